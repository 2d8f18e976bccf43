import os
import signal
import subprocess
import sys
import threading

import pytest

from hsmwrap.locks import LIBCRYPTO
from hsmwrap.sm2 import known_answer

# Python 3.12 and newer warn of what the lock is for.
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
        with LIBCRYPTO.read():
            inside.set()
            may_leave.wait()
            left.set()

    def let_go():
        # Without the lock the fork would be long done when this gives up waiting for it.
        give_up = threading.Event()
        for _ in range(200):
            if LIBCRYPTO._closed_for_fork or give_up.wait(0.01):
                break
        may_leave.set()

    threads = [threading.Thread(target=call), threading.Thread(target=let_go)]
    threads[0].start()
    inside.wait()
    threads[1].start()
    assert in_child(
        lambda: left.is_set() and not LIBCRYPTO.readers and not LIBCRYPTO._closed_for_fork
    )
    for thread in threads:
        thread.join()
    assert not LIBCRYPTO.readers
    assert not LIBCRYPTO._closed_for_fork


FORKS_INSIDE_CALLS = """
import os, signal, threading
from hsmwrap.locks import LIBCRYPTO as gate
if PKCS11: import hsmwrap.pkcs11

def fork(*_):
    child = os.fork()
    if not child:
        return  # as a handler does: back into the call that it interrupted
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

def interrupted_by_a_fork():
    parent = os.getpid()
    signal.raise_signal(signal.SIGUSR1)
    return os.getpid() != parent

def leave_if(is_child):
    if is_child:
        with gate.read():
            os._exit(7 if len(gate.readers) == 1 and not gate._closed_for_fork else 1)

signal.signal(signal.SIGUSR1, fork)
with gate.read():
    is_child = interrupted_by_a_fork()
    assert len(gate.readers) == (not is_child)
leave_if(is_child)
with gate._changed:  # where a call comes in or leaves
    is_child = interrupted_by_a_fork()
leave_if(is_child)

def fork_beside_another():
    with gate.read():
        inside.wait()
        child = os.fork()
        if not child:
            os._exit(7)
        os.waitpid(child, 0)

inside = threading.Barrier(2)
threads = [threading.Thread(target=fork_beside_another) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not gate.readers and not gate._closed_for_fork
print("done")
"""


@pytest.mark.parametrize("pkcs11", [False, True])
def test_a_fork_inside_a_call_does_not_wait_for_itself(pkcs11):
    """By a signal handler, wherever it strikes; and by two threads at once."""
    code = f"PKCS11 = {pkcs11}\n{FORKS_INSIDE_CALLS}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_calls_hold_the_lock(libcrypto):
    with libcrypto._scope():
        assert len(LIBCRYPTO.readers) == 1
    assert not LIBCRYPTO.readers


@pytest.mark.slow
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
