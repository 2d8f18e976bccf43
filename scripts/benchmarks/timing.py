"""Timing by turns: the sides of a comparison alternate, so that drift hits all of them alike.

Making an RSA key pair is a search: how long it takes is luck, and the luck of a hundred searches
still varies by several percent. So the time inside the search is told apart (:func:`search`), and
two sides are compared as if they had been equally lucky.
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
    """Seconds that the present thread spent in searches: by the clock, and of processor time."""

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
    """Most calls leave nothing behind."""


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison; ``clean`` takes away what a call left, off the clock."""

    call: Callable[[], Any]
    clean: Callable[[Any], None] = _nothing


@dataclass(slots=True)
class Timing:
    """What the calls of one side took, in seconds; ``searched`` is the part that was luck."""

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
        """Half of the calls took no longer."""
        return statistics.median(self.seconds)

    @property
    def p99(self) -> float:
        """All but one call in a hundred took no longer; of fewer calls, the slowest."""
        return percentile_99(self.seconds)

    def to_json(self) -> dict[str, float | int]:
        """Median and p99 in milliseconds, and how many calls they are from."""
        return {
            "median_ms": self.median * 1e3,
            "p99_ms": self.p99 * 1e3,
            "calls": len(self.seconds),
        }


def take_turns(sides: Mapping[str, Side], seconds: float, least: int) -> dict[str, Timing]:
    """Call the sides in turn, for about ``seconds`` in all and at least ``least`` times each."""
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
    """Our speed as a fraction of the raw one, had both been equally lucky."""
    luck = statistics.fmean([*ours.searched, *raw.searched])
    return _median_with(luck, raw) / _median_with(luck, ours)


def _median_with(luck: float, timing: Timing) -> float:
    pairs = zip(timing.seconds, timing.searched, strict=True)
    return luck + statistics.median(total - searched for total, searched in pairs)


def percentile_99(values: Sequence[float]) -> float:
    """What all but one in a hundred do not exceed; of fewer values, the highest."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lowest, median and highest."""
    return min(values), statistics.median(values), max(values)
