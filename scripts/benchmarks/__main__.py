"""The command behind ``scripts/bench``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import (
    audit,
    latency,
    machine,
    operations,
    outstanding,
    over_http,
    plot,
    protection,
    throughput,
)
from benchmarks.hsm import RawToken
from benchmarks.machine import Others
from benchmarks.measured import open_measured_backends, token_settings
from benchmarks.plan import DEFAULT, FULL, QUICK, Plan
from benchmarks.report import Results
from hsmwrap.errors import HsmwrapError

PARTS = ("operations", "throughput", "latency", "http", "outstanding")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    try:
        results = measure(options.plan, options.part or PARTS, options.opened_keys)
    except HsmwrapError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if options.machine:
        results.machine = {**results.machine, "cpu": options.machine}
    print(results.text())
    if options.json:
        document = json.dumps(results.to_json(), indent=2, ensure_ascii=False)
        options.json.write_text(f"{document}\n", encoding="utf-8")
    if options.plot:
        plot.draw(results, options.plot)
    return 0


def measure(plan: Plan, parts: Sequence[str], opened_keys: int = 0) -> Results:
    """Measure the requested parts on the HSM token that the environment describes."""
    settings = token_settings(os.environ)
    with open_measured_backends(settings) as (software, hsm):
        token, others = RawToken(settings), Others()
        results = Results(plan.name, machine.describe(token.module))
        if "operations" in parts:
            for measured in (software, hsm):
                results.comparisons += operations.compare(measured, token, plan)
            results.protection = protection.measure(token, plan)
        if "throughput" in parts:
            for load in throughput.loads(hsm, token):
                results.rates += throughput.measure(load, plan)
        if "latency" in parts:
            results.latency = latency.measure(hsm, plan)
        if "http" in parts:
            results.audit = audit.measure()
            results.requests += over_http.measure(settings, plan, hsm, opened_keys)
        if "outstanding" in parts:  # last, since it fills the HSM token
            results.costs += outstanding.sealed(hsm, token, plan)
            results.costs += outstanding.resident(hsm, token, plan)
        results.others = others.share()
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Compare hsmwrap with the raw operations it consists of (half an hour).",
    )
    parser.set_defaults(plan=DEFAULT)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--quick", dest="plan", action="store_const", const=QUICK, help="a few minutes; less exact"
    )
    amount.add_argument(
        "--full",
        dest="plan",
        action="store_const",
        const=FULL,
        help="hours: up to 100,000 resident wrapping keys, which take a gigabyte in TMPDIR",
    )
    parser.add_argument(
        "--part", action="append", choices=PARTS, help="measure only this part; may be repeated"
    )
    parser.add_argument(
        "--opened-keys", type=int, default=0, help="this setting of the KMS in the part http"
    )
    parser.add_argument("--machine", help="what the report and the figure call the processor")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers as JSON")
    parser.add_argument("--plot", type=_plot_file, metavar="FILE.svg|.png", help="the figure")
    return parser


def _plot_file(text: str) -> Path:
    path = Path(text)
    if path.suffix not in plot.FORMATS:
        raise argparse.ArgumentTypeError(f"the file's name ends in {' or '.join(plot.FORMATS)}")
    return path


if __name__ == "__main__":
    sys.exit(main())
