"""The registry of fork hooks: order, errors, forks in several threads."""

import subprocess
import sys

import pytest

HOOKS = """
import os, sys
from hsmwrap import forks
from hsmwrap.forks import ForkAware, ForkTurn

calls = []


class Recorder(ForkAware):
    def __init__(self, turn):
        self.fork_turn = turn
        forks.register(self)

    def note(self, hook):
        calls.append((hook, self.fork_turn.name))
        if RAISES and self.fork_turn is ForkTurn.LIBCRYPTO:
            raise ZeroDivisionError

    def before_fork(self):
        self.note("before")

    def after_fork_in_parent(self):
        self.note("parent")

    def after_fork_in_child(self):
        self.note("child")


ended = Recorder(ForkTurn.STATE)
kept = [Recorder(turn) for turn in (ForkTurn.THREADS, ForkTurn.LIBCRYPTO, ForkTurn.PKCS11_MODULES)]
del ended
pid = os.fork()
after = "parent" if pid else "child"
turns = ["PKCS11_MODULES", "LIBCRYPTO", "THREADS"]
expected = [("before", turn) for turn in turns]
expected += [(after, turn) for turn in (reversed(turns) if pid else turns)]
right = calls == expected and not forks.forking_threads()
if not pid:
    os._exit(0 if right else 1)
assert right, calls
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


@pytest.mark.parametrize("raises", [False, True], ids=["in turn", "whatever one of them raises"])
def test_hooks_are_called_in_their_turn(raises):
    """Not in the order of registration; and not of what exists no more."""
    code = f"RAISES = {raises}\n{HOOKS}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ("ZeroDivisionError" in done.stderr) == raises
