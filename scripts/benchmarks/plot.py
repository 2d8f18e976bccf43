"""The picture of a run: one chart for each part that was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks import svg, targets
from benchmarks.latency import Latency
from benchmarks.operations import Comparison
from benchmarks.outstanding import Cost
from benchmarks.over_http import SIDES as HTTP_SIDES
from benchmarks.over_http import Requests
from benchmarks.report import Results
from benchmarks.throughput import Rates

_SHORT = {
    "RSAES_PKCS1_V1_5": "PKCS1",
    "RSAES_OAEP_SHA_1": "OAEP-1",
    "RSAES_OAEP_SHA_256": "OAEP-256",
    "SM2PKE": "SM2",
}


def draw(results: Results) -> str:
    """A self-contained SVG."""
    machine = results.machine
    title = f"hsmwrap on {machine['token']}, {machine['cpu']}, {machine['cores']} cores"
    return svg.page(f"{title} ({results.plan} run)", list(_charts(results)))


def _charts(results: Results) -> Iterator[str]:
    for backend in dict.fromkeys(each.backend for each in results.comparisons):
        yield _comparisons(backend, [c for c in results.comparisons if c.backend == backend])
    for load in dict.fromkeys(each.load for each in results.rates):
        yield _rates(load, [each for each in results.rates if each.load == load])
    if results.latency:
        yield _latency(results.latency)
    for operation in dict.fromkeys(each.operation for each in results.requests):
        yield _requests(operation, [r for r in results.requests if r.operation == operation])
    if results.costs:
        yield _costs(results.costs)


def _comparisons(backend: str, comparisons: Sequence[Comparison]) -> str:
    bars = [
        svg.Bar(f"{each.operation}\n{_SHORT[each.row.algorithm]}", each.of_loop)
        for each in comparisons
    ]
    limit = f"asked of imports into an HSM token: {targets.LEAST_IMPORT}", targets.LEAST_IMPORT
    return svg.bars(f"{backend}: our speed / that of the same raw calls", bars, limit=limit)


def _rates(load: str, rates: Sequence[Rates]) -> str:
    series = [
        svg.Line(name, [(each.threads, each.rate(side)) for each in rates], dashed=side != "ours")
        for side, name in (("ours", "hsmwrap"), ("loop", "same raw calls"), ("bare", "bare call"))
    ]
    what = "processor seconds of prime search" if rates[0].searches else "calls"
    return svg.lines(f"{load}: {what} per second", series, across="threads")


def _latency(latency: Latency) -> str:
    timings = {"inline": latency.cold, "pool at rest": latency.idle, "pool at work": latency.busy}
    bars = [
        svg.Bar(f"{name}\n{what}", value * 1e3)
        for name, timing in timings.items()
        for what, value in (("p50", timing.median), ("p99", timing.p99))
    ]
    most = latency.cold.median * targets.MOST_WARM * 1e3
    limit = f"asked of p99 from the pool: {most:.2f} ms", most
    return svg.bars("Parameters for RSA_2048: milliseconds", bars, limit=limit, logarithmic=True)


def _requests(operation: str, requests: Sequence[Requests]) -> str:
    series = [
        svg.Line(side, [(each.threads, each.rate(side)) for each in requests])
        for side in HTTP_SIDES
    ]
    return svg.lines(f"{operation}: calls per second", series, across="clients")


def _costs(costs: Sequence[Cost]) -> str:
    series = []
    for custody in dict.fromkeys(each.custody for each in costs):
        mine = [each for each in costs if each.custody == custody]
        imports = [(each.outstanding, each.bring_in.median * 1e3) for each in mine]
        raws = [(each.outstanding, each.raw.median * 1e3) for each in mine]
        series.append(svg.Line(f"hsmwrap, {custody}", imports))
        series.append(svg.Line(f"raw, {custody}", raws, dashed=True))
    across = "outstanding import tokens"
    return svg.lines("Import: milliseconds", series, across=across, logarithmic=True)
