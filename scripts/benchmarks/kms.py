"""Two reference KMS on one HSM token: in this process, and behind ``hsmwrap serve``.

Each is complete: permissions, database, audit log, key-pair pool. Requests are signed beforehand.
"""

from __future__ import annotations

import base64
import hmac
import itertools
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

from benchmarks.load import Failed
from benchmarks.measured import KEY_SPEC, LEVEL, NO_BOUND
from hsmwrap.http import canonical
from hsmwrap.http.app import API_VERSION
from hsmwrap.kms.access import AccessKey, Permissions, StaticAccessKeys
from hsmwrap.kms.config import ServerConfig
from hsmwrap.kms.opening import open_kms
from hsmwrap.metrics import PUBLISH_SECONDS

Call = Callable[[], object]
"""One prepared request."""

_SECRET = secrets.token_hex(16)
_ACCESS_KEY = AccessKey("bench", _SECRET, Permissions.everything())
_DEADLINE = 60
_SETTLED_DEADLINE = 600
_PAIR_SECONDS = 2
"""Longer than a pair takes to make."""
_LENGTH = re.compile(rb"\r\nContent-Length: *(\d+)\r\n", re.IGNORECASE)
_METRICS_PORT = re.compile(r"Listening at: \S+,http://127\.0\.0\.1:(\d+) ")
_POOL_LEVEL = re.compile(r"^hsmwrap_keypool_level\{.*\} (\S+)$", re.MULTILINE)


class KmsSide(ABC):
    """A KMS under measurement.

    Attributes:
        cmks: One CMK for each thread.
        processes: How many processes it is.
    """

    def __init__(self, processes: int = 1) -> None:
        self.cmks: list[str] = []
        self.processes = processes

    @abstractmethod
    def prepare(self, thread: int, action: str, parameters: Mapping[str, str]) -> Call:
        """A call by the thread with this number, prepared as far as a client can."""

    @abstractmethod
    def call(self, action: str, parameters: Mapping[str, str]) -> dict[str, Any]:
        """Call once; the answer's fields."""

    @abstractmethod
    def pool_levels(self) -> list[float]:
        """Number of wrapping key pairs that are ready, in each process."""

    @abstractmethod
    def reconnect(self) -> None:
        """Let the next call of each thread take a new connection, where there are any."""

    def make_cmks(self, count: int) -> None:
        """Create a CMK for each thread, since imports into one CMK wait for each other."""
        wanted = {"Origin": "EXTERNAL", "KeySpec": str(KEY_SPEC), "ProtectionLevel": str(LEVEL)}
        made = [self.call("CreateKey", wanted) for _ in range(count)]
        self.cmks = [fields["KeyMetadata"]["KeyId"] for fields in made]

    def settled_levels(self) -> list[float]:
        """The levels of the key-pair pools, once no pool is being filled.

        Raises:
            Failed: They still change after ten minutes.
        """
        end = time.monotonic() + _SETTLED_DEADLINE
        # What another process publishes may be so old.
        pause = PUBLISH_SECONDS + 1 if self.processes > 1 else _PAIR_SECONDS
        before: list[float] = []
        while True:
            time.sleep(pause)
            levels = self.pool_levels()
            if levels == before:
                return levels
            if time.monotonic() > end:
                raise Failed("the key-pair pools do not come to rest")
            before = levels


class LocalKms(KmsSide):
    """A KMS in this process."""

    def __init__(
        self, directory: Path, settings: Mapping[str, Any], pool: int, database_url: str
    ) -> None:
        super().__init__()
        config = ServerConfig(
            **_configuration(directory, settings, pool, database_url=database_url)
        )
        self._kms = open_kms(config, access_keys=StaticAccessKeys([_ACCESS_KEY]))
        self._caller, self._numbers = _ACCESS_KEY.caller(), itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._kms.close()

    def prepare(self, thread: int, action: str, parameters: Mapping[str, str]) -> Call:
        """No preparation is needed, and the thread does not matter."""
        del thread
        return partial(self.call, action, parameters)

    def call(self, action: str, parameters: Mapping[str, str]) -> dict[str, Any]:
        """Call the KMS; the answer's fields."""
        request_id = f"bench-{next(self._numbers)}"
        return self._kms.execute(action, parameters, self._caller, request_id)

    def reconnect(self) -> None:
        """There are none."""

    def pool_levels(self) -> list[float]:
        """Ask the pool itself."""
        return [sum(kind.level for pool in self._kms.watched()[1] for kind in pool.facts())]


class ServedKms(KmsSide):
    """A KMS behind ``hsmwrap serve``."""

    def __init__(
        self, port: int, metrics_port: int, pid: int, threads: int, processes: int = 1
    ) -> None:
        super().__init__(processes)
        self.port = port
        self._pid = pid
        self._metrics = _Connection(metrics_port)
        self._connections = [_Connection(port) for _ in range(threads)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        for connection in [*self._connections, self._metrics]:
            connection.close()

    def prepare(self, thread: int, action: str, parameters: Mapping[str, str]) -> Call:
        """Sign the request, and take the thread's own connection."""
        return partial(self._connections[thread].ask, signed_post(action, parameters))

    def call(self, action: str, parameters: Mapping[str, str]) -> dict[str, Any]:
        """Sign and send a request; the answer's fields."""
        fields: dict[str, Any] = json.loads(
            self._connections[0].ask(signed_post(action, parameters))
        )
        return fields

    def reconnect(self) -> None:
        """Close the threads' connections: new ones may reach other worker processes."""
        for connection in self._connections:
            connection.close()

    def cpu_seconds(self) -> float:
        """Processor time of the worker processes so far."""
        workers = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text("ascii").split()
        # proc(5): utime and stime are the fields 14 and 15, the second one is in parentheses.
        fields = [Path(f"/proc/{w}/stat").read_text("utf-8").rpartition(")")[2] for w in workers]
        ticks = sum(sum(map(int, each.split()[11:13])) for each in fields)
        return ticks / os.sysconf("SC_CLK_TCK")

    def pool_levels(self) -> list[float]:
        """Read /metrics."""
        page = self._metrics.ask(b"GET /metrics HTTP/1.1\r\nHost: bench\r\n\r\n").decode()
        return [float(level) for level in _POOL_LEVEL.findall(page)] or [0]


class _Connection:
    """A persistent connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None

    def ask(self, request: bytes) -> bytes:
        """Send a request; returns the body of the answer, which has to have status 200."""
        try:
            head, body = self._exchange(request)
        except ConnectionError:  # the server closes idle connections
            self.close()
            head, body = self._exchange(request)
        if not head.startswith(b"HTTP/1.1 200 "):
            raise Failed(f"{head.splitlines()[0]!r}: {body!r}")
        return body

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _exchange(self, request: bytes) -> tuple[bytes, bytes]:
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=_DEADLINE)
        self._socket.sendall(request)
        head, _, body = self._more(b"", lambda data: b"\r\n\r\n" in data).partition(b"\r\n\r\n")
        length = _LENGTH.search(head + b"\r\n")
        if length is None:
            raise Failed("the answer has no Content-Length")
        return head, self._more(body, lambda data: len(data) >= int(length[1]))

    def _more(self, data: bytes, enough: Callable[[bytes], bool]) -> bytes:
        assert self._socket is not None  # noqa: S101  # _exchange connected it
        while not enough(data):
            received = self._socket.recv(65_536)
            if not received:
                raise ConnectionResetError
            data += received
        return data


@contextmanager
def serving(
    directory: Path,
    settings: Mapping[str, Any],
    pool: int,
    plugin: str = "pkcs11",
    *,
    database_url: str = "",
    workers: int = 1,
) -> Iterator[tuple[int, int, int]]:
    """Run ``hsmwrap serve``; yields its port, that of its metrics, and its process.

    Args:
        directory: For all its files.
        settings: Of the backend.
        pool: Wrapping key pairs that are made ahead.
        plugin: The backend.
        database_url: Without it: SQLite in ``directory``.
        workers: Worker processes.

    Raises:
        Failed: It does not start; its log is in the message.
    """
    config, log = directory / "hsmwrap.toml", directory / "log"
    configuration = _configuration(directory, settings, pool, plugin, database_url)
    config.write_text(_toml(configuration), encoding="utf-8")
    command = [sys.executable, "-m", "hsmwrap.cli", "serve", "--port", "0", "--config", str(config)]
    command += ["--workers", str(workers)]
    with log.open("wb") as stderr:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        assert server.stdout is not None  # noqa: S101  # it is a pipe
        ready = server.stdout.readline()
        if not ready.startswith("ready http://127.0.0.1:"):
            raise Failed(f"hsmwrap serve did not start: {log.read_text('utf-8')}")
        metrics = _METRICS_PORT.search(log.read_text("utf-8"))
        if metrics is None:
            raise Failed("the log does not say where the metrics are")
        yield int(ready.rpartition(":")[2]), int(metrics[1]), server.pid
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(_DEADLINE)
        server.kill()
        server.wait()


def _configuration(
    directory: Path,
    settings: Mapping[str, Any],
    pool: int,
    plugin: str = "pkcs11",
    database_url: str = "",
) -> dict[str, Any]:
    """A server's configuration with all its files in ``directory``; writes the access key file."""
    directory.mkdir(exist_ok=True)
    access_keys = directory / "access-keys.toml"
    if not access_keys.exists():
        access_keys.touch(0o600)
        key = {"id": _ACCESS_KEY.access_key_id, "secret": _SECRET}
        lines = [f"{name} = {json.dumps(value)}" for name, value in key.items()]
        allow = 'allow = [{ actions = ["*"], keys = ["*"] }]'
        access_keys.write_text("\n".join(["[[access_key]]", *lines, allow, ""]), encoding="utf-8")
    return {
        "metrics_address": "127.0.0.1:0",
        "database_url": database_url or f"sqlite:///{directory}/kms.db",
        "access_key_file": str(access_keys),
        "audit_file": str(directory / "audit.log"),
        "key_pool": pool,
        "max_failed_imports": NO_BOUND,
        "sweep_interval": 0,
        "backends": {str(LEVEL): {"plugin": plugin, "settings": dict(settings)}},
    }


def _toml(configuration: Mapping[str, Any]) -> str:
    """The configuration as TOML; scalars as in JSON, nested tables as dotted keys."""

    def lines(prefix: str, table: Mapping[str, Any]) -> Iterator[str]:
        for name, value in table.items():
            if isinstance(value, Mapping):
                yield from lines(f"{prefix}{name}.", value)
            else:
                yield f"{prefix}{name} = {json.dumps(value)}"

    return "\n".join([*lines("", configuration), ""])


def signed_post(action: str, parameters: Mapping[str, str]) -> bytes:
    """A complete HTTP request with the parameters in a form, signed by version 1."""
    signed = {
        **parameters,
        "Action": action,
        "Version": API_VERSION,
        "Format": "JSON",
        "AccessKeyId": _ACCESS_KEY.access_key_id,
        "SignatureMethod": "HMAC-SHA1",
        "SignatureVersion": "1.0",
        "SignatureNonce": secrets.token_hex(16),
        "Timestamp": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    }
    text = canonical.v1_string_to_sign("POST", signed).encode()
    mac = hmac.digest(f"{_SECRET}&".encode(), text, "sha1")
    body = canonical.query({**signed, "Signature": base64.b64encode(mac).decode()}).encode()
    head = (
        "POST / HTTP/1.1\r\nHost: bench\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
