"""Faults that the soak has found, each as a test of its own."""

import time

import pytest
from pkcs11.exceptions import HostMemory, SessionCount, SessionHandleInvalid

from hsmwrap.errors import HsmUnavailable
from hsmwrap.pkcs11.binding.objectlock import NO_LOCK
from hsmwrap.pkcs11.sessions import connecting
from hsmwrap.pkcs11.sessions import pool as pool_module
from hsmwrap.pkcs11.sessions.connection import Connection
from hsmwrap.pkcs11.sessions.pool import SessionPool
from hsmwrap.pkcs11.sessions.session import HandleEpoch, PendingObject, PooledSession
from hsmwrap.pkcs11.settings import Pkcs11Settings

OBJECT_ID = b"an object's id.."


@pytest.fixture
def connection(softhsm):
    opened = Connection(Pkcs11Settings.from_mapping(softhsm.settings("soaked")))
    yield opened
    opened.close()


def pending_objects(connection):
    return connection.health()[2]["pending_objects"]


def fails_once(pending):
    faults = [SessionHandleInvalid]

    def operation(pooled):
        with pooled.creating(pending):
            if faults:
                raise faults.pop()
        return "made"

    return operation


def test_a_reaper_at_work_does_not_see_what_a_second_try_may_make(connection, monkeypatch):
    """It destroyed by its id what the second try had made: an import that was acknowledged."""
    seen = []
    monkeypatch.setattr(
        PooledSession, "destroy", lambda *_: seen.append(pending_objects(connection))
    )
    pending = PendingObject(OBJECT_ID)
    assert connection.run(fails_once(pending), pending=pending) == "made"
    assert seen == [0]


def test_no_second_try_while_the_first_ones_leftovers_may_be_there(connection, monkeypatch):
    """They were destroyed by their id later, and with them what the second try had made."""

    def fails(*_):
        raise HostMemory

    with monkeypatch.context() as patch:
        patch.setattr(PooledSession, "destroy", fails)
        pending = PendingObject(OBJECT_ID)
        with pytest.raises(HsmUnavailable):
            connection.run(fails_once(pending), pending=pending)
    assert pending_objects(connection) == 1
    connection.destroy_pending()
    assert pending_objects(connection) == 0


def test_a_call_that_never_began_leaves_nothing_to_clear_up(connection):
    """Each call that failed fast while the HSM was unavailable was remembered for the reaper."""
    connection._breaker.failed(connection._breaker.check(), "DEVICE_ERROR")
    pending = PendingObject(OBJECT_ID)
    with pytest.raises(HsmUnavailable):
        connection.run(fails_once(pending), pending=pending)
    assert pending_objects(connection) == 0


def test_a_login_that_fails_leaves_no_session(connection, monkeypatch):
    """The session that was opened for it was forgotten."""
    opened, closed = [], []
    real_open = connecting.open_worker_session
    monkeypatch.setattr(
        connecting,
        "open_worker_session",
        lambda *given: opened.append(real_open(*given)) or opened[-1],
    )
    monkeypatch.setattr(connecting, "close_quietly", closed.append)

    def no_login(*_):
        raise HostMemory

    monkeypatch.setattr(connection._connector.login, "log_in", no_login)
    module, token = connection._host._module, connection._connector.connected.token
    with pytest.raises(HostMemory):
        connection._connector._open_logged_in(module, token)
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

    return SessionPool(open_session, lambda _: True, NO_LOCK, HandleEpoch(), 2)


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
