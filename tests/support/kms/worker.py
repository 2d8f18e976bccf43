"""A process with a KMS of its own, driven over a pipe: one JSON object a line, in and out.

A request says the time, then what to do: ``call`` (an API request), ``sweep`` or ``objects``. With
``die_at`` a forked child does it and is killed at that step, as the whole process would be.
"""

import json
import os
import signal
import subprocess
import sys
import warnings
from datetime import datetime

from hsmwrap.errors import HsmwrapError
from support import rsa_pairs
from support.backends.scripted import OnePair
from support.kms.fakes import Client, Clock, DirectoryBackend, build_kms, hsm_of

MAX_FAILED_IMPORTS = 3


class QuickBackend(DirectoryBackend):
    """Its wrapping keys are sealed in import tokens as always, but are one pair."""

    opens = OnePair


class Worker:
    """The parent's end."""

    def __init__(self, url, directory, audit_file):
        arguments = json.dumps([url, str(directory), str(audit_file)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.kms.worker", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait(60) == 0

    def _ask(self, now, **request):
        self._process.stdin.write(json.dumps({"now": now.isoformat(), **request}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def call(self, now, action, parameters, die_at=None):
        """Returns ("ok", fields), (the error's code, None) or ("died", None)."""
        return tuple(self._ask(now, call=[action, parameters], die_at=die_at))

    def sweep(self, now):
        return tuple(self._ask(now, sweep=True))

    def objects(self, now):
        """The number of objects in the backend."""
        return self._ask(now, objects=True)[1]


def main(url, directory, audit_file):
    rsa_pairs.use(preload=False)
    clock = Clock()
    die_at = []

    def step(name):
        if name in die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    backend = QuickBackend(directory)
    more = {"step": step, "max_failed_imports": MAX_FAILED_IMPORTS}
    with build_kms(url, backend, audit_file, clock, **more) as kms:
        for line in sys.stdin:
            request = json.loads(line)
            clock.now = datetime.fromisoformat(request["now"])
            die_at[:] = filter(None, [request.get("die_at")])
            perform = _in_child if die_at else _perform
            print(json.dumps(perform(kms, request)), flush=True)


def _perform(kms, request):
    if "objects" in request:
        return "ok", len(hsm_of(kms).objects())
    try:
        if "sweep" in request:
            return "ok", kms.sweep()
        action, parameters = request["call"]
        return "ok", Client(kms)(action, **parameters)
    except HsmwrapError as error:
        return error.code, None


def _in_child(kms, request):
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork in a process with threads; the KMS allows it.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        os.write(writing, json.dumps(_perform(kms, request)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "died", None
    return json.loads(answer)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
