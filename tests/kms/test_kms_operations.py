"""The operations: fields, parameters, errors, and the objects in the backend."""

import base64
import json
import re
import uuid

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from support.kms.fakes import AES_MATERIAL, OTHER_MATERIAL, SM4_MATERIAL, Client

from hsmwrap.backend import Exposure
from hsmwrap.catalog import ManagedHsm, ProtectionLevel, WrappingAlgorithm
from hsmwrap.errors import HsmwrapError
from hsmwrap.kms import Caller, Permissions
from hsmwrap.kms.api import OPERATIONS
from hsmwrap.kms.blobs import CiphertextBlob, additional_data
from hsmwrap.policy import Deployment

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


def refused(code, call, *arguments, status=400, **more):
    with pytest.raises(HsmwrapError) as caught:
        call(*arguments, **more)
    assert (caught.value.code, caught.value.http_status) == (code, status)
    return caught.value


@pytest.mark.parametrize(
    ("key_spec", "material"), [("Aliyun_AES_256", AES_MATERIAL), ("Aliyun_SM4", SM4_MATERIAL)]
)
def test_whole_life(open_kms, custody, key_spec, material):
    client = Client(open_kms(custody))
    key_id = client.create(KeySpec=key_spec)
    assert client.import_material(key_id, material).keys() == {"RequestId"}
    blob = client.usable(key_id)
    client("DeleteKeyMaterial", KeyId=key_id)
    refused("InvalidKeyMaterial", client.import_material, key_id, material[::-1])
    assert client.state(key_id) == "PendingImport"
    client.import_material(key_id, material)
    assert client("Decrypt", CiphertextBlob=blob)["Plaintext"] == "aGVsbG8="


def test_material_is_the_clients(client):
    key_id = client.create()
    client.import_material(key_id)
    raw = base64.b64decode(client.usable(key_id))
    blob = CiphertextBlob.from_bytes(raw)
    assert blob.key_id == key_id
    nonce, ciphertext = blob.ciphertext[1:13], blob.ciphertext[13:]
    bound_to = additional_data(key_id, {})
    assert AESGCM(AES_MATERIAL).decrypt(nonce, ciphertext, bound_to) == b"hello"


def test_create_and_describe_fields(client, clock):
    answer = client("CreateKey", Origin="EXTERNAL", Description="für SM4", KeySpec="Aliyun_SM4")
    metadata = answer["KeyMetadata"]
    assert answer["RequestId"] == "admin-1"
    key_id = metadata.pop("KeyId")
    assert str(uuid.UUID(key_id)) == key_id
    assert str(uuid.UUID(metadata.pop("PrimaryKeyVersion")))
    assert metadata == {
        "Arn": f"acs:kms:cn-hangzhou:1000000000000000:key/{key_id}",
        "KeyState": "PendingImport",
        "KeySpec": "Aliyun_SM4",
        "KeyUsage": "ENCRYPT/DECRYPT",
        "Origin": "EXTERNAL",
        "ProtectionLevel": "SOFTWARE",
        "Description": "für SM4",
        "Creator": "admin",
        "CreationDate": "2030-01-01T00:00:00Z",
        "DeleteDate": "",
        "MaterialExpireTime": "",
        "LastRotationDate": "2030-01-01T00:00:00Z",
        "AutomaticRotation": "Disabled",
    }
    client.import_material(key_id, SM4_MATERIAL, KeyMaterialExpireUnix=clock.unix(days=1))
    client("ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays="366")
    described = client("DescribeKey", KeyId=key_id)["KeyMetadata"]
    assert described["MaterialExpireTime"] == "2030-01-02T00:00:00Z"
    assert described["DeleteDate"] == "2031-01-02T00:00:00Z"
    assert json.loads(json.dumps(described)) == described


def test_key_by_arn(client):
    arn = client("CreateKey", Origin="EXTERNAL")["KeyMetadata"]["Arn"]
    assert client.state(arn) == "PendingImport"
    refused("Forbidden.KeyNotFound", client.state, arn.replace("hangzhou", "beijing"), status=404)
    refused("Forbidden.KeyNotFound", client.state, arn.replace("1000", "2000"), status=404)


def test_parameters_for_import(client):
    key_id = client.create()
    first, second = client.parameters(key_id), client.parameters(key_id)
    assert first.keys() == {"KeyId", "ImportToken", "PublicKey", "TokenExpireTime", "RequestId"}
    assert first["TokenExpireTime"] == "2030-01-02T00:00:00Z"
    assert first["RequestId"] == "admin-2"
    assert first["PublicKey"] != second["PublicKey"]
    assert first["ImportToken"] != second["ImportToken"]
    client.import_material(key_id, parameters=first)
    client.import_material(key_id, parameters=first)
    client.import_material(key_id, parameters=second)


def test_list_keys_in_pages(client, clock):
    made = []
    for _ in range(5):
        made.append(client.create())
        clock.advance(seconds=1)
    page = client("ListKeys", PageNumber="2", PageSize="2")
    assert (page["TotalCount"], page["PageNumber"], page["PageSize"]) == (5, 2, 2)
    assert [key["KeyId"] for key in page["Keys"]["Key"]] == made[2:4]
    assert all(key["KeyArn"].endswith(key["KeyId"]) for key in page["Keys"]["Key"])
    assert len(client("ListKeys")["Keys"]["Key"]) == 5
    assert client("ListKeys", PageNumber="9")["Keys"]["Key"] == []


def test_reimport_replaces_the_object(client, objects, clock):
    key_id = client.create()
    client.import_material(key_id)
    blob = client.usable(key_id)
    client("DisableKey", KeyId=key_id)
    client.import_material(key_id, KeyMaterialExpireUnix=clock.unix(hours=1))
    assert (client.state(key_id), objects()) == ("Disabled", 1)
    client("EnableKey", KeyId=key_id)
    assert client("Decrypt", CiphertextBlob=blob)["Plaintext"] == "aGVsbG8="
    client.import_material(key_id)
    assert client("DescribeKey", KeyId=key_id)["KeyMetadata"]["MaterialExpireTime"] == ""
    client("DeleteKeyMaterial", KeyId=key_id)
    assert objects() == 0


@pytest.mark.parametrize("material", [b"", bytes(16), bytes(31), bytes(33), OTHER_MATERIAL])
def test_failed_import_leaves_nothing(client, objects, material):
    key_id = client.create()
    client.import_material(key_id)
    refused("InvalidKeyMaterial", client.import_material, key_id, material)
    assert (client.state(key_id), objects()) == ("Enabled", 1)
    client.usable(key_id)


def test_encryption_context(client):
    key_id = client.create()
    client.import_material(key_id)
    made = client(
        "Encrypt", KeyId=key_id, Plaintext="aGVsbG8=", EncryptionContext='{"a": "1", "b": "ü"}'
    )
    assert made.keys() == {"KeyId", "KeyVersionId", "CiphertextBlob", "RequestId"}
    blob = made["CiphertextBlob"]
    for same in ('{"b":"ü","a":"1"}', '{"a":"1", "b":"\\u00fc"}'):
        answer = client("Decrypt", CiphertextBlob=blob, EncryptionContext=same)
        assert answer["Plaintext"] == "aGVsbG8="
        assert (answer["KeyId"], answer["KeyVersionId"]) == (key_id, made["KeyVersionId"])
    for other in ('{"a":"1"}', "{}", '{"a":"1","b":"ü","c":""}', '{"a":"b","1":"ü"}'):
        error = refused(
            "InvalidParameter", client, "Decrypt", CiphertextBlob=blob, EncryptionContext=other
        )
        assert error.name == "CiphertextBlob"
    refused("InvalidParameter", client, "Decrypt", CiphertextBlob=blob)


def test_ciphertext_of_another_key(client):
    first, second = client.create(), client.create()
    client.import_material(first)
    client.import_material(second)
    blob = CiphertextBlob.from_bytes(base64.b64decode(client.usable(first)))
    moved = base64.b64encode(CiphertextBlob(second, blob.ciphertext).to_bytes()).decode()
    refused("InvalidParameter", client, "Decrypt", CiphertextBlob=moved)
    unknown = base64.b64encode(CiphertextBlob(str(uuid.uuid4()), b"x").to_bytes()).decode()
    refused("Forbidden.KeyNotFound", client, "Decrypt", CiphertextBlob=unknown, status=404)


@pytest.mark.parametrize(
    ("asked", "length"),
    [
        ({}, 32),
        ({"KeySpec": "AES_256"}, 32),
        ({"KeySpec": "AES_128"}, 16),
        ({"NumberOfBytes": "1"}, 1),
        ({"NumberOfBytes": "1024"}, 1024),
        ({"NumberOfBytes": "5", "KeySpec": "AES_256"}, 5),
    ],
)
def test_generate_data_key(client, asked, length):
    key_id = client.create()
    client.import_material(key_id)
    made = client("GenerateDataKey", KeyId=key_id, EncryptionContext='{"a":"b"}', **asked)
    assert made.keys() == {"KeyId", "KeyVersionId", "CiphertextBlob", "Plaintext", "RequestId"}
    assert len(base64.b64decode(made["Plaintext"])) == length
    blob = made["CiphertextBlob"]
    opened = client("Decrypt", CiphertextBlob=blob, EncryptionContext='{"a":"b"}')
    assert opened["Plaintext"] == made["Plaintext"]


def test_generate_data_key_without_plaintext(client):
    key_id = client.create()
    client.import_material(key_id)
    made = client("GenerateDataKeyWithoutPlaintext", KeyId=key_id, NumberOfBytes="24")
    assert made.keys() == {"KeyId", "KeyVersionId", "CiphertextBlob", "RequestId"}
    opened = client("Decrypt", CiphertextBlob=made["CiphertextBlob"])
    assert len(base64.b64decode(opened["Plaintext"])) == 24


def test_re_encrypt(client):
    source, destination = client.create(), client.create()
    client.import_material(source)
    client.import_material(destination, OTHER_MATERIAL)
    made = client("Encrypt", KeyId=source, Plaintext="aGVsbG8=", EncryptionContext='{"a":"1"}')
    wanted = {
        "CiphertextBlob": made["CiphertextBlob"],
        "SourceEncryptionContext": '{"a":"1"}',
        "DestinationKeyId": f"acs:kms:cn-hangzhou:1000000000000000:key/{destination}",
        "DestinationEncryptionContext": '{"b":"2"}',
    }
    moved = client("ReEncrypt", **wanted)
    assert moved.keys() == {"KeyId", "KeyVersionId", "CiphertextBlob", "RequestId"}
    described = client("DescribeKey", KeyId=destination)["KeyMetadata"]
    assert (moved["KeyId"], moved["KeyVersionId"]) == (destination, described["PrimaryKeyVersion"])
    blob = moved["CiphertextBlob"]
    opened = client("Decrypt", CiphertextBlob=blob, EncryptionContext='{"b":"2"}')
    assert (opened["KeyId"], opened["Plaintext"]) == (destination, "aGVsbG8=")
    refused("InvalidParameter", client, "Decrypt", CiphertextBlob=blob)
    wanted["SourceEncryptionContext"] = "{}"
    error = refused("InvalidParameter", client, "ReEncrypt", **wanted)
    assert error.name == "CiphertextBlob"


def test_versions(client):
    metadata = client("CreateKey", Origin="EXTERNAL")["KeyMetadata"]
    key_id, version_id = metadata["KeyId"], metadata["PrimaryKeyVersion"]
    version = {
        "KeyId": key_id,
        "KeyVersionId": version_id,
        "CreationDate": "2030-01-01T00:00:00Z",
    }
    listed = client("ListKeyVersions", KeyId=key_id)
    assert listed == {
        "KeyVersions": {"KeyVersion": [version]},
        "TotalCount": 1,
        "PageNumber": 1,
        "PageSize": 10,
        "RequestId": "admin-2",
    }
    assert client("ListKeyVersions", KeyId=key_id, PageNumber="2")["KeyVersions"] == {
        "KeyVersion": []
    }
    described = client("DescribeKeyVersion", KeyId=key_id, KeyVersionId=version_id)
    assert described == {"KeyVersion": version, "RequestId": "admin-4"}
    refused(
        "Forbidden.KeyVersionNotFound",
        client,
        "DescribeKeyVersion",
        KeyId=key_id,
        KeyVersionId=key_id,
        status=404,
    )


def test_update_key_description(client):
    key_id = client.create(Description="before")
    for text in ("afterwards", ""):
        assert client("UpdateKeyDescription", KeyId=key_id, Description=text).keys() == {
            "RequestId"
        }
        assert client("DescribeKey", KeyId=key_id)["KeyMetadata"]["Description"] == text
    refused("MissingParameter", client, "UpdateKeyDescription", KeyId=key_id)


def test_describe_regions(client):
    answer = client("DescribeRegions")
    assert answer["Regions"] == {"Region": [{"RegionId": "cn-hangzhou"}]}


DRY_RUNS = {
    "Encrypt": {"Plaintext": "aGVsbG8="},
    "GenerateDataKey": {},
    "GenerateDataKeyWithoutPlaintext": {},
}


def test_dry_run(client):
    """Nothing is answered but what the request would have led to."""
    key_id = client.create()
    client.import_material(key_id)
    blob = client.usable(key_id)
    requests = [
        *((action, {"KeyId": key_id} | more) for action, more in DRY_RUNS.items()),
        ("Decrypt", {"CiphertextBlob": blob}),
        ("ReEncrypt", {"CiphertextBlob": blob, "DestinationKeyId": key_id}),
    ]
    assert {action for action, _ in requests} == {
        action for action, operation in OPERATIONS.items() if "DryRun" in operation.parameters
    }
    unprivileged = Client(client.kms, Caller("unprivileged", Permissions()))
    for action, parameters in requests:
        refused("DryRunOperationError", client, action, **parameters, DryRun="true")
        refused("DryRunOperationError", client, action, **parameters, DryRun="True")
        refused("ValidationError", client, action, **parameters, DryRun="true", Colour="red")
        refused("ValidationError", client, action, DryRun="true")
        refused("AccessDeniedError", unprivileged, action, **parameters, DryRun="true", status=403)
        refused("Forbidden.NoPermission", unprivileged, action, **parameters, status=403)
        refused("InvalidParameter", client, action, **parameters, DryRun="maybe")
        for no in ("false", "False", ""):
            client(action, **parameters, DryRun=no)
    client("DisableKey", KeyId=key_id)
    for action, parameters in requests:
        refused("Rejected.Disabled", client, action, **parameters, DryRun="true", status=409)
    refused("ValidationError", client, "Decrypt", CiphertextBlob="aGVsbG8=", DryRun="true")


def test_booleans_of_the_sdks(client):
    """The new Python SDK writes False, others write false."""
    for no in ("false", "False"):
        client.create(EnableAutomaticRotation=no)
    for yes in ("true", "True", "1"):
        refused("InvalidParameter", client.create, EnableAutomaticRotation=yes)


def test_own_material(open_kms, custody, objects):
    client = Client(open_kms(custody))
    for level in ProtectionLevel:
        answer = client("CreateKey", ProtectionLevel=level)["KeyMetadata"]
        assert (answer["Origin"], answer["KeyState"]) == ("Aliyun_KMS", "Enabled")
        key_id = answer["KeyId"]
        client.usable(key_id)
        refused("Unsupported.Origin", client.parameters, key_id)
        refused("Unsupported.Origin", client, "DeleteKeyMaterial", KeyId=key_id)
        refused(
            "Unsupported.Origin",
            client,
            "ImportKeyMaterial",
            KeyId=key_id,
            ImportToken="aGVsbG8=",
            EncryptedKeyMaterial="aGVsbG8=",
        )
    assert objects() == (2 if custody == "HsmInternal" else 0)


def test_own_material_is_refused_where_it_must_stay_in_the_hsm(open_kms, objects):
    client = Client(open_kms(required_exposure=Exposure.IN_HSM))
    error = refused("InvalidParameter", client, "CreateKey", ProtectionLevel="HSM")
    assert error.name == "Origin"
    assert error.name in OPERATIONS["CreateKey"].parameters
    assert "has to be EXTERNAL" in str(error)
    assert client("ListKeys")["TotalCount"] == objects() == 0


def test_an_algorithm_that_is_turned_off(open_kms):
    client = Client(open_kms(refused_algorithms={WrappingAlgorithm.RSAES_PKCS1_V1_5}))
    key_id = client.create()
    wanted = {"KeyId": key_id, "WrappingKeySpec": "RSA_2048"}
    row = wanted | {"WrappingAlgorithm": "RSAES_PKCS1_V1_5"}
    error = refused("InvalidParameter", client, "GetParametersForImport", **row)
    assert error.name == "WrappingAlgorithm"
    assert client("GetParametersForImport", **wanted, WrappingAlgorithm="RSAES_OAEP_SHA_256")


def test_no_hsm_key_without_a_managed_hsm(open_kms):
    kms = open_kms()
    core = kms.operations.lifecycle._core
    object.__setattr__(core, "deployment", Deployment(ManagedHsm.NONE))
    client = Client(kms)
    refused("Unsupported.ProtectionLevel", client.create)
    client.create(ProtectionLevel="SOFTWARE")


UNKNOWN_KEY = "8a8e3a5f-0000-4000-8000-000000000000"
WRONG = [
    ("Nothing", {}, "InvalidAction.NotFound", 404),
    ("createkey", {}, "InvalidAction.NotFound", 404),
    ("CreateKey", {"Colour": "red"}, "InvalidParameter", 400),
    ("CreateKey", {"Origin": "AWS_KMS"}, "InvalidParameter", 400),
    ("CreateKey", {"KeySpec": "RSA_2048"}, "InvalidParameter", 400),
    ("CreateKey", {"KeyUsage": "SIGN/VERIFY"}, "InvalidParameter", 400),
    ("CreateKey", {"EnableAutomaticRotation": "true"}, "InvalidParameter", 400),
    ("CreateKey", {"ProtectionLevel": "hsm"}, "InvalidParameter", 400),
    ("CreateKey", {"Description": "x" * 8193}, "InvalidParameter", 400),
    ("CreateKey", {"Description": "\0"}, "InvalidParameter", 400),
    ("CreateKey", {"Description": "\ud800"}, "InvalidParameter", 400),
    ("DescribeKey", {}, "MissingParameter", 400),
    ("DescribeKey", {"KeyId": ""}, "MissingParameter", 400),
    ("DescribeKey", {"KeyId": UNKNOWN_KEY}, "Forbidden.KeyNotFound", 404),
    ("DescribeKey", {"KeyId": "\0"}, "Forbidden.KeyNotFound", 404),
    ("DescribeKey", {"KeyId": "x" * 5000}, "Forbidden.KeyNotFound", 404),
    ("DescribeKey", {"KeyId": "alias/mine"}, "Forbidden.AliasNotFound", 404),
    ("DescribeKey", {"KeyId": "alias/"}, "Forbidden.AliasNotFound", 404),
    ("DescribeKey", {"KeyId": "alias/\0"}, "Forbidden.AliasNotFound", 404),
    ("DescribeKey", {"KeyId": "alias/" + "x" * 256}, "Forbidden.AliasNotFound", 404),
    ("UpdateAlias", {"KeyId": UNKNOWN_KEY, "AliasName": "mine"}, "Forbidden.AliasNotFound", 404),
    ("DeleteAlias", {"AliasName": "alias/mine"}, "Forbidden.AliasNotFound", 404),
    ("DeleteAlias", {}, "MissingParameter", 400),
    *(
        ("CreateAlias", {"KeyId": UNKNOWN_KEY, "AliasName": name}, "InvalidParameter", 400)
        for name in (
            "mine",
            "alias/",
            "ALIAS/mine",
            "alias/a b",
            "alias/ü",
            "alias/mine\n",
            "alias/" + "x" * 256,
            "alias/acs",
            "alias/acs/oss",
        )
    ),
    ("CreateAlias", {"KeyId": UNKNOWN_KEY, "AliasName": "alias/a"}, "Forbidden.KeyNotFound", 404),
    ("ListAliasesByKeyId", {"KeyId": UNKNOWN_KEY}, "Forbidden.KeyNotFound", 404),
    ("ListAliases", {"PageSize": "0"}, "InvalidParameter", 400),
    ("ListKeyVersions", {"KeyId": UNKNOWN_KEY}, "Forbidden.KeyNotFound", 404),
    ("DescribeKeyVersion", {"KeyId": UNKNOWN_KEY}, "MissingParameter", 400),
    ("ReEncrypt", {"CiphertextBlob": "aGVsbG8="}, "InvalidParameter", 400),
    ("GenerateDataKeyWithoutPlaintext", {"KeyId": "alias/x"}, "Forbidden.AliasNotFound", 404),
    ("DescribeKey", {"KeyId": "acs:kms:r:1:alias/mine"}, "Unsupported.Alias", 400),
    ("ListKeys", {"PageNumber": "0"}, "InvalidParameter", 400),
    ("ListKeys", {"PageSize": "101"}, "InvalidParameter", 400),
    ("ListKeys", {"PageSize": "9" * 5000}, "InvalidParameter", 400),
    ("ListKeys", {"PageSize": "１"}, "InvalidParameter", 400),
    ("ListKeys", {"PageSize": "-1"}, "InvalidParameter", 400),
    ("GetParametersForImport", {"KeyId": UNKNOWN_KEY}, "MissingParameter", 400),
    (
        "GetParametersForImport",
        {"KeyId": UNKNOWN_KEY, "WrappingKeySpec": "RSA_2048", "WrappingAlgorithm": "SM2"},
        "InvalidParameter",
        400,
    ),
    (
        "ImportKeyMaterial",
        {"KeyId": UNKNOWN_KEY, "ImportToken": "?", "EncryptedKeyMaterial": "aGVsbG8="},
        "InvalidImportToken",
        400,
    ),
    (
        "ImportKeyMaterial",
        {"KeyId": UNKNOWN_KEY, "ImportToken": "aGVsbG8=", "EncryptedKeyMaterial": "?"},
        "InvalidParameter",
        400,
    ),
    (
        "ImportKeyMaterial",
        {
            "KeyId": UNKNOWN_KEY,
            "ImportToken": "aGVsbG8=",
            "EncryptedKeyMaterial": "aGVsbG8=",
            "KeyMaterialExpireUnix": "253402300800",
        },
        "InvalidParameter",
        400,
    ),
    ("Encrypt", {"KeyId": UNKNOWN_KEY}, "MissingParameter", 400),
    ("Encrypt", {"KeyId": UNKNOWN_KEY, "Plaintext": "a b="}, "InvalidParameter", 400),
    (
        "Encrypt",
        {"KeyId": UNKNOWN_KEY, "Plaintext": base64.b64encode(bytes(6145)).decode()},
        "InvalidParameter",
        400,
    ),
    *(
        (
            "Encrypt",
            {"KeyId": UNKNOWN_KEY, "Plaintext": "aGVsbG8=", "EncryptionContext": context},
            "InvalidParameter",
            400,
        )
        for context in (
            "[]",
            "x",
            '{"a":1}',
            '{"a":"1","a":"2"}',
            '{"a":{}}',
            "[" * 8000,
            f'{{"a":"{"x" * 9000}"}}',
        )
    ),
    ("Decrypt", {"CiphertextBlob": "aGVsbG8="}, "InvalidParameter", 400),
    ("Decrypt", {"CiphertextBlob": "?"}, "InvalidParameter", 400),
    ("Decrypt", {"KeyId": UNKNOWN_KEY, "CiphertextBlob": "?"}, "InvalidParameter", 400),
    ("GenerateDataKey", {"KeyId": UNKNOWN_KEY, "NumberOfBytes": "1025"}, "InvalidParameter", 400),
    ("GenerateDataKey", {"KeyId": UNKNOWN_KEY, "KeySpec": "AES_192"}, "InvalidParameter", 400),
    ("ScheduleKeyDeletion", {"KeyId": UNKNOWN_KEY}, "MissingParameter", 400),
    *(
        ("ScheduleKeyDeletion", {"KeyId": UNKNOWN_KEY, "PendingWindowInDays": days}, code, status)
        for days, code, status in (
            ("6", "InvalidParameter", 400),
            ("367", "InvalidParameter", 400),
            ("7", "Forbidden.KeyNotFound", 404),
            ("366", "Forbidden.KeyNotFound", 404),
        )
    ),
]


@pytest.fixture(scope="module")
def one_client(tmp_path_factory):
    from support.kms.fakes import build_kms

    from hsmwrap.software import SoftwareBackend

    home = tmp_path_factory.mktemp("kms")
    backend = SoftwareBackend.from_settings({"serve_hsm_level": True})
    with build_kms(f"sqlite:///{home}/kms.db", backend, home / "audit.log") as kms:
        yield Client(kms)


@pytest.mark.parametrize(("action", "parameters", "code", "status"), WRONG)
def test_wrong_requests(one_client, action, parameters, code, status):
    refused(code, one_client, action, status=status, **parameters)


def test_messages(one_client):
    def message(code, *arguments, **more):
        return refused(code, one_client, *arguments, **more).api_message

    assert message("InvalidAction.NotFound", "X", status=404) == (
        "Specified api is not found, please check your url and method."
    )
    assert message("MissingParameter", "DescribeKey") == (
        'The parameter "KeyId" is needed but not provided.'
    )
    assert message("InvalidParameter", "DescribeKey", Colour="x") == (
        'The specified parameter "Colour" is not valid.'
    )


@pytest.mark.parametrize("action", OPERATIONS)
def test_every_operation_refuses_what_it_does_not_know(one_client, action):
    refused("InvalidParameter", one_client, action, Colour="red")


def test_expiry_in_the_past(client, clock):
    key_id = client.create()
    error = refused(
        "InvalidParameter",
        client.import_material,
        key_id,
        KeyMaterialExpireUnix=clock.unix(seconds=0),
    )
    assert error.name == "KeyMaterialExpireUnix"
    client.import_material(key_id, KeyMaterialExpireUnix="0")
    assert client("DescribeKey", KeyId=key_id)["KeyMetadata"]["MaterialExpireTime"] == ""


def test_health_and_close(open_kms):
    kms = open_kms()
    health = kms.health()
    assert health.ready
    assert health.facts == {
        "backend SOFTWARE": "ready",
        "backend HSM": "ready",
        "access keys": "ready",
        "database": "ready",
        "audit log": "ready",
        "keys": "ready",
    }
    kms.close()
    kms.close()
    assert not kms.health().ready
