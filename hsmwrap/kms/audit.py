"""The audit log: one line of JSON per operation, each chained to the line before.

A line holds what happened, its sequence number from 1, and a digest over the previous line's
digest and all of that: SHA-256, or HMAC-SHA-256 where there is a key. Whoever changes, removes or
reorders lines breaks the chain; without a key they could write a new one. Lines cut off at the
end leave a good chain: against that the database remembers a line (:mod:`hsmwrap.kms.anchors`).

Several processes append to one file: under its lock each reads the last line and chains to it.
Do not rotate the file; to start a new one, configure another path.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from hsmwrap.errors import HsmwrapError

FIRST = hashlib.sha256(b"hsmwrap audit log").hexdigest()
"""What the first line is chained to."""
_MAX_TEXT = 256
# Longest line: five texts of which each character may become two six-character escapes.
_MAX_LINE = 5 * 12 * _MAX_TEXT + 512
_BEGIN = b'{"sequence":'

_log = logging.getLogger(__name__)


class AuditFailed(HsmwrapError):
    """The audit log cannot be written, so operations are not answered."""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """What happened: who did what to which key in which request, and how it ended.

    Attributes:
        request_id: The id that the answer carried.
        access_key_id: Who asked; ``system`` for the KMS itself.
        action: The API's action.
        key_id: Id of the key; None where there is none.
        outcome: ``ok``, or the error code of the answer.
    """

    request_id: str
    access_key_id: str
    action: str
    key_id: str | None
    outcome: str


@dataclass(frozen=True, slots=True)
class Anchor:
    """A line of an audit log.

    Attributes:
        sequence: Its number, from 1; 0 is what the first line is chained to.
        digest: Its digest.
        position: Where it begins in the file, or any line's beginning before that.
    """

    sequence: int
    digest: str
    position: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class AuditProblem:
    """Something wrong with an audit log, at a line (from 1) of the file."""

    line: int
    problem: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.problem}"


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What :func:`verify` found; ``head`` is the last line."""

    lines: int
    problems: tuple[AuditProblem, ...]
    head: Anchor

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class AuditLog:
    """Appends to one file.

    Attributes:
        path: The file; made with mode 600 when absent.
        clock: Returns the current aware time.
        key: HMAC key of the chain; None: SHA-256.
        sync: True waits for the disk with each line.
        log_id: What a database calls the log; None: host and path.
    """

    path: Path
    clock: Callable[[], datetime]
    key: bytes | None = field(default=None, repr=False)
    sync: bool = False
    log_id: str | None = None

    def append(self, entry: AuditEntry) -> None:
        """Write one line.

        Raises:
            AuditFailed: It could not be written, or the file ends in no line of ours.
        """
        try:
            with self._locked() as file:
                last = _last_line(file)
                self._write(file, _line(entry, self.clock(), last, self.key))
        except (OSError, ValueError) as error:
            raise AuditFailed(f"audit log {self.path}: {error}") from error

    def head(self) -> Anchor:
        """The last line.

        Raises:
            AuditFailed: The file cannot be read, or ends in no line of ours.
        """
        try:
            with self._locked() as file:
                return _last_line(file)
        except (OSError, ValueError) as error:
            raise AuditFailed(f"audit log {self.path}: {error}") from error

    def check(self) -> None:
        """Make sure that a line could be written now; only whether there is room is not seen.

        Raises:
            AuditFailed: It could not.
        """
        self.head()

    def holds(self, line: Anchor) -> bool:
        """Whether the log still has this line. Reads from its position to the line alone.

        Raises:
            AuditFailed: The file cannot be read.
        """
        try:
            with self._locked() as file:
                return line == _NOTHING or _line_from(file, line) == line
        except OSError as error:
            raise AuditFailed(f"audit log {self.path}: {error}") from error

    @contextmanager
    def _locked(self) -> Iterator[int]:
        # The lock is the open file's, so threads exclude each other as processes do.
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield file
            finally:
                # A child forked by another thread has the file open too: closing frees nothing.
                fcntl.flock(file, fcntl.LOCK_UN)
        finally:
            os.close(file)

    def _write(self, file: int, line: bytes) -> None:
        end = os.fstat(file).st_size
        if os.write(file, line) != len(line):
            os.ftruncate(file, end)
            raise OSError("a line was written in part; is the disk full?")
        if self.sync:
            os.fdatasync(file)


_NOTHING = Anchor(0, FIRST)


def verify(path: Path, key: bytes | None = None, anchors: tuple[Anchor, ...] = ()) -> AuditReport:
    """Check a whole audit log.

    Args:
        path: The file.
        key: HMAC key of the chain; None: SHA-256.
        anchors: Lines that it must have.

    Raises:
        OSError: The file cannot be read.
    """
    problems: list[AuditProblem] = []
    missing = {anchor.sequence: anchor.digest for anchor in anchors if anchor != _NOTHING}
    last, number = _NOTHING, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                anchor, content = _parse(line)
            except ValueError:
                problems.append(AuditProblem(number, "is no line of an audit log"))
                continue
            problems += (AuditProblem(number, text) for text in _faults(anchor, content, last, key))
            last = anchor
            if missing.get(anchor.sequence) == anchor.digest:
                del missing[anchor.sequence]
    problems += (
        AuditProblem(number, f"the log ends without line {sequence}, which it had")
        for sequence in sorted(missing)
    )
    return AuditReport(number, tuple(problems), last)


def _faults(
    anchor: Anchor, content: dict[str, Any], last: Anchor, key: bytes | None
) -> Iterator[str]:
    if anchor.sequence != last.sequence + 1:
        yield f"has number {anchor.sequence} after {last.sequence}: lines are missing or moved"
    if not hmac.compare_digest(anchor.digest, _digest(content, last.digest, key)):
        yield "does not fit the line before: one of them was changed, or lines are missing or moved"


def _line(entry: AuditEntry, now: datetime, last: Anchor, key: bytes | None) -> bytes:
    content = {
        "sequence": last.sequence + 1,
        "time": now.isoformat(timespec="milliseconds"),
        "request_id": entry.request_id[:_MAX_TEXT],
        "access_key_id": entry.access_key_id[:_MAX_TEXT],
        "action": entry.action[:_MAX_TEXT],
        "key_id": entry.key_id and entry.key_id[:_MAX_TEXT],
        "outcome": entry.outcome[:_MAX_TEXT],
    }
    return _json(content | {"digest": _digest(content, last.digest, key)}) + b"\n"


def _parse(line: bytes) -> tuple[Anchor, dict[str, Any]]:
    content = json.loads(line)
    if not isinstance(content, dict) or _json(content) + b"\n" != line:
        raise ValueError("not in the form that is written")
    digest, sequence = content.pop("digest", None), content.get("sequence")
    if not isinstance(digest, str) or not isinstance(sequence, int):
        raise ValueError("not chained")  # noqa: TRY004 (what it is, is a damaged line)
    return Anchor(sequence, digest), content


def _last_line(file: int) -> Anchor:
    """The last whole line. What a crash of the machine left behind it is cut off.

    That is the beginning of a line, or zeros, or both; its operation was never answered.
    """
    size = os.fstat(file).st_size
    written = _without_zeros(file, size)
    start = max(0, written - _MAX_LINE)
    tail = os.pread(file, written - start, start)
    whole = tail.rfind(b"\n") + 1
    torn = tail[whole:]
    if not (torn.startswith(_BEGIN) or _BEGIN.startswith(torn)) or (start and not whole):
        raise ValueError("ends in something that is no line of an audit log")
    begin = tail.rfind(b"\n", 0, max(0, whole - 1)) + 1
    last = _parse(tail[begin:whole])[0] if whole else _NOTHING
    if start + whole < size:
        _log.warning("audit log: torn last line cut off", extra={"bytes": size - start - whole})
        os.ftruncate(file, start + whole)
    return replace(last, position=start + begin)


def _line_from(file: int, sought: Anchor) -> Anchor | None:
    """The first line from the position of ``sought`` on that does not come before it."""
    with os.fdopen(os.dup(file), "rb") as lines:
        lines.seek(sought.position)
        try:
            found = (_parse(line)[0] for line in lines)
            return next((line for line in found if line.sequence >= sought.sequence), None)
        except ValueError:
            return None


def _without_zeros(file: int, end: int) -> int:
    while end > 0:
        start = max(0, end - _MAX_LINE)
        written = len(os.pread(file, end - start, start).rstrip(b"\0"))
        if written:
            return start + written
        end = start
    return 0


def _digest(content: dict[str, Any], last: str, key: bytes | None) -> str:
    message = last.encode("ascii", "replace") + b"\n" + _json(content)
    return (hmac.digest(key, message, "sha256") if key else hashlib.sha256(message).digest()).hex()


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode("ascii")
