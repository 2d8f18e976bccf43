"""A soak of memory: does a worker of ``hsmwrap serve`` grow under a mixed load?

``scripts/soak memory --minutes 60`` serves with one worker, calls it at a steady rate and samples
the worker's resident memory. The last half of the time has to be flat: its slope, by least squares,
stays under ``--most-growth``. With ``--leak N`` the server keeps N bytes of each request, which
shows that the trial can fail. The backend is software by default; with ``--plugin pkcs11`` it is
SoftHSM, which leaks by itself, and ``--max-requests`` then has to hold the memory down.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from support.http.gunicorn_runner import Process, running
from support.http.rpc_signing import v1_query
from support.kms.fakes import import_request

from hsmwrap.http import app
from hsmwrap.software import KeyringFile
from hsmwrap.testing.softhsm import SoftHsm
from soak.runner import say

KEYS = 40
SAMPLE_SECONDS = 10.0
CONFIG = """\
port = 0
metrics_address = "127.0.0.1:0"
database_url = "sqlite:///{directory}/kms.db"
access_key_file = "{directory}/access-keys.toml"
audit_file = "{directory}/audit.log"
key_pool = 4
max_failed_imports = 1000000
limits.max_requests = {max_requests}
backends.{level}.plugin = "{plugin}"
backends.{level}.settings = {{ {settings} }}
"""
ACCESS_KEY = """\
[[access_key]]
id = "testid"
secret = "testsecret"
allow = [{ actions = ["*"], keys = ["*"] }]
"""


@dataclass
class Client:
    """Calls the server over one connection, and chooses what to call.

    Attributes:
        level: Protection level of its keys.
        calls: How often it called what.
        failures: What was not answered as it should be.
    """

    port: int
    level: str
    seed: int
    calls: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        self.chosen = random.Random(self.seed)  # repeatable, not secret
        self.keys = [self._make_key() for _ in range(KEYS)]

    def ask(self, action: str, **parameters: str) -> tuple[int, dict[str, Any]]:
        self.calls[action] += 1
        signed: dict[str, Any] = {"action": action, "at": datetime.now(UTC), **parameters}
        self.connection.request("POST", f"/?{v1_query('POST', **signed)}")
        answer = self.connection.getresponse()
        return answer.status, json.loads(answer.read())

    def call(self, action: str, expected: int = 200, **parameters: str) -> dict[str, Any]:
        status, fields = self.ask(action, **parameters)
        if status != expected:
            self.failures.append(f"{action}: {status} {fields.get('Code')}")
        return fields

    def one(self) -> None:
        """One step of the mixed load."""
        key = self.chosen.choice(self.keys)
        steps: list[Callable[[str], None]] = [self._use, self._use, self._use, self._data_key]
        steps += [self._use, self._data_key, self._read, self._refused, self._import]
        self.chosen.choice(steps)(key)

    def _make_key(self) -> str:
        made = self.call("CreateKey", Origin="EXTERNAL", ProtectionLevel=self.level)
        key: str = made["KeyMetadata"]["KeyId"]
        self._import(key)
        return key

    def _import(self, key: str) -> None:
        issued = self.call(
            "GetParametersForImport",
            KeyId=key,
            WrappingKeySpec="RSA_2048",
            WrappingAlgorithm="RSAES_OAEP_SHA_256",
        )
        self.call("ImportKeyMaterial", **import_request(issued, bytes(32)))

    def _use(self, key: str) -> None:
        text = base64.b64encode(self.chosen.randbytes(self.chosen.randrange(1, 2048))).decode()
        blob = self.call("Encrypt", KeyId=key, Plaintext=text)["CiphertextBlob"]
        if self.call("Decrypt", CiphertextBlob=blob)["Plaintext"] != text:
            self.failures.append("Decrypt: another plaintext")

    def _data_key(self, key: str) -> None:
        self.call("GenerateDataKey", KeyId=key)

    def _read(self, key: str) -> None:
        self.call("DescribeKey", KeyId=key)
        self.call("ListKeys", PageSize="20")

    def _refused(self, key: str) -> None:
        self.call("Encrypt", 404, KeyId=f"none-{self.chosen.random()}", Plaintext="YQ==")
        self.call("Decrypt", 400, CiphertextBlob="YWJj")
        self.call("Encrypt", 400, KeyId=key, Plaintext="*")


@dataclass(frozen=True)
class Sample:
    """Resident memory of the workers, in kB, after so many seconds and calls."""

    seconds: float
    calls: int
    kilobytes: int
    workers: tuple[str, ...]


def resident(server: Process) -> tuple[int, tuple[str, ...]]:
    """Resident memory of the worker processes in kB, and their ids."""
    pid, total = server.popen.pid, 0
    workers = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()
    for each in workers:
        try:
            status = Path(f"/proc/{each}/status").read_text("utf-8")
        except FileNotFoundError:  # it has just been replaced
            continue
        total += int(status.partition("VmRSS:")[2].split()[0])
    return total, tuple(workers)


def slope(samples: Sequence[Sample]) -> tuple[float, float]:
    """Growth in kB per hour and in bytes per call, by least squares."""
    kilobytes = [each.kilobytes for each in samples]
    hourly = statistics.linear_regression([s.seconds for s in samples], kilobytes).slope * 3600
    by_call = statistics.linear_regression([s.calls for s in samples], kilobytes).slope * 1024
    return hourly, by_call


@contextmanager
def served(options: argparse.Namespace, directory: Path) -> Iterator[Process]:
    """A server with one worker and a database, an audit log and keys of its own."""
    level = "SOFTWARE" if options.plugin == "software" else "HSM"
    if options.plugin == "software":
        settings = {"keyring_file": str(directory / "keyring")}
        KeyringFile(directory / "keyring").create()
    else:
        ours = {n: v for n, v in os.environ.items() if n.startswith(("HSMWRAP_", "SOFTHSM2_"))}
        settings = SoftHsm(ours).settings("memory")
    (directory / "access-keys.toml").touch(0o600)
    (directory / "access-keys.toml").write_text(ACCESS_KEY)
    config = directory / "hsmwrap.toml"
    config.write_text(
        CONFIG.format(
            directory=directory,
            level=level,
            plugin=options.plugin,
            max_requests=options.max_requests,
            settings=", ".join(f"{name} = {json.dumps(v)}" for name, v in settings.items()),
        )
    )
    command = ["-m", "soak.memory", str(options.leak), "serve", "--config", str(config)]
    with running(command, directory / "log") as server:
        yield server


def run(options: argparse.Namespace, directory: Path) -> int:
    with served(options, directory) as server:
        client = Client(server.port, "SOFTWARE" if options.plugin == "software" else "HSM", 1)
        samples: list[Sample] = []
        started = time.monotonic()
        end = started + options.minutes * 60
        due = next_sample = started
        while (now := time.monotonic()) < end:
            if now >= next_sample:
                samples.append(Sample(now - started, client.calls.total(), *resident(server)))
                next_sample += options.sample_seconds
                if len(samples) % 30 == 1:
                    say(f"{samples[-1].calls} calls, {samples[-1].kilobytes} kB")
            before = client.calls.total()
            client.one()
            due = max(due, now - 1) + (client.calls.total() - before) / options.rate
            time.sleep(max(0.0, due - time.monotonic()))
    return report(options, samples, client)


def report(options: argparse.Namespace, samples: Sequence[Sample], client: Client) -> int:
    """Print what was found; 0 only if memory was flat and no call failed."""
    last = samples[len(samples) // 2 :]
    hourly, by_call = slope(last)
    workers = {worker for each in samples for worker in each.workers}
    found = {
        "calls": dict(client.calls),
        "failed": len(client.failures),
        "failures": client.failures[:5],
        "workers": len(workers),
        "kilobytes": [each.kilobytes for each in samples[:: math.ceil(len(samples) / 20)]],
        "most_kilobytes": max(each.kilobytes for each in samples),
        "kilobytes_per_hour": round(hourly),
        "bytes_per_call": round(by_call, 1),
        "flat": hourly <= options.most_growth,
    }
    print(json.dumps(found, indent=2))
    recycled = options.max_requests and len(workers) > 1
    return int(bool(client.failures) or not (found["flat"] or recycled))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak memory", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=50.0, help="calls a second")
    parser.add_argument("--plugin", choices=("software", "pkcs11"), default="software")
    parser.add_argument("--max-requests", type=int, default=0, help="recycle the worker after them")
    parser.add_argument("--leak", type=int, default=0, help="bytes of each request that are kept")
    parser.add_argument(
        "--most-growth", type=float, default=1024.0, help="kB an hour that count as flat"
    )
    parser.add_argument("--sample-seconds", type=float, default=SAMPLE_SECONDS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="hsmwrap-memory-") as directory:
        return run(options, Path(directory))


def _leaking(size: int) -> None:
    """Let the server keep so many bytes of each request."""
    kept: list[bytes] = []
    respond = app.App._respond

    def leak(self: Any, environ: Any, exchange: Any) -> Any:
        kept.append(bytes(size))
        return respond(self, environ, exchange)

    vars(app)["App"] = type("App", (app.App,), {"_respond": leak})


if __name__ == "__main__":
    from hsmwrap.cli import main as hsmwrap

    if size := int(sys.argv[1]):
        _leaking(size)
    sys.exit(hsmwrap(sys.argv[2:]))
