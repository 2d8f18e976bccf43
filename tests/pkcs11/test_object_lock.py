"""The lock for many that read or one that writes, and SoftHSM's token objects under it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from support.pkcs11.attacker import OAEP1, SM2, issue

from hsmwrap.errors import PoolTimeout
from hsmwrap.locks import ReadWriteLock
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding.objectlock import NO_LOCK, softhsm_object_lock

SOON, LONG = 0.05, 30


@pytest.fixture
def lock(monkeypatch):
    monkeypatch.setattr("hsmwrap.pkcs11.binding.objectlock.WAIT", SOON)
    return softhsm_object_lock()


def elsewhere(call):
    """Run in another thread; what came of it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(LONG)


def enter(manager):
    with manager:
        return True


def test_many_read_at_once(lock):
    with lock.read():
        assert elsewhere(lambda: enter(lock.read()))


@pytest.mark.parametrize(
    ("mine", "theirs"), [("read", "write"), ("write", "read"), ("write", "write")]
)
def test_a_writer_is_alone(lock, mine, theirs):
    with getattr(lock, mine)(), pytest.raises(PoolTimeout, match="other threads are busy"):
        elsewhere(lambda: enter(getattr(lock, theirs)()))
    assert elsewhere(lambda: enter(getattr(lock, theirs)()))


def test_a_thread_that_reads_may_write_and_reads_on(lock):
    with lock.read():
        with lock.write(), lock.write():
            pass
        with pytest.raises(PoolTimeout):
            elsewhere(lambda: enter(lock.write()))
    assert elsewhere(lambda: enter(lock.write()))


def test_two_that_read_may_both_write():
    """Each would wait for the other to stop reading."""
    lock, both, order = ReadWriteLock(timeout=LONG), threading.Barrier(2), []

    def work(name):
        with lock.read():
            both.wait()
            with lock.write():
                order.append(f"{name} in")
                order.append(f"{name} out")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, "ab"))
    assert [each[0] for each in order] in (["a", "a", "b", "b"], ["b", "b", "a", "a"])


def test_a_writer_that_waited_in_vain_holds_nothing(lock):
    with lock.read():
        with pytest.raises(PoolTimeout):
            elsewhere(lambda: enter_both(lock))
        assert elsewhere(lambda: enter(lock.read()))
    assert elsewhere(lambda: enter(lock.write()))


def enter_both(lock):
    with lock.read(), lock.write():
        raise AssertionError


def test_a_yielded_read_lets_others_write(lock):
    with lock.read():
        with lock.yielded():
            assert elsewhere(lambda: enter(lock.write()))
        with pytest.raises(PoolTimeout):
            elsewhere(lambda: enter(lock.write()))
    with lock.yielded():  # read nothing, and does not begin to
        pass
    assert elsewhere(lambda: enter(lock.write()))


def test_a_writer_is_not_overtaken_by_those_who_come_later():
    lock, order = ReadWriteLock(timeout=LONG), []

    def come(manager, name):
        with manager():
            order.append(name)

    with ThreadPoolExecutor(2) as pool, ExitStack() as reading:
        reading.enter_context(lock.read())
        came = []
        for manager, name in ((lock.write, "writer"), (lock.read, "later")):
            came.append(pool.submit(come, manager, name))
            deadline = time.monotonic() + LONG
            while lock.waiting < len(came) and not came[-1].done():
                assert time.monotonic() < deadline
                time.sleep(0.001)
        reading.close()
        for each in came:
            each.result(LONG)
    assert order == ["writer", "later"]


def test_a_read_may_be_nested_while_a_writer_waits():
    lock, order = ReadWriteLock(timeout=LONG), []

    def write():
        with lock.write():
            order.append("writer")

    with ThreadPoolExecutor(1) as pool:
        with lock.read():
            came = pool.submit(write)
            deadline = time.monotonic() + LONG
            while not lock.waiting:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            with lock.read():
                order.append("nested")
            order.append("reader")
        came.result(LONG)
    assert order == ["nested", "reader", "writer"]


def test_an_error_gives_everything_back(lock):
    for manager in (lock.read, lock.write):
        with pytest.raises(KeyError), manager():
            raise KeyError
    assert elsewhere(lambda: enter(lock.write()))


def test_other_modules_need_none():
    with NO_LOCK.write():
        assert elsewhere(lambda: enter(NO_LOCK.write()))


# --- in the backend


def test_softhsm_makes_a_token_object_while_no_thread_reads(softhsm, monkeypatch):
    seen = []
    with Pkcs11Backend.from_settings(softhsm.settings("objects")) as backend:
        backend.capabilities()
        lock = backend._connection._host.object_lock()
        assert lock is not NO_LOCK
        generate = Pkcs11Backend._generate

        def watched(*arguments):
            seen.append((lock.writer == threading.get_ident(), set(lock.readers)))
            return generate(*arguments)

        monkeypatch.setattr(Pkcs11Backend, "_generate", watched)
        key = issue(backend, SM2)
        issue(backend, OAEP1)  # a session object: others go on reading, and writing
        backend.discard_wrapping_key(key.private_key)
        assert not lock.readers
        assert lock.writer is None
    assert seen == [(True, set()), (False, set())]
