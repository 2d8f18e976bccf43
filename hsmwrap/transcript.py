"""Transcripts of ceremonies with key sets: what was done, when, which fingerprints; for auditors.

A line when a ceremony begins and one when it ends, chained (:mod:`hsmwrap.chain`): a change, a
missing line or another order shows. It has no secret. That lines were cut off the end, or
that all of it was written anew, shows by the digest of the last line alone: it is printed after
each ceremony, to be written down elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hsmwrap import chain
from hsmwrap.errors import ConfigurationError
from hsmwrap.locks import FILE_LOCK_SECONDS, lock_file

MAX_WORDS = 1000
"""Most characters of the operator's words."""
_START = chain.start("hsmwrap transcript")
_LONGEST = 100_000


@dataclass(frozen=True, slots=True)
class Verified:
    """What :func:`verify` found.

    Attributes:
        lines: How many lines there are.
        digest: That of the last line.
        problems: What is wrong, with the number of the line.
        noted: Number of the line whose digest was given; 0: none.
    """

    lines: int
    digest: str
    problems: tuple[str, ...]
    noted: int = 0


def append(path: Path, now: datetime, content: Mapping[str, Any]) -> str:
    """Write one line to a transcript, which is made if it does not exist.

    Args:
        path: The file.
        now: The current time.
        content: What JSON has; no secret.

    Returns:
        The digest of the line, 64 hexadecimal digits.

    Raises:
        ConfigurationError: It cannot be written, or is not a whole transcript.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            lock_file(file, FILE_LOCK_SECONDS)
            last, _, problems, _ = _read(path)
            if problems:
                raise ConfigurationError(
                    f"transcript {path}: {problems[0]}; keep it, and begin a new one"
                )
            line = chain.write({"time": now.isoformat(timespec="seconds"), **content}, last)
            chain.add(file, line, os.fstat(file).st_size, sync=True)
        finally:
            os.close(file)
    except OSError as error:
        raise ConfigurationError(f"transcript {path}: {error.strerror}") from None
    return chain.read(line)[0].digest


def verify(path: Path, digest: str | None = None) -> Verified:
    """Check a transcript.

    Args:
        path: The file.
        digest: That of one of its lines, as it was written down elsewhere after a ceremony; None:
            not known. Lines that were cut off after that one do not show.

    Raises:
        ConfigurationError: It cannot be read.
    """
    try:
        last, lines, problems, noted = _read(path, digest)
    except OSError as error:
        raise ConfigurationError(f"transcript {path}: {error.strerror}") from None
    if digest is not None and not noted:
        problems = (*problems, "no line has the digest given: lines are missing at the end")
    return Verified(lines, last.digest, problems, noted)


def _read(path: Path, digest: str | None = None) -> tuple[chain.Link, int, tuple[str, ...], int]:
    """The last line, how many there are, what is wrong, and the number of the line sought."""
    last, number, problems, noted = _START, 0, list[str](), 0
    with path.open("rb") as file:
        for number, line in enumerate(chain.lines(file, _LONGEST), start=1):
            try:
                link, content = chain.read(line)
            except ValueError:
                problems.append(f"line {number}: is not a line of a transcript")
                continue
            problems += (f"line {number}: {fault}" for fault in chain.faults(link, content, last))
            last = link
            noted = number if link.digest == digest else noted
    return last, number, tuple(problems), noted
