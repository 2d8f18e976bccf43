"""The audit log: one line of JSON per operation, each chained to the line before.

:mod:`hsmwrap.chain` says what a line is and what a chain shows. Cutting lines off the end leaves a
valid chain, so the database stores one line, the anchor (:mod:`hsmwrap.kms.anchors`). The lines
behind the anchor are those that can be cut off unnoticed.

Several processes append to one file: each holds its lock, reads the last line and chains to it.

A log is a row of segments. Where its last line is damaged nothing can be chained to it, and nothing
is written until a command begins a new segment (:meth:`AuditLog.begin_segment`): the file gets
another name, and the first line of the new one has that name, the SHA-256 of its content, and what
was wrong with it. Do not rotate the file in another way.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from hsmwrap import chain
from hsmwrap.chain import Link
from hsmwrap.errors import HsmwrapError, ServiceUnavailable
from hsmwrap.locks import FILE_LOCK_SECONDS, lock_file

START = chain.start("hsmwrap audit log")
"""What the first line is chained to."""
SYSTEM = "system"
"""The access key id of the KMS itself in the audit log."""
BEGIN_SEGMENT = "BeginAuditSegment"
"""The action of the first line of a later segment."""
_MAX_TEXT = 256
# Longest line: six texts; each character may take two escapes of six characters.
_MAX_LINE = 6 * 12 * _MAX_TEXT + 512

_log = logging.getLogger(__name__)


class AuditFailed(HsmwrapError):
    """The audit log cannot be written, so operations are refused."""


class AuditLocked(AuditFailed, ServiceUnavailable):
    """Another process holds the lock of the audit log for too long; the text says what to do."""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One event: caller, action, key, request and outcome.

    Attributes:
        request_id: The RequestId of the answer.
        access_key_id: The caller; ``system`` for the KMS itself.
        action: The API's action.
        key_id: Id of the key; None without one.
        outcome: ``ok``, or the error code of the answer.
        alias: The alias that the request named; None without one.
    """

    request_id: str
    access_key_id: str
    action: str
    key_id: str | None
    outcome: str
    alias: str | None = None


@dataclass(frozen=True, slots=True)
class AuditProblem:
    """A problem of an audit log at a line of the file, counted from 1."""

    line: int
    problem: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Segment:
    """An ended segment of an audit log, as the first line of the next one describes it.

    Attributes:
        file: Its name, in the log's directory.
        sha256: SHA-256 of its content, in hex.
        lines: How many lines it has.
        finding: The first problem, and how many more there are; empty where it was whole.
    """

    file: str
    sha256: str
    lines: int
    finding: str

    def __str__(self) -> str:
        return f"{self.file}, {self.lines} lines, {self.finding or 'complete'}"


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The result of :func:`verify`.

    Attributes:
        lines: How many lines the file has.
        problems: What is wrong.
        head: The last line.
        anchor: The last of the given anchors that the log has; None: none, or only the start of
            the chain, which every log has.
        behind: How many lines follow the anchor; all of them where there is none.
        before: The segment before, if this is not the first.
    """

    lines: int
    problems: tuple[AuditProblem, ...]
    head: Link
    anchor: Link | None
    behind: int
    before: Segment | None = None

    @property
    def ok(self) -> bool:
        """True without problems."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class AuditLog:
    """Appends to one file.

    Attributes:
        path: The file; created with mode 600.
        clock: Returns the current aware time.
        key: HMAC key of the chain; None: SHA-256.
        sync: True flushes each line to the disk.
        log_id: Id of the log in the database; None: host and path.
        lock_seconds: How long a call waits while others hold the log's lock.
    """

    path: Path
    clock: Callable[[], datetime]
    key: bytes | None = field(default=None, repr=False)
    sync: bool = False
    log_id: str | None = None
    lock_seconds: float = FILE_LOCK_SECONDS

    def append(self, entry: AuditEntry) -> int:
        """Write one line and return its number.

        Raises:
            AuditFailed: It cannot be written, or the file does not end with a line of an audit log.
            AuditLocked: Others held the log's lock for ``lock_seconds``.
        """
        with self._locked() as file:
            last = _last_line(file)
            self._write(file, _line(entry, self.clock(), last, self.key))
            return last.sequence + 1

    def head(self) -> Link:
        """The last line.

        Raises:
            AuditFailed: The file cannot be read, or does not end with a line of an audit log.
            AuditLocked: As :meth:`append`.
        """
        with self._locked() as file:
            return _last_line(file)

    def check(self) -> None:
        """Check that a line can be written now; free space on the disk is not checked.

        Raises:
            AuditFailed: It cannot.
            AuditLocked: As :meth:`append`.
        """
        self.head()

    def begin_segment(self, anchors: tuple[Link, ...] = ()) -> tuple[Link, Segment]:
        """End this segment, whole or damaged, and begin another one under the log's name.

        Processes that append to the log go on with the new one. Its first line is chained to the
        start of the chain.

        Args:
            anchors: Lines that the segment must have.

        Returns:
            The first line of the new segment, and what it says of the one that was ended.

        Raises:
            AuditFailed: The file cannot be read, or the directory cannot be written.
            AuditLocked: As :meth:`append`.
        """
        with self._locked() as file:
            path = self.path.resolve()  # the file itself, not a link to it
            old = _next_name(path)
            report = verify(path, self.key, anchors)
            segment = Segment(old.name, _sha256(path), report.lines, _finding(report))
            new = path.with_name(f".{path.name}.new")
            new.unlink(missing_ok=True)  # left by a command that was killed
            begin = AuditEntry("", SYSTEM, BEGIN_SEGMENT, None, "ok")
            line = _line(begin, self.clock(), START, self.key, before=asdict(segment))
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as created:  # noqa: PTH123 (a descriptor has no path)
                if os.geteuid() == 0:  # the service still has to write it
                    status = os.fstat(file)
                    os.fchown(descriptor, status.st_uid, status.st_gid)
                created.write(line)
                created.flush()
                os.fsync(descriptor)
            # In this order the log's name always leads to a file: another process that finds none
            # would make an empty one.
            old.hardlink_to(path)
            new.rename(path)
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        return chain.read(line)[0], segment

    def holds(self, line: Link) -> bool:
        """Whether the log still has this line; reads the file from the line's position.

        Raises:
            AuditFailed: The file cannot be read.
            AuditLocked: As :meth:`append`.
        """
        with self._locked() as file:
            return line == START or _line_from(file, line) == line

    @contextmanager
    def _locked(self) -> Iterator[int]:
        try:
            file = self._open_locked()
            try:
                yield file
            finally:
                # Explicitly: a child forked meanwhile has the file open too, so closing does not
                # unlock it.
                fcntl.flock(file, fcntl.LOCK_UN)
                os.close(file)
        except TimeoutError as error:
            raise AuditLocked(f"audit log {self.path}: {error.strerror}") from error
        except OSError as error:
            raise AuditFailed(f"audit log {self.path}: {error}") from error
        except ValueError as error:
            advice = "look into it with hsmwrap audit verify, go on with hsmwrap audit new-segment"
            raise AuditFailed(f"audit log {self.path}: {error}; {advice}") from error

    def _open_locked(self) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # It locks the open file, so it excludes threads as well as processes.
                lock_file(file, self.lock_seconds)
                is_the_log = os.path.samestat(os.fstat(file), self.path.stat())
            except BaseException:
                os.close(file)
                raise
            if is_the_log:
                return file
            os.close(file)  # a new segment has begun meanwhile

    def _write(self, file: int, line: bytes) -> None:
        end = os.fstat(file).st_size
        if os.write(file, line) != len(line):
            os.ftruncate(file, end)
            raise OSError("a line was written only in part; is the disk full?")
        if self.sync:
            os.fdatasync(file)


def verify(path: Path, key: bytes | None = None, anchors: tuple[Link, ...] = ()) -> AuditReport:
    """Check a whole audit log.

    Args:
        path: The file.
        key: HMAC key of the chain; None: SHA-256.
        anchors: Lines that the log must have.

    Raises:
        OSError: The file cannot be read.
    """
    problems: list[AuditProblem] = []
    missing = {anchor.sequence: anchor for anchor in anchors if anchor != START}
    last, number, anchored, behind, before = START, 0, None, 0, None
    with path.open("rb") as file:
        for number, line in enumerate(chain.lines(file, _MAX_LINE), start=1):
            behind += 1
            try:
                found, content = chain.read(line)
            except ValueError:
                problems.append(AuditProblem(number, "is not a line of an audit log"))
                continue
            problems += (
                AuditProblem(number, text) for text in chain.faults(found, content, last, key)
            )
            last = found
            if number == 1:
                before = _segment_before(content)
            if missing.get(found.sequence) == found:
                anchored, behind = missing.pop(found.sequence), 0
    problems += (
        AuditProblem(number, f"the log ends without line {sequence}, which it had")
        for sequence in sorted(missing)
    )
    if before:
        problems += _problems_of_segments(path, before)
    return AuditReport(number, tuple(problems), last, anchored, behind, before)


def _segment_before(content: dict[str, Any]) -> Segment | None:
    match content.get("before"):
        case {"file": str(file), "sha256": str(sha256), "lines": int(lines), "finding": str(text)}:
            return Segment(file, sha256, lines, text)
    return None


def _problems_of_segments(path: Path, segment: Segment) -> Iterator[AuditProblem]:
    """Whether the segments before are there, unchanged since they ended; the latest first."""
    directory = path.resolve().parent
    while True:
        file = directory / Path(segment.file).name
        if not file.is_file() or _sha256(file) != segment.sha256:
            yield AuditProblem(1, f"the ended segment {file.name} is missing or was changed")
            return
        with file.open("rb") as lines:
            try:
                before = _segment_before(chain.read(next(chain.lines(lines, _MAX_LINE), b""))[1])
            except ValueError:
                return
        if before is None:
            return
        segment = before


def _finding(report: AuditReport) -> str:
    if not report.problems:
        return ""
    more = len(report.problems) - 1
    return f"{report.problems[0]}{f', and {more} more problems' if more else ''}"[:_MAX_TEXT]


def _next_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(entry: AuditEntry, now: datetime, last: Link, key: bytes | None, **more: object) -> bytes:
    content = {
        "time": now.isoformat(timespec="milliseconds"),
        "request_id": entry.request_id[:_MAX_TEXT],
        "access_key_id": entry.access_key_id[:_MAX_TEXT],
        "action": entry.action[:_MAX_TEXT],
        "key_id": entry.key_id and entry.key_id[:_MAX_TEXT],
        "outcome": entry.outcome[:_MAX_TEXT],
        **({"alias": entry.alias[:_MAX_TEXT]} if entry.alias else {}),
        **more,
    }
    return chain.write(content, last, key)


def _last_line(file: int) -> Link:
    """The last complete line; cuts off what a crash of the machine left behind it.

    A crash can leave the beginning of a line, zero bytes, or both. Its operation was not answered.
    """
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a regular file")
    size = status.st_size
    written = _without_zeros(file, size)
    start = max(0, written - _MAX_LINE)
    tail = os.pread(file, written - start, start)
    whole = tail.rfind(b"\n") + 1
    partial = tail[whole:]
    if not (partial.startswith(chain.BEGIN) or chain.BEGIN.startswith(partial)) or (
        start and not whole
    ):
        raise ValueError("does not end with a line of an audit log")
    begin = tail.rfind(b"\n", 0, max(0, whole - 1)) + 1
    last = chain.read(tail[begin:whole])[0] if whole else START
    if start + whole < size:
        _log.warning(
            "audit log: incomplete last line cut off",
            extra={"bytes": size - start - whole, "after_line": last.sequence},
        )
        os.ftruncate(file, start + whole)
    return replace(last, position=start + begin)


def _line_from(file: int, sought: Link) -> Link | None:
    """The first line from the position of ``sought`` whose number is not lower."""
    with os.fdopen(os.dup(file), "rb") as lines:
        lines.seek(sought.position)
        try:
            found = (chain.read(line)[0] for line in chain.lines(lines, _MAX_LINE))
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
