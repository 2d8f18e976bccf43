"""The reference KMS over HTTP, compared with the same calls in process: rates and latencies.

Three sides take turns: ``hsmwrap serve`` over HTTP, a KMS in this process (``kms.execute``), and
the backend alone. The clients are another process (:mod:`benchmarks.load`).
"""

from __future__ import annotations

import base64
import itertools
import secrets
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from support.services import postgres

from benchmarks import clients
from benchmarks.kms import Call, KmsSide, LocalKms, ServedKms, serving, signed_post
from benchmarks.load import Burst, Send, generator
from benchmarks.measured import KEY_SPEC, MeasuredBackend, new_cmk
from benchmarks.plan import Plan, say
from benchmarks.timing import percentile_99
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec

HTTP, KMS, BACKEND = SIDES = ("http", "kms", "backend")
_ALGORITHM = WrappingAlgorithm.RSAES_OAEP_SHA_256
_ISSUE, _IMPORT = "GetParametersForImport", "ImportKeyMaterial"
_REFILLING = f"{_ISSUE}, pool refilling"
_PLAINTEXT = bytes(32)
_BURSTS = 4
"""How many bursts a full pool has pairs for: one that has three leaves more than half."""


@dataclass(frozen=True, slots=True)
class Server:
    """How the KMS is served: its database, and its number of worker processes."""

    database: str
    workers: int


@dataclass(slots=True)
class Requests:
    """The bursts of one operation with one number of clients; not all sides have all operations."""

    operation: str
    server: Server
    threads: int
    bursts: dict[str, list[Burst]]
    cpu: list[float] = field(default_factory=list)
    """Processor seconds of the server's processes for each request, burst by burst."""

    def rate(self, side: str) -> float:
        """Calls per second; median of the bursts."""
        return statistics.median(each.rate for each in self.bursts[side])

    def p50(self, side: str) -> float:
        """The median of the calls, in seconds."""
        return statistics.median(s for each in self.bursts[side] for s in each.seconds)

    def p99(self, side: str) -> float:
        """The 99th percentile of the calls, in seconds."""
        return percentile_99([s for each in self.bursts[side] for s in each.seconds])

    def of(self, side: str) -> float:
        """The rate over HTTP as a fraction of the side's: median over pairs of bursts."""
        pairs = zip(self.bursts[HTTP], self.bursts[side], strict=True)
        return statistics.median(one.rate / other.rate for one, other in pairs)

    @property
    def client_cpu(self) -> float:
        """The processor time of the clients as a fraction of the time that the bursts took."""
        bursts = self.bursts[HTTP]
        return sum(each.client_cpu for each in bursts) / sum(each.elapsed for each in bursts)

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {
            "operation": self.operation,
            "database": self.server.database,
            "workers": self.server.workers,
            "clients": self.threads,
            "calls": {s: sum(len(each.seconds) for each in b) for s, b in self.bursts.items()},
            "per_second": {side: self.rate(side) for side in self.bursts},
            "p50_ms": {side: self.p50(side) * 1e3 for side in self.bursts},
            "p99_ms": {side: self.p99(side) * 1e3 for side in self.bursts},
            "server_cpu_ms": statistics.median(self.cpu) * 1e3,
            "client_cpu": self.client_cpu,
            "of": {side: self.of(side) for side in self.bursts if side != HTTP},
        }


_Parameters = Sequence[Mapping[str, str]]
"""The parameters of each client's calls."""


@dataclass(frozen=True, slots=True)
class _Load:
    """An operation: its parameters on the sides that are a KMS, and its call on the backend."""

    action: str
    count: int
    parameters: Mapping[str, _Parameters]
    alone: Call | None = None
    before: Callable[[], object] = lambda: None
    """Runs before each turn."""

    @property
    def operation(self) -> str:
        """The API's action."""
        return self.action.partition(",")[0]


class _Stand:
    """The sides on one database, with one number of worker processes."""

    def __init__(
        self, served: ServedKms, local: LocalKms, send: Send, measured: MeasuredBackend
    ) -> None:
        self.served, self.local = served, local
        self.kms: Mapping[str, KmsSide] = {HTTP: served, KMS: local}
        self._send = send
        self._measured = measured

    def burst(self, load: _Load, side: str, threads: int) -> tuple[Burst, float]:
        """Time the calls of a load; with the processor time that the server took, if it is HTTP."""
        if side == BACKEND:
            assert load.alone is not None  # noqa: S101  # it is not asked for otherwise
            return _burst(_dealt([load.alone] * load.count, threads)), 0
        mine = load.parameters[side]
        if side == KMS:
            calls = [
                partial(self.local.call, load.operation, mine[number % threads])
                for number in range(load.count)
            ]
            return _burst(_dealt(calls, threads)), 0
        requests = [
            signed_post(load.operation, mine[number % threads]) for number in range(load.count)
        ]
        cpu = self.served.cpu_seconds()
        burst = self._send(self.served.port, _dealt(requests, threads))
        return burst, self.served.cpu_seconds() - cpu

    def loads(self, plan: Plan, pool: int) -> Iterator[_Load]:
        """All operations; the imports are prepared before the pools are full."""
        imports = {name: [_import(side, c) for c in side.cmks] for name, side in self.kms.items()}
        # Making pairs in the background would take processor time from what is measured.
        self._fill_pools(pool)
        yield from self._uses(plan)
        issues = {name: [_row(cmk) for cmk in side.cmks] for name, side in self.kms.items()}
        yield _Load(_ISSUE, plan.requests, issues, before=partial(self._fill_pools, pool))
        yield _Load(_IMPORT, plan.requests, imports)
        if self.served.processes == 1:
            # Else a process may run out of pairs: which of them a connection reaches is chance.
            refilling = partial(self._start_refill, pool)
            # Last, as the pools are still being filled when it ends.
            yield _Load(_REFILLING, plan.requests, issues, before=refilling)

    def _uses(self, plan: Plan) -> Iterator[_Load]:
        most = max(plan.clients)
        plaintext = base64.b64encode(_PLAINTEXT).decode()
        encrypt: dict[str, _Parameters] = {}
        decrypt: dict[str, _Parameters] = {}
        data_key: dict[str, _Parameters] = {}
        for name, side in self.kms.items():
            wanted = {"KeySpec": str(KEY_SPEC), "ProtectionLevel": "HSM"}
            key = side.call("CreateKey", wanted)["KeyMetadata"]["KeyId"]
            encrypt[name] = [{"KeyId": key, "Plaintext": plaintext}] * most
            blob = side.call("Encrypt", encrypt[name][0])["CiphertextBlob"]
            decrypt[name] = [{"CiphertextBlob": blob}] * most
            data_key[name] = [{"KeyId": key}] * most
        issued = self._measured.issue(WrappingKeySpec.RSA_2048, _ALGORITHM)
        imported = self._measured.service.import_key_material(
            issued.cmk, issued.ciphertext, issued.parameters.import_token
        ).imported
        backend, key_ref, data = self._measured.backend, imported.key, new_cmk().key_id.encode()
        ciphertext = backend.encrypt(key_ref, _PLAINTEXT, data)
        seal = partial(backend.encrypt, key_ref, _PLAINTEXT, data)
        yield _Load("Encrypt", plan.uses, encrypt, seal)
        yield _Load(
            "Decrypt", plan.uses, decrypt, partial(backend.decrypt, key_ref, ciphertext, data)
        )
        yield _Load("GenerateDataKey", plan.uses, data_key, seal)

    def _start_refill(self, pool: int) -> None:
        """Take so many pairs that each pool is just being filled again."""
        self._fill_pools(pool)
        for side in self.kms.values():
            self._take_pairs(side, int(max(side.pool_levels())) - pool // 2)

    @staticmethod
    def _take_pairs(side: KmsSide, count: int) -> None:
        for _, (thread, cmk) in zip(
            range(count), itertools.cycle(enumerate(side.cmks)), strict=False
        ):
            side.reconnect()  # so that each process is reached
            side.prepare(thread, _ISSUE, _row(cmk))()

    def _fill_pools(self, pool: int) -> None:
        """Let no pool be filled during the next burst, nor be filled now."""
        for side in self.kms.values():
            while min(levels := side.settled_levels()) <= pool * (_BURSTS - 1) // _BURSTS:
                # A pool is filled from one half on.
                self._take_pairs(side, side.processes * max(1, int(max(levels)) - pool // 2))


def measure(
    settings: Mapping[str, Any], plan: Plan, measured: MeasuredBackend, opened_keys: int = 0
) -> Iterator[Requests]:
    """Measure each operation with each server of the plan, on the HSM token of ``settings``.

    ``opened_keys`` is the setting of that name of both KMS; the backend alone opens each key anew.
    """
    settings = {**settings, "opened_keys": opened_keys}
    pool = _BURSTS * plan.requests
    with ExitStack() as outer:
        send = outer.enter_context(generator())
        cluster = None
        if any(database == "postgresql" for database, _ in plan.servers):
            cluster = outer.enter_context(postgres.PrivateCluster())
        for database, workers in plan.servers:
            with ExitStack() as stack:
                directory = Path(stack.enter_context(TemporaryDirectory(prefix="hsmwrap-bench-")))
                say(f"http: starting hsmwrap serve with {database}, {workers} workers")
                urls = ["", ""]
                if cluster and database == "postgresql":
                    urls = [cluster.new_database() for _ in SIDES[:2]]
                there = serving(
                    directory / "served", settings, pool, database_url=urls[0], workers=workers
                )
                served = ServedKms(*stack.enter_context(there), max(plan.clients), workers)
                local = LocalKms(directory / "local", settings, pool, urls[1])
                stack.enter_context(served)
                stack.enter_context(local)
                stand = _Stand(served, local, send, measured)
                for side in stand.kms.values():
                    side.make_cmks(max(plan.clients))
                for load in stand.loads(plan, pool):
                    yield from _rounds(stand, Server(database, workers), load, plan)


def _rounds(stand: _Stand, server: Server, load: _Load, plan: Plan) -> Iterator[Requests]:
    """Measure each number of clients; the side that starts changes with each turn."""
    sides = SIDES if load.alone else (HTTP, KMS)
    for threads in plan.clients:
        requests = Requests(load.action, server, threads, {side: [] for side in sides})
        for turn in range(plan.turns):
            what = f"{load.action} by {threads} clients, {server.database}, {server.workers}"
            say(f"http: {what} workers, turn {turn + 1} of {plan.turns}")
            load.before()
            first = turn % len(sides)
            for side in sides[first:] + sides[:first]:
                burst, cpu = stand.burst(load, side, threads)
                requests.bursts[side].append(burst)
                if side == HTTP:
                    requests.cpu.append(cpu / load.count)
        yield requests


def _row(cmk: str) -> dict[str, str]:
    spec = WrappingKeySpec.RSA_2048
    return {"KeyId": cmk, "WrappingKeySpec": str(spec), "WrappingAlgorithm": str(_ALGORITHM)}


def _import(side: KmsSide, cmk: str) -> dict[str, str]:
    """Parameters to import the same material into the same CMK repeatedly."""
    issued = side.call(_ISSUE, _row(cmk))
    material = secrets.token_bytes(KEY_SPEC.material_length)
    ciphertext = clients.encrypt(_ALGORITHM, base64.b64decode(issued["PublicKey"]), material)
    return {
        "KeyId": cmk,
        "EncryptedKeyMaterial": base64.b64encode(ciphertext).decode(),
        "ImportToken": issued["ImportToken"],
        "KeyMaterialExpireUnix": "0",
    }


def _dealt(each: Sequence[Any], threads: int) -> list[Sequence[Any]]:
    """One sequence for each thread; the first thread's parameters are at 0, the next at 1."""
    return [each[first::threads] for first in range(threads)]


def _burst(calls: Sequence[Sequence[Call]]) -> Burst:
    """Make the calls, each list in its own thread."""
    start = threading.Barrier(len(calls))

    def work(mine: Sequence[Call]) -> tuple[float, list[float], float]:
        start.wait()
        started, seconds = time.perf_counter(), []
        for call in mine:
            before = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - before)
        return started, seconds, time.perf_counter()

    with ThreadPoolExecutor(len(calls)) as threads:
        done = list(threads.map(work, calls))
    elapsed = max(ended for _, _, ended in done) - min(started for started, _, _ in done)
    return Burst([each for _, seconds, _ in done for each in seconds], elapsed)
