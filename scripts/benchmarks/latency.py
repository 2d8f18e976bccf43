"""Latency of issuing parameters: cold (inline), and warm (from the key-pair pool)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from benchmarks.measured import MeasuredBackend, new_cmk
from benchmarks.plan import Plan, say
from benchmarks.timing import Side, Timing
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.imports import ImportService
from hsmwrap.keypool import KeyPool, PoolSettings

_ROW = (WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_256)
_PAUSE = 0.01


@dataclass(frozen=True, slots=True)
class Latency:
    """Times of issuing RSA parameters.

    Attributes:
        cold: With inline key generation.
        idle: From an idle pool.
        busy: From the pool, one at a time, while a background thread generates the next pair.
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


def measure(measured: MeasuredBackend, plan: Plan) -> Latency:
    """Measure all three."""
    say("cold issue")
    cold, side = Timing(), measured.issue_side(*_ROW)
    for _ in range(plan.cold):
        cold.add(side)
    return Latency(cold, _idle(measured, plan), _busy(measured, plan))


def _idle(measured: MeasuredBackend, plan: Plan) -> Timing:
    """Empty a full pool repeatedly; it refills only when it is empty."""
    timing = Timing()
    with KeyPool(PoolSettings(high_water=plan.burst, low_water=0, threads=2)) as pool:
        side = _warm_side(measured, measured.service_with(pool))
        while len(timing.seconds) < plan.warm:
            say(f"warm issue, idle pool: {len(timing.seconds)} of {plan.warm}")
            _wait_for(measured, pool, plan.burst)
            for _ in range(plan.burst - 1):
                timing.add(side)
            side.call()
    return timing


def _busy(measured: MeasuredBackend, plan: Plan) -> Timing:
    """Take each pair as soon as it is ready, so that the background thread is always busy."""
    timing = Timing()
    with KeyPool(PoolSettings(high_water=plan.burst, low_water=plan.burst - 1)) as pool:
        side = _warm_side(measured, measured.service_with(pool))
        say(f"warm issue, busy pool: {plan.busy}")
        while len(timing.seconds) < plan.busy:
            _wait_for(measured, pool, 1)
            timing.add(side)
    return timing


def _warm_side(measured: MeasuredBackend, service: ImportService) -> Side:
    cmk = new_cmk()
    return Side(lambda: service.get_parameters_for_import(cmk, *_ROW), measured.discard)


def _wait_for(measured: MeasuredBackend, pool: KeyPool, level: int) -> None:
    pool.prepare(measured.backend, [_ROW])
    while sum(facts.level for facts in pool.facts()) < level:
        time.sleep(_PAUSE)
