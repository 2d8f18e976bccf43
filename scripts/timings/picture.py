"""The picture: the AUC of each class with its interval, a chart for each algorithm and place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from timings.judge import Comparison, Expected, Verdict

_COLUMNS = 2
_COLOURS = {Verdict.SAME: "C0", Verdict.MAY_DIFFER: "C7", Verdict.MUST_DIFFER: "C2"}


def draw(comparisons: Sequence[Comparison], expected: Expected, path: Path) -> None:
    """Write the picture; the file's suffix says the format."""
    groups: dict[tuple[str, str, str], list[Comparison]] = {}
    for each in comparisons:
        groups.setdefault((each.backend, each.over, each.algorithm), []).append(each)
    rows = math.ceil(len(groups) / _COLUMNS)
    figure = Figure((14, 4.5 * rows), layout="constrained")
    figure.suptitle(
        "How often a class takes longer than the first of its algorithm (0.5: time tells nothing)\n"
        "blue: has to be alike; grey: may differ; green: control, has to differ"
    )
    for position, (title, group) in enumerate(groups.items(), 1):
        axes = figure.add_subplot(rows, _COLUMNS, position)
        axes.set_title(f"{', '.join(title)}; {group[0].apart.rounds} rounds", fontsize=10)
        axes.axvspan(0.5 - expected.margin, 0.5 + expected.margin, color="C0", alpha=0.15)
        for line, each in enumerate(reversed(group)):
            found = each.apart
            axes.plot([found.low, found.high], [line, line], color=_COLOURS[expected.of(each)])
            label = f"{found.microseconds:+.0f} µs"
            axes.plot(found.auc, line, "o", color=_COLOURS[expected.of(each)])
            axes.annotate(label, (1.02, line), va="center", fontsize=7, annotation_clip=False)
        axes.set_yticks(range(len(group)), [each.other for each in reversed(group)], fontsize=8)
        axes.set_xlim(0, 1)
        axes.grid(axis="x")
    figure.savefig(path)
