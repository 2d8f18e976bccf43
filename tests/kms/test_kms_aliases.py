"""Aliases: where they stand for a key, which key has them, and what becomes of them."""

import json

import pytest
from support.kms.fakes import Client

from hsmwrap.errors import HsmwrapError, KeyNotFound
from hsmwrap.kms import Caller, Grant, Permissions
from hsmwrap.kms.api import OPERATIONS
from hsmwrap.kms.audit import AuditFailed
from hsmwrap.kms.errors import (
    AliasAlreadyExists,
    AliasNotFound,
    NoPermission,
    StateModifiedFailed,
    UnsupportedAlias,
)

ALIAS = "alias/tenant-1/backup_key"
ARN = "acs:kms:cn-hangzhou:1000000000000000:"
NEEDED = {
    "Encrypt": {"Plaintext": "aGVsbG8="},
    "GetParametersForImport": {
        "WrappingKeySpec": "RSA_2048",
        "WrappingAlgorithm": "RSAES_OAEP_SHA_1",
    },
    "ImportKeyMaterial": {"EncryptedKeyMaterial": "aGVsbG8=", "ImportToken": "aGVsbG8="},
    "ScheduleKeyDeletion": {"PendingWindowInDays": "7"},
    "UpdateKeyDescription": {"Description": "other"},
    "CreateAlias": {"AliasName": "alias/second"},
    "UpdateAlias": {"AliasName": ALIAS},
}
# The documentation's list ("Use aliases", and the parameter's text of each operation).
ACCEPT = {
    "DescribeKey",
    "DescribeKeyVersion",
    "Encrypt",
    "GenerateDataKey",
    "GenerateDataKeyWithoutPlaintext",
    "ListKeyVersions",
}


@pytest.fixture
def key_id(client):
    key_id = client.create()
    client.import_material(key_id)
    client("CreateAlias", KeyId=key_id, AliasName=ALIAS)
    return key_id


def names(client, **of):
    action = "ListAliasesByKeyId" if of else "ListAliases"
    return [each["AliasName"] for each in client(action, **of)["Aliases"]["Alias"]]


def test_where_an_alias_stands_for_the_key(client, key_id):
    version = client("DescribeKey", KeyId=ALIAS)["KeyMetadata"]["PrimaryKeyVersion"]
    needed = NEEDED | {"DescribeKeyVersion": {"KeyVersionId": version}}
    accepted = set()
    for action, operation in OPERATIONS.items():
        if "KeyId" not in operation.parameters:
            continue
        try:
            answer = client(action, KeyId=ALIAS, **needed.get(action, {}))
        except UnsupportedAlias:
            continue
        accepted.add(action)
        assert key_id in json.dumps(answer)
        assert ALIAS not in json.dumps(answer)
    assert accepted == ACCEPT
    blob = client.usable(ALIAS)
    with pytest.raises(UnsupportedAlias):
        client("ReEncrypt", CiphertextBlob=blob, DestinationKeyId=ALIAS)
    with pytest.raises(UnsupportedAlias):
        client("DescribeKey", KeyId=ARN + ALIAS)


def test_lists(client, key_id):
    other = client.create()
    for name in ("alias/b", "alias/a", "alias/A"):
        client("CreateAlias", KeyId=other, AliasName=name)
    listed = client("ListAliasesByKeyId", KeyId=key_id)
    assert listed == {
        "Aliases": {"Alias": [{"KeyId": key_id, "AliasName": ALIAS, "AliasArn": ARN + ALIAS}]},
        "TotalCount": 1,
        "PageNumber": 1,
        "PageSize": 10,
        "RequestId": listed["RequestId"],
    }
    assert sorted(names(client)) == sorted([ALIAS, "alias/A", "alias/a", "alias/b"])
    assert sorted(names(client, KeyId=other)) == ["alias/A", "alias/a", "alias/b"]
    pages = [client("ListAliases", PageSize="3", PageNumber=page) for page in "123"]
    assert [page["TotalCount"] for page in pages] == [4, 4, 4]
    together = [each["AliasName"] for page in pages for each in page["Aliases"]["Alias"]]
    assert together == names(client)


def test_an_alias_is_one_keys(client, key_id):
    other = client.create()
    for again in (key_id, other):
        with pytest.raises(AliasAlreadyExists) as caught:
            client("CreateAlias", KeyId=again, AliasName=ALIAS)
        assert (caught.value.code, caught.value.http_status) == ("AliasAlreadyExists", 400)
    assert names(client, KeyId=key_id) == [ALIAS]
    assert client("UpdateAlias", KeyId=other, AliasName=ALIAS).keys() == {"RequestId"}
    assert (names(client, KeyId=key_id), names(client, KeyId=other)) == ([], [ALIAS])
    assert client("DescribeKey", KeyId=ALIAS)["KeyMetadata"]["KeyId"] == other
    client("UpdateAlias", KeyId=other, AliasName=ALIAS)
    assert client("DeleteAlias", AliasName=ALIAS).keys() == {"RequestId"}
    assert names(client) == []
    for action, more in (("UpdateAlias", {"KeyId": other}), ("DeleteAlias", {})):
        with pytest.raises(AliasNotFound) as caught:
            client(action, AliasName=ALIAS, **more)
        assert (caught.value.code, caught.value.http_status) == ("Forbidden.AliasNotFound", 404)


def test_ciphertexts_do_not_follow_an_alias(client, key_id):
    """They name the key: encrypted under another alias, or none, they decrypt."""
    blob = client("Encrypt", KeyId=ALIAS, Plaintext="aGVsbG8=")["CiphertextBlob"]
    client("UpdateAlias", KeyId=client.create(), AliasName=ALIAS)
    assert client("Decrypt", CiphertextBlob=blob)["KeyId"] == key_id


@pytest.mark.parametrize("swept", [True, False])
def test_aliases_of_a_deleted_key(client, key_id, clock, swept):
    client("ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays="7")
    other = client.create()
    with pytest.raises(AliasAlreadyExists):
        client("CreateAlias", KeyId=other, AliasName=ALIAS)
    assert names(client) == [ALIAS]
    clock.advance(days=7)
    if swept:
        client.kms.sweep()
    assert names(client) == []
    with pytest.raises(AliasNotFound if swept else KeyNotFound):
        client("DescribeKey", KeyId=ALIAS)
    client("CreateAlias", KeyId=other, AliasName=ALIAS)
    client.kms.sweep()
    assert names(client, KeyId=other) == [ALIAS]


def test_a_deletion_that_is_cancelled_keeps_the_aliases(client, key_id, clock):
    client("ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays="7")
    with pytest.raises(StateModifiedFailed):
        client("CreateAlias", KeyId=key_id, AliasName="alias/late")
    client("CancelKeyDeletion", KeyId=key_id)
    clock.advance(days=8)
    client.kms.sweep()
    assert names(client) == [ALIAS]


@pytest.mark.parametrize("action", ["UpdateAlias", "DeleteAlias"])
def test_an_alias_that_moves_during_a_call_stays_moved(client, key_id, action):
    """The permission was for the key that had it."""
    other, third = client.create(), client.create()
    aliases = client.kms.operations.aliases
    more = {"KeyId": third} if action == "UpdateAlias" else {}

    def key_of(name):
        aliases.update(name, other, key_id)
        return key_id

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(aliases), "key_of", lambda _self, name: key_of(name))
        with pytest.raises(AliasNotFound):
            client(action, AliasName=ALIAS, **more)
    assert names(client, KeyId=other) == [ALIAS]


def audited(client, tmp_path):
    lines = [json.loads(line) for line in (tmp_path / "audit.log").read_text().splitlines()]
    of_caller = [line for line in lines if line["access_key_id"] == client.caller.access_key_id]
    return [
        (line["action"], line["key_id"], line.get("alias"), line["outcome"]) for line in of_caller
    ]


def test_the_audit_log_names_key_and_alias(client, key_id, tmp_path):
    limited = Client(client.kms, Caller("limited", Permissions((Grant(("*",), (key_id,)),))))
    other = client.create()
    client("CreateAlias", KeyId=other, AliasName="alias/other")
    limited("Encrypt", KeyId=ALIAS, Plaintext="aGVsbG8=")
    limited("Encrypt", KeyId=key_id, Plaintext="aGVsbG8=")
    for name in ("alias/other", "alias/none"):
        with pytest.raises(NoPermission):
            limited("DescribeKey", KeyId=name)
    with pytest.raises(NoPermission):
        limited("UpdateAlias", KeyId=key_id, AliasName="alias/other")
    limited("CreateAlias", KeyId=key_id, AliasName="alias/own")
    limited("UpdateAlias", KeyId=key_id, AliasName="alias/own")
    limited("DeleteAlias", AliasName="alias/own")
    with pytest.raises(HsmwrapError):
        limited("DeleteKeyMaterial", KeyId=ALIAS)
    assert audited(limited, tmp_path) == [
        ("Encrypt", key_id, ALIAS, "ok"),
        ("Encrypt", key_id, None, "ok"),
        ("DescribeKey", other, "alias/other", "Forbidden.NoPermission"),
        ("DescribeKey", None, "alias/none", "Forbidden.NoPermission"),
        ("UpdateAlias", key_id, "alias/other", "Forbidden.NoPermission"),
        ("UpdateAlias", other, "alias/other", "Forbidden.NoPermission"),
        ("CreateAlias", key_id, "alias/own", "ok"),
        ("UpdateAlias", key_id, "alias/own", "ok"),
        ("DeleteAlias", key_id, "alias/own", "ok"),
        ("DeleteKeyMaterial", ALIAS, None, "Unsupported.Alias"),
    ]


def test_the_audit_log_has_both_keys_of_a_re_encryption(client, key_id, tmp_path):
    other = client.create()
    client.import_material(other, bytes(32))
    caller = Client(client.kms, Caller("mover", Permissions.everything()))
    blob = client.usable(key_id)
    caller("ReEncrypt", CiphertextBlob=blob, DestinationKeyId=other)
    assert audited(caller, tmp_path) == [
        ("ReEncryptFrom", key_id, None, "ok"),
        ("ReEncryptTo", other, None, "ok"),
    ]


def test_the_second_line_of_a_re_encryption_is_owed_where_the_first_fails(
    client, key_id, tmp_path, monkeypatch
):
    other = client.create()
    client.import_material(other, bytes(32))
    caller = Client(client.kms, Caller("mover", Permissions.everything()))
    blob = client.usable(key_id)
    log = client.kms._audit.log
    with monkeypatch.context() as patch:
        patch.setattr(type(log), "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(AuditFailed):
            caller("ReEncrypt", CiphertextBlob=blob, DestinationKeyId=other)
    caller("DescribeKey", KeyId=other)
    assert [line[:2] for line in audited(caller, tmp_path)] == [
        ("ReEncryptFrom", key_id),
        ("ReEncryptTo", other),
        ("DescribeKey", other),
    ]
