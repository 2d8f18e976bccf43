"""Times of all classes, in rounds: each class once a round, in a new order each time."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping

from hsmwrap.catalog import WrappingAlgorithm
from timings.classes import classes
from timings.desks import Desk, Wrapped
from timings.judge import Comparison
from timings.statistics import apart

_WARM_UP = 5
_GC_ROUNDS = 20

Clock = Callable[[], float]
Times = Mapping[str, list[float]]
"""Seconds of each class; equal positions are of the same round."""


CLOCKS: Mapping[str, Clock] = {"wall": time.perf_counter, "cpu": time.thread_time}
"""What a client sees; and in process, the processor time of this thread, whatever else runs."""


def take(wrapped: Wrapped, algorithm: WrappingAlgorithm, rounds: int, clock: Clock) -> Times:
    """Measure all classes of an algorithm."""
    makers = classes(algorithm, wrapped.public_key, wrapped.material)
    times: dict[str, list[float]] = {name: [] for name in makers}
    order = list(makers)
    shuffle = random.SystemRandom().shuffle
    gc.disable()
    try:
        for number in range(-_WARM_UP, rounds):
            if number % _GC_ROUNDS == 0:
                gc.collect()
            shuffle(order)
            # All before the first is timed: what makes one class's requests takes longer than what
            # makes another's, and so leaves less of the call's data in the processor's caches.
            calls = [(name, wrapped.prepare(makers[name]())) for name in order]
            for name, call in calls:
                started = clock()
                call()
                seconds = clock() - started
                if number >= 0:
                    times[name].append(seconds)
    finally:
        gc.enable()
    return times


def compare(
    where: tuple[str, str], algorithm: WrappingAlgorithm, times: Times, confidence: float
) -> Iterator[Comparison]:
    """Each class with the first of its algorithm; ``where`` is backend and transport."""
    first, *others = times
    for other in others:
        yield Comparison(
            *where, str(algorithm), first, other, apart(times[first], times[other], confidence)
        )


def measure(
    where: tuple[str, str],
    desk: Desk,
    algorithm: WrappingAlgorithm,
    *,
    rounds: int,
    clock: Clock,
    confidence: float,
) -> list[Comparison]:
    """Measure and compare."""
    times = take(desk.wrapped(algorithm), algorithm, rounds, clock)
    return list(compare(where, algorithm, times, confidence))
