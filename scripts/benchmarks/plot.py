"""The figure of a run: one chart for each part that was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from benchmarks import targets
from benchmarks.latency import Latency
from benchmarks.operations import Comparison
from benchmarks.outstanding import Cost
from benchmarks.over_http import BACKEND, HTTP, KMS, Requests
from benchmarks.report import Results
from benchmarks.throughput import Rates

FORMATS = (".svg", ".png")
_COLUMNS = 2
_CHART_INCHES = (5.6, 3.4)
_SHORT = {
    "RSAES_PKCS1_V1_5": "PKCS1",
    "RSAES_OAEP_SHA_1": "OAEP-1",
    "RSAES_OAEP_SHA_256": "OAEP-256",
    "SM2PKE": "SM2",
}


def draw(results: Results, path: Path) -> None:
    """Write the figure; the file's suffix is one of :data:`FORMATS`."""
    charts = list(_charts(results))
    rows = math.ceil(len(charts) / _COLUMNS)
    width, height = _CHART_INCHES
    figure = Figure((_COLUMNS * width, rows * height + 0.4), layout="constrained")
    machine = results.machine
    where = f"hsmwrap on {machine['token']}, {machine['cpu']}, {machine['cores']} cores"
    run = f"{results.plan} run"
    if results.disturbed:
        run += f"; other processes took {results.others:.0%} of the processor time"
    figure.suptitle(f"{where}\n{run}", fontweight="bold")
    with rc_context({"axes.titlesize": 10, "legend.fontsize": 8}):
        for position, chart in enumerate(charts, 1):
            chart(figure.add_subplot(rows, _COLUMNS, position))
        figure.savefig(path)


def _charts(results: Results) -> Iterator[Callable[[Axes], None]]:
    for backend in dict.fromkeys(each.backend for each in results.comparisons):
        yield partial(
            _comparisons, backend, [c for c in results.comparisons if c.backend == backend]
        )
    for load in dict.fromkeys(each.load for each in results.rates):
        yield partial(_rates, load, [each for each in results.rates if each.load == load])
    if results.latency:
        yield partial(_latency, results.latency)
    for operation in dict.fromkeys(each.operation for each in results.requests):
        requests = [each for each in results.requests if each.operation == operation]
        yield partial(_requests, operation, requests)
    if results.costs:
        yield partial(_costs, results.costs)


def _comparisons(backend: str, comparisons: Sequence[Comparison], axes: Axes) -> None:
    axes.set_title(f"{backend}: our speed / that of the same raw calls")
    names = [f"{each.operation}\n{_SHORT[each.row.algorithm]}" for each in comparisons]
    limit = targets.LEAST_IMPORT
    what = f"target for imports into an HSM token: {limit}"
    _bars(axes, names, [each.of_loop for each in comparisons], limit, what)


def _latency(latency: Latency, axes: Axes) -> None:
    axes.set_title("Parameters for RSA_2048: milliseconds")
    axes.set_yscale("log")
    timings = {"inline": latency.cold, "idle pool": latency.idle, "busy pool": latency.busy}
    values = {
        f"{name}\n{what}": value * 1e3
        for name, timing in timings.items()
        for what, value in (("p50", timing.median), ("p99", timing.p99))
    }
    limit = latency.cold.median * targets.MOST_WARM * 1e3
    what = f"target for p99 from the pool: {limit:.2f} ms"
    _bars(axes, list(values), list(values.values()), limit, what)


def _rates(load: str, rates: Sequence[Rates], axes: Axes) -> None:
    what = "processor seconds of prime search" if rates[0].searches else "calls"
    axes.set_title(f"{load}: {what} per second")
    for side, name in (("ours", "hsmwrap"), ("loop", "same raw calls"), ("bare", "bare call")):
        points = [(each.threads, each.rate(side)) for each in rates]
        _line(axes, name, points, dashed=side != "ours")
    _finish_lines(axes, "threads")


def _requests(operation: str, requests: Sequence[Requests], axes: Axes) -> None:
    side = BACKEND if BACKEND in requests[0].bursts else KMS
    name = "the backend alone" if side == BACKEND else "the KMS in process"
    axes.set_title(f"{operation}: HTTP / {name}, and p99 in ms")
    for server in dict.fromkeys(each.server for each in requests):
        mine = [each for each in requests if each.server == server]
        label = f"{server.database}, {server.workers} workers"
        _line(axes, label, [(each.threads, each.of(side)) for each in mine])
        for each in mine:
            at, text = (each.threads, each.of(side)), f"{each.p99(HTTP) * 1e3:.0f}"
            axes.annotate(text, at, (0, 5), textcoords="offset points", fontsize=7)
    limit = targets.LEAST_USE if side == BACKEND else targets.LEAST_OVER_HTTP
    axes.axhline(limit, color="C7", linestyle="--", label=f"target: {limit:.2f}")
    _finish_lines(axes, "clients")


def _costs(costs: Sequence[Cost], axes: Axes) -> None:
    axes.set_title("Import: milliseconds")
    axes.set_yscale("log")
    for custody in dict.fromkeys(each.custody for each in costs):
        mine = [each for each in costs if each.custody == custody]
        imports = [(each.outstanding, each.bring_in.median * 1e3) for each in mine]
        raws = [(each.outstanding, each.raw.median * 1e3) for each in mine]
        _line(axes, f"hsmwrap, {custody}", imports)
        _line(axes, f"raw, {custody}", raws, dashed=True)
    _finish_lines(axes, "outstanding import tokens")


def _bars(
    axes: Axes, names: Sequence[str], values: Sequence[float], limit: float, what: str
) -> None:
    axes.bar_label(axes.bar(names, values), fmt="%.3g", fontsize=8)
    axes.axhline(limit, color="C1", linestyle="--", label=what)
    axes.tick_params(axis="x", labelsize=7)
    axes.margins(y=0.25)  # room for the legend above the bars
    axes.legend(loc="upper right")


def _line(
    axes: Axes, name: str, points: Sequence[tuple[float, float]], *, dashed: bool = False
) -> None:
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, marker="o", linestyle="--" if dashed else "-", label=name)


def _finish_lines(axes: Axes, across: str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 4.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(LogLocator(subs=()))
    if axes.get_yscale() == "linear":
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])  # with room for the numbers
    axes.set_xlabel(across)
    axes.grid(axis="y")
    axes.legend()
