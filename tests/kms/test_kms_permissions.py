"""Permissions deny by default; access keys come from a private file."""

from traceback import walk_tb

import pytest
from support.kms.fakes import ADMIN, AES_MATERIAL, Client

from hsmwrap.errors import ConfigurationError, HsmwrapError
from hsmwrap.kms import AccessKey, Caller, Grant, NoPermission, Permissions
from hsmwrap.kms.access import MAX_ID_LENGTH, FileAccessKeys, parse_access_keys
from hsmwrap.kms.api import OPERATIONS, PERMISSIONS
from hsmwrap.kms.audit import SYSTEM
from hsmwrap.kms.schema import Key

UNKNOWN_KEY = "8a8e3a5f-0000-4000-8000-000000000000"
NEEDED = {
    "GetParametersForImport": {
        "WrappingKeySpec": "RSA_2048",
        "WrappingAlgorithm": "RSAES_OAEP_SHA_256",
    },
    "ImportKeyMaterial": {"EncryptedKeyMaterial": "aGVsbG8=", "ImportToken": "aGVsbG8="},
    "Encrypt": {"Plaintext": "aGVsbG8="},
    "ScheduleKeyDeletion": {"PendingWindowInDays": "7"},
    "UpdateKeyDescription": {"Description": "other"},
    "DescribeKeyVersion": {"KeyVersionId": "other"},
    "CreateAlias": {"AliasName": "alias/second"},
    "UpdateAlias": {"AliasName": "alias/mine"},
}
WITHOUT_KEY = ("CreateKey", "ListKeys", "ListAliases", "DescribeRegions")


def caller(*grants):
    return Caller("limited", Permissions(grants))


@pytest.fixture
def key(kms):
    admin = Client(kms)
    key_id = admin.create()
    admin.import_material(key_id, AES_MATERIAL)
    admin("CreateAlias", KeyId=key_id, AliasName="alias/mine")
    return key_id, admin.usable(key_id)


def requests(key_id, blob):
    for action in OPERATIONS:
        if action == "Decrypt":
            yield action, {"CiphertextBlob": blob}
        elif action == "ReEncrypt":
            yield action, {"CiphertextBlob": blob, "DestinationKeyId": key_id}
        elif action == "DeleteAlias":
            yield action, {"AliasName": "alias/mine"}
        elif action in WITHOUT_KEY:
            yield action, {}
        else:
            yield action, {"KeyId": key_id} | NEEDED.get(action, {})


def answers(kms, who, key_id, blob):
    """Each action → whether it was allowed (it may still fail later)."""
    client, allowed = Client(kms, who), {}
    for action, parameters in requests(key_id, blob):
        try:
            client(action, **parameters)
            allowed[action] = True
        except HsmwrapError as error:
            allowed[action] = error.code != "Forbidden.NoPermission"
    return allowed


@pytest.mark.parametrize(
    "grants",
    [
        (),
        (Grant((), ("*",)),),
        (Grant(("*",), ()),),
        (Grant(("*",), (UNKNOWN_KEY,)),),
        (
            Grant(
                ("describekey", "KMS:*"),
                ("*",),
            ),
        ),
    ],
)
def test_nothing_is_allowed(kms, key, grants):
    assert not any(answers(kms, caller(*grants), *key).values())


def test_everything_is_allowed(kms, key):
    assert all(answers(kms, ADMIN, *key).values())


def test_some_actions_on_some_keys(kms, key):
    key_id, _ = key
    grants = (Grant(("Encrypt", "De*"), (f"{key_id[:8]}*",)), Grant(("ListKeys",), ("*",)))
    allowed = {action for action, yes in answers(kms, caller(*grants), *key).items() if yes}
    of_the_key = {"DeleteAlias", "DeleteKeyMaterial", "DescribeKey", "DescribeKeyVersion"}
    assert allowed == {"Encrypt", "Decrypt", "ListKeys"} | of_the_key


def test_decrypt_needs_permission_for_the_key_of_the_blob(kms, key):
    key_id, blob = key
    other = Client(kms).create()
    with pytest.raises(NoPermission) as caught:
        Client(kms, caller(Grant(("*",), (other,))))("Decrypt", CiphertextBlob=blob)
    assert caught.value.http_status == 403
    Client(kms, caller(Grant(("*",), (key_id,))))("Decrypt", CiphertextBlob=blob)


def test_re_encryption_needs_a_permission_for_each_of_its_keys(kms, key):
    key_id, blob = key
    other = Client(kms).create()
    Client(kms).import_material(other, AES_MATERIAL)
    wanted = {"CiphertextBlob": blob, "DestinationKeyId": other}
    source, destination = (
        Grant(("ReEncryptFrom",), (key_id,)),
        Grant(("ReEncryptTo",), (other,)),
    )
    swapped = (Grant(("ReEncryptTo",), (key_id,)), Grant(("ReEncryptFrom",), (other,)))
    for too_few in ((source,), (destination,), swapped, (Grant(("ReEncrypt",), ("*",)),)):
        with pytest.raises(NoPermission):
            Client(kms, caller(*too_few))("ReEncrypt", **wanted)
    Client(kms, caller(source, destination))("ReEncrypt", **wanted)
    Client(kms, caller(Grant(("ReEncrypt*",), (key_id, other))))("ReEncrypt", **wanted)


def test_an_alias_gives_no_rights(kms, key):
    """A grant for its name matches nothing."""
    key_id, _ = key
    other = Client(kms).create()
    Client(kms).import_material(other, AES_MATERIAL)
    by_name = Client(kms, caller(Grant(("*",), ("alias/*", "mine", other))))
    for name in ("alias/mine", "alias/none"):
        texts = set()
        for action, more in (("Encrypt", {"Plaintext": "aGVsbG8="}), ("DescribeKey", {})):
            with pytest.raises(NoPermission) as caught:
                by_name(action, KeyId=name, **more)
            texts.add(str(caught.value).replace(action, "…"))
        assert texts == {"limited may not … this key"}
    granted = Client(kms, caller(Grant(("Encrypt",), (key_id,))))
    assert granted("Encrypt", KeyId="alias/mine", Plaintext="aGVsbG8=")["KeyId"] == key_id


def test_aliases_of_other_keys_stay_where_they_are(kms, key):
    """Who may use one key moves no other key's alias to it: others would encrypt under it."""
    key_id, _ = key
    other = Client(kms).create()
    limited = Client(kms, caller(Grant(("*",), (other,))))
    for action, parameters in (
        ("UpdateAlias", {"KeyId": other, "AliasName": "alias/mine"}),
        ("UpdateAlias", {"KeyId": key_id, "AliasName": "alias/mine"}),
        ("DeleteAlias", {"AliasName": "alias/mine"}),
        ("DeleteAlias", {"AliasName": "alias/none"}),
        ("CreateAlias", {"KeyId": key_id, "AliasName": "alias/new"}),
        ("ListAliasesByKeyId", {"KeyId": key_id}),
        ("ListAliases", {}),
    ):
        with pytest.raises(NoPermission):
            limited(action, **parameters)
    limited("CreateAlias", KeyId=other, AliasName="alias/own")
    limited("DeleteAlias", AliasName="alias/own")
    assert Client(kms)("DescribeKey", KeyId="alias/mine")["KeyMetadata"]["KeyId"] == key_id


def test_denial_does_not_tell_whether_a_key_exists(kms, key):
    client = Client(kms, caller())
    texts = set()
    for key_id in (key[0], UNKNOWN_KEY):
        with pytest.raises(NoPermission) as caught:
            client("DescribeKey", KeyId=key_id)
        texts.add(str(caught.value) + caught.value.api_message)
    assert len(texts) == 1


def test_arn_does_not_go_around_patterns(kms, key):
    arn = f"acs:kms:cn-hangzhou:1000000000000000:key/{key[0]}"
    with pytest.raises(NoPermission):
        Client(kms, caller(Grant(("*",), ("acs:*",))))("DescribeKey", KeyId=arn)


FILE = """
[[access_key]]
id = "backup"
secret = "s3cret-value"
allow = [{ actions = ["Encrypt"], keys = ["8a*"] }, { actions = ["ListKeys"], keys = ["*"] }]

[[access_key]]
id = "unprivileged"
secret = "other"
"""


@pytest.fixture
def access_file(tmp_path):
    path = tmp_path / "access.toml"
    path.write_text(FILE)
    path.chmod(0o600)
    return path


def test_access_key_file(access_file):
    keys = FileAccessKeys(access_file)
    backup = keys.lookup("backup")
    assert backup == AccessKey(
        "backup",
        "s3cret-value",
        Permissions((Grant(("Encrypt",), ("8a*",)), Grant(("ListKeys",), ("*",)))),
    )
    assert "s3cret" not in repr(backup) + repr(keys) + repr(backup.caller())
    assert keys.lookup("unprivileged").permissions == Permissions()
    assert keys.lookup("missing") is None


def test_access_key_file_is_read_again(access_file):
    keys = FileAccessKeys(access_file)
    replacement = access_file.with_suffix(".new")
    replacement.write_text('[[access_key]]\nid = "fresh"\nsecret = "x"\n')
    replacement.chmod(0o600)
    replacement.replace(access_file)
    assert keys.lookup("backup") is None
    assert keys.lookup("fresh")


@pytest.mark.parametrize("mode", [0o620, 0o604, 0o660])
def test_access_key_file_must_be_private(access_file, mode):
    access_file.chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod 0400"):
        FileAccessKeys(access_file)


@pytest.mark.parametrize(
    "text",
    [
        "not toml",
        "[[access_keys]]\n",
        '[[access_key]]\nid = "a"\n',
        '[[access_key]]\nid = "a"\nsecret = ""\n',
        '[[access_key]]\nid = "a"\nsecret = 7\n',
        '[[access_key]]\nid = "a"\nsecret = "hush-hush"\nallow = "all"\n',
        '[[access_key]]\nid = "a"\nsecret = "hush-hush"\nallow = [{ keys = ["*"] }]\n',
        '[[access_key]]\nid = "a"\nsecret = "hush-hush"\nallow = [{ actions = "*" }]\n',
        '[[access_key]]\nid = "a"\nsecret = "hush-hush"\ndeny = []\n',
        'access_key = "hush-hush"\n',
        'access_key = ["hush-hush"]\n',
        '[[access_key]]\nid = "a"\nsecret = "hush-hush"\n' * 2,
    ],
)
def test_access_key_file_errors_quote_no_secret(access_file, text):
    access_file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        FileAccessKeys(access_file)
    assert "hush-hush" not in str(caught.value)


def test_the_first_unknown_entry_is_named():
    with pytest.raises(ConfigurationError, match=r"^access keys: alpha is none of access_key$"):
        parse_access_keys({"zeta": 1, "access_key": [], "alpha": 2})


def test_a_refusal_keeps_no_variables_that_hold_a_secret():
    with pytest.raises(ConfigurationError) as caught:
        parse_access_keys({"access_key": [{"id": "me", "secret": "of-mine", "allow": 7}]})
    frames = [frame.f_code.co_filename for frame, _ in walk_tb(caught.value.__traceback__)]
    assert parse_access_keys.__wrapped__.__code__.co_filename not in frames


def test_access_key_file_that_is_missing(tmp_path):
    with pytest.raises(ConfigurationError):
        FileAccessKeys(tmp_path / "none")


def test_id_that_is_too_long_for_a_row_is_refused():
    assert MAX_ID_LENGTH == 128
    longest = "i" * MAX_ID_LENGTH
    entry = {"secret": "x", "allow": []}
    assert parse_access_keys({"access_key": [{"id": longest, **entry}]})[0].access_key_id == longest
    with pytest.raises(ConfigurationError, match=f"more than {MAX_ID_LENGTH} characters") as caught:
        parse_access_keys({"access_key": [{"id": longest + "i", **entry}]})
    assert "iii" not in str(caught.value)
    with pytest.raises(ConfigurationError):
        AccessKey(longest + "i", "x", Permissions())
    assert Key.creator.type.length >= MAX_ID_LENGTH


def test_a_grant_without_keys_is_refused():
    """It would be for every key, also for one whose list of keys was forgotten."""
    entry = {"id": "a", "secret": "x", "allow": [{"actions": ["Encrypt"]}]}
    with pytest.raises(ConfigurationError, match=r'keys = \["\*"\] stands for every key'):
        parse_access_keys({"access_key": [entry]})
    with pytest.raises(TypeError):
        Grant(("Encrypt",))


@pytest.mark.parametrize(
    ("actions", "near"),
    [
        (["Encrpyt"], "did you mean Encrypt?"),
        (["Decrypt", "encrypt"], "did you mean Encrypt?"),
        (["ReEncrypt"], "did you mean ReEncryptTo?"),
        (["Zap*"], "It takes "),
    ],
)
def test_an_action_that_there_is_not_is_refused(actions, near):
    entry = {"id": "a", "secret": "x", "allow": [{"actions": actions, "keys": ["*"]}]}
    with pytest.raises(ConfigurationError, match="actions matches none") as caught:
        parse_access_keys({"access_key": [entry]})
    assert near in str(caught.value)
    assert "Encrpyt" not in str(caught.value)


def test_each_action_can_be_granted():
    actions = ["*", "De*", "ReEncrypt*", "[CL]*Key*", *PERMISSIONS]
    entry = {"id": "a", "secret": "x", "allow": [{"actions": actions, "keys": ["*"]}]}
    parse_access_keys({"access_key": [entry]})
    assert set(OPERATIONS) - set(PERMISSIONS) == {"ReEncrypt"}


@pytest.mark.parametrize("key", ["alias/foo", "alias/*", "acs:kms:cn-hangzhou:1:key/x"])
def test_an_alias_or_an_arn_in_keys_is_refused(key):
    grant = {"actions": ["Encrypt"], "keys": ["*", key]}
    with pytest.raises(ConfigurationError, match="matches no key: give the key id"):
        parse_access_keys({"access_key": [{"id": "a", "secret": "x", "allow": [grant]}]})


@pytest.mark.parametrize(
    "access_key_id", [SYSTEM, "System", "SYSTEM-1", "_system_", "kms", "hsmwrap", "KMS.system"]
)
def test_an_id_that_looks_like_the_kms_itself_is_refused(access_key_id):
    entry = {"id": access_key_id, "secret": "x"}
    with pytest.raises(ConfigurationError, match="looks like the KMS itself"):
        parse_access_keys({"access_key": [entry]})
    with pytest.raises(ConfigurationError):
        AccessKey(access_key_id, "x", Permissions())


@pytest.mark.parametrize(
    "access_key_id", ["system ", " a", "a\tb", "\u0455ystem", "syste\u200bm", "a\n", "caf\u00e9"]
)
def test_an_id_is_printable_ascii(access_key_id):
    """A Cyrillic letter and an invisible blank look like nothing or like another letter."""
    with pytest.raises(ConfigurationError, match="printable characters of ASCII"):
        parse_access_keys({"access_key": [{"id": access_key_id, "secret": "x"}]})


def test_ids_of_the_cloud_are_taken():
    for access_key_id in ("LTAI5tExample", "STS.NUgExample", "kms-importer", "ecosystem"):
        parse_access_keys({"access_key": [{"id": access_key_id, "secret": "x"}]})
