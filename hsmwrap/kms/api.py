"""The API's operations as a table: parameters in, fields of the answer out.

Source: Alibaba Cloud KMS API 2016-01-20. Operations and parameters that this KMS does not serve
(asymmetric keys, rotation, tags, secrets, instances) are answered as unknown. An alias is taken
where the documentation says so, and nowhere else.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any

from hsmwrap.catalog import KeySpec, Origin, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.kms import parameters as p
from hsmwrap.kms.aliases import Aliases, AliasPage
from hsmwrap.kms.blobs import CiphertextBlob
from hsmwrap.kms.core import Core
from hsmwrap.kms.errors import AliasNotFound, KeyVersionNotFound
from hsmwrap.kms.lifecycle import KeyLifecycle
from hsmwrap.kms.material import KeyMaterial
from hsmwrap.kms.parameters import AliasName, Parameter, parse
from hsmwrap.kms.schema import Key
from hsmwrap.kms.use import DataKey, Encrypted, KeyUse

Arguments = Mapping[str, Any]
Fields = dict[str, Any]

_KEY_USAGE = "ENCRYPT/DECRYPT"
_DATA_KEY_LENGTHS = MappingProxyType({"AES_256": 32, "AES_128": 16})
_MAX_DATA_KEY = 1024
_MAX_DESCRIPTION = 8192
_MAX_PAGE = 1_000_000
_MAX_PAGE_SIZE = 100


class Operations:
    """The typed operations.

    Attributes:
        lifecycle: Create, describe, enable, disable and delete keys.
        material: Import and delete key material.
        use: Encrypt and decrypt.
        aliases: Names of keys.
    """

    def __init__(self, core: Core) -> None:
        """Take the parts of the KMS."""
        self.lifecycle = KeyLifecycle(core)
        self.material = KeyMaterial(core)
        self.use = KeyUse(core)
        self.aliases = Aliases(core)
        self.region = core.arn_prefix.split(":")[2]
        self.alias_arn_prefix = core.arn_prefix.removesuffix("key/")


@dataclass(frozen=True, slots=True)
class Request:
    """A request with parsed parameters.

    Attributes:
        arguments: The value of each parameter of the operation. KeyId is a key's, also where the
            request names an alias.
        caller: Access key id of the caller.
        alias: The alias that the request names, which has to exist; None if it names none.
        aliased: Id of the key that has the alias; None if it does not exist.
    """

    arguments: Arguments = field(repr=False)
    caller: str
    alias: AliasName | None = None
    aliased: str | None = None

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def key_id(self) -> str | None:
        """Id of the key that the request names; None if it names none."""
        blob = self.arguments.get("CiphertextBlob")
        if isinstance(blob, CiphertextBlob):
            return blob.key_id
        named: str | None = self.arguments.get("KeyId", self.aliased)
        return named

    def require_alias(self) -> None:
        """Raise AliasNotFound if the request names an alias that does not exist."""
        if self.alias is not None and self.aliased is None:
            raise AliasNotFound("no key has this alias")


Uses = Iterable[tuple[str, str | None]]
"""What a request does with which keys: action and key id (None: no key)."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of the API.

    Attributes:
        parameters: Its own parameters by name.
        run: Runs it and returns the answer's fields, without RequestId.
        uses: What needs a permission and has an audit line, where that is more than the operation
            on its one key.
    """

    parameters: Mapping[str, Parameter]
    run: Callable[[Operations, Request], Fields]
    uses: Callable[[Request], Uses] | None = None

    def request(self, kms: Operations, given: Mapping[str, str], caller: str) -> Request:
        """Parse the parameters, and look up the alias that they name.

        Raises:
            HsmwrapError: A parameter is wrong or missing. An alias that does not exist raises
                nothing yet: that is only for those who may know.
        """
        arguments = parse(self.parameters, given)
        alias = next((each for each in arguments.values() if isinstance(each, AliasName)), None)
        aliased = None if alias is None else kms.aliases.key_of(alias)
        if isinstance(arguments.get("KeyId"), AliasName):
            arguments["KeyId"] = aliased
        return Request(arguments, caller, alias, aliased)


def _create_key(kms: Operations, request: Request) -> Fields:
    key = kms.lifecycle.create_key(
        request.caller,
        key_spec=request["KeySpec"],
        origin=request["Origin"],
        protection_level=request["ProtectionLevel"],
        description=request["Description"],
    )
    return {"KeyMetadata": key_metadata(key)}


def _describe_key(kms: Operations, request: Request) -> Fields:
    return {"KeyMetadata": key_metadata(kms.lifecycle.describe_key(request["KeyId"]))}


def _list_keys(kms: Operations, request: Request) -> Fields:
    page = kms.lifecycle.list_keys(request["PageNumber"], request["PageSize"])
    return {
        "Keys": {"Key": [{"KeyId": key.key_id, "KeyArn": key.arn} for key in page.keys]},
        "TotalCount": page.total,
    } | _page(request)


def _describe_key_version(kms: Operations, request: Request) -> Fields:
    key = kms.lifecycle.describe_key(request["KeyId"])
    if request["KeyVersionId"] != key.version_id:
        raise KeyVersionNotFound("a key has one version: PrimaryKeyVersion of DescribeKey")
    return {"KeyVersion": _key_version(key)}


def _list_key_versions(kms: Operations, request: Request) -> Fields:
    key = kms.lifecycle.describe_key(request["KeyId"])
    versions = [_key_version(key)] if request["PageNumber"] == 1 else []
    return {"KeyVersions": {"KeyVersion": versions}, "TotalCount": 1} | _page(request)


def _update_key_description(kms: Operations, request: Request) -> Fields:
    kms.lifecycle.update_key_description(request["KeyId"], request["Description"])
    return {}


def _describe_regions(kms: Operations, _request: Request) -> Fields:
    return {"Regions": {"Region": [{"RegionId": kms.region}]}}


def _create_alias(kms: Operations, request: Request) -> Fields:
    kms.aliases.create(request["AliasName"], request["KeyId"])
    return {}


def _update_alias(kms: Operations, request: Request) -> Fields:
    kms.aliases.update(request["AliasName"], request["KeyId"], request.aliased or "")
    return {}


def _delete_alias(kms: Operations, request: Request) -> Fields:
    kms.aliases.delete(request["AliasName"], request.aliased or "")
    return {}


def _list_aliases(kms: Operations, request: Request) -> Fields:
    page = kms.aliases.list(
        request["PageNumber"], request["PageSize"], request.arguments.get("KeyId")
    )
    return _aliases(kms, page) | _page(request)


def _get_parameters_for_import(kms: Operations, request: Request) -> Fields:
    issued = kms.material.get_parameters_for_import(
        request["KeyId"], request["WrappingKeySpec"], request["WrappingAlgorithm"]
    )
    return dict(issued.to_api())


def _import_key_material(kms: Operations, request: Request) -> Fields:
    kms.material.import_key_material(
        request["KeyId"],
        request["EncryptedKeyMaterial"],
        request["ImportToken"],
        request["KeyMaterialExpireUnix"],
    )
    return {}


def _delete_key_material(kms: Operations, request: Request) -> Fields:
    kms.material.delete_key_material(request["KeyId"])
    return {}


def _encrypt(kms: Operations, request: Request) -> Fields:
    encrypted = kms.use.encrypt(
        request["KeyId"], request["Plaintext"], request["EncryptionContext"]
    )
    return _encrypted(encrypted)


def _decrypt(kms: Operations, request: Request) -> Fields:
    decrypted = kms.use.decrypt(request["CiphertextBlob"], request["EncryptionContext"])
    return _version(decrypted.key) | {"Plaintext": _base64(decrypted.plaintext)}


def _re_encrypt(kms: Operations, request: Request) -> Fields:
    encrypted = kms.use.re_encrypt(
        request["CiphertextBlob"],
        request["SourceEncryptionContext"],
        request["DestinationKeyId"],
        request["DestinationEncryptionContext"],
    )
    return _encrypted(encrypted)


def _generate_data_key(kms: Operations, request: Request) -> Fields:
    made = _data_key(kms, request)
    return _encrypted(made.encrypted) | {"Plaintext": _base64(made.plaintext)}


def _generate_data_key_without_plaintext(kms: Operations, request: Request) -> Fields:
    return _encrypted(_data_key(kms, request).encrypted)


def _data_key(kms: Operations, request: Request) -> DataKey:
    # If both are given, the API ignores KeySpec.
    length = request["NumberOfBytes"] or _DATA_KEY_LENGTHS[request["KeySpec"]]
    return kms.use.generate_data_key(request["KeyId"], length, request["EncryptionContext"])


def _enable_key(kms: Operations, request: Request) -> Fields:
    kms.lifecycle.enable_key(request["KeyId"])
    return {}


def _disable_key(kms: Operations, request: Request) -> Fields:
    kms.lifecycle.disable_key(request["KeyId"])
    return {}


def _schedule_key_deletion(kms: Operations, request: Request) -> Fields:
    kms.lifecycle.schedule_key_deletion(request["KeyId"], request["PendingWindowInDays"])
    return {}


def _cancel_key_deletion(kms: Operations, request: Request) -> Fields:
    kms.lifecycle.cancel_key_deletion(request["KeyId"])
    return {}


_KEY_ID: Mapping[str, Parameter] = MappingProxyType({"KeyId": Parameter(p.key_id, required=True)})
_KEY_ID_OR_ALIAS: Mapping[str, Parameter] = MappingProxyType(
    {"KeyId": Parameter(p.key_id_or_alias, required=True)}
)
_ALIAS: Mapping[str, Parameter] = MappingProxyType({"AliasName": Parameter(p.alias, required=True)})
_PAGES: Mapping[str, Parameter] = MappingProxyType(
    {
        "PageNumber": Parameter(p.integer(1, _MAX_PAGE), default=1),
        "PageSize": Parameter(p.integer(1, _MAX_PAGE_SIZE), default=10),
    }
)
_CONTEXT_OF_ONE = Parameter(p.encryption_context, default=MappingProxyType({}))
_DRY_RUN: Mapping[str, Parameter] = MappingProxyType(
    {"DryRun": Parameter(p.boolean, default=False)}
)
_USE: Mapping[str, Parameter] = MappingProxyType({"EncryptionContext": _CONTEXT_OF_ONE, **_DRY_RUN})
_DATA_KEY: Mapping[str, Parameter] = MappingProxyType(
    {
        **_KEY_ID_OR_ALIAS,
        **_USE,
        "KeySpec": Parameter(p.choice(*_DATA_KEY_LENGTHS), default="AES_256"),
        "NumberOfBytes": Parameter(p.integer(1, _MAX_DATA_KEY)),
    }
)

OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "CreateKey": Operation(
            {
                "Description": Parameter(p.words(_MAX_DESCRIPTION), default=""),
                "EnableAutomaticRotation": Parameter(p.never),
                "KeySpec": Parameter(p.member(KeySpec), default=KeySpec.ALIYUN_AES_256),
                "KeyUsage": Parameter(p.choice(_KEY_USAGE)),
                "Origin": Parameter(p.member(Origin), default=Origin.ALIYUN_KMS),
                "ProtectionLevel": Parameter(
                    p.member(ProtectionLevel), default=ProtectionLevel.SOFTWARE
                ),
            },
            _create_key,
        ),
        "DescribeKey": Operation(_KEY_ID_OR_ALIAS, _describe_key),
        "DescribeKeyVersion": Operation(
            {**_KEY_ID_OR_ALIAS, "KeyVersionId": Parameter(p.words(64), required=True)},
            _describe_key_version,
        ),
        "DescribeRegions": Operation({}, _describe_regions),
        "ListKeys": Operation(_PAGES, _list_keys),
        "ListKeyVersions": Operation({**_KEY_ID_OR_ALIAS, **_PAGES}, _list_key_versions),
        "UpdateKeyDescription": Operation(
            {
                **_KEY_ID,
                "Description": Parameter(p.words(_MAX_DESCRIPTION), required=True, empty=True),
            },
            _update_key_description,
        ),
        "CreateAlias": Operation(
            {**_KEY_ID, "AliasName": Parameter(p.new_alias, required=True)}, _create_alias
        ),
        # Also of the key that has the alias: or who may use one key could take the others' aliases.
        "UpdateAlias": Operation(
            {**_KEY_ID, **_ALIAS},
            _update_alias,
            lambda request: (
                ("UpdateAlias", request["KeyId"]),
                ("UpdateAlias", request.aliased),
            ),
        ),
        "DeleteAlias": Operation(_ALIAS, _delete_alias),
        "ListAliases": Operation(_PAGES, _list_aliases),
        "ListAliasesByKeyId": Operation({**_KEY_ID, **_PAGES}, _list_aliases),
        "GetParametersForImport": Operation(
            {
                **_KEY_ID,
                "WrappingAlgorithm": Parameter(p.member(WrappingAlgorithm), required=True),
                "WrappingKeySpec": Parameter(p.member(WrappingKeySpec), required=True),
            },
            _get_parameters_for_import,
        ),
        "ImportKeyMaterial": Operation(
            {
                **_KEY_ID,
                "EncryptedKeyMaterial": Parameter(p.binary, required=True),
                "ImportToken": Parameter(p.import_token, required=True),
                "KeyMaterialExpireUnix": Parameter(p.unix_time),
            },
            _import_key_material,
        ),
        "DeleteKeyMaterial": Operation(_KEY_ID, _delete_key_material),
        "Encrypt": Operation(
            {**_KEY_ID_OR_ALIAS, **_USE, "Plaintext": Parameter(p.plaintext, required=True)},
            _encrypt,
        ),
        "Decrypt": Operation(
            {**_USE, "CiphertextBlob": Parameter(p.ciphertext_blob, required=True)}, _decrypt
        ),
        # Without the parameters for ciphertexts of asymmetric keys (SourceKeyId and others).
        "ReEncrypt": Operation(
            {
                **_DRY_RUN,
                "CiphertextBlob": Parameter(p.ciphertext_blob, required=True),
                "SourceEncryptionContext": _CONTEXT_OF_ONE,
                "DestinationKeyId": Parameter(p.key_id, required=True),
                "DestinationEncryptionContext": _CONTEXT_OF_ONE,
            },
            _re_encrypt,
            lambda request: (
                ("ReEncryptFrom", request.key_id),
                ("ReEncryptTo", request["DestinationKeyId"]),
            ),
        ),
        "GenerateDataKey": Operation(_DATA_KEY, _generate_data_key),
        "GenerateDataKeyWithoutPlaintext": Operation(
            _DATA_KEY, _generate_data_key_without_plaintext
        ),
        "EnableKey": Operation(_KEY_ID, _enable_key),
        "DisableKey": Operation(_KEY_ID, _disable_key),
        "ScheduleKeyDeletion": Operation(
            {**_KEY_ID, "PendingWindowInDays": Parameter(p.integer(7, 366), required=True)},
            _schedule_key_deletion,
        ),
        "CancelKeyDeletion": Operation(_KEY_ID, _cancel_key_deletion),
    }
)
"""The operations by action."""

PERMISSIONS = (*sorted(OPERATIONS.keys() - {"ReEncrypt"}), "ReEncryptFrom", "ReEncryptTo")
"""The actions that a grant may name: the operations, and the two uses of ReEncrypt."""


def key_metadata(key: Key) -> Fields:
    """The KeyMetadata of CreateKey and DescribeKey; an absent time is an empty string."""
    return {
        "KeyId": key.key_id,
        "Arn": key.arn,
        "KeyState": key.state.value,
        "KeySpec": key.key_spec.value,
        "KeyUsage": _KEY_USAGE,
        "Origin": key.origin.value,
        "ProtectionLevel": key.protection_level.value,
        "Description": key.description,
        "Creator": key.creator,
        "CreationDate": _time(key.created_at),
        "DeleteDate": _time(key.deletion_at),
        "MaterialExpireTime": _time(key.material_expires_at),
        "PrimaryKeyVersion": key.version_id,
        "LastRotationDate": _time(key.created_at),
        "AutomaticRotation": "Disabled",
    }


def _key_version(key: Key) -> Fields:
    return _version(key) | {"CreationDate": _time(key.created_at)}


def _aliases(kms: Operations, page: AliasPage) -> Fields:
    listed = [
        {
            "KeyId": alias.key_id,
            "AliasName": alias.name,
            "AliasArn": kms.alias_arn_prefix + alias.name,
        }
        for alias in page.aliases
    ]
    return {"Aliases": {"Alias": listed}, "TotalCount": page.total}


def _page(request: Request) -> Fields:
    return {"PageNumber": request["PageNumber"], "PageSize": request["PageSize"]}


def _encrypted(encrypted: Encrypted) -> Fields:
    return _version(encrypted.key) | {"CiphertextBlob": _base64(encrypted.ciphertext_blob)}


def _version(key: Key) -> Fields:
    return {"KeyId": key.key_id, "KeyVersionId": key.version_id}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _time(time: datetime | None) -> str:
    return "" if time is None else time.strftime("%Y-%m-%dT%H:%M:%SZ")
