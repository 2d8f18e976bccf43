"""The state matrix: every operation in every state, against a second, independent listing."""

import pytest
from support.kms.fakes import AES_MATERIAL

from hsmwrap.errors import HsmwrapError
from hsmwrap.kms.api import OPERATIONS
from hsmwrap.kms.states import STATE_MATRIX, KeyState

# E: Enabled, D: Disabled, X: PendingDeletion, I: PendingImport.
LISTING = """
DescribeKey             E ok   D ok  X ok   I ok
GetParametersForImport  E ok   D ok  X ok   I ok
ImportKeyMaterial       E ok   D ok  X SMF  I ok
DeleteKeyMaterial       E ok   D ok  X ok   I ok
Encrypt                 E ok   D RD  X RX   I RI
Decrypt                 E ok   D RD  X RX   I RI
GenerateDataKey         E ok   D RD  X RX   I RI
EnableKey               E ok   D ok  X SMF  I SMF
DisableKey              E ok   D ok  X SMF  I SMF
ScheduleKeyDeletion     E ok   D ok  X SMF  I ok
CancelKeyDeletion       E SMF  D SMF X ok   I SMF
"""
STATES = {"E": "Enabled", "D": "Disabled", "X": "PendingDeletion", "I": "PendingImport"}
CODES = {
    "ok": "ok",
    "SMF": "Rejected.StateModifiedFailed",
    "RD": "Rejected.Disabled",
    "RX": "Rejected.PendingDeletion",
    "RI": "Rejected.PendingImport",
}
# The state afterwards, if it changes; from the text of the API's pages.
AFTERWARDS = {
    ("ImportKeyMaterial", "PendingImport"): "Enabled",
    ("DeleteKeyMaterial", "Enabled"): "PendingImport",
    ("DeleteKeyMaterial", "Disabled"): "PendingImport",
    ("EnableKey", "Disabled"): "Enabled",
    ("DisableKey", "Enabled"): "Disabled",
    ("ScheduleKeyDeletion", "Enabled"): "PendingDeletion",
    ("ScheduleKeyDeletion", "Disabled"): "PendingDeletion",
    ("ScheduleKeyDeletion", "PendingImport"): "PendingDeletion",
    ("CancelKeyDeletion", "PendingDeletion"): "Enabled",
}


def cells():
    for line in LISTING.split("\n")[1:-1]:
        operation, *pairs = line.split()
        for letter, code in zip(pairs[::2], pairs[1::2], strict=True):
            yield operation, STATES[letter], CODES[code]


def key_in(client, state):
    """A key in this state, parameters for it, and a blob made while it was Enabled."""
    key_id = client.create()
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


def call(client, operation, key_id, parameters, blob):
    arguments = {
        "GetParametersForImport": lambda: client.parameters(key_id),
        "ImportKeyMaterial": lambda: client.import_material(key_id, AES_MATERIAL, parameters),
        "Encrypt": lambda: client("Encrypt", KeyId=key_id, Plaintext="aGVsbG8="),
        "Decrypt": lambda: client("Decrypt", CiphertextBlob=blob),
        "ScheduleKeyDeletion": lambda: client(
            "ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays="30"
        ),
    }
    return arguments.get(operation, lambda: client(operation, KeyId=key_id))()


@pytest.mark.parametrize(("operation", "state", "code"), list(cells()))
def test_operation_in_state(client, operation, state, code):
    key_id, parameters, blob = key_in(client, state)
    answer, status = "ok", 409
    try:
        call(client, operation, key_id, parameters, blob)
    except HsmwrapError as error:
        answer, status = error.code, error.http_status
    assert (answer, status) == (code, 409)
    expected = AFTERWARDS.get((operation, state), state) if code == "ok" else state
    assert client.state(key_id) == expected


def test_listing_covers_everything():
    listed = {(operation, state) for operation, state, _ in cells()}
    assert listed == {(operation, state) for operation in STATE_MATRIX for state in KeyState}
    assert set(OPERATIONS) - set(STATE_MATRIX) == {"CreateKey", "ListKeys"}


def test_import_after_deletion_was_cancelled_without_material(client):
    key_id = client.create()
    client("ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays="7")
    client("CancelKeyDeletion", KeyId=key_id)
    assert client.state(key_id) == "PendingImport"


def test_material_deleted_while_pending_deletion(client, objects):
    key_id, *_ = key_in(client, "PendingDeletion")
    client("DeleteKeyMaterial", KeyId=key_id)
    assert (client.state(key_id), objects()) == ("PendingDeletion", 0)
    client("CancelKeyDeletion", KeyId=key_id)
    assert client.state(key_id) == "PendingImport"
