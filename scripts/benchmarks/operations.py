"""Each operation alone: issue and import, by row of the compatibility table and backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import software
from benchmarks.arena import Arena
from benchmarks.hsm import Raw, RawToken
from benchmarks.plan import Plan, say
from benchmarks.timing import Side, Timing, speed, take_turns
from hsmwrap.backend import WrappingCapability


@dataclass(frozen=True, slots=True)
class Comparison:
    """One operation of one row on one backend, against the same raw calls and the bare one."""

    backend: str
    operation: str
    row: WrappingCapability
    ours: Timing
    loop: Timing
    bare: Timing

    @property
    def of_loop(self) -> float:
        """Our speed as a fraction of that of the same raw calls."""
        return speed(self.ours, self.loop)

    @property
    def of_bare(self) -> float:
        """Our speed as a fraction of that of the bare call alone."""
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


def compare(arena: Arena, token: RawToken, plan: Plan) -> Iterator[Comparison]:
    """Issue and import by every row of a backend."""
    for row in arena.backend.capabilities().wrapping:
        name = arena.backend.name
        say(f"{name}: issue and import by {row.algorithm}")
        raw = _raw_issue(arena, token, row)
        ours = arena.issue_side(row.spec, row.algorithm)
        yield Comparison(name, "issue", row, **_timed(ours, raw, plan))
        ours, raw = _import_sides(arena, token, row)
        yield Comparison(name, "import", row, **_timed(ours, raw, plan))


def _timed(ours: Side, raw: Raw, plan: Plan) -> dict[str, Timing]:
    sides = {"ours": ours, "loop": raw.loop, "bare": raw.bare}
    return take_turns(sides, plan.seconds, plan.least)


def _raw_issue(arena: Arena, token: RawToken, row: WrappingCapability) -> Raw:
    if arena.backend.name == "software":
        return software.issue(row.spec)
    return token.session().issue(row.spec, row.algorithm)


def _import_sides(arena: Arena, token: RawToken, row: WrappingCapability) -> tuple[Side, Raw]:
    issued = arena.issue(row.spec, row.algorithm)
    if arena.backend.name == "software":
        raw = software.bring_in(row.algorithm, issued.material)
    else:
        raw = token.session().bring_in(issued.claims, issued.ciphertext, issued.material)
    return arena.import_side(issued), raw
