"""The connection to an HSM token: logins, forks under load, a lost HSM, closing, PIN stops."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from pkcs11.constants import TokenFlag
from support.services.softhsm import make_softhsm

from hsmwrap import registry
from hsmwrap.errors import (
    BackendClosed,
    ConfigurationError,
    HsmUnavailable,
    PinError,
    PoolTimeout,
    TokenSelectionError,
)
from hsmwrap.pkcs11.binding.objectlock import NO_LOCK
from hsmwrap.pkcs11.sessions._breaker import Breaker
from hsmwrap.pkcs11.sessions.connection import Connection
from hsmwrap.pkcs11.sessions.pool import PoolState, SessionPool, Ticket
from hsmwrap.pkcs11.sessions.session import HandleEpoch, PooledSession
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.token import login

FORK = multiprocessing.get_context("fork")
DEADLINE = 60

pytestmark = pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")


@pytest.fixture
def connect(softhsm):
    opened = []

    def connects(**more):
        settings = Pkcs11Settings.from_mapping(softhsm.settings("connection") | more)
        opened.append(Connection(settings))
        return opened[-1]

    yield connects
    for connection in opened:
        connection.close()


def random_bytes(pooled):
    return pooled.session.generate_random(64)


# --- sessions -----------------------------------------------------------------------------------


def test_a_session_is_lent_to_one_at_a_time_and_reused(connect):
    connection = connect(sessions=2)
    used = []

    def operation(pooled):
        used.append(pooled.session.handle)
        return random_bytes(pooled)

    for _ in range(10):
        connection.run(operation)
    assert len(set(used)) == 1


def test_an_exhausted_pool_times_out(connect):
    connection = connect(sessions=1, session_wait=0.05)

    def outer(_pooled):
        thread = threading.Thread(target=inner)
        thread.start()
        thread.join()

    def inner():
        with pytest.raises(PoolTimeout, match="raise 'sessions'"):
            connection.run(random_bytes)
        seen.append(True)

    seen = []
    connection.run(outer)
    assert seen == [True]
    assert connection.run(random_bytes)


def test_a_session_that_saw_an_error_is_not_used_again(connect):
    connection = connect(sessions=1)
    handles = []

    def fails(pooled):
        handles.append(pooled.session.handle)
        raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            connection.run(fails)
    assert len(set(handles)) == 3
    assert connection.health()[2]["sessions_in_use"] == 0


def test_repr_and_health_show_the_pool(connect):
    connection = connect(sessions=3)
    connection.run(random_bytes)
    assert "generation=" in repr(connection)
    assert "in_use=0 idle=1 waiting=0 cap=3" in repr(connection)
    ready, detail, facts = connection.health()
    assert (ready, detail, facts["breaker"]) == (True, "ready", "closed")


def test_pool_arithmetic():
    state = PoolState(2)
    assert state.available
    assert state.take() is None
    assert state.take() is None
    assert not state.available
    session = PooledSession(session=object(), is_logged_in=lambda _: True)
    assert state.give_back(session)
    assert state.available
    assert state.take() is session
    session.tainted = True
    assert not state.give_back(session)
    assert (state.total, state.in_use, state.idle) == (1, 1, [])
    state.take()
    state.failed_to_open(lower_cap=True)
    assert (state.cap, state.total) == (1, 1)


def test_sessions_go_to_those_who_wait_in_their_order():
    state = PoolState(1)
    state.take()
    first, second = Ticket(), Ticket()
    state.queue.extend([first, second])
    session = PooledSession(session=object(), is_logged_in=lambda _: True)
    assert state.give_back(session)
    state.serve()
    assert (first.called.is_set(), second.called.is_set()) == (True, False)
    assert first.session is session
    assert state.close() == []
    assert second.stale


class Interrupted(Exception):
    pass


def test_a_place_in_the_queue_is_left_when_a_signal_interrupts_the_wait(connect):
    """Sessions were given to those who had left, until there were none."""

    def interrupt(*_):
        raise Interrupted

    connection = connect(sessions=1, session_wait=DEADLINE)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with connection_in_use(connection) as may_leave:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Interrupted):
                connection.run(random_bytes)
            may_leave.set()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(connection.run(random_bytes)) == 8


def test_what_was_given_to_one_who_leaves_goes_to_the_next():
    pool = SessionPool(lambda: "opened", lambda _: True, NO_LOCK, HandleEpoch(), 1)
    given = pool.acquire(time.monotonic() + DEADLINE)
    ticket = Ticket()
    pool._state.queue.append(ticket)
    pool.release(given)
    assert ticket.session is given
    pool._leave(ticket)
    assert pool.acquire(time.monotonic() + DEADLINE) is given


@contextmanager
def connection_in_use(connection):
    inside, may_leave = threading.Event(), threading.Event()

    def operation(_pooled):
        inside.set()
        may_leave.wait(DEADLINE)

    worker = threading.Thread(target=connection.run, args=(operation,))
    worker.start()
    inside.wait(DEADLINE)
    try:
        yield may_leave
    finally:
        may_leave.set()
        worker.join(DEADLINE)


# --- closing ------------------------------------------------------------------------------------


def test_closing_waits_for_running_calls_and_refuses_new_ones(connect):
    connection = connect()
    inside, may_leave = threading.Event(), threading.Event()
    results = []

    def operation(pooled):
        inside.set()
        may_leave.wait(DEADLINE)
        return random_bytes(pooled)

    worker = threading.Thread(target=lambda: results.append(connection.run(operation)))
    worker.start()
    inside.wait(DEADLINE)
    closer = threading.Thread(target=connection.close)
    closer.start()
    while not connection.closed:
        time.sleep(0.001)
    with pytest.raises(BackendClosed):
        connection.run(random_bytes)
    assert results == []
    may_leave.set()
    closer.join(DEADLINE)
    worker.join(DEADLINE)
    assert len(results[0]) == 8


# --- forks --------------------------------------------------------------------------------------


def test_forks_under_load(connect):
    """Children that inherit a busy connection work, and so does the parent."""
    connection = connect(sessions=4)
    stop, failures, done = threading.Event(), [], [0] * 4

    def load(index):
        try:
            while not stop.is_set():
                connection.run(random_bytes)
                done[index] += 1
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=load, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    children = []
    for _ in range(20):
        child = FORK.Process(target=child_works, args=(connection,))
        child.start()
        children.append(child)
    for child in children:
        child.join(DEADLINE)
    before = sum(done)
    connection.run(random_bytes)
    while sum(done) == before and not failures:
        time.sleep(0.001)
    stop.set()
    for thread in threads:
        thread.join(DEADLINE)
    assert failures == []
    assert [child.exitcode for child in children] == [0] * 20


def child_works(connection):
    inherited = connection.generation
    workers = [threading.Thread(target=connection.run, args=(random_bytes,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(DEADLINE)
    assert len(connection.run(random_bytes)) == 8
    assert connection.generation > inherited
    connection.close()


def test_a_child_starts_over_at_its_first_call_only(connect):
    connection = connect()
    parent = connection.generation
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        before = connection.generation
        connection.run(random_bytes)
        os.write(writer, json.dumps([before, connection.generation]).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert json.load(pipe) == [parent, parent + 1]
    assert connection.generation == parent


# --- PINs ---------------------------------------------------------------------------------------

LOCK = """
import json, sys
from hsmwrap import registry
from hsmwrap.errors import PinError
settings = json.loads(sys.argv[1])
kind = registry.load("pkcs11")
tries = []
for _ in range(int(sys.argv[2])):
    try:
        backend = kind.from_settings(settings)
        backend.mac(b"")
        tries.append("open")
        backend.close()
    except PinError as error:
        tries.append(str(error))
print(json.dumps(tries))
"""


@pytest.fixture
def locked_out(softhsm, tmp_path):
    """A token of its own and a wrong PIN: USER_PIN_COUNT_LOW stays until a right one."""
    return make_softhsm(tmp_path / "locked-out", label="locked-out")


@pytest.fixture
def wrong_pin(tmp_path):
    path = tmp_path / "wrong.pin"
    path.touch(mode=0o600)
    path.write_text("not-the-pin")
    return str(path)


def run_on(token, code, *arguments):
    """Run it in another process: SoftHSM reads its configuration once per process."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | token.environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def test_a_wrong_pin_is_tried_once(locked_out, wrong_pin, tmp_path):
    """The next backend sees USER_PIN_COUNT_LOW and does not even try."""
    from support.faults.shim import fault_shim

    shim = fault_shim(locked_out.module, tmp_path / "shim")
    settings = locked_out.bare_settings(module=str(shim.path), pin_file=wrong_pin, lazy=True)
    first, second = json.loads(run_on(locked_out, LOCK, json.dumps(settings), "2"))
    assert "PIN_INCORRECT" in first
    assert "not trying again" in first
    assert "USER_PIN_COUNT_LOW" in second
    assert shim.counters().calls["C_Login"] == 1


def test_a_stopped_backend_says_so_and_does_not_log_in_again(locked_out, wrong_pin):
    code = """
import json, sys
from hsmwrap import registry
from hsmwrap.errors import PinError
backend = registry.load("pkcs11").from_settings(json.loads(sys.argv[1]))
texts = []
for _ in range(3):
    try:
        backend.mac(b"")
    except PinError as error:
        texts.append(str(error))
assert len(set(texts)) == 1 and len(texts) == 3, texts
assert not backend.health().ready
assert "PIN_INCORRECT" in backend.health().detail
"""
    settings = locked_out.bare_settings(pin_file=wrong_pin, lazy=True)
    run_on(locked_out, code, json.dumps(settings))


def test_a_missing_pin_setting_is_said(softhsm, monkeypatch):
    """Without a login the HSM token would answer CKR_USER_NOT_LOGGED_IN to the first call."""
    pins = {"pin_file", "pin_env", "pin_command", "pin", "allow_pin_value"}
    settings = softhsm.settings("connection")
    bare = Pkcs11Settings.from_mapping({n: v for n, v in settings.items() if n not in pins})
    assert bare.pin is None
    with pytest.raises(ConfigurationError, match=r"no PIN setting, .* set pin_file"):
        Connection(bare)
    monkeypatch.setattr(login, "flags_of", lambda _session: TokenFlag.TOKEN_INITIALIZED)
    connection = Connection(bare)
    assert connection.run(random_bytes)
    connection.close()


def test_a_low_count_stops_no_first_login(connect, monkeypatch):
    """Another program's wrong PIN sets it, and no server could start any more."""
    monkeypatch.setattr(login, "flags_of", lambda _session: TokenFlag.USER_PIN_COUNT_LOW)
    assert connect().run(random_bytes)
    assert login._refused == set()


@pytest.mark.parametrize("flag", ["USER_PIN_COUNT_LOW", "USER_PIN_FINAL_TRY", "USER_PIN_LOCKED"])
def test_a_doubtful_pin_is_not_tried_unless_forced(connect, monkeypatch, flag):
    """A low count is doubtful after a refusal in this process."""
    serial = connect()._connector.connected.token.serial
    monkeypatch.setattr(login, "_refused", {serial} if flag.endswith("COUNT_LOW") else set())
    monkeypatch.setattr(login, "flags_of", lambda _session: TokenFlag[flag])
    with pytest.raises(PinError, match=flag):
        connect()
    assert connect(force_login=True).run(random_bytes)


# --- which token --------------------------------------------------------------------------------


def test_no_match_lists_the_tokens_that_are_there(softhsm):
    settings = softhsm.settings("connection", token_label="another")
    with pytest.raises(TokenSelectionError, match=softhsm.environment["HSMWRAP_TOKEN_LABEL"]):
        registry.open_backend("pkcs11", settings)


def test_by_uri(softhsm):
    bare = softhsm.settings("connection")
    uri = (
        f"pkcs11:token={bare['token_label']}?module-path={bare['module']}"
        f"&pin-source=file:{bare['pin_file']}"
    )
    with registry.open_backend("pkcs11", {"uri": uri, "key_prefix": "connection"}) as backend:
        assert backend.mac(b"")


def test_a_token_without_our_keys_names_the_command(softhsm):
    with (
        registry.open_backend("pkcs11", softhsm.bare_settings(key_prefix="nothing")) as backend,
        pytest.raises(ConfigurationError, match="hsmwrap keys init"),
    ):
        backend.capabilities()


# --- a lost HSM ---------------------------------------------------------------------------------

SCENARIOS = "support.pkcs11.lost_hsm"


@pytest.mark.parametrize("scenario", ["comes_back", "sticky", "lazy_start", "logged_out"])
def test_lost_hsm(softhsm, tmp_path, scenario):
    play(softhsm, tmp_path, scenario)


def test_a_module_that_cannot_lock_is_called_by_one_thread_at_a_time(softhsm, tmp_path):
    play(softhsm, tmp_path, "cannot_lock")


def play(softhsm, tmp_path, scenario):
    # Trusted keys are public objects, which are found without a login.
    trusted = scenario != "logged_out"
    prefix = "connection" if trusted else "connection-untrusted"
    settings = softhsm.settings(prefix, trusted=trusted, initial_backoff=0.05, max_backoff=0.1)
    command = [sys.executable, "-m", SCENARIOS, scenario, tmp_path / "shim", json.dumps(settings)]
    subprocess.run(command, check=True, timeout=DEADLINE)


def test_breaker_backs_off_and_lets_one_trial_call_pass():
    now = [0.0]
    breaker = Breaker(1.0, 4.0, clock=lambda: now[0])
    held = breaker.check()
    for expected in (1.0, 2.0, 4.0, 4.0):
        breaker.failed(held, "DEVICE_ERROR")
        assert breaker.state == "open"
        now[0] += expected - 0.01
        with pytest.raises(HsmUnavailable, match="DEVICE_ERROR"):
            breaker.check()
        now[0] += 0.01
        assert breaker.state == "half-open"
        held = breaker.check()
        with pytest.raises(HsmUnavailable):
            breaker.check()
    breaker.succeeded(held)
    assert breaker.state == "closed"
    breaker.failed(breaker.check(), "x")
    now[0] += 1.0
    breaker.check()


def test_one_outage_counts_once_however_many_calls_it_ends():
    now = [0.0]
    breaker = Breaker(1.0, 30.0, clock=lambda: now[0])
    held = [breaker.check() for _ in range(12)]
    for each in held:
        breaker.failed(each, "DEVICE_REMOVED")
    assert breaker.wait == 1.0
    now[0] = 1.0
    trial = breaker.check()
    for each in held:  # late ones: neither another outage, nor the end of this one
        breaker.failed(each, "DEVICE_REMOVED")
        breaker.succeeded(each)
        breaker.undecided(each)
    assert breaker.state == "half-open"
    with pytest.raises(HsmUnavailable):
        breaker.check()
    breaker.succeeded(trial)
    assert breaker.state == "closed"


def test_a_trial_call_that_tells_nothing_lets_another_one_pass():
    breaker = Breaker(0.0, 0.0)
    breaker.failed(breaker.check(), "x")
    breaker.undecided(breaker.check())
    assert breaker.check().trial


FORK_ORDER = """
import os
hooks = []
register = os.register_at_fork
os.register_at_fork = lambda **named: (hooks.append(named), register(**named))
import hsmwrap.FIRST
import hsmwrap.pkcs11
import hsmwrap.sm2
from hsmwrap.locks import LIBCRYPTO, ReadWriteLock
from hsmwrap.pkcs11.binding.host import ModuleHost
order = []
before_fork = ReadWriteLock.before_fork
ReadWriteLock.before_fork = lambda lock: (order.append(lock), before_fork(lock))
if os.fork() == 0:
    os._exit(0)
os.wait()
assert order.index(ModuleHost._hosts_lock) < order.index(LIBCRYPTO), order
modules = [getattr(named.get("after_in_child"), "__module__", None) or "" for named in hooks]
assert [name for name in modules if name.startswith("hsmwrap")] == ["hsmwrap.forks"], modules
"""


@pytest.mark.parametrize("first", ["pkcs11", "locks"])
def test_a_fork_holds_calls_back_at_the_module_first_and_at_libcrypto_second(first):
    """The other way round, a call inside the module waits for libcrypto, and the fork for it."""
    subprocess.run([sys.executable, "-c", FORK_ORDER.replace("FIRST", first)], check=True)
