"""The command behind ``scripts/timing``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import Others
from benchmarks.measured import token_settings
from benchmarks.plan import say

from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.errors import CombinationRefused, HsmwrapError
from timings.desks import DESKS
from timings.judge import Comparison, Expected
from timings.measure import CLOCKS, measure

BACKENDS = ("software", "pkcs11")
SAMPLES = 2_000
_FORMATS = (".svg", ".png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if something is not as expected."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.clock == "cpu" and "http" in (options.over or ()):
        parser.error("--clock cpu is of this process: it says nothing about --over http")
    expected, others = Expected.read(), Others()
    try:
        comparisons = _measure_all(options, expected.confidence)
    except HsmwrapError as error:
        print(f"timing: {error}", file=sys.stderr)
        return 2
    findings = list(expected.findings(comparisons))
    share = others.share()
    print("\n".join([_table(comparisons, expected), *findings]))
    print(f"other processes used {share:.0%} of the machine; {len(findings)} findings")
    if options.json:
        rows = [each.to_json() | {"expected": expected.of(each)} for each in comparisons]
        document = {"others": share, "findings": findings, "comparisons": rows}
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        from timings.picture import draw  # noqa: PLC0415  # matplotlib, for this alone

        draw(comparisons, expected, options.plot)
    return 1 if findings else 0


def _measure_all(options: argparse.Namespace, confidence: float) -> list[Comparison]:
    settings = {"software": {"serve_hsm_level": True}}
    found: list[Comparison] = []
    for backend in options.backend or BACKENDS:
        if backend not in settings:
            settings[backend] = token_settings(os.environ)
        for over in options.over or (DESKS if options.clock == "wall" else ("in process",)):
            with DESKS[over](backend, settings[backend]) as desk:
                for name in options.algorithm or WrappingAlgorithm:
                    say(f"{backend}, {over}, {name}")
                    algorithm = WrappingAlgorithm(name)
                    try:
                        found += measure(
                            (backend, over),
                            desk,
                            algorithm,
                            rounds=options.samples,
                            clock=CLOCKS[options.clock],
                            confidence=confidence,
                        )
                    except CombinationRefused as error:
                        say(f"not served: {error}")
    return found


def _table(comparisons: Sequence[Comparison], expected: Expected) -> str:
    head = "backend   over        algorithm           class                       µs  effect"
    lines = [f"{head}    AUC  interval       expected"]
    for each in comparisons:
        a = each.apart
        mark = "differs" if expected.differs(each) else "alike"
        lines.append(
            f"{each.backend:9} {each.over:11} {each.algorithm:19} {each.other:22} "
            f"{a.microseconds:+7.1f} {a.effect:+7.2f}  {a.auc:.3f}  {a.low:.3f}-{a.high:.3f}  "
            f"{expected.of(each)}: {mark}"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/timing",
        description="Tell whether the time of a failed import depends on what is wrong.",
    )
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"of a class ({SAMPLES})")
    parser.add_argument("--backend", action="append", choices=BACKENDS)
    parser.add_argument("--over", action="append", choices=tuple(DESKS))
    parser.add_argument("--algorithm", action="append", choices=tuple(map(str, WrappingAlgorithm)))
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: in process, on a busy machine"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers as JSON")
    parser.add_argument("--plot", type=_plot_file, metavar="FILE.svg|.png", help="the picture")
    return parser


def _plot_file(text: str) -> Path:
    path = Path(text)
    if path.suffix not in _FORMATS:
        raise argparse.ArgumentTypeError(f"the file's name ends in {' or '.join(_FORMATS)}")
    return path


if __name__ == "__main__":
    sys.exit(main())
