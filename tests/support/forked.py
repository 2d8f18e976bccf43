"""Processes of their own that need no time to import: forks of one that has imported and waits.

``python -m support.forked MODULE`` imports MODULE and forks for each line of its input: one JSON
object, the environment and the arguments of ``MODULE.perform``. A line of its output is what became
of the fork. The waiting process does nothing else, so a fork has nothing open and one thread.
"""

import atexit
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from functools import cache

LONGEST = 120
"""Seconds."""


def run(module, environment=None, **arguments):
    """The ended process: its ``returncode``, ``stdout`` and ``stderr``.

    ``environment`` is laid over this process's; None removes a variable.
    """
    whole = dict(os.environ) | (environment or {})
    set_ = {name: value for name, value in whole.items() if value is not None}
    request = {"environment": set_, "arguments": arguments}
    try:
        server = _server(module)
        _ask(server, request)
    except OSError:  # it has ended: what was asked is not done yet
        _server.cache_clear()
        server = _server(module)
        _ask(server, request)
    try:
        return subprocess.CompletedProcess(module, **json.loads(server.stdout.readline()))
    except (OSError, ValueError):
        _server.cache_clear()  # one test fails, and not all that come after it
        raise


def _ask(server, request):
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()


@cache
def _server(module):
    command = [sys.executable, "-m", "support.forked", module]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen(command, text=True, **pipes)
    atexit.register(_end, server)
    return server


def _end(server):
    with suppress(OSError, ValueError):
        server.communicate()


def main(name):
    module = importlib.import_module(name)
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            child = os.fork()
            if not child:
                os.dup2(output.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                _become(module.perform, **json.loads(line))
            _, status = os.waitpid(child, 0)
            ended = {"returncode": os.waitstatus_to_exitcode(status)}
            for stream, file in (("stdout", output), ("stderr", errors)):
                file.seek(0)
                ended[stream] = file.read()
        print(json.dumps(ended), flush=True)


def _become(perform, environment, arguments):
    os.environ.clear()
    os.environ.update(environment)
    signal.alarm(LONGEST)
    status = 1
    try:
        status = perform(**arguments) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1])
