import os
import signal
import threading

import pytest

from hsmwrap.forkgate import LIBCRYPTO as _GATE
from hsmwrap.sm2 import known_answer

# Python 3.12 and newer warn of what the gate is for.
pytestmark = pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")


def in_child(check):
    """Fork; True if ``check`` holds in the child."""
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.alarm(60)  # a child that hangs fails
        try:
            code = 0 if check() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_engine_in_a_child(engine):
    pair = engine.generate()

    def works():
        other = engine.generate()
        ciphertext = engine.encrypt(other.public, b"0123456789abcdef")
        plain = engine.decrypt(other.private, other.public, ciphertext)
        return plain == b"0123456789abcdef" and other.public != pair.public

    assert in_child(works)
    assert in_child(works)
    assert works()


def test_children_and_parent_make_different_keys(libcrypto):
    reader, writer = os.pipe()
    for _ in range(3):
        assert in_child(lambda: os.write(writer, libcrypto.generate().public) == 65)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        keys = {pipe.read(65) for _ in range(3)}
    assert len(keys | {libcrypto.generate().public}) == 4


def test_fork_waits_for_running_calls():
    inside, may_leave, left = threading.Event(), threading.Event(), threading.Event()

    def call():
        with _GATE.passing():
            inside.set()
            may_leave.wait()
            left.set()

    def let_go():
        # Without the gate the fork would be long done when this gives up waiting for it.
        give_up = threading.Event()
        for _ in range(200):
            if _GATE._forking or give_up.wait(0.01):
                break
        may_leave.set()

    threads = [threading.Thread(target=call), threading.Thread(target=let_go)]
    threads[0].start()
    inside.wait()
    threads[1].start()
    assert in_child(lambda: left.is_set() and not _GATE._running and not _GATE._forking)
    for thread in threads:
        thread.join()
    assert not _GATE._running
    assert not _GATE._forking


def test_calls_pass_the_gate(libcrypto):
    with libcrypto._scope():
        assert _GATE._running == 1
    assert _GATE._running == 0


def test_forks_under_load(libcrypto):
    stop = threading.Event()

    def load():
        while not stop.is_set():
            # A new thread seeds its own random generator from the shared one, under a lock.
            thread = threading.Thread(target=libcrypto.generate)
            thread.start()
            thread.join()

    def works():
        libcrypto.generate()
        known = (known_answer.PRIVATE, known_answer.PUBLIC, known_answer.CIPHERTEXT)
        return libcrypto.decrypt(*known) == known_answer.MESSAGE

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        assert all(in_child(works) for _ in range(50))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
