"""Which refused signatures are audited.

The audit log tells what was tried in the name of an access key, and grows for ever. Whoever knows
the id of an access key can sign wrongly, and whoever saw a request can send it again: such
refusals are audited at most :data:`PER_MINUTE` times a minute, for each access key and in each
process. The first one that is audited after others were not is preceded by a line that says how
many were left out. The request log and the metrics have every one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from hsmwrap.http.ports import KmsPort

PER_MINUTE = 10
"""Refusals that are audited, of each access key, a minute and a process."""

LEFT_OUT = "RefusalsLeftOut"
"""What the outcome of the line begins with that counts refusals which were not audited."""

_WINDOW = timedelta(minutes=1)


@dataclass(slots=True)
class _Window:
    """A minute, and how many of its refusals came so far."""

    begins: datetime
    refusals: int = 0

    @property
    def left_out(self) -> int:
        return max(0, self.refusals - PER_MINUTE)


class RefusalAudit:
    """Audits refusals in the name of access keys that exist, some a minute."""

    def __init__(self, kms: KmsPort, clock: Callable[[], datetime]) -> None:
        """Take the KMS that keeps the audit log, and what returns the current aware time."""
        self._kms = kms
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: dict[str, _Window] = {}

    def record(self, action: str, access_key_id: str, request_id: str, code: str) -> None:
        """Audit a refusal, if the access key has not had too many.

        Args:
            action: The API's action, or nothing.
            access_key_id: An access key that exists: one is remembered for each.
            request_id: The id that the answer carries.
            code: The error's code.

        Raises:
            HsmwrapError: The audit log cannot be written.
        """
        left_out, audited = self._count(access_key_id)
        if left_out:
            self._kms.record_refusal("", access_key_id, request_id, f"{LEFT_OUT} {left_out}")
        if audited:
            self._kms.record_refusal(action, access_key_id, request_id, code)

    def _count(self, access_key_id: str) -> tuple[int, bool]:
        """How many were left out before this one, and whether this one is audited."""
        now, left_out = self._clock(), 0
        with self._lock:
            window = self._windows.get(access_key_id)
            if window is None or abs(now - window.begins) >= _WINDOW:
                left_out = window.left_out if window else 0
                window = self._windows[access_key_id] = _Window(now)
            window.refusals += 1
            return left_out, window.refusals <= PER_MINUTE
