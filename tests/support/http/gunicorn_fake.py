"""Serves a fake KMS under gunicorn.

Usage: python -m support.http.gunicorn_fake WORKERS DIRECTORY [SECONDS] [OPTION=NUMBER...]

SECONDS are the deadline of everything that a client does, instead of the real ones. Options are
those of the server, or a deadline in capitals. It is ready where the file ``healthy`` is in the
directory. It does not open where ``unavailable`` or ``pin`` is there; a process
that opened leaves ``opened-PID``.

A call of the action Wait leaves the file ``started`` and returns when the file ``release`` is
there. Metrics returns this process's page of metrics, its number and the directory of all.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

THREADS = 4


class WaitingKms:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def execute(self, action, parameters, caller, request_id):
        if action == "Wait":
            (self._directory / "started").touch()
            while not (self._directory / "release").exists():
                time.sleep(0.01)
        if action == "Metrics":
            from hsmwrap.http.app import _render

            directory = os.environ["PROMETHEUS_MULTIPROC_DIR"]
            return {"Process": os.getpid(), "Directory": directory, "Metrics": _render().decode()}
        return {"Length": sum(map(len, parameters.values()))}

    def record_refusal(self, action, caller, request_id, code):
        pass

    def health(self):
        if (self._directory / "healthy").exists():
            from hsmwrap.backend import Health

            return Health(ready=True, detail="")
        raise ConnectionError("secret-host")


class AnyNonce:
    def use(self, access_key_id, nonce, expires_at):
        return True


def load(directory: Path):
    from hsmwrap.errors import PinError, ServiceUnavailable
    from hsmwrap.http import logs
    from hsmwrap.http.app import create_app
    from hsmwrap.kms.access import StaticAccessKeys
    from support.http.fakes import ACCESS_KEY

    if (directory / "broken").exists():
        raise RuntimeError("this application does not load")
    logs.configure()
    if (directory / "unavailable").exists():
        raise ServiceUnavailable("the HSM is unreachable")
    if (directory / "pin").exists():
        raise PinError("the PIN was refused")
    (directory / f"opened-{os.getpid()}").touch()
    return create_app(
        WaitingKms(directory),
        StaticAccessKeys([ACCESS_KEY]),
        AnyNonce(),
        clock=lambda: datetime.now(UTC),
    )


def from_environment():
    """For gunicorn's own command line."""
    return load(Path(os.environ["FAKE_DIRECTORY"]))


def hurry(seconds: float) -> None:
    from hsmwrap.http import deadline

    for name in ("HEAD_SECONDS", "BODY_SECONDS", "ANSWER_SECONDS", "REST_SECONDS"):
        setattr(deadline, name, seconds)


def main() -> int:
    from hsmwrap.http import deadline
    from hsmwrap.http.server import Server

    workers, directory = int(sys.argv[1]), Path(sys.argv[2])
    options = {}
    for given in sys.argv[3:]:
        name, _, value = given.rpartition("=")
        if name.isupper():
            setattr(deadline, name, float(value))
        elif name:
            options[name] = json.loads(value)
        else:
            hurry(float(value))
    return Server(
        lambda: load(directory),
        host="127.0.0.1",
        port=0,
        workers=workers,
        threads=THREADS,
        metrics_address="127.0.0.1:0",
        **options,
    ).run_to_exit()


if __name__ == "__main__":
    sys.exit(main())
