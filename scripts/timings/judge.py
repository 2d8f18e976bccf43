"""Whether what was measured is what was expected; the expectation is data (``expected.toml``)."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from timings.statistics import Apart

EXPECTED = Path(__file__).with_name("expected.toml")


class Verdict(StrEnum):
    """What is expected of two classes."""

    SAME = "same"
    MAY_DIFFER = "may differ"
    MUST_DIFFER = "must differ"
    """A control: where it does not, the run could not have seen a difference either."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two classes of an algorithm, on a backend, in process or over HTTP."""

    backend: str
    over: str
    algorithm: str
    one: str
    other: str
    apart: Apart

    def __str__(self) -> str:
        return f"{self.backend}, {self.over}, {self.algorithm}: {self.other!r} and {self.one!r}"

    def to_json(self) -> dict[str, Any]:
        """All fields in one table."""
        names = ("backend", "over", "algorithm", "one", "other")
        return {name: getattr(self, name) for name in names} | self.apart.to_json()


@dataclass(frozen=True, slots=True)
class Expectation:
    """A row of the data: pairs of classes by patterns (as of file names), and what is expected."""

    verdict: Verdict
    why: str
    backend: str = "*"
    over: str = "*"
    algorithm: str = "*"
    other: str = "*"

    def fits(self, comparison: Comparison) -> bool:
        """Whether it speaks of this comparison."""
        return all(
            fnmatchcase(getattr(comparison, name), getattr(self, name))
            for name in ("backend", "over", "algorithm", "other")
        )


@dataclass(frozen=True, slots=True)
class Expected:
    """The data.

    Attributes:
        margin: How far from 0.5 an AUC may be without telling anything in an attack.
        confidence: Of the bootstrap interval that has to be beyond the margin.
        rows: The first that fits a comparison counts; without one the classes are the same.
    """

    margin: float
    confidence: float
    rows: tuple[Expectation, ...]

    @classmethod
    def read(cls, path: Path = EXPECTED) -> Self:
        """Read the data; a wrong name or verdict is a TypeError or ValueError."""
        data = tomllib.loads(path.read_text("utf-8"))
        rows = tuple(
            Expectation(**{**row, "verdict": Verdict(row["verdict"])}) for row in data.pop("pair")
        )
        return cls(**data, rows=rows)

    def of(self, comparison: Comparison) -> Verdict:
        """What is expected of these classes."""
        return next((row.verdict for row in self.rows if row.fits(comparison)), Verdict.SAME)

    def differs(self, comparison: Comparison) -> bool:
        """Whether time tells these classes apart."""
        low, high = comparison.apart.low, comparison.apart.high
        return low > 0.5 + self.margin or high < 0.5 - self.margin

    def findings(self, comparisons: Sequence[Comparison]) -> Iterator[str]:
        """What is not as expected, a sentence each."""
        for each in comparisons:
            verdict, differs = self.of(each), self.differs(each)
            if verdict is Verdict.SAME and differs:
                yield f"NEW DIFFERENCE: {each}: AUC {each.apart.auc:.3f}"
            if verdict is Verdict.MUST_DIFFER and not differs:
                yield f"NOT SEEN: {each}: the control does not differ, so the run shows nothing"
