"""Material and keys are deleted on time: at use, by the sweeper, and across restarts."""

import json
from contextlib import nullcontext

import pytest
from sqlalchemy import text
from support.kms.fakes import AES_MATERIAL, OTHER_MATERIAL, Client, hsm_of

from hsmwrap.backend import Custody, KeyRef
from hsmwrap.catalog import KeySpec
from hsmwrap.errors import InvalidKeyMaterial, KeyNotFound, ServiceUnavailable
from hsmwrap.kms import RejectedPendingImport, StateModifiedFailed
from hsmwrap.kms.core import Core
from hsmwrap.kms.lifecycle import KeyLifecycle
from hsmwrap.kms.objects import Objects, schedule_destruction
from hsmwrap.kms.once import OnceStore
from hsmwrap.kms.sweeper import Sweeper

pytestmark = pytest.mark.slow


@pytest.fixture
def expiring(client, clock):
    key_id = client.create()
    client.import_material(key_id, KeyMaterialExpireUnix=clock.unix(hours=1))
    return key_id


def row(kms, key_id):
    with kms._database.read() as transaction:
        return transaction.execute(
            text("SELECT state, reference, material_expires_at, exposure FROM keys")
        ).one()


def test_usable_until_the_second(client, clock, expiring):
    clock.advance(seconds=3599)
    client.usable(expiring)
    clock.advance(seconds=1)
    with pytest.raises(RejectedPendingImport):
        client.usable(expiring)


def test_gone_from_row_and_token_at_first_look(client, clock, expiring, objects):
    clock.advance(hours=1)
    assert client.state(expiring) == "PendingImport"
    assert row(client.kms, expiring) == ("PendingImport", None, None, None)
    assert objects() == 0


def test_gone_from_row_and_token_when_nobody_looks(client, clock, expiring, objects):
    clock.advance(minutes=59)
    client.kms.sweep()
    assert objects() == 1
    clock.advance(minutes=1)
    client.kms.sweep()
    assert row(client.kms, expiring) == ("PendingImport", None, None, None)
    assert objects() == 0


def test_gone_across_a_restart(client, clock, expiring, objects, open_kms):
    client.kms.close()
    clock.advance(days=1)
    kms = open_kms()
    assert row(kms, expiring)[:2] == ("PendingImport", None)
    assert objects() == 0


def test_gone_from_the_row_while_the_hsm_is_unavailable(client, clock, expiring, objects):
    backend = hsm_of(client.kms)
    clock.advance(hours=1)
    backend.unavailable = True
    client.kms.sweep()
    assert row(client.kms, expiring)[:2] == ("PendingImport", None)
    assert objects() == 1
    backend.unavailable = False
    client.kms.sweep()
    assert objects() == 0


def test_object_of_a_backend_that_is_gone_keeps_no_other(client, clock, expiring, objects):
    foreign = KeyRef("gone", KeySpec.ALIYUN_AES_256, Custody.HSM_INTERNAL, bytes(16))
    with client.kms._database.write() as transaction:
        schedule_destruction(transaction, foreign, clock())
    clock.advance(hours=1)
    client.kms.sweep()
    assert objects() == 0
    with client.kms._database.read() as transaction:
        assert (
            transaction.execute(text("SELECT count(*) FROM scheduled_destructions")).scalar() == 1
        )


@pytest.fixture
def expired(tmp_path):
    """The callers that deleted material, and the keys, from the audit log."""

    def read():
        lines = map(json.loads, (tmp_path / "audit.log").read_text().splitlines())
        expiries = [line for line in lines if line["action"] == "ExpireKeyMaterial"]
        return [(line["access_key_id"], line["key_id"]) for line in expiries]

    return read


TOUCHES = {
    "EnableKey": StateModifiedFailed,
    "DisableKey": StateModifiedFailed,
    "CancelKeyDeletion": StateModifiedFailed,
    "Encrypt": RejectedPendingImport,
    "DescribeKey": None,
    "DeleteKeyMaterial": None,
    "GetParametersForImport": None,
}


@pytest.mark.parametrize("action", TOUCHES)
def test_request_that_touches_expired_material_takes_it_out(
    client, expiring, objects, expired, action
):
    """Also if the operation is then refused; and the audit log has the expiry."""
    needed = {
        "Encrypt": {"Plaintext": "aGVsbG8="},
        "GetParametersForImport": {
            "WrappingKeySpec": "RSA_2048",
            "WrappingAlgorithm": "RSAES_OAEP_SHA_256",
        },
    }
    client.kms._clock.advance(hours=1)
    refused = TOUCHES[action]
    with pytest.raises(refused) if refused else nullcontext():
        client(action, KeyId=expiring, **needed.get(action, {}))
    assert row(client.kms, expiring) == ("PendingImport", None, None, None)
    assert objects() == 0
    client.kms.sweep()
    assert expired() == [("system", expiring)]


def test_material_that_expires_during_an_import_is_settled_first(open_kms, clock, expired):
    client = Client(open_kms(step=lambda name: clock.advance(minutes=5)))
    key_id = client.create()
    client.import_material(key_id, KeyMaterialExpireUnix=clock.unix(minutes=30))
    client("DisableKey", KeyId=key_id)
    clock.advance(minutes=9)
    client.import_material(key_id)
    assert expired() == [("system", key_id)]
    assert client.state(key_id) == "Enabled"


def test_broken_audit_log_keeps_no_material(client, clock, objects, tmp_path, caplog):
    keys = [client.create() for _ in range(3)]
    for key_id in keys:
        client.import_material(key_id, KeyMaterialExpireUnix=clock.unix(hours=1))
    scheduled = client.create()
    client("ScheduleKeyDeletion", KeyId=scheduled, PendingWindowInDays="7")
    (tmp_path / "audit.log").rename(tmp_path / "moved.log")
    (tmp_path / "audit.log").mkdir()
    clock.advance(days=7)
    client.kms.sweep()
    with client.kms._database.read() as transaction:
        left = transaction.execute(text("SELECT count(reference), count(*) FROM keys")).one()
    assert (tuple(left), objects()) == ((0, 3), 0)
    assert {getattr(record, "key_id", None) for record in caplog.records} >= {*keys, scheduled}


def test_sweep_goes_on_whatever_fails(client, expiring, objects, monkeypatch, caplog):
    clock = client.kms._clock

    def fail(*_arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(OnceStore, "purge", fail)
    hsm_of(client.kms).failing["reap"] = ZeroDivisionError()
    monkeypatch.setattr(KeyLifecycle, "delete_due", fail)
    monkeypatch.setattr(Core, "expire", fail)
    anchored = []
    client.kms._sweep._anchor = lambda: anchored.append(True)
    with client.kms._database.write() as transaction:
        schedule_destruction(transaction, KeyRef.from_bytes(row(client.kms, expiring)[1]), clock())
    clock.advance(hours=1)
    client.kms.sweep()
    assert (objects(), anchored) == (0, [True])
    assert "ZeroDivisionError" in caplog.text


@pytest.fixture
def backlog(client, clock, open_backend):
    """A due object of another backend, and the list of objects that are destroyed."""
    foreign = KeyRef("hsm", KeySpec.ALIYUN_SM4, Custody.HSM_INTERNAL, bytes(16))
    with client.kms._database.write() as transaction:
        schedule_destruction(transaction, foreign, clock())
    backend, destroyed = client.kms._backends["HSM"], []
    destroy = backend.destroy_key

    def told(key):
        destroyed.append(key)
        destroy(key)

    backend.destroy_key = told
    return foreign, destroyed


def test_requests_destroy_what_they_let_go_of_and_no_more(client, clock, backlog):
    foreign, destroyed = backlog
    key_id = client.create()
    client.import_material(key_id)
    client.import_material(key_id)
    client("DeleteKeyMaterial", KeyId=key_id)
    client.import_material(key_id, KeyMaterialExpireUnix=clock.unix(hours=1))
    with pytest.raises(InvalidKeyMaterial):
        client.import_material(key_id, OTHER_MATERIAL)
    clock.advance(hours=1)
    client.state(key_id)
    # Replaced, deleted, refused, expired.
    assert (len(destroyed), foreign in destroyed) == (4, False)
    client.kms.sweep()
    assert destroyed[4:] == [foreign]


def test_request_is_done_though_its_object_cannot_be_destroyed(client, objects, monkeypatch):
    key_id = client.create()
    client.import_material(key_id)

    def unavailable(*_arguments):
        raise ServiceUnavailable("the database is unavailable")

    monkeypatch.setattr(Objects, "_start", unavailable)
    client.import_material(key_id)
    client("DeleteKeyMaterial", KeyId=key_id)
    monkeypatch.undo()
    assert (client.state(key_id), objects()) == ("PendingImport", 2)
    client.kms.sweep()
    assert objects() == 0


def test_sealed_material_goes_too(open_kms, clock):
    client = Client(open_kms("HsmEncryptedDatabase"))
    key_id = client.create()
    client.import_material(key_id, KeyMaterialExpireUnix=clock.unix(hours=1))
    clock.advance(hours=1)
    client.kms.sweep()
    assert row(client.kms, key_id)[:2] == ("PendingImport", None)


def test_the_same_material_comes_back(client, clock, expiring):
    blob = client.usable(expiring)
    clock.advance(hours=1)
    with pytest.raises(InvalidKeyMaterial):
        client.import_material(expiring, OTHER_MATERIAL)
    client.import_material(expiring, AES_MATERIAL)
    assert client("Decrypt", CiphertextBlob=blob)["Plaintext"] == "aGVsbG8="
    clock.advance(days=10_000)
    client.usable(expiring)


def test_disabled_key_and_key_to_be_deleted(client, clock, expiring, objects):
    client("DisableKey", KeyId=expiring)
    other = client.create()
    client.import_material(other, KeyMaterialExpireUnix=clock.unix(hours=1))
    client("ScheduleKeyDeletion", KeyId=other, PendingWindowInDays="7")
    clock.advance(hours=1)
    client.kms.sweep()
    assert (client.state(expiring), client.state(other)) == ("PendingImport", "PendingDeletion")
    assert objects() == 0


def test_key_is_deleted_on_its_date(client, clock, objects):
    key_id = client.create()
    client.import_material(key_id)
    blob = client.usable(key_id)
    client("ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays="7")
    clock.advance(days=7, seconds=-1)
    client.kms.sweep()
    assert (client.state(key_id), objects()) == ("PendingDeletion", 1)
    clock.advance(seconds=1)
    # Deleted at once, with or without a sweep.
    for action in ("DescribeKey", "CancelKeyDeletion", "DeleteKeyMaterial"):
        with pytest.raises(KeyNotFound):
            client(action, KeyId=key_id)
    with pytest.raises(KeyNotFound):
        client("Decrypt", CiphertextBlob=blob)
    assert client("ListKeys")["TotalCount"] == 0
    client.kms.sweep()
    assert objects() == 0
    with client.kms._database.read() as transaction:
        assert transaction.execute(text("SELECT count(*) FROM keys")).scalar() == 0


def test_cancelled_deletion_does_not_happen(client, clock, objects):
    key_id = client.create()
    client.import_material(key_id)
    client("ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays="7")
    client("CancelKeyDeletion", KeyId=key_id)
    clock.advance(days=8)
    client.kms.sweep()
    assert (client.state(key_id), objects()) == ("Enabled", 1)


def test_thread_sweeps_until_it_is_stopped():
    import threading

    swept = threading.Event()
    rounds = []

    def sweep():
        rounds.append(len(rounds))
        if len(rounds) == 1:
            raise ValueError("one round fails")
        swept.set()

    sweeper = Sweeper(sweep, 0.01)
    assert swept.wait(10)
    sweeper.stop()
    sweeper.stop()
    after = len(rounds)
    assert not sweeper._thread.is_alive()
    assert len(rounds) == after
