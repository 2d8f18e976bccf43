"""Throughput with many threads: our calls per second and the raw ones, in alternating slices.

The rate of RSA key generation is measured as processor seconds of prime search per second, because
the number of keys per second also depends on chance.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.hsm import Raw, RawToken
from benchmarks.measured import MOST_THREADS, MeasuredBackend
from benchmarks.plan import Plan, say
from benchmarks.timing import SEARCHED, Side
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec

SIDES = ("ours", "loop", "bare")
_ROWS = (
    (WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_1),
    (WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE),
)


@dataclass(frozen=True, slots=True)
class Load:
    """One operation; each side has a call for each thread, and raw calls their own session.

    ``clear`` removes what a slice left behind.
    """

    name: str
    sides: Mapping[str, Sequence[Side]]
    searches: bool
    clear: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Slice:
    """The result of one slice: calls, and seconds of prime search, per second."""

    calls: float
    searching: float


@dataclass(slots=True)
class Rates:
    """One load at one number of threads."""

    load: str
    threads: int
    searches: bool
    slices: dict[str, list[Slice]] = field(default_factory=lambda: {side: [] for side in SIDES})

    def rate(self, side: str) -> float:
        """Calls per second, or searching per second; median of the slices."""
        return statistics.median(self._counted(side))

    def of(self, raw: str) -> float:
        """Our rate as a fraction of a raw one: median over pairs of slices."""
        pairs = zip(self._counted("ours"), self._counted(raw), strict=True)
        return statistics.median(ours / other for ours, other in pairs)

    def against(self, fewer: Rates, side: str) -> float:
        """The rate as a multiple of that with fewer threads: median over pairs of slices."""
        pairs = zip(self._counted(side), fewer._counted(side), strict=True)
        return statistics.median(many / few for many, few in pairs)

    def calls(self, side: str) -> float:
        """Calls per second, without correction for chance."""
        return statistics.fmean(each.calls for each in self.slices[side])

    def _counted(self, side: str) -> list[float]:
        slices = self.slices[side]
        return [each.searching if self.searches else each.calls for each in slices]

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {
            "load": self.load,
            "threads": self.threads,
            "calls_per_second": {side: self.calls(side) for side in SIDES},
            "searching_per_second": {side: self.rate(side) for side in SIDES}
            if self.searches
            else None,
            "of_loop": self.of("loop"),
            "of_bare": self.of("bare"),
        }


def loads(measured: MeasuredBackend, token: RawToken) -> Iterator[Load]:
    """Issue and import, by C_UnwrapKey, by C_DeriveKey, and by C_GenerateKeyPair of both kinds."""
    sessions = [token.session() for _ in range(MOST_THREADS)]
    served = {row.algorithm for row in measured.backend.capabilities().wrapping}
    for spec, algorithm in (row for row in _ROWS if row[1] in served):
        issued = measured.issue(spec, algorithm)
        arguments = issued.claims, issued.ciphertext, issued.material
        raws = [session.bring_in(*arguments) for session in sessions]
        sides = _sides(measured.import_side(issued).call, raws)
        yield Load(f"import {algorithm}", sides, searches=False, clear=_nothing)
        raws = [session.issue(spec, algorithm) for session in sessions]
        sides = _sides(measured.issue_side(spec, algorithm).call, raws)
        searches = spec is WrappingKeySpec.RSA_2048
        yield Load(f"issue {spec}", sides, searches, clear=measured.reap_all)


def _nothing() -> None:
    """Imports of sealed keys leave nothing behind."""


def _sides(ours: Callable[[], Any], raws: Sequence[Raw]) -> dict[str, list[Side]]:
    return {
        "ours": [Side(ours)] * len(raws),
        "loop": [raw.loop for raw in raws],
        "bare": [raw.bare for raw in raws],
    }


def measure(load: Load, plan: Plan) -> list[Rates]:
    """Measure the slices of each number of threads and each side, in turn."""
    rates = [Rates(load.name, threads, load.searches) for threads in plan.threads]
    seconds = plan.issue_slice if load.searches else plan.slice
    for turn in range(plan.turns):
        say(f"{load.name} by {plan.threads} threads, turn {turn + 1} of {plan.turns}")
        first = turn % len(SIDES)
        for each in rates:
            for side in SIDES[first:] + SIDES[:first]:
                each.slices[side].append(run(load.sides[side][: each.threads], seconds))
                load.clear()
    return rates


def run(sides: Sequence[Side], seconds: float) -> Slice:
    """Call each side in its own thread for ``seconds``, then clean up."""
    workers = [_Worker(side, seconds) for side in sides]
    start = threading.Barrier(len(workers))
    threads = [threading.Thread(target=each.work, args=(start,)) for each in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for worker in workers:
        worker.finish()
    calls = sum(len(each.results) / each.elapsed for each in workers)
    return Slice(calls, sum(each.searched / each.elapsed for each in workers))


class _Worker:
    def __init__(self, side: Side, seconds: float) -> None:
        self._side, self._seconds = side, seconds
        self._failure: BaseException | None = None
        self.results: list[Any] = []
        self.elapsed = self.searched = 0.0

    def work(self, start: threading.Barrier) -> None:
        call, results = self._side.call, self.results
        start.wait()
        searched, started = SEARCHED.cpu, time.perf_counter()
        end = started + self._seconds
        try:
            while time.perf_counter() < end:
                results.append(call())
        except BaseException as failure:  # noqa: BLE001  # raised again by finish()
            self._failure = failure
        self.elapsed = time.perf_counter() - started
        self.searched = SEARCHED.cpu - searched

    def finish(self) -> None:
        if self._failure is not None:
            raise self._failure
        for result in self.results:
            self._side.clean(result)
