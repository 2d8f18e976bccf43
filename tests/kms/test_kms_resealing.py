"""Rotation without re-imports: stored keys move to the current key set, and no needed set goes."""

import json
import threading
from dataclasses import replace
from datetime import timedelta

import pytest
from support.kms.fakes import AES_MATERIAL, OTHER_MATERIAL, SM4_MATERIAL, Client, hsm_of

from hsmwrap.backend import KeyRef
from hsmwrap.errors import (
    ConfigurationError,
    HsmError,
    HsmUnavailable,
    UnsupportedOperation,
)
from hsmwrap.kms.keysets import SETTLING, Progress, StoredKeys, note_current
from hsmwrap.testing import MemoryBackend

pytestmark = pytest.mark.slow
SEALED = "HsmEncryptedDatabase"
WAIT = timedelta(hours=25, minutes=1)


@pytest.fixture
def kms(open_kms):
    return open_kms(SEALED)


@pytest.fixture
def client(kms):
    return Client(kms)


class Audit(list):
    def __call__(self, action, key_id):
        self.append((action, key_id))


@pytest.fixture
def audit():
    return Audit()


@pytest.fixture
def stored(kms, audit):
    return StoredKeys(kms._database, kms._backends["HSM"], audit)


def memory_of(kms):
    return hsm_of(kms).ability(MemoryBackend)


def rotate(kms):
    memory = memory_of(kms)
    return type(memory).rotate_keys({"store": memory.store}).key_set


def retire(kms, key_set):
    memory = memory_of(kms)
    type(memory).retire_keys({"store": memory.store}, key_set)


def imported(client, material=AES_MATERIAL, **parameters):
    key_id = client.create(**parameters)
    client.import_material(key_id, material)
    return key_id


def references(kms):
    with kms._database.read() as transaction:
        rows = transaction.connection().exec_driver_sql("SELECT key_id, reference FROM keys")
        return {key_id: bytes(reference) for key_id, reference in rows if reference}


def set_reference(kms, key_id, reference):
    with kms._database.write() as transaction:
        connection = transaction.connection()
        mark = "?" if connection.dialect.name == "sqlite" else "%s"
        connection.exec_driver_sql(
            f"UPDATE keys SET reference = {mark} WHERE key_id = {mark}", (reference, key_id)
        )


# --- moving ---------------------------------------------------------------------------------------


def test_every_key_works_after_its_key_set_was_retired(kms, client, stored, audit):
    """Imported ones of both specs, disabled, pending deletion, and those that the KMS made."""
    keys = [imported(client), imported(client, SM4_MATERIAL, KeySpec="Aliyun_SM4")]
    made = client("CreateKey", ProtectionLevel="HSM")["KeyMetadata"]["KeyId"]
    disabled, leaving = imported(client), imported(client)
    blobs = {key_id: client.usable(key_id) for key_id in (*keys, made, disabled, leaving)}
    client("DisableKey", KeyId=disabled)
    client("ScheduleKeyDeletion", KeyId=leaving, PendingWindowInDays="7")
    assert rotate(kms) == "2"
    assert stored.usage() == {"1": 5}

    assert stored.reseal() == Progress(examined=5, moved=5)
    assert stored.usage() == {"2": 5}
    assert sorted(audit) == sorted(("ResealKey", key_id) for key_id in blobs)
    retire(kms, "1")
    client("EnableKey", KeyId=disabled)
    client("CancelKeyDeletion", KeyId=leaving)
    for key_id, blob in blobs.items():
        assert client("Decrypt", CiphertextBlob=blob)["Plaintext"] == "aGVsbG8="
        client.usable(key_id)


def test_a_key_that_did_not_move_is_lost_with_its_key_set(kms, client):
    """The control of the test before. The error says what the operator has lost, and why."""
    made = client("CreateKey", ProtectionLevel="HSM")["KeyMetadata"]["KeyId"]
    blobs = {key_id: client.usable(key_id) for key_id in (imported(client), made)}
    rotate(kms)
    retire(kms, "1")
    for key_id, blob in blobs.items():
        with pytest.raises(HsmError, match=rf"{key_id}: key set 1, which sealed this key, was re"):
            client("Decrypt", CiphertextBlob=blob)


def test_a_second_run_has_nothing_to_do(kms, client, stored, audit):
    imported(client)
    rotate(kms)
    stored.reseal()
    audit.clear()
    assert stored.reseal() == Progress(examined=1)
    assert audit == []


def test_keys_are_read_in_batches(kms, client, stored, monkeypatch):
    monkeypatch.setattr("hsmwrap.kms.keysets.BATCH", 2)
    for _ in range(5):
        imported(client)
    rotate(kms)
    assert stored.usage() == {"1": 5}
    assert stored.reseal() == Progress(examined=5, moved=5)
    assert stored.usage() == {"2": 5}


def test_a_run_that_was_stopped_goes_on(kms, client, stored):
    for _ in range(3):
        imported(client)
    rotate(kms)
    seen = []

    def stop(progress):
        seen.append(progress)
        if progress.moved == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stored.reseal(report=stop)
    assert seen == [Progress(1, 1), Progress(2, 2)]
    assert stored.usage() == {"1": 1, "2": 2}
    assert stored.reseal() == Progress(examined=3, moved=1)


def test_the_same_material_is_imported_again_afterwards_and_no_other(kms, client, stored):
    key_id = imported(client)
    rotate(kms)
    stored.reseal()
    client.import_material(key_id)
    with pytest.raises(Exception, match="material"):
        client.import_material(key_id, OTHER_MATERIAL)


# --- beside other operations ----------------------------------------------------------------------


@pytest.fixture
def meanwhile(kms, monkeypatch):
    """Does something between the re-sealing of a key and the change of its row."""

    def between(action):
        memory = memory_of(kms)
        reseal = memory.reseal

        def then(*arguments, **named):
            answer = reseal(*arguments, **named)
            action()
            return answer

        monkeypatch.setattr(memory, "reseal", then)

    return between


def test_a_re_import_meanwhile_counts(kms, client, stored, audit, meanwhile):
    key_id = imported(client)
    rotate(kms)
    meanwhile(lambda: client.import_material(key_id))
    before = references(kms)
    assert stored.reseal() == Progress(examined=1)
    assert references(kms) != before
    assert audit == []
    client.usable(key_id)


def test_a_deletion_meanwhile_counts(kms, client, stored, audit, meanwhile):
    key_id = imported(client)
    rotate(kms)
    meanwhile(lambda: client("DeleteKeyMaterial", KeyId=key_id))
    assert stored.reseal() == Progress(examined=1)
    assert references(kms) == {}
    assert client.state(key_id) == "PendingImport"
    assert audit == []


def test_an_expiry_meanwhile_counts(kms, client, clock, stored, meanwhile):
    key_id = client.create()
    client.import_material(key_id, KeyMaterialExpireUnix=clock.unix(hours=1))
    rotate(kms)
    meanwhile(lambda: kms.sweep(clock.advance(hours=1)))
    assert stored.reseal() == Progress(examined=1)
    assert client.state(key_id) == "PendingImport"


def test_use_beside_a_run_and_the_retirement_does_not_fail(kms, client, stored):
    key_ids = [imported(client) for _ in range(4)]
    blobs = [client.usable(key_id) for key_id in key_ids]
    failed, stop = [], threading.Event()

    def use():
        mine = Client(kms)
        while not stop.is_set():
            for blob in blobs:
                try:
                    mine("Decrypt", CiphertextBlob=blob)
                except Exception as error:
                    failed.append(error)

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for old in ("1", "2"):
        rotate(kms)
        assert stored.reseal().moved == len(key_ids)
        retire(kms, old)
    stop.set()
    for thread in threads:
        thread.join()
    assert failed == []


def test_two_runs_at_once_move_each_key_once(kms, client, stored, audit):
    for _ in range(6):
        imported(client)
    rotate(kms)
    done = []
    runs = [threading.Thread(target=lambda: done.append(stored.reseal())) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [each.failed for each in done] == [0, 0]
    assert sum(each.moved for each in done) == len(audit) == len(set(audit)) == 6


# --- what does not move ---------------------------------------------------------------------------


def test_a_key_that_does_not_open_is_counted_and_the_others_move(kms, client, stored, caplog):
    lost, fine = imported(client), imported(client)
    reference = references(kms)[lost]
    set_reference(kms, lost, reference[:-1] + bytes([reference[-1] ^ 1]))
    rotate(kms)
    assert stored.reseal() == Progress(examined=2, moved=1, failed=1)
    (record,) = [each for each in caplog.records if each.message == "a key was not re-sealed"]
    assert (record.key_id, record.error) == (lost, "KeyNotFound")
    client.usable(fine)


def test_a_key_under_another_key_s_reference_does_not_move(kms, client, stored):
    """Its check value is another one: the row would go on with a key that is not its own."""
    one, other = imported(client), imported(client, OTHER_MATERIAL)
    set_reference(kms, one, references(kms)[other])
    rotate(kms)
    assert stored.reseal() == Progress(examined=2, moved=1, failed=1)


def test_a_reference_that_does_not_parse_stops_nothing(kms, client, stored, caplog):
    broken, _ = imported(client), imported(client)
    set_reference(kms, broken, b"\xff")
    rotate(kms)
    assert stored.reseal() == Progress(examined=1, moved=1)
    assert "a stored key reference does not parse" in caplog.messages


def test_keys_of_another_backend_are_left_alone(kms, client, stored, caplog):
    key_id = imported(client)
    foreign = replace(KeyRef.from_bytes(references(kms)[key_id]), backend="another")
    set_reference(kms, key_id, foreign.to_bytes())
    assert stored.usage() == {}
    assert caplog.messages == []


def test_an_unavailable_hsm_stops_the_run(kms, client, stored):
    imported(client)
    rotate(kms)
    hsm_of(kms).unavailable = True
    with pytest.raises(HsmUnavailable):
        stored.reseal()
    hsm_of(kms).unavailable = False
    assert stored.reseal().moved == 1


def test_resident_keys_stay_as_they_are(open_kms, audit):
    kms = open_kms("HsmInternal")
    client = Client(kms)
    key_id = imported(client)
    rotate(kms)
    stored = StoredKeys(kms._database, kms._backends["HSM"], audit)
    assert stored.usage() == {}
    assert stored.reseal() == Progress()
    retire(kms, "1")
    client.usable(key_id)


def test_a_backend_without_the_ability_says_so(kms, audit):
    class Plain(MemoryBackend):
        def ability(self, kind):
            return None if kind.__name__ == "ReSealsKeys" else super().ability(kind)

    with pytest.raises(UnsupportedOperation, match="does not re-seal keys"):
        StoredKeys(kms._database, Plain(), audit)


# --- retirement -----------------------------------------------------------------------------------


def test_a_set_that_keys_need_is_not_retired(kms, client, clock, stored):
    for _ in range(3):
        imported(client)
    rotate(kms)
    kms.sweep()
    now = clock.advance(days=3)
    with pytest.raises(ConfigurationError, match=r"needed by 3 stored keys .*keys reseal"):
        stored.require_unneeded("1", WAIT, now)
    stored.reseal()
    stored.require_unneeded("1", WAIT, now)


def test_a_set_that_import_tokens_need_is_not_retired(kms, clock, stored):
    rotate(kms)
    kms.sweep()
    rotated = clock()
    end = (rotated + WAIT).isoformat()
    for since in (timedelta(0), WAIT - timedelta(seconds=1)):
        with pytest.raises(ConfigurationError) as caught:
            stored.require_unneeded("1", WAIT, rotated + since)
        assert f"import tokens, which may be valid until {end}" in str(caught.value)
        assert "stored keys" not in str(caught.value)
    stored.require_unneeded("1", WAIT, rotated + WAIT)


def test_a_rotation_counts_from_when_it_was_first_seen(kms, clock, stored):
    """Not from before it, and not again with each look."""
    rotate(kms)
    seen = clock.advance(days=9)  # no sweep since the rotation
    with pytest.raises(ConfigurationError, match="import tokens"):
        stored.require_unneeded("1", WAIT, seen)
    note_current(kms._database, kms._backends["HSM"], seen + timedelta(hours=20))
    stored.require_unneeded("1", WAIT, seen + WAIT)


def test_a_set_that_was_never_seen_current_waits_as_well(kms, clock, stored):
    rotate(kms)
    rotate(kms)  # and no sweep between them
    kms.sweep()
    with pytest.raises(ConfigurationError, match="import tokens"):
        stored.require_unneeded("2", WAIT, clock())
    stored.require_unneeded("2", WAIT, clock() + WAIT)


def test_the_current_set_is_not_retired(kms, stored, clock):
    with pytest.raises(ConfigurationError, match="key set 1 is current; rotate first"):
        stored.require_unneeded("1", WAIT, clock())


# --- the sweeper ----------------------------------------------------------------------------------


def audited(tmp_path):
    lines = (tmp_path / "audit.log").read_text().splitlines()
    return [json.loads(line)["action"] for line in lines]


def test_sweeps_move_keys_some_at_a_time(open_kms, clock, tmp_path):
    kms = open_kms(SEALED, reseal_at_once=2)
    client = Client(kms)
    for _ in range(5):
        imported(client)
    stored = StoredKeys(kms._database, kms._backends["HSM"], Audit())
    rotate(kms)
    left = []
    for _ in range(3):
        kms.sweep()
        left.append(stored.usage().get("1", 0))
    assert left == [3, 1, 0]
    assert audited(tmp_path).count("ResealKey") == 5


def test_sweeps_do_not_move_keys_unless_they_are_told(kms, client, stored):
    imported(client)
    rotate(kms)
    kms.sweep()
    assert stored.usage() == {"1": 1}


def test_sweeps_look_again_until_no_process_seals_under_the_old_set(open_kms, clock, monkeypatch):
    kms = open_kms(SEALED, reseal_at_once=10)
    client = Client(kms)
    stored = StoredKeys(kms._database, kms._backends["HSM"], Audit())
    rotate(kms)
    kms.sweep()
    # An import that a process finished under the old set, which it still held for current.
    memory = memory_of(kms)
    with monkeypatch.context() as late:
        late.setattr(memory, "current_key_set", lambda: "1")
        imported(client)
    clock.advance(seconds=SETTLING.total_seconds() - 1)
    kms.sweep()
    assert stored.usage() == {"2": 1}
    clock.advance(seconds=1)
    kms.sweep()  # settled: from here on, sweeps read no rows for it
    monkeypatch.setattr(StoredKeys, "reseal", None)
    kms.sweep()
