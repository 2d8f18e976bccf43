"""Timing in turns: the sides of a comparison alternate, so that drift affects all of them equally.

Generating an RSA key pair searches for primes, which takes a random time; even the mean of a
hundred searches varies by several percent. So the search time is measured separately
(:func:`search`), and two sides are compared with the same mean search time.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class _Searched(threading.local):
    """Seconds that this thread spent in searches: wall time and processor time."""

    wall = 0.0
    cpu = 0.0


SEARCHED = _Searched()


def search(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, with its time added to :data:`SEARCHED`."""

    @wraps(function)
    def timed(*args: P.args, **kwargs: P.kwargs) -> T:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            SEARCHED.wall += time.perf_counter() - wall
            SEARCHED.cpu += time.thread_time() - cpu

    return timed


def _nothing(_result: Any) -> None:
    """Clean up nothing."""


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison; ``clean`` cleans up after a call and is not timed."""

    call: Callable[[], Any]
    clean: Callable[[Any], None] = _nothing


@dataclass(slots=True)
class Timing:
    """Seconds of the calls of one side; ``searched`` is the part spent in prime search."""

    seconds: list[float] = field(default_factory=list)
    searched: list[float] = field(default_factory=list)

    def add(self, side: Side) -> None:
        """Time one call."""
        before, started = SEARCHED.wall, time.perf_counter()
        result = side.call()
        self.seconds.append(time.perf_counter() - started)
        self.searched.append(SEARCHED.wall - before)
        side.clean(result)

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    @property
    def p99(self) -> float:
        """The 99th percentile; the maximum of fewer than 100 calls."""
        return percentile_99(self.seconds)

    def to_json(self) -> dict[str, float | int]:
        """Median and p99 in milliseconds, and the number of calls."""
        return {
            "median_ms": self.median * 1e3,
            "p99_ms": self.p99 * 1e3,
            "calls": len(self.seconds),
        }


def take_turns(sides: Mapping[str, Side], seconds: float, least: int) -> dict[str, Timing]:
    """Call the sides in turn, for about ``seconds`` in total, each at least ``least`` times."""
    names = list(sides)
    for side in sides.values():
        side.clean(side.call())
    timings = {name: Timing() for name in names}
    end, turn = time.monotonic() + seconds, 0
    while turn < least or time.monotonic() < end:
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            timings[name].add(sides[name])
        turn += 1
    return timings


def speed(ours: Timing, raw: Timing) -> float:
    """Our speed as a fraction of the raw one, with the same mean search time for both."""
    search_time = statistics.fmean([*ours.searched, *raw.searched])
    return _median_with(search_time, raw) / _median_with(search_time, ours)


def _median_with(search_time: float, timing: Timing) -> float:
    pairs = zip(timing.seconds, timing.searched, strict=True)
    return search_time + statistics.median(total - searched for total, searched in pairs)


def percentile_99(values: Sequence[float]) -> float:
    """The 99th percentile; the maximum of fewer than 100 values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
