"""Material goes on time, keys are deleted on time: at use, by the sweeper, and across restarts."""

import pytest
from kms_fakes import AES_MATERIAL, OTHER_MATERIAL, Client
from sqlalchemy import text

from hsmwrap.backend import Custody, KeyRef
from hsmwrap.catalog import KeySpec
from hsmwrap.errors import InvalidKeyMaterial, KeyNotFound
from hsmwrap.kms import RejectedPendingImport
from hsmwrap.kms.objects import doom
from hsmwrap.kms.sweeper import Sweeper


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


def test_gone_from_the_row_while_the_hsm_is_away(client, clock, expiring, objects):
    backend = client.kms._backends["HSM"]
    clock.advance(hours=1)
    backend.away = True
    client.kms.sweep()
    assert row(client.kms, expiring)[:2] == ("PendingImport", None)
    assert objects() == 1
    backend.away = False
    client.kms.sweep()
    assert objects() == 0


def test_object_of_a_backend_that_is_gone_keeps_no_other(client, clock, expiring, objects):
    foreign = KeyRef("gone", KeySpec.ALIYUN_AES_256, Custody.HSM_INTERNAL, bytes(16))
    with client.kms._database.write() as transaction:
        doom(transaction, foreign, clock())
    clock.advance(hours=1)
    client.kms.sweep()
    assert objects() == 0
    with client.kms._database.read() as transaction:
        assert transaction.execute(text("SELECT count(*) FROM doomed_objects")).scalar() == 1


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
    # Gone at once, swept or not.
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
