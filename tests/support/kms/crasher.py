"""Run one operation on a KMS in another process, which may die by SIGKILL at a step.

``python -m support.kms.crasher`` forks such a process for each request that it reads: to import the
KMS takes longer than the operation. A line of its input is one JSON object, the environment and the
arguments of ``_perform``; a line of its output is what became of the process.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import cache, partial

from hsmwrap.registry import open_backend
from support import rsa_pairs
from support.kms.fakes import ADMIN, Client, Clock, DirectoryBackend, build_kms

OPENERS = {"file": DirectoryBackend.from_settings, "pkcs11": partial(open_backend, "pkcs11")}
LONGEST = 120


def run_elsewhere(arguments):
    """The ended process: its ``returncode``, ``stdout`` and ``stderr``."""
    server = _server()
    request = {"environment": dict(os.environ), "arguments": arguments}
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return subprocess.CompletedProcess(arguments, **json.loads(server.stdout.readline()))


@cache
def _server():
    server = subprocess.Popen(
        [sys.executable, "-m", "support.kms.crasher"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)
    return server


def main():
    rsa_pairs.use(preload=False)
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            child = os.fork()
            if not child:
                os.dup2(output.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                _become(**json.loads(line))
            _, status = os.waitpid(child, 0)
            ended = {"returncode": os.waitstatus_to_exitcode(status)}
            for name, file in (("stdout", output), ("stderr", errors)):
                file.seek(0)
                ended[name] = file.read()
        print(json.dumps(ended), flush=True)


def _become(environment, arguments):
    os.environ.clear()
    os.environ.update(environment)
    signal.alarm(LONGEST)
    status = 1
    try:
        _perform(**arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _perform(*, url, backend, audit_file, die_at, sweep_days, action, parameters):
    clock = Clock()
    reached = []

    def step(name):
        reached.append(name)
        if name == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    kms = build_kms(url, OPENERS[backend[0]](backend[1]), audit_file, clock, step=step)
    if sweep_days:
        clock.advance(days=sweep_days)
        kms.sweep()
    else:
        Client(kms, ADMIN)(action, **parameters)
    kms.close()
    sys.stdout.write(json.dumps(reached))


if __name__ == "__main__":
    main()
