"""Cost of issue and import while many import tokens are outstanding, sealed and resident.

The result is our cost as a multiple of the raw loop, which is measured at the same time. Resident
keys slow the raw loop down too, since SoftHSM searches all objects.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.hsm import RawSession, RawToken
from benchmarks.measured import MeasuredBackend, cycling, new_cmk
from benchmarks.plan import Plan, say
from benchmarks.timing import Side, Timing, take_turns
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.imports import Cmk, ImportParameters, ImportService, generate_inline

Row = tuple[WrappingKeySpec, WrappingAlgorithm]
Held = tuple[Cmk, ImportParameters]

_SEALED = (WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_1)
_RESIDENT = (WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE)
_SEALED_PAIRS = 32
_SAMPLE = 20
"""Number of outstanding import tokens that are then used for imports."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Times of issue and import with outstanding import tokens; ``raw`` is the import's loop."""

    custody: str
    outstanding: int
    issue: Timing
    bring_in: Timing
    raw: Timing

    @property
    def relative(self) -> float:
        """An import as a multiple of the raw loop."""
        return self.bring_in.median / self.raw.median

    @property
    def relative_issue(self) -> float:
        """An issue without key generation, as a multiple of the raw loop of an import."""
        return self.issue.median / self.raw.median

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {
            "custody": self.custody,
            "outstanding": self.outstanding,
            "issue": self.issue.to_json(),
            "import": self.bring_in.to_json(),
            "raw_loop": self.raw.to_json(),
            "import_of_raw": self.relative,
            "issue_of_raw": self.relative_issue,
        }


def sealed(measured: MeasuredBackend, token: RawToken, plan: Plan) -> Iterator[Cost]:
    """RSA: outstanding tokens use no space in the HSM token."""
    expires_at = measured.issue(*_SEALED).claims.expires_at
    say(f"{_SEALED_PAIRS} RSA pairs for the sealed tokens")
    keys = [generate_inline(measured.backend, *_SEALED, expires_at) for _ in range(_SEALED_PAIRS)]
    service, session = measured.service_with(cycling(keys)), token.session()
    held: list[Held] = []
    issue_one = partial(_issue, service, _SEALED, held)

    for count in plan.sealed:
        say(f"{count} sealed tokens outstanding")
        while len(held) < count:
            issue_one()
        yield _Calls(measured, session, held).cost("sealed", issue_one, plan)


def resident(measured: MeasuredBackend, token: RawToken, plan: Plan) -> Iterator[Cost]:
    """SM2: each outstanding token has an object in the HSM token. Stops at the time limit."""
    held: list[Held] = []
    issue_one = partial(_issue, measured.service, _RESIDENT, held)
    session, end = token.session(), time.monotonic() + plan.fill_seconds

    for count in plan.resident:
        say(f"{count} resident wrapping keys")
        while len(held) < count and time.monotonic() < end:
            issue_one()
        reached = len(held)
        yield _Calls(measured, session, held).cost("resident", issue_one, plan)
        if reached < count:
            say(f"resident: time limit at {reached} of {count}")
            return


def _issue(service: ImportService, row: Row, held: list[Held]) -> None:
    cmk = new_cmk()
    held.append((cmk, service.get_parameters_for_import(cmk, *row)))


class _Calls:
    """The calls that are timed while import tokens are outstanding."""

    def __init__(
        self, measured: MeasuredBackend, session: RawSession, held: Sequence[Held]
    ) -> None:
        sample = random.sample(held, min(_SAMPLE, len(held)))
        chosen = [measured.encrypted(*each) for each in sample]
        self.outstanding = len(held)
        self.bring_in = _in_turn([measured.import_side(each) for each in chosen])
        raws = (session.bring_in(each.claims, each.ciphertext, each.material) for each in chosen)
        self.raw = _in_turn([raw.loop for raw in raws])

    def cost(self, custody: str, issue: Callable[[], Any], plan: Plan) -> Cost:
        """Time all three in turn."""
        sides = {"issue": Side(issue), "import": self.bring_in, "raw": self.raw}
        timings = take_turns(sides, plan.seconds, plan.least)
        return Cost(custody, self.outstanding, *(timings[side] for side in sides))


def _in_turn(sides: Sequence[Side]) -> Side:
    following = itertools.cycle(sides)
    return Side(lambda: next(following).call())
