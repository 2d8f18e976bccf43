"""A KMS that records its calls, and the other parts that the application needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from werkzeug.test import Client, TestResponse

from hsmwrap.backend import Health
from hsmwrap.http.app import create_app
from hsmwrap.kms.access import AccessKey, Permissions, StaticAccessKeys

ACCESS_KEY = AccessKey("testid", "testsecret", Permissions.everything())
NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


class FakeClock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **delta: float) -> None:
        self.now += timedelta(**delta)


class MemoryNonces:
    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.used: dict[tuple[str, str], datetime] = {}

    def use(self, access_key_id: str, nonce: str, expires_at: datetime) -> bool:
        self.used = {k: e for k, e in self.used.items() if e > self._clock()}
        if (access_key_id, nonce) in self.used:
            return False
        self.used[access_key_id, nonce] = expires_at
        return True


class FakeKms:
    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, str], str, str]] = []
        self.refusals: list[tuple[str, str, str, str]] = []
        self.addresses: list[str | None] = []
        self.answer: Any = {"KeyId": "k-1"}
        self.ready = True

    def execute(self, action, parameters, caller, request_id):
        self.addresses.append(caller.address)
        self.calls.append((action, dict(parameters), caller.access_key_id, request_id))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def record_refusal(self, action, caller, request_id, code):
        self.addresses.append(caller.address)
        self.refusals.append((action, caller.access_key_id, request_id, code))

    def health(self):
        return Health(self.ready, "state", {"database": "secret-host: unavailable"})


@dataclass
class Bench:
    """An application over a fake KMS, and a client in the same process."""

    kms: FakeKms = field(default_factory=FakeKms)
    clock: FakeClock = field(default_factory=FakeClock)
    access_keys: tuple[AccessKey, ...] = (ACCESS_KEY,)

    def __post_init__(self) -> None:
        self.nonces = MemoryNonces(self.clock)
        self.app = create_app(
            self.kms, StaticAccessKeys(self.access_keys), self.nonces, clock=self.clock
        )
        self.client = Client(self.app)
        self.metrics = Client(self.app.metrics_app)

    def get(self, query: str = "", path: str = "/", **more: Any) -> TestResponse:
        return self.client.get(path, query_string=query, **more)

    def post(self, query: str = "", **more: Any) -> TestResponse:
        return self.client.post("/", query_string=query, **more)
