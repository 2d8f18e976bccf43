"""Unmodified public SDKs over a real socket: the whole life of an external key."""

from __future__ import annotations

import base64
import os

import pytest
from support.http import material_clients as clients
from support.http.kms_over_http import backend_settings, running_kms
from support.http.sdk_clients import DEFAULT_SDKS, SDK_WARNINGS, SDKS, SdkError

from hsmwrap.registry import open_backend

pytestmark = SDK_WARNINGS

WAYS = {
    "PKCS1-pyca": ("RSA_2048", "RSAES_PKCS1_V1_5", clients.pyca_pkcs1),
    "PKCS1-pycryptodome": ("RSA_2048", "RSAES_PKCS1_V1_5", clients.pycryptodome_pkcs1),
    "OAEP1-pyca": ("RSA_2048", "RSAES_OAEP_SHA_1", clients.pyca_oaep_sha1),
    "OAEP1-pycryptodome": ("RSA_2048", "RSAES_OAEP_SHA_1", clients.pycryptodome_oaep_sha1),
    "OAEP256-pyca": ("RSA_2048", "RSAES_OAEP_SHA_256", clients.pyca_oaep_sha256),
    "OAEP256-pycryptodome": ("RSA_2048", "RSAES_OAEP_SHA_256", clients.pycryptodome_oaep_sha256),
    "SM2-gmssl": ("EC_SM2", "SM2PKE", clients.gmssl_sm2),
    "SM2-gmssl-04": ("EC_SM2", "SM2PKE", clients.gmssl_sm2_with_04),
    "SM2-openssl": ("EC_SM2", "SM2PKE", clients.openssl_sm2),
}


@pytest.fixture(scope="module", params=["software", "pkcs11"])
def running(request, tmp_path_factory):
    backend = open_backend(request.param, backend_settings(request.param, request))
    with running_kms(tmp_path_factory.mktemp("kms"), backend) as server:
        yield server


# Each way of encrypting with each SDK's defaults; each way of sending with one of them.
LIVES = [(sdk, way) for sdk in DEFAULT_SDKS for way in WAYS] + [
    (sdk, "OAEP256-pyca") for sdk in SDKS if sdk not in DEFAULT_SDKS
]


@pytest.fixture(params=SDKS)
def call(request, running):
    def call(action, /, **parameters):
        return SDKS[request.param].call(running.credentials, action, **parameters)

    return call


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(("call", "way"), LIVES, indirect=["call"])
def test_life_of_an_external_key(call, way):
    spec, algorithm, encrypt = WAYS[way]
    created = call("CreateKey", Origin="EXTERNAL", ProtectionLevel="HSM")["KeyMetadata"]
    assert (created["KeyState"], created["ProtectionLevel"]) == ("PendingImport", "HSM")
    key_id = created["KeyId"]

    def import_material(material: bytes) -> None:
        issued = call(
            "GetParametersForImport",
            KeyId=key_id,
            WrappingKeySpec=spec,
            WrappingAlgorithm=algorithm,
        )
        assert issued["KeyId"] == key_id
        encrypted = encrypt(base64.b64decode(issued["PublicKey"]), material)
        call(
            "ImportKeyMaterial",
            KeyId=key_id,
            EncryptedKeyMaterial=b64(encrypted),
            ImportToken=issued["ImportToken"],
            KeyMaterialExpireUnix=0,
        )

    material = os.urandom(32)
    import_material(material)
    assert call("DescribeKey", KeyId=key_id)["KeyMetadata"]["KeyState"] == "Enabled"

    context = {"tenant": "a+b é~*/ ", "purpose": ""}
    sealed = call("Encrypt", KeyId=key_id, Plaintext=b64(b"hello"), EncryptionContext=context)
    blob = sealed["CiphertextBlob"]
    opened = call("Decrypt", CiphertextBlob=blob, EncryptionContext=context)
    assert (opened["KeyId"], base64.b64decode(opened["Plaintext"])) == (key_id, b"hello")

    call("DeleteKeyMaterial", KeyId=key_id)
    with pytest.raises(SdkError, match=r"^Rejected\.PendingImport$"):
        call("Decrypt", CiphertextBlob=blob, EncryptionContext=context)

    with pytest.raises(SdkError, match=r"^InvalidKeyMaterial$"):
        import_material(os.urandom(32))
    import_material(material)
    opened = call("Decrypt", CiphertextBlob=blob, EncryptionContext=context)
    assert base64.b64decode(opened["Plaintext"]) == b"hello"


def wrapped(call):
    """A CMK, an import token for it, and key material under the wrapping key."""
    key_id = call("CreateKey", Origin="EXTERNAL", ProtectionLevel="HSM")["KeyMetadata"]["KeyId"]
    issued = call(
        "GetParametersForImport",
        KeyId=key_id,
        WrappingKeySpec="RSA_2048",
        WrappingAlgorithm="RSAES_OAEP_SHA_256",
    )
    public_key = base64.b64decode(issued["PublicKey"])
    encrypted = b64(clients.pyca_oaep_sha256(public_key, bytes(range(32))))
    return key_id, issued["ImportToken"], encrypted


def test_the_other_operations(call):
    key_id, token, encrypted = wrapped(call)
    call("ImportKeyMaterial", KeyId=key_id, EncryptedKeyMaterial=encrypted, ImportToken=token)

    made = call("GenerateDataKey", KeyId=key_id, NumberOfBytes=16)
    assert len(base64.b64decode(made["Plaintext"])) == 16
    opened = call("Decrypt", CiphertextBlob=made["CiphertextBlob"])
    assert opened["Plaintext"] == made["Plaintext"]

    call("DisableKey", KeyId=key_id)
    assert call("DescribeKey", KeyId=key_id)["KeyMetadata"]["KeyState"] == "Disabled"
    call("EnableKey", KeyId=key_id)
    call("ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays=7)
    assert call("DescribeKey", KeyId=key_id)["KeyMetadata"]["KeyState"] == "PendingDeletion"
    call("CancelKeyDeletion", KeyId=key_id)
    listed = call("ListKeys", PageNumber=1, PageSize=100)
    assert listed["TotalCount"] >= 1


def imported(call):
    key_id, token, encrypted = wrapped(call)
    call("ImportKeyMaterial", KeyId=key_id, EncryptedKeyMaterial=encrypted, ImportToken=token)
    return key_id


def test_aliases(call):
    key_id, name = imported(call), f"alias/{os.urandom(8).hex()}"
    call("CreateAlias", KeyId=key_id, AliasName=name)
    with pytest.raises(SdkError, match=r"^AliasAlreadyExists$"):
        call("CreateAlias", KeyId=key_id, AliasName=name)
    alias = call("ListAliasesByKeyId", KeyId=key_id)["Aliases"]["Alias"]
    assert [(each["AliasName"], each["KeyId"]) for each in alias] == [(name, key_id)]
    assert call("ListAliases", PageNumber=1, PageSize=100)["TotalCount"] >= 1
    made = call("GenerateDataKeyWithoutPlaintext", KeyId=name, KeySpec="AES_128")
    assert made["KeyId"] == key_id
    opened = call("Decrypt", CiphertextBlob=made["CiphertextBlob"])
    assert len(base64.b64decode(opened["Plaintext"])) == 16
    other = imported(call)
    call("UpdateAlias", KeyId=other, AliasName=name)
    assert call("DescribeKey", KeyId=name)["KeyMetadata"]["KeyId"] == other
    call("DeleteAlias", AliasName=name)
    with pytest.raises(SdkError, match=r"^Forbidden\.AliasNotFound$"):
        call("DescribeKey", KeyId=name)


def test_re_encryption_and_dry_runs(call):
    source, destination = imported(call), imported(call)
    context = {"tenant": "a"}
    made = call("Encrypt", KeyId=source, Plaintext=b64(b"hello"), EncryptionContext=context)
    wanted = {
        "CiphertextBlob": made["CiphertextBlob"],
        "SourceEncryptionContext": context,
        "DestinationKeyId": destination,
        "DestinationEncryptionContext": {"tenant": "b"},
    }
    with pytest.raises(SdkError, match=r"^DryRunOperationError$"):
        call("ReEncrypt", **wanted, DryRun="true")
    moved = call("ReEncrypt", **wanted, DryRun="false")["CiphertextBlob"]
    opened = call("Decrypt", CiphertextBlob=moved, EncryptionContext={"tenant": "b"})
    assert (opened["KeyId"], base64.b64decode(opened["Plaintext"])) == (destination, b"hello")


def test_versions_description_and_regions(call):
    key = {"Origin": "EXTERNAL", "ProtectionLevel": "HSM", "EnableAutomaticRotation": False}
    created = call("CreateKey", **key)["KeyMetadata"]
    key_id, version = created["KeyId"], created["PrimaryKeyVersion"]
    listed = call("ListKeyVersions", KeyId=key_id)["KeyVersions"]["KeyVersion"]
    assert [each["KeyVersionId"] for each in listed] == [version]
    one = call("DescribeKeyVersion", KeyId=key_id, KeyVersionId=version)["KeyVersion"]
    assert one == listed[0]
    call("UpdateKeyDescription", KeyId=key_id, Description="für Tests")
    assert call("DescribeKey", KeyId=key_id)["KeyMetadata"]["Description"] == "für Tests"
    regions = call("DescribeRegions")["Regions"]["Region"]
    assert [each["RegionId"] for each in regions] == ["cn-hangzhou"]


def test_the_longest_plaintext(call):
    """6 KiB, that is 8 KiB and more in the request line."""
    key_id = call("CreateKey", Origin="EXTERNAL", ProtectionLevel="HSM")["KeyMetadata"]["KeyId"]
    with pytest.raises(SdkError, match=r"^Rejected\.PendingImport$"):
        call("Encrypt", KeyId=key_id, Plaintext=b64(b"\xff" * 6144))
    with pytest.raises(SdkError, match=r"^InvalidParameter$"):
        call("Encrypt", KeyId=key_id, Plaintext=b64(b"\xff" * 6145))


def test_other_texts_of_the_same_base64_are_refused(call):
    """SDKs send what they are given; a refused import leaves the import token usable."""
    key_id, token, encrypted = wrapped(call)
    assert encrypted.endswith("==")

    def bring_in(encrypted, token):
        call("ImportKeyMaterial", KeyId=key_id, EncryptedKeyMaterial=encrypted, ImportToken=token)

    last = chr(ord(encrypted[-3]) + 1)
    for other in (
        encrypted[:-3] + last + "==",
        encrypted.rstrip("="),
        encrypted + "\n",
        encrypted[:64] + "\n" + encrypted[64:],
    ):
        with pytest.raises(SdkError, match=r"^InvalidParameter$"):
            bring_in(other, token)
    for other in (token + "\n", token.rstrip("=") + "====", "=" + token):
        with pytest.raises(SdkError, match=r"^InvalidImportToken$"):
            bring_in(encrypted, other)
    bring_in(encrypted, token)
