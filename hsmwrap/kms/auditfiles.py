"""Reading the files of an audit log: is it complete, and what is in it from a number on.

:mod:`hsmwrap.kms.audit` says how the files follow each other. All of them are read in their order,
so that a file that is missing in the middle is found.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hsmwrap import chain
from hsmwrap.chain import Link
from hsmwrap.kms.audit import (
    ACCEPT,
    MAX_LINE,
    MAX_TEXT,
    ROTATE,
    START,
    before_first,
    ended_files,
    first_line,
    sha256,
)
from hsmwrap.locks import FILE_LOCK_SECONDS, lock_file

_NO_LINE = "is not a line of an audit log"


@dataclass(frozen=True, slots=True)
class AuditProblem:
    """A problem of an audit log.

    Attributes:
        line: The line of the file, from 1; 0: the file as a whole.
        problem: What is wrong with it.
        file: Name of the ended file; empty: the log's own.
    """

    line: int
    problem: str
    file: str = ""

    def __str__(self) -> str:
        where = [self.file] if self.file else []
        return ": ".join([*where, *([f"line {self.line}"] if self.line else []), self.problem])


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What the first line of a file says of the files before it, which a command accepted.

    Attributes:
        sequence: Number of that line.
        time: When, as text.
        reason: Why.
        finding: The first problem, and how many more there were; empty: none.
    """

    sequence: int
    time: str
    reason: str
    finding: str

    def __str__(self) -> str:
        return f"accepted by line {self.sequence} at {self.time}: {self.reason}" + (
            f" ({self.finding})" if self.finding else ""
        )


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The result of :func:`verify`.

    Attributes:
        files: How many files the log has.
        lines: How many lines they have.
        problems: What is wrong, without what was accepted.
        head: The last line.
        sound: The highest number of a line that chains to the line before.
        anchor: The last of the given anchors that the log has; None: none, or only the start of
            the chain, which every log has.
        behind: How many lines follow the anchor; all of them where there is none.
        accepted: The acceptances of what was wrong earlier.
    """

    files: int
    lines: int
    problems: tuple[AuditProblem, ...]
    head: Link
    sound: int
    anchor: Link | None
    behind: int
    accepted: tuple[Acceptance, ...] = ()

    @property
    def ok(self) -> bool:
        """True without problems."""
        return not self.problems

    @property
    def finding(self) -> str:
        """The first problem, and how many more there are; empty: none."""
        if not self.problems:
            return ""
        more = len(self.problems) - 1
        return f"{self.problems[0]}{f', and {more} more problems' if more else ''}"[:MAX_TEXT]


@dataclass(frozen=True, slots=True)
class _Line:
    """A line, or a file that is missing (without text); what is wrong with it."""

    file: str
    number: int
    text: bytes
    link: Link | None
    content: dict[str, Any]
    faults: tuple[str, ...]


def verify(
    path: Path,
    key: bytes | None = None,
    anchors: tuple[Link, ...] = (),
    report: Callable[[int], None] = lambda _lines: None,
) -> AuditReport:
    """Check a whole audit log, with all its files.

    Args:
        path: The log's own file.
        key: HMAC key of the chain; None: SHA-256.
        anchors: Lines that the log must have.
        report: Called with the number of lines so far.

    Raises:
        OSError: A file cannot be read, or others hold the lock of the log's own file.
    """
    missing = {anchor.sequence: anchor for anchor in anchors if anchor != START}
    problems: list[AuditProblem] = []
    hashes: dict[str, str | None] = {}
    accepted: list[Acceptance] = []
    files, count, behind, sound, number = 0, 0, 0, 0, 0
    head, anchored = START, None
    for line in _lines(path, key):
        problems += (AuditProblem(line.number, fault, line.file) for fault in line.faults)
        number = line.number
        files += number == 1
        count += number > 0
        report(count)
        behind += number > 0
        if line.link is None:
            continue
        head = line.link
        if not line.faults:
            sound = max(sound, head.sequence)
            if number == 1 and line.content.get("action") == ACCEPT:
                accepted.append(_acceptance(line))
                hashes |= _hashes(line.content)
        if missing.get(head.sequence) == head:
            anchored, behind = missing.pop(head.sequence), 0
    problems += (
        AuditProblem(number, f"the log ends without line {sequence}, which it had")
        for sequence in sorted(missing)
    )
    # Of a file that was accepted as missing and is there again, only that is accepted.
    problems = [
        problem
        for problem in problems
        if problem.file not in hashes or (hashes[problem.file] is None and problem.line)
    ]
    path = path.resolve()
    problems += _changes(path, hashes, ended_files(path))
    return AuditReport(
        files, count, tuple(problems), head, sound, anchored, behind, tuple(accepted)
    )


def damaged_files(path: Path, report: AuditReport) -> list[tuple[str, str | None]]:
    """The ended files with problems: name and SHA-256, None where the file is missing.

    Raises:
        OSError: A file cannot be read.
    """
    path = path.resolve()
    there = ended_files(path)
    names = dict.fromkeys(problem.file for problem in report.problems if problem.file)
    return [(name, sha256(path.with_name(name)) if name in there else None) for name in names]


def export(
    path: Path, after: int, key: bytes | None = None, digest: str = ""
) -> Iterator[tuple[int, bytes | AuditProblem]]:
    """The lines with higher numbers than ``after``, as they are, and the problems among them.

    Args:
        path: The log's own file.
        after: Number of the last line that is known.
        key: HMAC key of the chain; None: SHA-256.
        digest: That of the line ``after``, in hex: another line of this number is a problem.
            Empty: not known.

    Yields:
        The number of the last line so far, and the line or the problem.

    Raises:
        OSError: As :func:`verify`.
    """
    last, head = after, 0
    for line in _lines(path, key, after - bool(digest)):
        head = line.link.sequence if line.link else head
        if line.link is not None and line.link.sequence <= after:
            if digest and line.link.sequence == after and line.link.digest != digest:
                fault = (
                    f"is another line {after} than the one known: the end was cut off, and other "
                    "lines with numbers up to this one followed, which are not here"
                )
                yield last, AuditProblem(line.number, fault, line.file)
            continue
        for fault in line.faults:
            yield last, AuditProblem(line.number, fault, line.file)
        if line.link is not None:
            last = line.link.sequence
            yield last, line.text
    if head < after:
        yield last, AuditProblem(0, f"the log ends with line {head}, before line {after}")


def _lines(path: Path, key: bytes | None, after: int = 0) -> Iterator[_Line]:
    """All lines with what is wrong with each, without the files that end at ``after`` or before.

    The log's own file is read as far as it goes now.
    """
    path = path.resolve()
    with path.open("rb") as own:
        lock_file(own.fileno(), FILE_LOCK_SECONDS)  # no line is half written now
        status = os.fstat(own.fileno())
        fcntl.flock(own, fcntl.LOCK_UN)
        # One that is the log's own file: it was rotated just now, or a killed command left a link.
        names = [
            name
            for name in ended_files(path)
            if not os.path.samestat(path.with_name(name).stat(), status)
        ]
        ended = names if after <= 0 else _needed(path, names, own, after)
        before = names[-len(ended) - 1] if len(ended) < len(names) else ""
        last: Link | None = None
        for name in ended:
            with path.with_name(name).open("rb") as file:
                for line in _of_file(file, name, last, before, names=names, key=key):
                    last = line.link or last
                    yield line
            before = name
        for line in _of_file(own, "", last, before, names=names, key=key):
            if own.tell() > status.st_size:
                return
            yield line


def _needed(path: Path, names: list[str], own: BinaryIO, after: int) -> list[str]:
    """The ended files that have lines with higher numbers than ``after``."""
    needed: list[str] = []
    first = first_line(own.fileno())
    for name in reversed(names):
        if first and first[0].sequence <= after + 1:
            break
        needed.insert(0, name)
        with path.with_name(name).open("rb") as file:
            first = first_line(file.fileno())
    return needed


def _of_file(
    file: BinaryIO,
    name: str,
    last: Link | None,
    before: str,
    *,
    names: list[str],
    key: bytes | None,
) -> Iterator[_Line]:
    for number, text in enumerate(chain.lines(file, MAX_LINE), start=1):
        try:
            link, content = chain.read(text)
        except ValueError:
            yield _Line(name, number, text, None, {}, (_NO_LINE,))
            continue
        faults: list[str] = []
        said = content.get("before") if content.get("action") in {ROTATE, ACCEPT} else None
        if number == 1 and isinstance(said, str):
            if said != before and said in names:
                faults.append(f"follows {said}, and not {before}: files were exchanged or added")
            elif said != before:
                yield _Line(said, 0, b"", None, {}, ("is missing",))
            if content["action"] == ACCEPT or last is None or said != before:
                last = before_first(link, content)
        faults += chain.faults(link, content, last or START, key)
        yield _Line(name, number, text, link, content, tuple(faults))
        last = link


def _acceptance(line: _Line) -> Acceptance:
    said = [str(line.content.get(member)) for member in ("time", "reason", "finding")]
    return Acceptance(line.link.sequence if line.link else 0, *said)


def _hashes(content: dict[str, Any]) -> dict[str, str | None]:
    """The files that an acceptance names, and the SHA-256 of each; None: missing."""
    accepted = content.get("accepted")
    return {
        each["file"]: each["sha256"]
        for each in (accepted if isinstance(accepted, list) else [])
        if isinstance(each, dict)
        and isinstance(each.get("file"), str)
        and isinstance(each.get("sha256"), str | None)
    }


def _changes(path: Path, hashes: dict[str, str | None], names: list[str]) -> Iterator[AuditProblem]:
    for name, digest in hashes.items():
        if digest is None:
            continue
        if name not in names:
            yield AuditProblem(0, "is missing", name)
        elif sha256(path.with_name(name)) != digest:
            yield AuditProblem(0, "was changed after it was accepted", name)
