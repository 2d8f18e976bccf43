"""Imports, deletions and uses of one key at the same time: one after the other, whole or not."""

import threading
from functools import partial

import pytest
from kms_fakes import AES_MATERIAL, OTHER_MATERIAL, Client, import_request
from sqlalchemy import text

from hsmwrap.errors import HsmError, HsmwrapError, InvalidKeyMaterial, ServiceUnavailable
from hsmwrap.kms import StateModifiedFailed
from hsmwrap.kms.objects import LEASE


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


def doomed(kms):
    with kms._database.read() as transaction:
        return transaction.execute(text("SELECT count(*) FROM doomed_objects")).scalar()


@pytest.fixture
def stop(open_kms):
    """A client whose KMS runs a call of the test's between two steps of an import."""

    class Stop(Client):
        def at(self, step, call):
            self.when, self.call = step, call

    def step(name):
        if name == client.when:
            client.when = None
            client.call()

    client = Stop(open_kms(step=step))
    client.when = None
    return client


def test_many_imports_into_one_key(open_kms, objects):
    clients = [Client(open_kms()), Client(open_kms())]
    key_id = clients[0].create()
    parameters = clients[0].parameters(key_id)
    calls = [
        partial(clients[i % 2].import_material, key_id, AES_MATERIAL, parameters) for i in range(8)
    ]
    assert together(*calls) == ["ok"] * 8
    clients[0].usable(key_id)
    assert (objects(), doomed(clients[0].kms)) == (1, 0)


def test_first_imports_of_different_material(open_kms, objects):
    clients = [Client(open_kms()), Client(open_kms())]
    for _ in range(3):
        key_id = clients[0].create()
        parameters = clients[0].parameters(key_id)
        codes = together(
            partial(clients[0].import_material, key_id, AES_MATERIAL, parameters),
            partial(clients[1].import_material, key_id, OTHER_MATERIAL, parameters),
        )
        # Not both: the second that commits finds the first's check value.
        assert sorted(codes) == ["InvalidKeyMaterial", "ok"]
        clients[0].usable(key_id)
    assert (objects(), doomed(clients[0].kms)) == (3, 0)


def test_second_of_two_imports_finds_the_firsts_check_value(stop, open_kms, objects):
    other = Client(open_kms())
    key_id = stop.create()
    stop.at("material imported", lambda: other.import_material(key_id, OTHER_MATERIAL))
    with pytest.raises(InvalidKeyMaterial):
        stop.import_material(key_id, AES_MATERIAL)
    other.usable(key_id)
    assert (objects(), doomed(stop.kms)) == (1, 0)


def test_deletion_during_an_import_comes_before_it(stop, open_kms, objects):
    other = Client(open_kms())
    key_id = stop.create()
    stop.import_material(key_id)
    stop.at("material imported", lambda: other("DeleteKeyMaterial", KeyId=key_id))
    stop.import_material(key_id)
    stop.usable(key_id)
    assert (objects(), doomed(stop.kms)) == (1, 0)


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
    assert (objects(), doomed(stop.kms)) == (0, 0)


def test_import_that_outlives_its_lease_fails(stop, open_kms, objects, clock):
    other = Client(open_kms())
    key_id = stop.create()

    def others_give_it_up():
        clock.advance(seconds=LEASE.total_seconds())
        other.kms.sweep()
        assert objects() == 0

    stop.at("material imported", others_give_it_up)
    with pytest.raises(ServiceUnavailable):
        stop.import_material(key_id)
    assert (stop.state(key_id), objects(), doomed(stop.kms)) == ("PendingImport", 0, 0)
    stop.import_material(key_id)
    stop.usable(key_id)


def test_condemned_object_is_not_taken_into_a_row(stop, open_kms, objects, clock):
    other = Client(open_kms())
    key_id = stop.create()

    def others_begin_to_give_it_up():
        clock.advance(seconds=LEASE.total_seconds())
        other.kms._backends["HSM"].away = True
        other.kms.sweep()
        assert (objects(), doomed(other.kms)) == (1, 1)

    stop.at("material imported", others_begin_to_give_it_up)
    with pytest.raises(ServiceUnavailable):
        stop.import_material(key_id)
    assert (stop.state(key_id), objects(), doomed(stop.kms)) == ("PendingImport", 0, 0)


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
        assert doomed(clients[0].kms) == 0


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
        backend._file(object_id).unlink()
    backend.close()
    with pytest.raises(HsmError) as caught:
        client.usable(key_id)
    assert caught.value.code == "InternalFailure"


def test_failed_import_is_cleaned_up_when_the_hsm_is_back(stop, objects, clock):
    backend = stop.kms._backends["HSM"]
    key_id = stop.create()

    def lose_everything():
        backend.away = True
        raise ServiceUnavailable("the database is away")

    stop.at("material imported", lose_everything)
    with pytest.raises(ServiceUnavailable):
        stop.import_material(key_id)
    assert objects() == 1
    backend.away = False
    stop.kms.sweep()
    assert (objects(), doomed(stop.kms), stop.state(key_id)) == (0, 0, "PendingImport")
