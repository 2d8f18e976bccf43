"""Who may touch token objects at the same time, on a module that mixes them up."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from support.pkcs11.attacker import OAEP1, SM2, issue

from hsmwrap.errors import PoolTimeout
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding.objectlock import NO_LOCK, ObjectLock

SOON, LONG = 0.05, 30


@pytest.fixture
def lock():
    return ObjectLock(SOON)


def elsewhere(call):
    """Run in another thread; what came of it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(LONG)


def enter(manager):
    with manager:
        return True


def test_many_look_at_once(lock):
    with lock.looking():
        assert elsewhere(lambda: enter(lock.looking()))


@pytest.mark.parametrize(
    ("mine", "theirs"), [("looking", "writing"), ("writing", "looking"), ("writing", "writing")]
)
def test_a_writer_is_alone(lock, mine, theirs):
    with getattr(lock, mine)(), pytest.raises(PoolTimeout, match="other threads are busy"):
        elsewhere(lambda: enter(getattr(lock, theirs)()))
    assert elsewhere(lambda: enter(getattr(lock, theirs)()))


def test_a_thread_that_looks_may_write_and_looks_on(lock):
    with lock.looking():
        with lock.writing(), lock.writing():
            pass
        with pytest.raises(PoolTimeout):
            elsewhere(lambda: enter(lock.writing()))
    assert elsewhere(lambda: enter(lock.writing()))


def test_two_that_look_may_both_write():
    """Each would wait for the other to stop looking."""
    lock, both, order = ObjectLock(LONG), threading.Barrier(2), []

    def work(name):
        with lock.looking():
            both.wait()
            with lock.writing():
                order.append(f"{name} in")
                order.append(f"{name} out")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, "ab"))
    assert [each[0] for each in order] in (["a", "a", "b", "b"], ["b", "b", "a", "a"])


def test_a_writer_that_waited_in_vain_holds_nothing(lock):
    with lock.looking():
        with pytest.raises(PoolTimeout):
            elsewhere(lambda: enter_both(lock))
        assert elsewhere(lambda: enter(lock.looking()))
    assert elsewhere(lambda: enter(lock.writing()))


def enter_both(lock):
    with lock.looking(), lock.writing():
        raise AssertionError


def test_whoever_steps_aside_is_in_nobodys_way(lock):
    with lock.looking():
        with lock.aside():
            assert elsewhere(lambda: enter(lock.writing()))
        with pytest.raises(PoolTimeout):
            elsewhere(lambda: enter(lock.writing()))
    with lock.aside():  # looked at nothing, and does not begin to
        pass
    assert elsewhere(lambda: enter(lock.writing()))


def test_a_writer_is_not_overtaken_by_those_who_come_later():
    lock, order = ObjectLock(LONG), []

    def come(manager, name):
        with manager():
            order.append(name)

    with ThreadPoolExecutor(2) as pool, ExitStack() as looking:
        looking.enter_context(lock.looking())
        came = []
        for manager, name in ((lock.writing, "writer"), (lock.looking, "later")):
            came.append(pool.submit(come, manager, name))
            deadline = time.monotonic() + LONG
            while len(lock._queue) < len(came) and not came[-1].done():
                assert time.monotonic() < deadline
                time.sleep(0.001)
        looking.close()
        for each in came:
            each.result(LONG)
    assert order == ["writer", "later"]


def test_an_error_gives_everything_back(lock):
    for manager in (lock.looking, lock.writing):
        with pytest.raises(KeyError), manager():
            raise KeyError
    assert elsewhere(lambda: enter(lock.writing()))


def test_other_modules_need_none():
    with NO_LOCK.writing():
        assert elsewhere(lambda: enter(NO_LOCK.writing()))


# --- in the backend


def test_softhsm_makes_a_token_object_while_nobody_looks(softhsm, monkeypatch):
    seen = []
    with Pkcs11Backend.from_settings(softhsm.settings("objects")) as backend:
        backend.capabilities()
        lock = backend._connection._host.object_lock()
        assert lock is not NO_LOCK
        generate = Pkcs11Backend._generate

        def watched(*arguments):
            seen.append((lock._writing == threading.get_ident(), set(lock._looking)))
            return generate(*arguments)

        monkeypatch.setattr(Pkcs11Backend, "_generate", watched)
        key = issue(backend, SM2)
        issue(backend, OAEP1)  # a session object: others go on looking, and writing
        backend.discard_wrapping_key(key.private_key)
        assert not lock._looking
        assert lock._writing is None
    assert seen == [(True, set()), (False, set())]
