"""How long a caller waits for parameters: cold, and warm from the key-pair pool."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from benchmarks.arena import Arena, new_cmk
from benchmarks.plan import Plan, say
from benchmarks.timing import Side, Timing
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.imports import ImportService
from hsmwrap.keypool import KeyPool, PoolSettings

_ROW = (WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_256)
_PAUSE = 0.01


@dataclass(frozen=True, slots=True)
class Latency:
    """Issues of RSA parameters.

    Attributes:
        cold: The pair is made inline.
        idle: From the pool, which rests meanwhile.
        busy: From the pool, one at a time, while a background thread makes the next pair.
    """

    cold: Timing
    idle: Timing
    busy: Timing

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {
            "cold": self.cold.to_json(),
            "warm_pool_idle": self.idle.to_json(),
            "warm_pool_busy": self.busy.to_json(),
        }


def measure(arena: Arena, plan: Plan) -> Latency:
    """Measure all three."""
    say("cold issue")
    cold, side = Timing(), arena.issue_side(*_ROW)
    for _ in range(plan.cold):
        cold.add(side)
    return Latency(cold, _idle(arena, plan), _busy(arena, plan))


def _idle(arena: Arena, plan: Plan) -> Timing:
    """Empty a full pool, again and again; it refills only once it is empty."""
    timing = Timing()
    with KeyPool(PoolSettings(high_water=plan.burst, low_water=0, threads=2)) as pool:
        side = _warm_side(arena, arena.service_with(pool))
        while len(timing.seconds) < plan.warm:
            say(f"warm issue, pool at rest: {len(timing.seconds)} of {plan.warm}")
            _wait_for(arena, pool, plan.burst)
            for _ in range(plan.burst - 1):
                timing.add(side)
            side.call()
    return timing


def _busy(arena: Arena, plan: Plan) -> Timing:
    """Take a pair whenever there is one: the thread that makes the next one never rests."""
    timing = Timing()
    with KeyPool(PoolSettings(high_water=plan.burst, low_water=plan.burst - 1)) as pool:
        side = _warm_side(arena, arena.service_with(pool))
        say(f"warm issue, pool at work: {plan.busy}")
        while len(timing.seconds) < plan.busy:
            _wait_for(arena, pool, 1)
            timing.add(side)
    return timing


def _warm_side(arena: Arena, service: ImportService) -> Side:
    cmk = new_cmk()
    return Side(lambda: service.get_parameters_for_import(cmk, *_ROW), arena.discard)


def _wait_for(arena: Arena, pool: KeyPool, level: int) -> None:
    pool.prepare(arena.backend, [_ROW])
    while sum(facts.level for facts in pool.facts()) < level:
        time.sleep(_PAUSE)
