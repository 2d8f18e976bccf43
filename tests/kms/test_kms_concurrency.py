"""Concurrent imports, deletions and uses of one key are atomic and take effect in turn."""

import threading
from datetime import UTC, datetime
from functools import partial

import pytest
from sqlalchemy import text
from support.kms.fakes import (
    AES_MATERIAL,
    OTHER_MATERIAL,
    Client,
    build_kms,
    hsm_of,
    import_request,
)

from hsmwrap.backend import Custody, KeyRef
from hsmwrap.catalog import KeySpec
from hsmwrap.errors import (
    HsmError,
    HsmwrapError,
    InvalidImportToken,
    InvalidKeyMaterial,
    ServiceUnavailable,
)
from hsmwrap.kms import StateModifiedFailed
from hsmwrap.kms.errors import CommitUnknown, LeaseLost
from hsmwrap.kms.objects import LEASE, Objects, schedule_destruction
from hsmwrap.kms.once import UsedImportTokens
from hsmwrap.kms.schema import ScheduledDestruction

pytestmark = pytest.mark.slow


def together(*calls):
    """Run the calls at once; the code of each answer."""
    start, codes = threading.Barrier(len(calls)), [None] * len(calls)

    def run(index, call):
        start.wait()
        try:
            call()
            codes[index] = "ok"
        except HsmwrapError as error:
            codes[index] = error.code

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return codes


def scheduled(kms):
    with kms._database.read() as transaction:
        return transaction.execute(text("SELECT count(*) FROM scheduled_destructions")).scalar()


class Stop(Client):
    """A client whose KMS runs a call of the test between two steps of an import."""

    when = None

    def __init__(self, open_kms, **more):
        super().__init__(open_kms(step=self.step, **more))

    def at(self, step, call):
        self.when, self.call = step, call

    def step(self, name):
        if name == self.when:
            self.when = None
            self.call()


@pytest.fixture
def stop(open_kms):
    return Stop(open_kms)


@pytest.fixture
def single_use(open_kms):
    return Stop(open_kms, single_use=True)


def test_many_imports_into_one_key(open_kms, objects):
    clients = [Client(open_kms()), Client(open_kms())]
    key_id = clients[0].create()
    parameters = clients[0].parameters(key_id)
    calls = [
        partial(clients[i % 2].import_material, key_id, AES_MATERIAL, parameters) for i in range(8)
    ]
    assert together(*calls) == ["ok"] * 8
    clients[0].usable(key_id)
    assert (objects(), scheduled(clients[0].kms)) == (1, 0)


def test_first_imports_of_different_material(open_kms, objects):
    clients = [Client(open_kms()), Client(open_kms())]
    for _ in range(3):
        key_id = clients[0].create()
        parameters = clients[0].parameters(key_id)
        codes = together(
            partial(clients[0].import_material, key_id, AES_MATERIAL, parameters),
            partial(clients[1].import_material, key_id, OTHER_MATERIAL, parameters),
        )
        # Not both: the second commit finds the check value of the first.
        assert sorted(codes) == ["InvalidKeyMaterial", "ok"]
        clients[0].usable(key_id)
    assert (objects(), scheduled(clients[0].kms)) == (3, 0)


def test_second_of_two_imports_finds_the_firsts_check_value(stop, open_kms, objects):
    other = Client(open_kms())
    key_id = stop.create()
    stop.at("material imported", lambda: other.import_material(key_id, OTHER_MATERIAL))
    with pytest.raises(InvalidKeyMaterial):
        stop.import_material(key_id, AES_MATERIAL)
    other.usable(key_id)
    assert (objects(), scheduled(stop.kms)) == (1, 0)


def test_deletion_during_an_import_comes_before_it(stop, open_kms, objects):
    other = Client(open_kms())
    key_id = stop.create()
    stop.import_material(key_id)
    stop.at("material imported", lambda: other("DeleteKeyMaterial", KeyId=key_id))
    stop.import_material(key_id)
    stop.usable(key_id)
    assert (objects(), scheduled(stop.kms)) == (1, 0)


def test_scheduled_deletion_during_an_import_refuses_it(stop, open_kms, objects):
    other = Client(open_kms())
    key_id = stop.create()
    stop.at(
        "material imported",
        lambda: other("ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays="7"),
    )
    with pytest.raises(StateModifiedFailed):
        stop.import_material(key_id)
    assert stop.state(key_id) == "PendingDeletion"
    assert (objects(), scheduled(stop.kms)) == (0, 0)


def test_import_that_outlives_its_lease_fails(stop, open_kms, objects, clock):
    other = Client(open_kms())
    key_id = stop.create()

    def others_give_it_up():
        clock.advance(seconds=LEASE.total_seconds())
        other.kms.sweep()
        assert objects() == 0

    stop.at("material imported", others_give_it_up)
    with pytest.raises(LeaseLost):
        stop.import_material(key_id)
    assert (stop.state(key_id), objects(), scheduled(stop.kms)) == ("PendingImport", 0, 0)
    stop.import_material(key_id)
    stop.usable(key_id)


@pytest.fixture
def given_up(open_kms, clock):
    """Another process treats the running import as dead, and sweeps ``times`` times."""
    other = Client(open_kms())

    def give_up(times=1, *, unavailable=False):
        for _ in range(times):
            clock.advance(seconds=LEASE.total_seconds())
            hsm_of(other.kms).unavailable = unavailable
            other.kms.sweep()
        hsm_of(other.kms).unavailable = False
        other.kms.sweep()

    return give_up


@pytest.mark.parametrize("times", [1, 2, 3])
def test_object_made_after_it_was_given_up_is_destroyed(stop, given_up, objects, times):
    key_id = stop.create()
    stop.at("destruction scheduled", lambda: given_up(times))
    with pytest.raises(LeaseLost):
        stop.import_material(key_id)
    assert (stop.state(key_id), objects(), scheduled(stop.kms)) == ("PendingImport", 0, 0)
    stop.at("destruction scheduled", lambda: given_up(times))
    with pytest.raises(LeaseLost):
        stop("CreateKey", ProtectionLevel="HSM")
    assert (objects(), scheduled(stop.kms)) == (0, 0)


@pytest.mark.parametrize("unavailable", [False, True])
def test_object_made_after_it_was_given_up_by_a_process_that_is_then_killed(
    stop, given_up, objects, monkeypatch, unavailable
):
    class Killed(BaseException):
        pass

    def die():
        raise Killed

    def given_up_then_killed():
        given_up(unavailable=unavailable)
        stop.at("material imported", die)

    key_id = stop.create()
    monkeypatch.setattr(Objects, "_destroy_pending", lambda *_: None)
    stop.at("destruction scheduled", given_up_then_killed)
    with pytest.raises(Killed):
        stop.import_material(key_id)
    assert objects() == 1
    given_up()
    assert (objects(), scheduled(stop.kms)) == (0, 0)


def test_object_scheduled_again_during_a_sweep_stays_scheduled(stop, open_kms, objects, clock):
    other = Client(open_kms())
    importing = other.kms.operations.material._core.objects
    backend = hsm_of(other.kms)
    pending = importing._schedule_pending(backend, KeySpec.ALIYUN_AES_256)

    def fail_meanwhile():
        backend.put_object(pending.data)
        backend.unavailable = True
        importing._destroy_pending(pending, LeaseLost())

    stop.at("object destroyed", fail_meanwhile)
    clock.advance(seconds=LEASE.total_seconds() + 1)
    stop.kms.sweep()
    assert (objects(), scheduled(stop.kms)) == (1, 1)
    stop.kms.sweep()
    assert (objects(), scheduled(stop.kms)) == (0, 0)


@pytest.fixture
def lose_the_answer(monkeypatch):
    """The next commit of a KMS happens, but its answer is lost."""

    def lose(kms):
        dialect = kms._database.engine.dialect
        commit = dialect.do_commit

        def commits(connection):
            monkeypatch.undo()
            commit(connection)
            raise dialect.loaded_dbapi.OperationalError("connection lost")

        monkeypatch.setattr(dialect, "do_commit", commits)

    return lose


def test_commit_whose_answer_is_lost_keeps_the_object(stop, lose_the_answer, objects, clock):
    key_id = stop.create()
    stop.at("material imported", lambda: lose_the_answer(stop.kms))
    with pytest.raises(CommitUnknown):
        stop.import_material(key_id)
    clock.advance(days=1)
    stop.kms.sweep()
    stop.usable(key_id)
    assert (objects(), scheduled(stop.kms)) == (1, 0)


def fail_after_unwrapping(stop, other, key_id, given_up):
    """Ways in which an import fails after the material was unwrapped."""

    def schedule_deletion():
        other("ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays="7")

    def lose_the_database():
        raise ServiceUnavailable("the database is unavailable")

    return {
        "Rejected.StateModifiedFailed": schedule_deletion,
        "InvalidKeyMaterial": lambda: other.import_material(key_id, OTHER_MATERIAL),
        "lease lost": given_up,
        "no database": lose_the_database,
    }


FAILURES = [
    "Rejected.StateModifiedFailed",
    "InvalidKeyMaterial",
    "lease lost",
    "no database",
]


@pytest.mark.parametrize("failure", FAILURES)
def test_failed_import_gives_a_single_use_token_back(single_use, given_up, open_kms, failure):
    other = Client(open_kms(single_use=True))
    key_id = single_use.create()
    parameters = single_use.parameters(key_id)
    fails = fail_after_unwrapping(single_use, other, key_id, given_up)[failure]
    single_use.at("material imported", fails)
    with pytest.raises(HsmwrapError):
        single_use.import_material(key_id, AES_MATERIAL, parameters)
    if failure == "Rejected.StateModifiedFailed":
        other("CancelKeyDeletion", KeyId=key_id)
    material = OTHER_MATERIAL if failure == "InvalidKeyMaterial" else AES_MATERIAL
    other.import_material(key_id, material, parameters)
    other.usable(key_id)
    with pytest.raises(InvalidImportToken):
        other.import_material(key_id, material, parameters)


def test_import_that_may_have_happened_keeps_a_single_use_token(single_use, lose_the_answer):
    key_id = single_use.create()
    parameters = single_use.parameters(key_id)
    single_use.at("material imported", lambda: lose_the_answer(single_use.kms))
    with pytest.raises(CommitUnknown):
        single_use.import_material(key_id, AES_MATERIAL, parameters)
    with pytest.raises(InvalidImportToken):
        single_use.import_material(key_id, AES_MATERIAL, parameters)


def test_token_that_cannot_be_given_back_hides_no_failure(single_use, monkeypatch, caplog):
    key_id = single_use.create()
    parameters = single_use.parameters(key_id)

    def lose_the_database():
        def unavailable(*_):
            raise ServiceUnavailable("the database is unavailable")

        monkeypatch.setattr(UsedImportTokens, "release", unavailable)
        raise ZeroDivisionError

    single_use.at("material imported", lose_the_database)
    with pytest.raises(ZeroDivisionError):
        single_use.import_material(key_id, AES_MATERIAL, parameters)
    assert "stays used" in caplog.text


def test_sweeps_do_not_wait_for_the_locks_of_others(postgres_cluster, open_backend, tmp_path):
    kms = build_kms(postgres_cluster.new_database(), open_backend(), tmp_path / "audit.log")
    keys = [KeyRef("hsm", KeySpec.ALIYUN_SM4, Custody.HSM_INTERNAL, bytes([i])) for i in (1, 2)]
    now = datetime.now(UTC)
    with kms._database.write() as transaction:
        for key in keys:
            schedule_destruction(transaction, key, now)
    with kms._database.write() as transaction:
        transaction.get(ScheduledDestruction, keys[0].to_bytes(), with_for_update=True)
        sweep = threading.Thread(target=kms.sweep)
        sweep.start()
        sweep.join(5)
        assert not sweep.is_alive()
        assert scheduled(kms) == 1
    kms.sweep()
    assert scheduled(kms) == 0
    kms.close()


def test_object_whose_destruction_started_is_not_put_into_a_row(stop, open_kms, objects, clock):
    other = Client(open_kms())
    key_id = stop.create()

    def others_begin_to_give_it_up():
        clock.advance(seconds=LEASE.total_seconds())
        hsm_of(other.kms).unavailable = True
        other.kms.sweep()
        assert (objects(), scheduled(other.kms)) == (1, 1)

    stop.at("material imported", others_begin_to_give_it_up)
    with pytest.raises(ServiceUnavailable):
        stop.import_material(key_id)
    assert (stop.state(key_id), objects(), scheduled(stop.kms)) == ("PendingImport", 0, 0)


def test_sweeps_leave_running_imports_alone(stop, open_kms, objects, clock):
    other = Client(open_kms())
    key_id = stop.create()

    def sweep():
        clock.advance(seconds=LEASE.total_seconds() - 1)
        other.kms.sweep()

    stop.at("material imported", sweep)
    stop.import_material(key_id)
    clock.advance(days=1)
    other.kms.sweep()
    other.usable(key_id)
    assert objects() == 1


def test_imports_deletions_and_uses_in_a_tangle(open_kms, objects):
    clients = [Client(open_kms()), Client(open_kms())]
    key_id = clients[0].create()
    request = import_request(clients[0].parameters(key_id), AES_MATERIAL)

    def importing(client):
        client("ImportKeyMaterial", **request)

    def deleting(client):
        client("DeleteKeyMaterial", KeyId=key_id)

    def using(client):
        client("Encrypt", KeyId=key_id, Plaintext="aGVsbG8=")

    for _ in range(4):
        calls = [importing, deleting, using, importing, using, deleting]
        codes = together(*(partial(call, clients[i % 2]) for i, call in enumerate(calls)))
        assert {codes[i] for i in (0, 1, 3, 5)} == {"ok"}
        assert {codes[i] for i in (2, 4)} <= {"ok", "Rejected.PendingImport"}
        assert objects() == (1 if clients[0].state(key_id) == "Enabled" else 0)
        assert scheduled(clients[0].kms) == 0


def test_use_follows_a_key_whose_object_was_replaced(client, open_kms):
    other = Client(open_kms())
    key_id = client.create()
    client.import_material(key_id)
    backend = client.kms._backends["HSM"]
    encrypt = backend.encrypt

    def replaced_meanwhile(*arguments):
        backend.encrypt = encrypt
        other.import_material(key_id)
        return encrypt(*arguments)

    backend.encrypt = replaced_meanwhile
    client.usable(key_id)


def test_use_of_a_key_whose_object_was_lost(client, open_backend):
    key_id = client.create()
    client.import_material(key_id)
    backend = open_backend()
    for object_id in backend.objects():
        backend.remove_object(object_id)
    backend.close()
    with pytest.raises(HsmError) as caught:
        client.usable(key_id)
    assert caught.value.code == "Rejected.Unavailable"


def test_failed_import_is_cleaned_up_when_the_hsm_is_back(stop, objects, clock):
    backend = hsm_of(stop.kms)
    key_id = stop.create()

    def lose_everything():
        backend.unavailable = True
        raise ServiceUnavailable("the database is unavailable")

    stop.at("material imported", lose_everything)
    with pytest.raises(ServiceUnavailable):
        stop.import_material(key_id)
    assert objects() == 1
    backend.unavailable = False
    stop.kms.sweep()
    assert (objects(), scheduled(stop.kms), stop.state(key_id)) == (0, 0, "PendingImport")
