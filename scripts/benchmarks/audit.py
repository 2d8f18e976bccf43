"""What a request pays for its line in the audit log: the check before it, and the line itself."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.timing import Timing
from hsmwrap.kms.audit import AuditEntry, AuditLog

_LINES = 2_000
_SYNCED = 200
_CHECK_AGE = 0.05
_ENTRY = AuditEntry("0" * 36, "bench", "Encrypt", "0" * 36, "ok", client="127.0.0.1")


@dataclass(frozen=True, slots=True)
class AuditCost:
    """Times of a line, by one thread.

    Attributes:
        line: Check and line.
        synced: The same with a flush to the disk (``audit_sync``).
        bare: Appending as many bytes to an open file.
    """

    line: Timing
    synced: Timing
    bare: Timing

    def to_json(self) -> dict[str, float]:
        """The medians, in milliseconds."""
        each = {"line": self.line, "synced": self.synced, "bare": self.bare}
        return {name: timing.median * 1e3 for name, timing in each.items()}


def measure() -> AuditCost:
    """Measure lines of one thread in a directory of their own, in turns of ten."""
    with TemporaryDirectory(prefix="hsmwrap-bench-") as directory:
        logs = [_log(directory, "line", sync=False), _log(directory, "synced", sync=True)]
        size = _size(logs[0])
        times: list[list[float]] = [[], [], []]
        with (Path(directory) / "bare").open("ab", buffering=0) as bare:
            for number in range(_LINES):
                for log, mine in zip(logs, times, strict=False):
                    if not log.sync or number < _SYNCED:
                        started = time.perf_counter()
                        log.check(max_age=_CHECK_AGE)
                        log.append(_ENTRY)
                        mine.append(time.perf_counter() - started)
                started = time.perf_counter()
                bare.write(bytes(size))
                times[2].append(time.perf_counter() - started)
    return AuditCost(*map(Timing, times))


def _log(directory: str, name: str, *, sync: bool) -> AuditLog:
    key = os.urandom(32)
    return AuditLog(Path(directory) / name, lambda: datetime.now(UTC), key, sync=sync)


def _size(log: AuditLog) -> int:
    """The bytes of a line."""
    log.append(_ENTRY)
    return log.path.stat().st_size
