"""Writing the audit log: one line of JSON per operation, each chained to the line before.

:mod:`hsmwrap.chain` says what a line is and what a chain shows. Cutting lines off the end leaves a
valid chain, so the database stores one line, the anchor (:mod:`hsmwrap.kms.anchors`). The lines
behind the anchor are those that can be cut off unnoticed.

Several processes append to one file: each holds its lock, reads the last line and chains to it. The
threads of a process take turns, and the one whose turn it is writes the lines of all that wait. A
line that could not be written is owed: it is written first as soon as the log can be written again,
and until then :meth:`AuditLog.check` fails.

A log is a row of files. :meth:`AuditLog.rotate` gives the file another name (``audit.log.1``, the
highest number is the newest), and the first line of the new one goes on with the numbers and the
chain. Where the last line is damaged nothing can be chained to it, and nothing is written until a
command accepts the log as it is (:meth:`AuditLog.accept`): the first line of the new file goes on
with the numbers, begins a chain, and says what was wrong and in which files.
:mod:`hsmwrap.kms.auditfiles` reads the files. Do not rotate them in another way.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from hsmwrap import chain, forks
from hsmwrap.chain import Link
from hsmwrap.errors import HsmwrapError, ServiceUnavailable
from hsmwrap.forks import ForkAware
from hsmwrap.locks import FILE_LOCK_SECONDS, lock_file
from hsmwrap.privatefile import sync_directory

START = chain.start("hsmwrap audit log")
"""What the first line is chained to."""
SYSTEM = "system"
"""The access key id of the KMS itself in the audit log."""
ROTATE = "RotateAuditLog"
"""The action of the first line of a file that goes on with the chain."""
ACCEPT = "AcceptAuditLog"
"""The action of the first line of a file that begins a chain after files that were accepted."""
MAX_TEXT = 256
"""How many characters of a text go into a line."""
# Longest line: seven texts and six facts; each character may take two escapes of six characters.
MAX_LINE = (7 + 6) * 12 * MAX_TEXT + 1024
"""Longest line in bytes."""
_NUMBER = re.compile("[1-9][0-9]{0,17}")
_MOST_OWED = 10_000
_LOST = "an audit line is lost"
_MAX_SEQUENCE = 2**52  # of what is read; numbers that follow still fit

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
        client: Address of the other end of the connection: the client's, or that of the last proxy
            before the KMS. None: without a connection, or without an address.
        facts: Further members of the line: texts by their names.
    """

    request_id: str
    access_key_id: str
    action: str
    key_id: str | None
    outcome: str
    alias: str | None = None
    client: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Waiting:
    """An entry that has no line yet; its thread waits for ``news``, which is locked."""

    entry: AuditEntry
    time: datetime
    sequence: int = 0
    failed: AuditFailed | None = None
    news: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.news.acquire()

    @property
    def is_over(self) -> bool:
        return bool(self.sequence or self.failed)

    def wake(self) -> None:
        with suppress(RuntimeError):  # it was woken before
            self.news.release()


@dataclass(slots=True)
class _End:
    """The end of the file as this process saw it last, under the lock."""

    file: tuple[int, int, int, int]
    size: int
    last: Link
    text: bytes
    seen: float

    def is_end_of(self, file: int) -> bool:
        status = os.fstat(file)
        return (self.file, self.size) == (_identity(status), status.st_size) and (
            os.pread(file, len(self.text), self.size - len(self.text)) == self.text
        )


class _Queue(ForkAware):
    """What the threads of a process share; a child after ``fork()`` starts afresh."""

    def __init__(self) -> None:
        self.after_fork_in_child()
        forks.register(self)

    def after_fork_in_child(self) -> None:
        self.turn = threading.Lock()
        self.waiting: deque[_Waiting] = deque()
        self.end: _End | None = None
        self.failures = 0
        self.rotates = True

    def wake_next(self) -> None:
        """Let a thread that waits take the turn, which is free now."""
        for each in list(self.waiting):
            if not each.failed:
                each.wake()
                return


@dataclass(frozen=True, slots=True)
class AuditLog:
    """Appends to one log.

    Attributes:
        path: The file; created with mode 600. A new file has the mode of the one before.
        clock: Returns the current aware time.
        key: HMAC key of the chain; None: SHA-256.
        sync: True flushes each line to the disk.
        log_id: Id of the log in the database; None: host and path.
        lock_seconds: How long a call waits while others hold the log's lock.
        max_bytes: Size at which the file is rotated; 0: only :meth:`rotate` does.
    """

    path: Path
    clock: Callable[[], datetime]
    key: bytes | None = field(default=None, repr=False)
    sync: bool = False
    log_id: str | None = None
    lock_seconds: float = FILE_LOCK_SECONDS
    max_bytes: int = 0
    _queue: _Queue = field(default_factory=_Queue, init=False, repr=False, compare=False)

    @property
    def failures(self) -> int:
        """How often this process could not write."""
        return self._queue.failures

    def append(self, entry: AuditEntry, *more: AuditEntry) -> int:
        """Write a line for each entry, with those of other threads; returns the last one's number.

        Raises:
            AuditFailed: They cannot be written now, or the file does not end with a line of an
                audit log. The lines are owed: they are written as soon as that is possible.
            AuditLocked: Others held the log's lock for ``lock_seconds``; the lines are owed too.
        """
        now, deadline = self.clock(), time.monotonic() + self.lock_seconds
        mine = [_Waiting(each, now) for each in (entry, *more)]
        self._queue.waiting.extend(mine)
        for waiting in mine:
            self._wait(waiting, deadline)
        for waiting in mine:
            if not waiting.sequence:
                failed = waiting.failed or self._late()
                raise type(failed)(str(failed)) from failed
        return mine[-1].sequence

    def _wait(self, waiting: _Waiting, deadline: float) -> None:
        queue = self._queue
        while not waiting.is_over:
            # The thread whose turn it is writes this line too, or wakes this one at its end.
            turn = queue.turn
            if turn.acquire(blocking=False):
                try:
                    if not (waiting.is_over or waiting in queue.waiting):
                        queue.waiting.append(waiting)  # in a child that was forked meanwhile
                    if not waiting.is_over:
                        self._write_waiting(deadline)
                except AuditFailed as error:
                    waiting.failed = error
                finally:
                    turn.release()
                    queue.wake_next()
            elif not waiting.news.acquire(timeout=max(0, deadline - time.monotonic())):
                waiting.failed = self._late()

    def head(self) -> Link:
        """The last line.

        Raises:
            AuditFailed: The file cannot be read, or does not end with a line of an audit log.
            AuditLocked: As :meth:`append`.
        """
        with self._locked() as file:
            return self._end(file).last

    def check(self, *, max_age: float = 0, lock_seconds: float | None = None) -> None:
        """Check that a line can be written now, and write those that are owed.

        Free space on the disk is not checked.

        Args:
            max_age: Seconds for which this process may rely on having had the lock. What the file
                is and how it ends is looked at in any case.
            lock_seconds: In place of the log's own.

        Raises:
            AuditFailed: It cannot.
            AuditLocked: As :meth:`append`.
        """
        queue, end = self._queue, self._queue.end
        owed = bool(queue.waiting) and queue.waiting[0].failed
        if end and not owed and time.monotonic() - end.seen < max_age and self._goes_on(end):
            return
        deadline = time.monotonic() + (self.lock_seconds if lock_seconds is None else lock_seconds)
        with self._turn(deadline):
            self._write_waiting(deadline)

    def write_owed(self, lock_seconds: float) -> None:
        """Write the lines that are owed, before the process ends; what remains is logged as lost.

        Args:
            lock_seconds: In place of the log's own.
        """
        queue = self._queue
        if not queue.waiting:
            return
        with suppress(AuditFailed):
            self.check(lock_seconds=lock_seconds)
        for each in list(queue.waiting):
            if each.failed:  # without that, its thread is still here
                with suppress(ValueError):
                    queue.waiting.remove(each)
                    _log.error(_LOST, extra={"line": each.entry})

    def rotate(self, at_least: int = 1) -> str | None:
        """Begin a new file that goes on with the chain; processes that append go on with it.

        Args:
            at_least: Size in bytes below which nothing happens.

        Returns:
            The name that the old file has now, in the same directory; None: nothing happened.

        Raises:
            AuditFailed: The file does not end with a line of an audit log, or the directory cannot
                be written.
            AuditLocked: As :meth:`append`.
        """
        with self._locked() as file:
            end = self._end(file)
            if end.size < at_least:
                return None
            name = self._next_name(file)
            self._begin(file, name, end.last, ROTATE, chained_to=end.last.digest)
            return name

    def accept(
        self,
        reason: str,
        finding: str = "",
        damaged: Iterable[tuple[str, str | None]] = (),
        last: int = 0,
    ) -> tuple[Link, str]:
        """Begin a new file with a chain of its own after this one, whole or damaged.

        Args:
            reason: Why the log is accepted as it is.
            finding: What is wrong with it.
            damaged: Names of the ended files with problems, and the SHA-256 of each; None: missing.
            last: A number that the log had; the new file has higher ones.

        Returns:
            The first line of the new file, and the name that the old one has now.

        Raises:
            AuditFailed: The file cannot be read, or the directory cannot be written.
            AuditLocked: As :meth:`append`.
        """
        with self._locked() as file:
            with suppress(ValueError):
                last = max(last, _last_line(file)[0].sequence)
            name = self._next_name(file)
            accepted = [
                {"file": each, "sha256": digest}
                for each, digest in (*damaged, (name, sha256(self.path)))
            ]
            more = {"reason": reason[:MAX_TEXT], "finding": finding[:MAX_TEXT]}
            begin = replace(START, sequence=last)
            return self._begin(file, name, begin, ACCEPT, **more, accepted=accepted), name

    def holds(self, line: Link) -> bool:
        """Whether the log still has this line; reads the file from the line's position.

        Raises:
            AuditFailed: The file cannot be read.
            AuditLocked: As :meth:`append`.
        """
        if line == START:
            return True
        with self._locked() as file:
            found = _has(file, line)
            if found is not None:
                return found
            path = self.path.resolve()
            for name in reversed(ended_files(path)):
                if found is not None:
                    break
                with path.with_name(name).open("rb") as ended:
                    found = _has(ended.fileno(), line)
            return bool(found)

    # --- in turn, and under the lock

    @contextmanager
    def _turn(self, deadline: float) -> Iterator[None]:
        turn = self._queue.turn
        if not turn.acquire(timeout=max(0, deadline - time.monotonic())):
            raise self._late()
        try:
            yield
        finally:
            turn.release()
            self._queue.wake_next()

    def _late(self) -> AuditLocked:
        return AuditLocked(f"audit log {self.path}: other threads wait for its lock too")

    @contextmanager
    def _locked(self) -> Iterator[int]:
        deadline = time.monotonic() + self.lock_seconds
        with self._turn(deadline), self._lock(deadline) as file:
            yield file

    @contextmanager
    def _lock(self, deadline: float) -> Iterator[int]:
        try:
            file = self._open_locked(deadline)
            try:
                yield file
            finally:
                # Explicitly: a child forked meanwhile has the file open too, so closing does not
                # unlock it.
                fcntl.flock(file, fcntl.LOCK_UN)
                os.close(file)
        except TimeoutError as error:
            self._queue.failures += 1
            raise AuditLocked(f"audit log {self.path}: {error.strerror}") from error
        except OSError as error:
            self._queue.failures += 1
            raise AuditFailed(f"audit log {self.path}: {error}") from error
        except ValueError as error:
            self._queue.failures += 1
            advice = "look into it with hsmwrap audit verify, go on with hsmwrap audit accept"
            raise AuditFailed(f"audit log {self.path}: {error}; {advice}") from error

    def _open_locked(self, deadline: float) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # It excludes other openings of the file, so other processes.
                lock_file(file, max(0, deadline - time.monotonic()))
                is_the_log = os.path.samestat(os.fstat(file), self.path.stat())
            except BaseException:
                os.close(file)
                raise
            if is_the_log:
                return file
            os.close(file)  # a new file has begun meanwhile

    def _write_waiting(self, deadline: float) -> None:
        """Write the lines of all that wait, in one piece; in turn."""
        queue = self._queue
        if self.max_bytes and queue.end and queue.end.size >= self.max_bytes:
            self._rotate_by_size(deadline)
        batch: list[_Waiting] = []
        try:
            with self._lock(deadline) as file:
                end = self._end(file)
                with suppress(IndexError):
                    while True:
                        batch.append(queue.waiting.popleft())
                if batch:
                    self._write(file, batch, end)
        except BaseException as error:
            queue.waiting.extendleft(reversed(batch))
            if isinstance(error, AuditFailed):
                for each in batch:
                    each.failed = error
                    each.wake()
            while len(queue.waiting) > _MOST_OWED:
                _log.error(_LOST, extra={"line": queue.waiting.popleft().entry})
            raise

    def _write(self, file: int, batch: list[_Waiting], end: _End) -> None:
        last, position, lines = end.last, end.size, []
        for each in batch:
            lines.append(chain.write(_content(each.entry, each.time), last, self.key))
            last = chain.link_of(lines[-1], last, position)
            position += len(lines[-1])
        chain.add(file, b"".join(lines), end.size, sync=self.sync)
        self._queue.end = _End(end.file, position, last, lines[-1], time.monotonic())
        for number, each in enumerate(batch, start=end.last.sequence + 1):
            each.sequence = number
            each.wake()

    def _end(self, file: int) -> _End:
        end = self._queue.end
        if end and end.is_end_of(file):
            end.seen = time.monotonic()
        else:
            status = os.fstat(file)
            last, size = _last_line(file)
            if size < status.st_size:
                facts = {"bytes": status.st_size - size, "after_line": last.sequence}
                _log.warning("audit log: incomplete last line cut off", extra=facts)
                os.ftruncate(file, size)
            text = os.pread(file, size - last.position, last.position)
            # Once for each file, as other processes that append check it too.
            if not (end and end.file == _identity(status)) and not self._chains(file, last, text):
                raise ValueError(
                    f"its last line, number {last.sequence}, does not chain with "
                    f"{'this key' if self.key else 'no key'}: set audit_key_file to the key of "
                    "this log; if it was that, the line was changed"
                )
            end = _End(_identity(status), size, last, text, time.monotonic())
        self._queue.end = end
        return end

    def _chains(self, file: int, last: Link, text: bytes) -> bool:
        """Whether the last line was written with this log's key, as far as that can be told."""
        if not text:
            return True
        link, content = chain.read(text)
        before = before_first(link, content)
        if last.position:
            start = max(0, last.position - MAX_LINE)
            tail = os.pread(file, last.position - start, start)
            try:
                before = chain.read(tail[tail.rfind(b"\n", 0, -1) + 1 :])[0]
            except ValueError:
                return True  # that line is damaged, which says nothing of the key
        before = replace(before, sequence=link.sequence - 1)
        return not any(chain.faults(link, content, before, self.key))

    def _goes_on(self, end: _End) -> bool:
        """Whether the file is the same and ends with a line, as far as one sees without the lock.

        Another process may be writing just then: False means that the lock is needed to see.
        """
        try:
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            try:
                if end.is_end_of(file):
                    return True
                last, size = _last_line(file)
                status = os.fstat(file)
                whole = size == status.st_size and last.sequence > end.last.sequence
                return whole and end.file == _identity(status)
            finally:
                os.close(file)
        except (OSError, ValueError):
            return False

    # --- new files

    def _rotate_by_size(self, deadline: float) -> None:
        try:
            with self._lock(deadline) as file:
                end = self._end(file)
                if end.size >= self.max_bytes:
                    name = self._next_name(file)
                    self._begin(file, name, end.last, ROTATE, chained_to=end.last.digest)
            self._queue.rotates = True
        except AuditFailed as error:
            # A line in a file that is too long is better than none.
            if self._queue.rotates:
                _log.error("the audit log was not rotated", extra={"why": str(error)})
            self._queue.rotates = False

    def _next_name(self, file: int) -> str:
        path = self.path.resolve()
        latest = ended_files(path)[-1:]
        if latest and os.path.samestat(os.fstat(file), path.with_name(latest[0]).stat()):
            return latest[0]  # left by a command that was killed
        before = (first_line(file) or (START, {}))[1].get("before")
        known = [str(name).rpartition(".")[2] for name in (*latest, before)]
        return f"{path.name}.{1 + max([0, *(int(n) for n in known if _NUMBER.fullmatch(n))])}"

    def _begin(self, file: int, name: str, last: Link, action: str, **more: object) -> Link:
        """Give the log's file another name and begin a new one under the log's."""
        path = self.path.resolve()  # the file itself, not a link to it
        new = path.with_name(f".{path.name}.new")
        new.unlink(missing_ok=True)  # left by a command that was killed
        content = _content(AuditEntry("", SYSTEM, action, None, "ok"), self.clock())
        line = chain.write(content | {"before": name} | more, last, self.key)
        if len(line) > MAX_LINE:
            raise OSError("too many files have problems")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as created:  # noqa: PTH123 (a descriptor has no path)
            _give_to_the_same(descriptor, os.fstat(file))
            created.write(line)
            created.flush()
            os.fsync(descriptor)
        # In this order the log's name always leads to a file: another process that finds none
        # would make an empty one.
        with suppress(FileExistsError):
            path.with_name(name).hardlink_to(path)
        new.rename(path)
        sync_directory(path.parent)
        self._queue.end = None
        return chain.link_of(line, last)


def ended_files(path: Path) -> list[str]:
    """Names of the files that a log ended, the oldest first.

    Raises:
        OSError: The directory cannot be read.
    """
    begin = f"{path.name}."
    found = (name for name in os.listdir(path.parent) if name.startswith(begin))  # noqa: PTH208 (names)
    ended = [name for name in found if _NUMBER.fullmatch(name.removeprefix(begin))]
    return sorted(ended, key=lambda name: int(name.removeprefix(begin)))


def _give_to_the_same(new: int, old: os.stat_result) -> None:
    """Give a new file the group and mode of the old one, and as root its owner."""
    if os.geteuid() == 0:  # the service still has to write it
        os.fchown(new, old.st_uid, old.st_gid)
    elif os.fstat(new).st_gid != old.st_gid:
        try:
            os.fchown(new, -1, old.st_gid)
        except PermissionError:
            return  # the rights are not for another group
    os.fchmod(new, stat.S_IMODE(old.st_mode))


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_mode, status.st_uid


def _content(entry: AuditEntry, now: datetime) -> dict[str, Any]:
    return {
        "time": now.isoformat(timespec="milliseconds"),
        "request_id": entry.request_id[:MAX_TEXT],
        "access_key_id": entry.access_key_id[:MAX_TEXT],
        "action": entry.action[:MAX_TEXT],
        "key_id": entry.key_id and entry.key_id[:MAX_TEXT],
        "outcome": entry.outcome[:MAX_TEXT],
        "client": entry.client and entry.client[:MAX_TEXT],
        **({"alias": entry.alias[:MAX_TEXT]} if entry.alias else {}),
        **{name: text[:MAX_TEXT] for name, text in entry.facts.items()},
    }


def _last_line(file: int) -> tuple[Link, int]:
    """The last complete line, and where it ends.

    What follows it is what a crash leaves: the beginning of a line, zero bytes, or both. Its
    operation was not answered.

    Raises:
        ValueError: The file does not end in such a way.
    """
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is not a regular file")
    written = _without_zeros(file, status.st_size)
    start = max(0, written - MAX_LINE)
    tail = os.pread(file, written - start, start)
    whole = tail.rfind(b"\n") + 1
    partial = tail[whole:]
    begun = partial.startswith(chain.BEGIN) or chain.BEGIN.startswith(partial)
    if not begun or (start and not whole):
        raise ValueError("does not end with a line of an audit log")
    begin = tail.rfind(b"\n", 0, max(0, whole - 1)) + 1
    last = chain.read(tail[begin:whole])[0] if whole else START
    if last.sequence >= _MAX_SEQUENCE:
        raise ValueError("its last line has an impossible number")
    return replace(last, position=start + begin), start + whole


def _line_from(file: int, sought: Link) -> Link | None:
    """The first line from the position of ``sought`` whose number is not lower."""
    with os.fdopen(os.dup(file), "rb") as lines:
        lines.seek(sought.position)
        try:
            found = (chain.read(line)[0] for line in chain.lines(lines, MAX_LINE))
            return next((line for line in found if line.sequence >= sought.sequence), None)
        except ValueError:
            return None


def _has(file: int, line: Link) -> bool | None:
    """Whether the file has the line; None: it would be in a file before."""
    if _line_from(file, line) == line:
        return True
    first = first_line(file)
    return None if first and first[0].sequence > line.sequence else False


def first_line(file: int) -> tuple[Link, dict[str, Any]] | None:
    """The first line of an open file; None: it does not parse."""
    try:
        return chain.read(os.pread(file, MAX_LINE, 0).partition(b"\n")[0] + b"\n")
    except ValueError:
        return None


def before_first(line: Link, content: dict[str, Any]) -> Link:
    """What the first line of a file is chained to, as it says."""
    rotated = content.get("action") == ROTATE and "before" in content
    digest = str(content.get("chained_to")) if rotated else START.digest
    return Link(line.sequence - 1, digest)


def _without_zeros(file: int, end: int) -> int:
    while end > 0:
        start = max(0, end - MAX_LINE)
        written = len(os.pread(file, end - start, start).rstrip(b"\0"))
        if written:
            return start + written
        end = start
    return 0
