"""The performance targets, and whether a run met them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.latency import Latency
from benchmarks.operations import Comparison
from benchmarks.outstanding import Cost
from benchmarks.over_http import BACKEND, HTTP, KMS, Requests
from benchmarks.throughput import Rates
from hsmwrap.catalog import WrappingAlgorithm

LEAST_ISSUE = 0.95
LEAST_IMPORT = 0.8
LEAST_SM2_IMPORT = 0.85
LEAST_SOFTWARE_RSA_IMPORT = 0.85
LEAST_SOFTWARE_SM2_IMPORT = 0.6
"""The loop is little more than libcrypto's own call there."""
LEAST_SCALING = 1.8
MOST_WARM = 1 / 50
MOST_GROWTH = 1.1
MOST_GROWTH_RESIDENT = 1.2
"""Of an import by a resident wrapping key, as time: SoftHSM's own search grows with the objects."""
LEAST_USE = 1_000 / 3_500
"""Of a key over HTTP, compared with the backend alone."""
LEAST_OVER_HTTP = 0.8
MOST_TAIL = 5.0
"""p99 / p50 over HTTP."""


@dataclass(frozen=True, slots=True)
class Target:
    """One target.

    Attributes:
        name: What is measured.
        value: The measured ratio.
        limit: The limit.
        at_least: True for a lower limit, False for an upper one.
        remark: A note for the reader.
    """

    name: str
    value: float
    limit: float
    at_least: bool
    remark: str = ""

    @property
    def met(self) -> bool:
        """Whether this run met it."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def to_json(self, *, judge: bool) -> dict[str, Any]:
        """All fields; ``met`` is None if the targets are not judged."""
        return {**asdict(self), "met": self.met if judge else None}


def of_imports(comparisons: Sequence[Comparison]) -> Iterator[Target]:
    """Imports, compared with the raw loop."""
    for each in comparisons:
        if each.operation == "import":
            name = f"{each.backend}: import {each.row.algorithm} / raw loop"
            limit = _least_import(each)
            yield Target(name, each.of_loop, limit, at_least=True, remark=each.row.path)


def _least_import(each: Comparison) -> float:
    by_sm2 = each.row.algorithm is WrappingAlgorithm.SM2PKE
    if each.backend == "software":
        return LEAST_SOFTWARE_SM2_IMPORT if by_sm2 else LEAST_SOFTWARE_RSA_IMPORT
    return LEAST_SM2_IMPORT if by_sm2 else LEAST_IMPORT


def of_rates(rates: Sequence[Rates]) -> Iterator[Target]:
    """Sustained issue on all cores, and two threads compared with one."""
    cores = len(os.sched_getaffinity(0))
    for each in rates:
        if each.searches and each.threads == cores:
            name = f"sustained issue / raw key generation, {cores} threads"
            yield Target(name, each.of("bare"), LEAST_ISSUE, at_least=True)
    by_load = {(each.load, each.threads): each for each in rates}
    for load in dict.fromkeys(each.load for each in rates):
        one, two = by_load.get((load, 1)), by_load.get((load, 2))
        if one and two:
            value, raw = two.against(one, "ours"), two.against(one, "bare")
            name, remark = f"{load}, 2 threads / 1", f"the bare call: {raw:.2f}"
            yield Target(name, value, LEAST_SCALING, at_least=True, remark=remark)


def of_latency(latency: Latency) -> Iterator[Target]:
    """Warm issue, compared with inline key generation."""
    for pool, warm in (("idle", latency.idle), ("busy", latency.busy)):
        value = warm.p99 / latency.cold.median
        name = f"warm issue p99 / inline median, pool {pool}"
        yield Target(name, value, MOST_WARM, at_least=False, remark=f"{len(warm.seconds)} calls")


def of_costs(costs: Sequence[Cost]) -> Iterator[Target]:
    """Growth of the costs with the number of outstanding tokens."""
    sealed = [each for each in costs if each.custody == "sealed"]
    if len(sealed) > 1:
        span = f"sealed, {sealed[0].outstanding} to {sealed[-1].outstanding} outstanding"
        for name, cost in (("import", "relative"), ("issue", "relative_issue")):
            values = [getattr(each, cost) for each in sealed]
            growth = max(values) / values[0]
            yield Target(f"{name} cost, {span}", growth, MOST_GROWTH, at_least=False)
    resident = [each for each in costs if each.custody == "resident"]
    if len(resident) > 1:
        span = f"{resident[0].outstanding} to {resident[-1].outstanding} outstanding"
        times = [each.bring_in.median for each in resident]
        growth, remark = max(times) / times[0], "issued in the process that imports"
        name = f"import time, resident, {span}"
        yield Target(name, growth, MOST_GROWTH_RESIDENT, at_least=False, remark=remark)


def of_requests(requests: Sequence[Requests]) -> Iterator[Target]:
    """Calls over HTTP, compared with those in process, and their tail with all clients."""
    most = max((each.threads for each in requests), default=0)
    for each in requests:
        server = each.server
        what = (
            f"{each.operation}, {server.database}, {server.workers} workers, {each.threads} clients"
        )
        side, limit = (BACKEND, LEAST_USE) if BACKEND in each.bursts else (KMS, LEAST_OVER_HTTP)
        yield Target(f"{what}: HTTP / {side}", each.of(side), limit, at_least=True)
        if each.threads == most:
            tail = each.p99(HTTP) / each.p50(HTTP)
            yield Target(f"{what}: p99 / p50", tail, MOST_TAIL, at_least=False)
