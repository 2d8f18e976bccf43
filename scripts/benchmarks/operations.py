"""Single operations: issue and import, for each backend and row of the compatibility table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import software
from benchmarks.hsm import Raw, RawToken
from benchmarks.measured import MeasuredBackend
from benchmarks.plan import Plan, say
from benchmarks.timing import Side, Timing, speed, take_turns
from hsmwrap.backend import WrappingCapability


@dataclass(frozen=True, slots=True)
class Comparison:
    """One operation of one row on one backend, with the raw loop and the bare call."""

    backend: str
    operation: str
    row: WrappingCapability
    ours: Timing
    loop: Timing
    bare: Timing

    @property
    def of_loop(self) -> float:
        """Our speed as a fraction of the raw loop's."""
        return speed(self.ours, self.loop)

    @property
    def of_bare(self) -> float:
        """Our speed as a fraction of the bare call's."""
        return speed(self.ours, self.bare)

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {
            "backend": self.backend,
            "operation": self.operation,
            "wrapping_key_spec": self.row.spec,
            "wrapping_algorithm": self.row.algorithm,
            "path": self.row.path,
            "custody": self.row.custody,
            "ours": self.ours.to_json(),
            "loop": self.loop.to_json(),
            "bare": self.bare.to_json(),
            "of_loop": self.of_loop,
            "of_bare": self.of_bare,
        }


def compare(measured: MeasuredBackend, token: RawToken, plan: Plan) -> Iterator[Comparison]:
    """Issue and import by every row of a backend."""
    for row in measured.backend.capabilities().wrapping:
        name = measured.backend.name
        say(f"{name}: issue and import by {row.algorithm}")
        raw = _raw_issue(measured, token, row)
        ours = measured.issue_side(row.spec, row.algorithm)
        yield Comparison(name, "issue", row, **_timed(ours, raw, plan))
        ours, raw = _import_sides(measured, token, row)
        yield Comparison(name, "import", row, **_timed(ours, raw, plan))


def _timed(ours: Side, raw: Raw, plan: Plan) -> dict[str, Timing]:
    sides = {"ours": ours, "loop": raw.loop, "bare": raw.bare}
    return take_turns(sides, plan.seconds, plan.least)


def _raw_issue(measured: MeasuredBackend, token: RawToken, row: WrappingCapability) -> Raw:
    if measured.backend.name == "software":
        return software.issue(row.spec)
    return token.session().issue(row.spec, row.algorithm)


def _import_sides(
    measured: MeasuredBackend, token: RawToken, row: WrappingCapability
) -> tuple[Side, Raw]:
    issued = measured.issue(row.spec, row.algorithm)
    if measured.backend.name == "software":
        raw = software.bring_in(row.algorithm, issued.material)
    else:
        raw = token.session().bring_in(issued.claims, issued.ciphertext, issued.material)
    return measured.import_side(issued), raw
