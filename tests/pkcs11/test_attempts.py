"""One attempt at an operation: what it does to its session, and which errors it ends with."""

import time
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
from pkcs11.exceptions import DeviceError, PinIncorrect, SessionHandleInvalid, UserNotLoggedIn
from pkcs11.types import Object

from hsmwrap.errors import HsmUnavailable, InvalidKeyMaterial, PinError
from hsmwrap.pkcs11.binding.returncodes import Remedy
from hsmwrap.pkcs11.sessions import recovery
from hsmwrap.pkcs11.sessions.connecting import PAUSES
from hsmwrap.pkcs11.sessions.pool import StalePool
from hsmwrap.pkcs11.sessions.recovery import Attempts


class Pool:
    """Lends one session."""

    def __init__(self):
        self.session = SimpleNamespace(tainted=False, lock=SimpleNamespace(read=nullcontext))
        self.released = []

    def acquire(self, _deadline):
        return self.session

    def release(self, session):
        self.released.append(session)


class Host:
    """A module that is there; tells how long the callers would have waited for it."""

    generation = 7

    def __init__(self):
        self.waits = []

    @contextmanager
    def inside(self, wait):
        self.waits.append(wait)
        yield "module", self.generation


def attempts(connector, host=None, breaker=None):
    return Attempts(
        host or Host(), connector, breaker, None, session_wait=1.0, trial=lambda _session: None
    )


def raising(error):
    def operation(_session):
        raise error

    return operation


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), AttributeError("of ours")])
def test_a_session_that_saw_an_error_that_no_client_causes_is_not_used_again(error):
    pool = Pool()
    with pytest.raises(type(error)):
        Attempts._lend(pool, raising(error), 0.0)
    assert pool.session.tainted
    assert pool.released == [pool.session]


def test_an_object_without_methods_is_a_session_that_failed():
    """python-pkcs11 gives one whose attributes it could not read no methods."""
    pool = Pool()
    with pytest.raises(SessionHandleInvalid):
        Attempts._lend(pool, raising(AttributeError("encrypt", obj=Object.__new__(Object))), 0.0)
    assert pool.session.tainted
    assert pool.released == [pool.session]


def test_a_session_without_its_login_is_not_used_again_after_a_clients_fault():
    pool = Pool()
    pool.session.require_login = partial(raising(UserNotLoggedIn()), pool.session)
    with pytest.raises(UserNotLoggedIn):
        Attempts._lend(pool, raising(InvalidKeyMaterial()), 0.0)
    assert pool.session.tainted


@pytest.mark.parametrize("was_tainted", [True, False])
def test_a_clients_fault_says_nothing_of_its_session(was_tainted):
    pool = Pool()
    pool.session.require_login = lambda: None
    pool.session.tainted = was_tainted
    with pytest.raises(InvalidKeyMaterial):
        Attempts._lend(pool, raising(InvalidKeyMaterial()), 0.0)
    assert pool.session.tainted is was_tainted


def test_a_session_whose_operation_succeeds_stays_good():
    pool = Pool()
    assert Attempts._lend(pool, lambda _session: "done", 0.0) == "done"
    assert not pool.session.tainted
    assert pool.released == [pool.session]


def test_a_call_whose_time_is_over_does_not_wait_for_the_module():
    host, pool = Host(), Pool()
    connected = SimpleNamespace(logins=0, pool=pool)
    trying = attempts(SimpleNamespace(connect=lambda *_: connected), host)
    assert trying._attempt(lambda _session: "done", time.monotonic() - 5, None) == "done"
    assert host.waits == [0]


def test_a_pin_that_is_refused_on_the_way_is_a_typed_error():
    def log_in_again(_module, _generation, _logins):
        raise PinIncorrect

    with pytest.raises(PinError):
        attempts(SimpleNamespace(log_in_again=log_in_again))._log_in_again(
            SimpleNamespace(logins=1)
        )


def test_a_module_that_is_back_is_restarted_once():
    host, told, restarted = Host(), [], []
    host.restart = lambda seen, _wait: restarted.append(seen)
    login = SimpleNamespace(in_doubt=False)
    connected = SimpleNamespace(logins=1, pool=Pool())
    connector = SimpleNamespace(connect=lambda *_: connected, login=login)
    breaker = SimpleNamespace(is_current=lambda _held: True, succeeded=told.append)
    trying = attempts(connector, host, breaker)
    trying._restart(SimpleNamespace(generation=6, held="held", said="lost"))
    assert (restarted, told) == ([6], ["held"])


def test_a_module_that_stays_lost_is_given_time_between_the_tries(monkeypatch):
    paused, told, host = [], [], Host()
    monkeypatch.setattr(recovery, "sleep_with_jitter", paused.append)
    host.restart = lambda _seen, _wait: None

    def connect(_module, _generation):
        raise DeviceError

    connector = SimpleNamespace(connect=connect, login=SimpleNamespace(in_doubt=False))
    trying = attempts(connector, host, SimpleNamespace(is_current=lambda _held: True))
    monkeypatch.setattr(trying, "_open_breaker", lambda held, _said: told.append(held))
    with pytest.raises(HsmUnavailable):
        trying._restart(SimpleNamespace(generation=6, held="held", said="lost"))
    assert paused == list(PAUSES)
    assert told == ["held"]


@pytest.mark.parametrize(
    ("said", "works"),
    [
        (None, True),
        (DeviceError(), False),
        (StalePool(), True),
        (HsmUnavailable("another thread opens the breaker"), True),
    ],
)
def test_whether_an_unknown_code_speaks_of_the_operation(said, works):
    def connect(_module, _generation):
        if said is not None:
            raise said
        return SimpleNamespace(pool=Pool())

    assert attempts(SimpleNamespace(connect=connect))._still_works() is works


@pytest.mark.parametrize("remedy", [Remedy.STOP, Remedy.FEWER_SESSIONS, Remedy.REAP])
def test_only_one_remedy_stops_the_login(remedy):
    stopped, undecided = [], []
    connector = SimpleNamespace(login=SimpleNamespace(stop=stopped.append))
    trying = attempts(connector, breaker=SimpleNamespace(undecided=undecided.append))
    failure = SimpleNamespace(
        recovery=SimpleNamespace(remedy=remedy, retry=False), name="CKR_X", said="said", held="held"
    )
    assert trying.recover(failure) is False
    assert stopped == (["said"] if remedy is Remedy.STOP else [])
    assert undecided == ["held"]


def test_a_call_that_waited_while_the_module_was_restarted_begins_again():
    answers, told = [StalePool(), SimpleNamespace(logins=1, pool=Pool())], []

    def connect(_module, _generation):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    breaker = SimpleNamespace(check=lambda: "held", succeeded=told.append)
    trying = attempts(SimpleNamespace(connect=connect), breaker=breaker)
    assert trying.attempt(lambda _session: "done") == "done"
    assert (answers, told) == ([], ["held"])
