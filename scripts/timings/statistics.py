"""How far two classes of paired times are apart: effect size, AUC, and a bootstrap interval."""

from __future__ import annotations

import random
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

RESAMPLES = 4_000
BLOCKS = 100
"""Rounds are drawn in so many blocks, as what disturbs the machine lasts longer than a round; in
fewer the interval would be too narrow."""
_SEED = 20_261_130
_NORMAL = 1.4826
"""Median absolute deviation of a normal distribution, as a fraction of its standard deviation."""


@dataclass(frozen=True, slots=True)
class Apart:
    """How far the times of one class are from those of another.

    Attributes:
        rounds: Pairs of times.
        microseconds: Median of the differences in the same round; positive: the other is slower.
        effect: The same in standard deviations of the differences, by their median deviation.
        auc: How often the other takes longer, over all pairs: 0.5 where time tells nothing.
        low: Lower end of the bootstrap interval of the AUC.
        high: Upper end.
    """

    rounds: int
    microseconds: float
    effect: float
    auc: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def apart(one: Sequence[float], other: Sequence[float], confidence: float) -> Apart:
    """Compare the times of two classes, in seconds; equal positions are of the same round.

    The interval is the percentile bootstrap of the AUC's linear part (DeLong et al., 1988), over
    blocks of rounds. The seed is fixed: the same times give the same interval.
    """
    differences = [b - a for a, b in zip(one, other, strict=True)]
    middle = statistics.median(differences)
    spread = _NORMAL * statistics.median(abs(each - middle) for each in differences)
    faster, slower = sorted(one), sorted(other)
    placed_one = [1 - _share_below(slower, each) for each in one]
    placed_other = [_share_below(faster, each) for each in other]
    auc = statistics.fmean(placed_other)
    parts = [a + b - auc for a, b in zip(placed_one, placed_other, strict=True)]
    low, high = _interval(parts, confidence)
    return Apart(
        rounds=len(differences),
        microseconds=middle * 1e6,
        effect=middle / spread if spread else 0.0,
        auc=auc,
        low=low,
        high=high,
    )


def _share_below(ordered: Sequence[float], value: float) -> float:
    """Share of values that are less; equal ones count half."""
    return (bisect_left(ordered, value) + bisect_right(ordered, value)) / 2 / len(ordered)


def _interval(parts: Sequence[float], confidence: float) -> tuple[float, float]:
    """Percentile interval of the mean, by drawing blocks."""
    size = max(1, len(parts) // BLOCKS)
    blocks = [parts[start : start + size] for start in range(0, len(parts), size)]
    sums = [(sum(block), len(block)) for block in blocks]
    draw = random.Random(_SEED)  # noqa: S311  # a bootstrap
    means = []
    for _ in range(RESAMPLES):
        drawn = draw.choices(sums, k=len(sums))
        means.append(sum(total for total, _ in drawn) / sum(count for _, count in drawn))
    means.sort()
    outside = round((1 - confidence) / 2 * (RESAMPLES - 1))
    return max(0.0, means[outside]), min(1.0, means[-1 - outside])
