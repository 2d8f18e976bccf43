"""The HSM in another process, killed under load: p11-kit's server in front of SoftHSM.

By field note 52, a dead server is DEVICE_ERROR at once, for every call. C_Finalize and
C_Initialize then succeed without a server too, but no slot lists a token until both are called
again with a server there. So the backend's own recovery brings it back, in the same process.

The backend lets one thread at a time into this module, because its private function table can only
be initialised without locking. Otherwise p11-kit's client lets one of several waiting threads read
the socket for all; when the server died during that, the others sometimes waited for ever inside
the module (field note 43).
"""

import time

import pytest
from pkcs11.constants import Attribute, ObjectClass
from pkcs11.mechanisms import Mechanism
from soak.load import LoadTarget
from soak.runner import TICK, Plan, Soak
from support.services.p11kit import p11kit_server
from support.services.softhsm import make_softhsm

from hsmwrap import checkvalue
from hsmwrap.backend import Custody
from hsmwrap.errors import HsmUnavailable
from hsmwrap.pkcs11 import Pkcs11Backend

KILLS = 5
LONGEST = 120
"""Seconds for what takes less than five."""


@pytest.fixture
def server(tmp_path):
    token = make_softhsm(tmp_path / "token", label="killed")
    with p11kit_server(token, tmp_path) as running:
        yield running


@pytest.fixture
def backend(server):
    settings = server.settings_with_keys("kill", initial_backoff=0.02, max_backoff=0.1)
    with Pkcs11Backend.from_settings(settings) as opened:
        yield opened


@pytest.fixture
def soak(backend):
    return Soak([LoadTarget(backend)], Plan(seconds=0, seed=1, threads=8))


def test_killed_and_restarted_under_load(server, backend, soak):
    (target,), generation = soak.targets, backend._connection.generation
    with soak.load():
        for _ in range(KILLS):
            each_thread(soak, "succeeded", 2)
            server.kill()
            each_thread(soak, "failed", 2)  # no thread waits until the server is back
            server.start()
        each_thread(soak, "succeeded", 2)
    assert soak.results.wrong == []
    assert set(soak.results.refused) == {"HsmUnavailable"}
    assert backend._connection.generation >= generation + KILLS
    assert soak.settle() == []
    present = objects(backend)
    assert target.object_ids() - present.keys() == set()
    # A pair is left until it expires if neither its token was sealed nor it was destroyed.
    surplus = {present[object_id] for object_id in present.keys() - target.object_ids()}
    assert all(label.startswith("kill:wrapping:") for label in surplus)
    assert [held for held in target.keys if not is_there(backend, held)] == []
    soak.destroy_all()
    assert objects(backend) == {}


def test_started_without_a_server(server):
    settings = server.settings_with_keys("lazy", initial_backoff=0.0, max_backoff=0.0)
    server.kill()
    with Pkcs11Backend.from_settings(settings | {"lazy": True}) as backend:
        with pytest.raises(HsmUnavailable):
            backend.mac(b"data")
        assert not backend.health().ready
        server.start()
        assert backend.mac(b"data")
        assert backend.health().ready


def each_thread(soak, what, more):
    """Wait until each thread has succeeded or failed ``more`` times; a stall is an error."""
    aims = [getattr(worker, what) + more for worker in soak.workers]
    deadline = time.monotonic() + LONGEST
    while any(getattr(w, what) < aim for w, aim in zip(soak.workers, aims, strict=True)):
        assert time.monotonic() < deadline, (what, soak.results.refused)
        soak.watch(TICK)


def objects(backend):
    """Labels by id of the wrapping keys and imported keys that are in the token."""

    def search(pooled):
        found = [
            key.get_attributes([Attribute.ID, Attribute.LABEL])
            for key in pooled.find({Attribute.TOKEN: True})
        ]
        labels = {each[Attribute.ID]: each[Attribute.LABEL] for each in found}
        ours = ("kill:wrapping:", "kill:material:")
        return {i: label for i, label in labels.items() if label.startswith(ours)}

    return backend._connection.run(search)


def is_there(backend, held):
    """Whether the object that the reference names is the key that was imported."""
    assert held.key.custody is Custody.HSM_INTERNAL
    template = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.ID: held.key.data}

    def check(pooled):
        (key,) = pooled.find(template)
        if len(held.material) != 32:
            return True  # SoftHSM keeps an SM4 key but cannot use it
        value = key.encrypt(checkvalue.CHECK_BLOCK, mechanism=Mechanism.AES_ECB)
        return checkvalue.check_value(held.material)[1:] == value

    return backend._connection.run(check)
