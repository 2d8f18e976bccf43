"""Faults that the soak has found, each as a test of its own."""

import time

import pytest
from pkcs11.exceptions import HostMemory, SessionCount, SessionHandleInvalid

from hsmwrap.errors import HsmUnavailable
from hsmwrap.pkcs11.binding.objectlock import NO_LOCK
from hsmwrap.pkcs11.sessions import connection as connection_module
from hsmwrap.pkcs11.sessions import pool as pool_module
from hsmwrap.pkcs11.sessions.connection import Connection, Leftover
from hsmwrap.pkcs11.sessions.pool import SessionPool
from hsmwrap.pkcs11.settings import Pkcs11Settings

OBJECT_ID = b"an object's id.."


@pytest.fixture
def connection(softhsm):
    opened = Connection(Pkcs11Settings.from_mapping(softhsm.settings("soaked")))
    yield opened
    opened.close()


def orphans(connection):
    return connection.health()[2]["orphans"]


def fails_once(leaves):
    faults = [SessionHandleInvalid]

    def operation(_pooled):
        leaves.possible = True
        if faults:
            raise faults.pop()
        return "made"

    return operation


def test_a_reaper_at_work_does_not_see_what_a_second_try_may_make(connection, monkeypatch):
    """It destroyed by its id what the second try had made: an import that was acknowledged."""
    seen = []
    monkeypatch.setattr(
        connection_module, "destroy_by_id", lambda *_: seen.append(orphans(connection))
    )
    leaves = Leftover(OBJECT_ID)
    assert connection.run(fails_once(leaves), leaves=leaves) == "made"
    assert seen == [0]


def test_no_second_try_while_the_first_ones_leftovers_may_be_there(connection, monkeypatch):
    """They were destroyed by their id later, and with them what the second try had made."""

    def fails(*_):
        raise HostMemory

    with monkeypatch.context() as patch:
        patch.setattr(connection_module, "destroy_by_id", fails)
        leaves = Leftover(OBJECT_ID)
        with pytest.raises(HsmUnavailable):
            connection.run(fails_once(leaves), leaves=leaves)
    assert orphans(connection) == 1
    connection.destroy_orphans()
    assert orphans(connection) == 0


def test_a_call_that_never_began_leaves_nothing_to_clear_up(connection):
    """Each call that failed fast while the HSM was unavailable was remembered for the reaper."""
    connection._breaker.failed(connection._breaker.check(), "DEVICE_ERROR")
    leaves = Leftover(OBJECT_ID)
    with pytest.raises(HsmUnavailable):
        connection.run(fails_once(leaves), leaves=leaves)
    assert orphans(connection) == 0


def test_a_login_that_fails_leaves_no_session(connection, monkeypatch):
    """The session that was opened for it was forgotten."""
    opened, closed = [], []
    real_open = connection_module.open_worker_session
    monkeypatch.setattr(
        connection_module,
        "open_worker_session",
        lambda *given: opened.append(real_open(*given)) or opened[-1],
    )
    monkeypatch.setattr(connection_module, "close_quietly", closed.append)

    def no_login(*_):
        raise HostMemory

    monkeypatch.setattr(connection._login, "log_in", no_login)
    module, token = connection._host._module, connection._live.token
    with pytest.raises(HostMemory):
        connection._open_logged_in(module, token)
    assert closed == opened != []
    opened[0].close()


class FakeSession:
    def __init__(self, *faults):
        self.faults = list(faults)
        self.closed = False

    def close(self):
        if self.faults:
            raise self.faults.pop()
        self.closed = True


def pool_of(*sessions):
    left = list(sessions)

    def open_session():
        session = left.pop(0)
        if isinstance(session, Exception):
            raise session
        return session

    return SessionPool(open_session, lambda _: True, NO_LOCK, 2)


def borrow(pool):
    return pool.acquire(time.monotonic() + 10)


def test_a_session_that_does_not_close_is_closed_later():
    """It stayed open until the module was finalised."""
    pool = pool_of(FakeSession(HostMemory()), FakeSession())
    lent = borrow(pool)
    lent.tainted = True
    pool.release(lent)
    assert not lent.session.closed
    borrow(pool)
    assert lent.session.closed


def test_a_pool_that_had_to_shrink_grows_again(monkeypatch):
    """The HSM had no session once, and the pool kept to the few that it had until a restart."""
    monkeypatch.setattr(pool_module, "CAP_LIFETIME", 0.0)
    pool = pool_of(FakeSession(), SessionCount(), FakeSession())
    assert borrow(pool) is not borrow(pool)
    assert pool.facts()["sessions_cap"] == 2
