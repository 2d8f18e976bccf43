"""The API's operations as a table: parameters in, fields of the answer out.

Source: Alibaba Cloud KMS API 2016-01-20. Operations and parameters that this KMS does not serve
(asymmetric keys, rotation, aliases, tags, instances) are answered as unknown.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any

from hsmwrap.catalog import KeySpec, Origin, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.kms import parameters as p
from hsmwrap.kms.blobs import CiphertextBlob
from hsmwrap.kms.core import Core
from hsmwrap.kms.lifecycle import KeyLifecycle
from hsmwrap.kms.material import KeyMaterial
from hsmwrap.kms.parameters import Parameter
from hsmwrap.kms.schema import Key
from hsmwrap.kms.use import Encrypted, KeyUse

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
    """

    def __init__(self, core: Core) -> None:
        """Take the parts of the KMS."""
        self.lifecycle = KeyLifecycle(core)
        self.material = KeyMaterial(core)
        self.use = KeyUse(core)


@dataclass(frozen=True, slots=True)
class Request:
    """A request with parsed parameters.

    Attributes:
        arguments: The value of each parameter of the operation.
        caller: Access key id of the caller.
    """

    arguments: Arguments = field(repr=False)
    caller: str

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def key_id(self) -> str | None:
        """Id of the key that the request names; None if it names none."""
        blob = self.arguments.get("CiphertextBlob")
        if isinstance(blob, CiphertextBlob):
            return blob.key_id
        named: str | None = self.arguments.get("KeyId")
        return named


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of the API.

    Attributes:
        parameters: Its own parameters by name.
        run: Runs it and returns the answer's fields, without RequestId.
    """

    parameters: Mapping[str, Parameter]
    run: Callable[[Operations, Request], Fields]


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
    number, size = request["PageNumber"], request["PageSize"]
    page = kms.lifecycle.list_keys(number, size)
    return {
        "Keys": {"Key": [{"KeyId": key.key_id, "KeyArn": key.arn} for key in page.keys]},
        "TotalCount": page.total,
        "PageNumber": number,
        "PageSize": size,
    }


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


def _generate_data_key(kms: Operations, request: Request) -> Fields:
    # If both are given, the API ignores KeySpec.
    length = request["NumberOfBytes"] or _DATA_KEY_LENGTHS[request["KeySpec"]]
    made = kms.use.generate_data_key(request["KeyId"], length, request["EncryptionContext"])
    return _encrypted(made.encrypted) | {"Plaintext": _base64(made.plaintext)}


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
_CONTEXT: Mapping[str, Parameter] = MappingProxyType(
    {"EncryptionContext": Parameter(p.encryption_context, default=MappingProxyType({}))}
)

OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "CreateKey": Operation(
            {
                "Description": Parameter(p.words(_MAX_DESCRIPTION), default=""),
                "EnableAutomaticRotation": Parameter(p.choice("false")),
                "KeySpec": Parameter(p.member(KeySpec), default=KeySpec.ALIYUN_AES_256),
                "KeyUsage": Parameter(p.choice(_KEY_USAGE)),
                "Origin": Parameter(p.member(Origin), default=Origin.ALIYUN_KMS),
                "ProtectionLevel": Parameter(
                    p.member(ProtectionLevel), default=ProtectionLevel.SOFTWARE
                ),
            },
            _create_key,
        ),
        "DescribeKey": Operation(_KEY_ID, _describe_key),
        "ListKeys": Operation(
            {
                "PageNumber": Parameter(p.integer(1, _MAX_PAGE), default=1),
                "PageSize": Parameter(p.integer(1, _MAX_PAGE_SIZE), default=10),
            },
            _list_keys,
        ),
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
            {**_KEY_ID, **_CONTEXT, "Plaintext": Parameter(p.plaintext, required=True)}, _encrypt
        ),
        "Decrypt": Operation(
            {**_CONTEXT, "CiphertextBlob": Parameter(p.ciphertext_blob, required=True)}, _decrypt
        ),
        "GenerateDataKey": Operation(
            {
                **_KEY_ID,
                **_CONTEXT,
                "KeySpec": Parameter(p.choice(*_DATA_KEY_LENGTHS), default="AES_256"),
                "NumberOfBytes": Parameter(p.integer(1, _MAX_DATA_KEY)),
            },
            _generate_data_key,
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


def _encrypted(encrypted: Encrypted) -> Fields:
    return _version(encrypted.key) | {"CiphertextBlob": _base64(encrypted.ciphertext_blob)}


def _version(key: Key) -> Fields:
    return {"KeyId": key.key_id, "KeyVersionId": key.version_id}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _time(time: datetime | None) -> str:
    return "" if time is None else time.strftime("%Y-%m-%dT%H:%M:%SZ")
