"""The state matrix: every operation in every state, against the documented table."""

from itertools import product

import pytest
from support.documents import text_of
from support.kms.fakes import AES_MATERIAL, OTHER_MATERIAL
from support.kms.listing import DOCUMENT, cells

from hsmwrap.errors import HsmwrapError
from hsmwrap.kms.api import OPERATIONS
from hsmwrap.kms.errors import RejectedDisabled, RejectedPendingImport
from hsmwrap.kms.states import STATE_MATRIX, KeyState


def key_in(client, state):
    """A key in this state, parameters for it, and a blob made while it was Enabled."""
    key_id = client.create()
    client("CreateAlias", KeyId=key_id, AliasName="alias/mine")
    parameters = client.parameters(key_id)
    client.import_material(key_id, AES_MATERIAL, parameters)
    blob = client.usable(key_id)
    if state == "Disabled":
        client("DisableKey", KeyId=key_id)
    elif state == "PendingDeletion":
        client("ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays="7")
    elif state == "PendingImport":
        client("DeleteKeyMaterial", KeyId=key_id)
    assert client.state(key_id) == state
    return key_id, parameters, blob


def update_alias(client, key_id):
    client("CreateAlias", KeyId=client.create(), AliasName="alias/others")
    client("UpdateAlias", KeyId=key_id, AliasName="alias/others")


def describe_version(client, key_id):
    version = client("DescribeKey", KeyId=key_id)["KeyMetadata"]["PrimaryKeyVersion"]
    client("DescribeKeyVersion", KeyId=key_id, KeyVersionId=version)


def call(client, operation, key_id, parameters, blob):
    arguments = {
        "GetParametersForImport": lambda: client.parameters(key_id),
        "ImportKeyMaterial": lambda: client.import_material(key_id, AES_MATERIAL, parameters),
        "Encrypt": lambda: client("Encrypt", KeyId=key_id, Plaintext="aGVsbG8="),
        "Decrypt": lambda: client("Decrypt", CiphertextBlob=blob),
        "ReEncrypt": lambda: client("ReEncrypt", CiphertextBlob=blob, DestinationKeyId=key_id),
        "UpdateKeyDescription": lambda: client(
            "UpdateKeyDescription", KeyId=key_id, Description="other"
        ),
        "DescribeKeyVersion": lambda: describe_version(client, key_id),
        "CreateAlias": lambda: client("CreateAlias", KeyId=key_id, AliasName="alias/second"),
        "UpdateAlias": lambda: update_alias(client, key_id),
        "DeleteAlias": lambda: client("DeleteAlias", AliasName="alias/mine"),
        "ScheduleKeyDeletion": lambda: client(
            "ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays="30"
        ),
    }
    return arguments.get(operation, lambda: client(operation, KeyId=key_id))()


@pytest.mark.parametrize(("operation", "state", "code", "afterwards"), list(cells()))
def test_operation_in_state(client, operation, state, code, afterwards):
    key_id, parameters, blob = key_in(client, state)
    answer, status = "ok", 409
    try:
        call(client, operation, key_id, parameters, blob)
    except HsmwrapError as error:
        answer, status = error.code, error.http_status
    assert (answer, status) == (code, 409)
    assert client.state(key_id) == afterwards


def test_the_table_covers_everything():
    listed = [(operation, state) for operation, state, *_ in cells()]
    assert sorted(listed) == sorted(product(STATE_MATRIX, KeyState))
    header = f"| operation | {' | '.join(KeyState)} |"
    assert header in text_of(DOCUMENT)
    without_key = {"CreateKey", "ListKeys", "ListAliases", "DescribeRegions"}
    assert set(OPERATIONS) - set(STATE_MATRIX) == without_key


def test_re_encryption_needs_both_keys(client):
    """The key that decrypts is asked first."""
    key_id, _, blob = key_in(client, "Disabled")
    other = client.create()
    wanted = {"CiphertextBlob": blob, "DestinationKeyId": other}
    with pytest.raises(RejectedDisabled):
        client("ReEncrypt", **wanted)
    client("EnableKey", KeyId=key_id)
    with pytest.raises(RejectedPendingImport):
        client("ReEncrypt", **wanted)
    client.import_material(other, OTHER_MATERIAL)
    client("ReEncrypt", **wanted)


def test_import_after_deletion_was_cancelled_without_material(client):
    key_id = client.create()
    client("ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays="7")
    client("CancelKeyDeletion", KeyId=key_id)
    assert client.state(key_id) == "PendingImport"


def test_the_matrix_is_the_table():
    for operation, state, answer, _ in cells():
        error = STATE_MATRIX[operation].get(KeyState(state))
        assert answer == (error.code if error else "ok"), (operation, state)


def test_what_the_document_decides(client):
    """Deletion and import enable a disabled key, an import alone does not."""
    key_id, parameters, _ = key_in(client, "Disabled")
    client.import_material(key_id, AES_MATERIAL, parameters)
    assert client.state(key_id) == "Disabled"
    client("DeleteKeyMaterial", KeyId=key_id)
    client.import_material(key_id, AES_MATERIAL, parameters)
    assert client.state(key_id) == "Enabled"
    client("DisableKey", KeyId=key_id)
    client("ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays="7")
    client("CancelKeyDeletion", KeyId=key_id)
    assert client.state(key_id) == "Enabled"


def test_material_deleted_while_pending_deletion(client, objects):
    key_id, *_ = key_in(client, "PendingDeletion")
    client("DeleteKeyMaterial", KeyId=key_id)
    assert (client.state(key_id), objects()) == ("PendingDeletion", 0)
    client("CancelKeyDeletion", KeyId=key_id)
    assert client.state(key_id) == "PendingImport"
