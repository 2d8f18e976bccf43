"""Rate limit for refused signatures in the audit log.

The audit log records attempts to use an access key, and is never truncated. Anyone who knows the id
of an access key can send requests with wrong signatures, and anyone who saw a request can repeat
it. So such refusals are audited at most :data:`PER_MINUTE` times a minute, for each access key and
in each process. The next audited refusal is preceded by a line with the number of those left out.
The request log and the metrics have all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from hsmwrap.http.ports import Caller, KmsPort

PER_MINUTE = 10
"""Audited refusals per minute, access key and process."""

LEFT_OUT = "RefusalsLeftOut"
"""Start of the outcome of a line that counts refusals which were not audited."""

_WINDOW = timedelta(minutes=1)


@dataclass(slots=True)
class _Window:
    """One minute, and its number of refusals so far."""

    begins: datetime
    refusals: int = 0

    @property
    def left_out(self) -> int:
        return max(0, self.refusals - PER_MINUTE)


class RefusalAudit:
    """Audits refusals for existing access keys, up to the rate limit."""

    def __init__(self, kms: KmsPort, clock: Callable[[], datetime]) -> None:
        """Take the KMS that writes the audit log, and the clock."""
        self._kms = kms
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: dict[str, _Window] = {}

    def record(self, action: str, caller: Caller, request_id: str, code: str) -> None:
        """Audit a refusal, unless the access key has reached the limit.

        Args:
            action: The API's action, or an empty text.
            caller: Has the id of an existing access key; each takes some memory.
            request_id: The RequestId of the answer.
            code: The error's code.

        Raises:
            HsmwrapError: The audit log cannot be written.
        """
        left_out, audited = self._count(caller.access_key_id)
        try:
            if left_out:
                # They came from other addresses too.
                anywhere = replace(caller, address=None)
                self._kms.record_refusal("", anywhere, request_id, f"{LEFT_OUT} {left_out}")
        finally:  # a line that cannot be written now is owed
            if audited:
                self._kms.record_refusal(action, caller, request_id, code)

    def _count(self, access_key_id: str) -> tuple[int, bool]:
        """The number of refusals left out before, and whether this one is audited."""
        now, left_out = self._clock(), 0
        with self._lock:
            window = self._windows.get(access_key_id)
            if window is None or abs(now - window.begins) >= _WINDOW:
                left_out = window.left_out if window else 0
                window = self._windows[access_key_id] = _Window(now)
            window.refusals += 1
            return left_out, window.refusals <= PER_MINUTE
