"""Crashes with a canary in memory, as do a fork and a program that it starts.

Arguments: the crash, and ``forbid`` or ``allow`` core dumps.
"""

import ctypes
import os
import sys

from hsmwrap import forbid_core_dumps

CRASHES = {"SIGABRT": os.abort, "SIGSEGV": lambda: ctypes.string_at(0)}

if __name__ == "__main__":
    crash, core_dumps = sys.argv[1:]
    kept = sys.stdin.read()
    if core_dumps == "forbid":
        forbid_core_dumps()
    if not (fork := os.fork()):
        CRASHES[crash]()
    abort = [sys.executable, "-c", "import os; os.abort()"]
    for child in fork, os.posix_spawn(abort[0], abort, os.environ):
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status), os.WCOREDUMP(status), flush=True)
    CRASHES[crash]()
