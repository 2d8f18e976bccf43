"""Failures in a row: what to do when the gentle remedies do not help.

After a restart of the HSM some client libraries answer the same code to every call, in fresh
sessions too, until C_Finalize. Which code that is, no table can know.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

IN_A_ROW = 3
"""Failures of one operation, without a success in between, after which the module is restarted."""

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 300.0
"""Seconds until the module may be restarted again for the same operation; doubles up to this, as a
restart that did not help stops every thread for nothing."""


@dataclass(slots=True)
class _Row:
    failures: int = 0
    not_before: float = float("-inf")
    pause: float = FIRST_PAUSE


class RepeatedFailures:
    """Counts failures in a row for each operation.

    For each one: while imports fail, MACs may succeed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with none; ``clock`` is monotonic, in seconds."""
        self._rows: dict[object, _Row] = {}
        self._clock = clock

    def succeeded(self, operation: object) -> None:
        """Forget the failures of this operation."""
        self._rows.pop(operation, None)

    def failed(self, operation: object) -> bool:
        """Count a failure; True if the module has to be restarted now."""
        row = self._rows.setdefault(operation, _Row())
        row.failures += 1
        now = self._clock()
        if row.failures < IN_A_ROW or now < row.not_before:
            return False
        row.failures = 0
        row.not_before = now + row.pause
        row.pause = min(2 * row.pause, LONGEST_PAUSE)
        return True
