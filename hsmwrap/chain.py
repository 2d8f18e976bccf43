"""Lines of JSON, each chained to the line before: for logs in which a change must show.

A line is a JSON object in one canonical form: no spaces, ASCII only, members in the order in which
they were written. Its first member is ``sequence``, a number that grows by one; its last is
``digest``, over the line before's digest and the rest of this line: SHA-256, or HMAC-SHA-256 if
there is a key. Changing, removing, inserting or reordering lines breaks the chain. It does not show
that the end was cut off: keep the last line's :class:`Link` elsewhere. Without a key everyone can
write a new chain.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, BinaryIO

BEGIN = b'{"sequence":'
"""How each line begins."""

_MAX_SEQUENCE = 2**53
_AFTER_DIGEST = len('"}\n')
_DIGEST = re.compile("[0-9a-f]{64}")
_ENCODER = json.JSONEncoder(separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Link:
    """A line of a chain, without its content.

    Attributes:
        sequence: Its number, from 1; 0 is the start of the chain.
        digest: Its digest, in hex.
        position: Byte offset of the line in its file, or of any line before it.
        set_at: Where it is kept elsewhere: aware time when it was known to be the last line.
    """

    sequence: int
    digest: str
    position: int = field(default=0, compare=False)
    set_at: datetime | None = field(default=None, compare=False)


def start(name: str) -> Link:
    """What the first line of a chain is chained to; the name keeps kinds of chains apart."""
    return Link(0, hashlib.sha256(name.encode()).hexdigest())


def write(content: Mapping[str, Any], last: Link, key: bytes | None = None) -> bytes:
    """The line, with its end, that has this content and follows ``last``.

    Args:
        content: Its members, without ``sequence`` and ``digest``; serialisable as JSON.
        last: The line before, or the :func:`start`.
        key: HMAC key of the chain; None: SHA-256.
    """
    numbered = {"sequence": last.sequence + 1, **content}
    text = _json(numbered)
    return text[:-1] + b',"digest":"' + _digest(text, last.digest, key).encode() + b'"}\n'


def add(file: int, lines: bytes, size: int, *, sync: bool) -> None:
    """Write lines to the end of an open file, all of them or none; the caller has locked it.

    Args:
        file: Open for appending.
        lines: What :func:`write` made.
        size: The file's size.
        sync: True flushes them to the disk.

    Raises:
        OSError: They could not be written, and were taken back.
    """
    whole = False
    try:
        if os.write(file, lines) == len(lines):
            if sync:
                os.fdatasync(file)
            whole = True
    finally:
        if not whole:
            os.ftruncate(file, size)
    if not whole:
        raise OSError(errno.EIO, "a line was written only in part; is the disk full?")


def link_of(line: bytes, last: Link, position: int = 0) -> Link:
    """The link of a line that :func:`write` made to follow ``last``."""
    digest = line[-_AFTER_DIGEST - 64 : -_AFTER_DIGEST].decode("ascii")
    return Link(last.sequence + 1, digest, position)


def read(line: bytes) -> tuple[Link, dict[str, Any]]:
    """Parse one line with its end; the content has ``sequence``, and no ``digest``.

    Raises:
        ValueError: It is not a line of a chain, or not in its canonical form.
    """
    try:
        content = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict) or _json(content) + b"\n" != line:
        raise ValueError("not in canonical form")
    digest, sequence = content.pop("digest", None), content.get("sequence")
    # type: true counts as an int. The limit: the number has to fit into a database.
    if type(sequence) is not int or not 0 < sequence < _MAX_SEQUENCE:
        raise ValueError("not numbered")
    if not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
        raise ValueError("not chained")
    return Link(sequence, digest), content


def faults(
    link: Link, content: Mapping[str, Any], last: Link, key: bytes | None = None
) -> Iterator[str]:
    """What is wrong with a line that :func:`read` parsed, where ``last`` is before it."""
    if link.sequence != last.sequence + 1:
        yield f"has number {link.sequence} after {last.sequence}: lines are missing or reordered"
    if not hmac.compare_digest(link.digest, _digest(_json(content), last.digest, key)):
        yield "does not chain to the line before: a line was changed, removed or reordered"


def lines(file: BinaryIO, longest: int) -> Iterator[bytes]:
    """Each line of a file; of one that is longer than ``longest`` bytes, only the beginning."""
    while line := file.readline(longest):
        yield line
        while len(line) == longest and not line.endswith(b"\n"):
            line = file.readline(longest)


def _digest(text: bytes, last: str, key: bytes | None) -> str:
    message = last.encode("ascii", "replace") + b"\n" + text
    return (hmac.digest(key, message, "sha256") if key else hashlib.sha256(message).digest()).hex()


def _json(content: Mapping[str, Any]) -> bytes:
    return _ENCODER.encode(content).encode("ascii")
