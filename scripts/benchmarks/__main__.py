"""The command behind ``scripts/bench``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import latency, machine, operations, outstanding, over_http, plot, throughput
from benchmarks.arena import open_arenas, token_settings
from benchmarks.hsm import RawToken
from benchmarks.machine import Others
from benchmarks.plan import DEFAULT, FULL, QUICK, Plan
from benchmarks.report import Results
from hsmwrap.errors import HsmwrapError

PARTS = ("operations", "throughput", "latency", "http", "outstanding")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    try:
        results = measure(options.plan, options.part or PARTS)
    except HsmwrapError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(results.text())
    if options.json:
        document = json.dumps(results.to_json(), indent=2, ensure_ascii=False)
        options.json.write_text(f"{document}\n", encoding="utf-8")
    if options.plot:
        plot.draw(results, options.plot)
    return 0


def measure(plan: Plan, parts: Sequence[str]) -> Results:
    """Measure the parts that were asked for, on the token that the environment describes."""
    settings = token_settings(os.environ)
    with open_arenas(settings) as (software, hsm):
        token, others = RawToken(settings), Others()
        results = Results(plan.name, machine.describe(token.module))
        if "operations" in parts:
            for arena in (software, hsm):
                results.comparisons += operations.compare(arena, token, plan)
        if "throughput" in parts:
            for load in throughput.loads(hsm, token):
                results.rates += throughput.measure(load, plan)
        if "latency" in parts:
            results.latency = latency.measure(hsm, plan)
        if "http" in parts:
            results.requests += over_http.measure(settings, plan)
        if "outstanding" in parts:  # last, as it fills the HSM token
            results.costs += outstanding.sealed(hsm, token, plan)
            results.costs += outstanding.resident(hsm, token, plan)
        results.others = others.share()
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="hsmwrap against the raw operations that it contains: ratios in one run, which "
        "takes about a quarter of an hour.",
    )
    parser.set_defaults(plan=DEFAULT)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--quick", dest="plan", action="store_const", const=QUICK, help="about a minute, and rough"
    )
    amount.add_argument(
        "--full",
        dest="plan",
        action="store_const",
        const=FULL,
        help="hours: resident wrapping keys up to 100,000, a gigabyte of files where TMPDIR says",
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="one part; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers, for machines")
    parser.add_argument("--plot", type=_plot_file, metavar="FILE.svg|.png", help="the figure")
    return parser


def _plot_file(text: str) -> Path:
    path = Path(text)
    if path.suffix not in plot.FORMATS:
        raise argparse.ArgumentTypeError(f"the file's name ends in {' or '.join(plot.FORMATS)}")
    return path


if __name__ == "__main__":
    sys.exit(main())
