"""The reference KMS over HTTP, compared with the same calls in process: rates and latencies."""

from __future__ import annotations

import base64
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

from benchmarks import clients
from benchmarks.kms import Call, KmsSide, LocalKms, ServedKms, serving
from benchmarks.measured import KEY_SPEC
from benchmarks.plan import Plan, say
from benchmarks.timing import percentile_99
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec

SIDES = ("http", "in process")
_ALGORITHM = WrappingAlgorithm.RSAES_OAEP_SHA_256
_ISSUE = "GetParametersForImport"
_MARGIN = 2
"""Extra pairs of the pool beyond two bursts, so that a burst does not start a refill."""


@dataclass(frozen=True, slots=True)
class Burst:
    """Seconds of each call of a burst, and of the whole burst."""

    seconds: list[float]
    elapsed: float

    @property
    def rate(self) -> float:
        """Calls per second."""
        return len(self.seconds) / self.elapsed


@dataclass(slots=True)
class Requests:
    """The bursts of one operation with one number of threads."""

    operation: str
    threads: int
    bursts: dict[str, list[Burst]] = field(default_factory=lambda: {side: [] for side in SIDES})

    def rate(self, side: str) -> float:
        """Calls per second; median of the bursts."""
        return statistics.median(each.rate for each in self.bursts[side])

    def p99(self, side: str) -> float:
        """The 99th percentile of the calls, in seconds."""
        return percentile_99([s for each in self.bursts[side] for s in each.seconds])

    @property
    def of_process(self) -> float:
        """The rate over HTTP as a fraction of that in process: median over pairs of bursts."""
        http, process = (self.bursts[side] for side in SIDES)
        pairs = zip(http, process, strict=True)
        return statistics.median(one.rate / other.rate for one, other in pairs)

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {
            "operation": self.operation,
            "threads": self.threads,
            "calls": {s: sum(len(each.seconds) for each in self.bursts[s]) for s in SIDES},
            "per_second": {side: self.rate(side) for side in SIDES},
            "p99_ms": {side: self.p99(side) * 1e3 for side in SIDES},
            "of_process": self.of_process,
        }


@dataclass(frozen=True, slots=True)
class _Load:
    """An operation, and the parameters of each thread's calls on each side."""

    name: str
    action: str
    sides: Mapping[str, KmsSide]
    parameters: Mapping[str, Sequence[Mapping[str, str]]]

    def burst(self, side: str, threads: int, count: int) -> Burst:
        """Time ``count`` calls, distributed over the threads."""
        kms, parameters = self.sides[side], self.parameters[side]
        calls: list[list[Call]] = [[] for _ in range(threads)]
        for number in range(count):
            thread = number % threads
            calls[thread].append(kms.prepare(thread, self.action, parameters[thread]))
        return _burst(calls)


def measure(settings: Mapping[str, Any], plan: Plan) -> Iterator[Requests]:
    """Warm GetParametersForImport and ImportKeyMaterial, on the HSM token of ``settings``."""
    pool = 2 * (plan.requests + _MARGIN)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="hsmwrap-bench-")))
        say("http: starting hsmwrap serve")
        ports = stack.enter_context(serving(directory / "served", settings, pool))
        served = stack.enter_context(ServedKms(*ports, max(plan.clients)))
        local = stack.enter_context(LocalKms(directory / "local", settings, pool))
        sides: dict[str, KmsSide] = dict(zip(SIDES, (served, local), strict=True))
        for side in sides.values():
            side.make_cmks(max(plan.clients))
        # First, so that the pools are refilled before anything is timed.
        imports = {name: [_import(side, c) for c in side.cmks] for name, side in sides.items()}
        issues = {name: [_row(cmk) for cmk in side.cmks] for name, side in sides.items()}
        load = _Load("GetParametersForImport (warm)", _ISSUE, sides, issues)
        yield from _rounds(load, plan, partial(_fill_pools, sides, pool))
        load = _Load("ImportKeyMaterial", "ImportKeyMaterial", sides, imports)
        yield from _rounds(load, plan, lambda: None)


def _rounds(load: _Load, plan: Plan, before: Callable[[], object]) -> Iterator[Requests]:
    """Measure each number of threads; the side that starts changes with each turn."""
    for threads in plan.clients:
        requests = Requests(load.name, threads)
        for turn in range(plan.turns):
            say(f"http: {load.name} by {threads} clients, turn {turn + 1} of {plan.turns}")
            before()
            first = turn % len(SIDES)
            for side in SIDES[first:] + SIDES[:first]:
                requests.bursts[side].append(load.burst(side, threads, plan.requests))
        yield requests


def _row(cmk: str) -> dict[str, str]:
    spec = WrappingKeySpec.RSA_2048
    return {"KeyId": cmk, "WrappingKeySpec": str(spec), "WrappingAlgorithm": str(_ALGORITHM)}


def _fill_pools(sides: Mapping[str, KmsSide], pool: int) -> None:
    """Fill both pools completely, so that they do not refill during a burst (below half)."""
    for side in sides.values():
        while side.pool_level() > pool // 2:
            side.call(_ISSUE, _row(side.cmks[0]))
    for side in sides.values():
        side.wait_for_pool(pool)


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
