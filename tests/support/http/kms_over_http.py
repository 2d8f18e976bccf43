"""The real KMS behind the real application, on an ephemeral port of the loopback interface."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from werkzeug.serving import WSGIRequestHandler, make_server

from hsmwrap.backend import Backend
from hsmwrap.http.app import create_app
from hsmwrap.kms.access import AccessKey, Grant, Permissions, StaticAccessKeys
from hsmwrap.kms.audit import AuditLog
from hsmwrap.kms.database import Database
from hsmwrap.kms.service import Kms
from hsmwrap.policy import Deployment
from support.fast import needs_service
from support.http.sdk_clients import Credentials

ACCESS_KEYS = (
    AccessKey("testid", "testsecret", Permissions.everything()),
    AccessKey("reader", "readersecret", Permissions((Grant(("DescribeKey",), ("*",)),))),
)


class ShiftedClock:
    """The real time, which the SDKs put into their requests, plus a shift that tests set."""

    def __init__(self) -> None:
        self.shift = timedelta(0)

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.shift

    @contextmanager
    def shifted(self, **delta: float) -> Iterator[None]:
        self.shift = timedelta(**delta)
        try:
            yield
        finally:
            self.shift = timedelta(0)


class QuietHandler(WSGIRequestHandler):
    def log(self, *args: Any) -> None:
        pass


@dataclass
class RunningKms:
    """A running server.

    Attributes:
        kms_clock: Says whether tokens are expired and material is due.
        http_clock: Says whether a request is fresh.
    """

    kms: Kms
    backend: Backend
    port: int
    kms_clock: ShiftedClock
    http_clock: ShiftedClock
    audit_file: Path
    credentials: Credentials = field(init=False)

    def __post_init__(self) -> None:
        self.credentials = Credentials(f"127.0.0.1:{self.port}")


@contextmanager
def running_kms(
    directory: Path, backend: Backend, deployment: Deployment | None = None
) -> Iterator[RunningKms]:
    needs_service()
    kms_clock, http_clock = ShiftedClock(), ShiftedClock()
    database = Database(f"sqlite:///{directory}/kms.db")
    database.migrate()
    access_keys = StaticAccessKeys(ACCESS_KEYS)
    with Kms(
        database,
        dict.fromkeys(backend.capabilities().protection_levels, backend),
        deployment or Deployment(),
        access_keys=access_keys,
        audit_log=AuditLog(directory / "audit.log", kms_clock),
        clock=kms_clock,
    ) as kms:
        app = create_app(kms, access_keys, kms.nonces, clock=http_clock)
        server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=QuietHandler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield RunningKms(
                kms, backend, server.server_port, kms_clock, http_clock, directory / "audit.log"
            )
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def backend_settings(name: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of a backend that serves CMKs of both levels, or a skip."""
    if name == "software":
        return {"serve_hsm_level": True}
    return request.getfixturevalue("softhsm").settings("http")
