"""Secrets that are made to be found again: in any spelling, in files, and in a process's memory."""

import base64
import json
import os
import signal
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest

NO_MEMORY = "capability: the memory of a child process cannot be read here"
_UNTOUCHED = bytes(1 << 16)


@dataclass(frozen=True)
class Canary:
    """A secret value and every spelling that it is looked for in, by name of the spelling.

    Of each spelling both halves are looked for on their own: an allocator overwrites the beginning
    of what was freed, and a line may be broken or cut.
    """

    name: str
    value: bytes = field(repr=False)

    def __post_init__(self):
        assert len(self.value) >= 16, "too short: its halves would be found by chance"

    def patterns(self):
        """Yields the name of a spelling and the bytes to look for."""
        # Most spellings of text are the same.
        for text, spelling in {text: spelling for spelling, text in self._spellings()}.items():
            middle = len(text) // 2
            yield spelling, text[:middle]
            yield spelling, text[middle:]

    def _spellings(self):
        value = self.value
        yield "raw", value
        yield "hex", value.hex().encode()
        yield "HEX", value.hex().upper().encode()
        for before in range(3):  # within a longer text it may begin at any of three places
            encoded = base64.b64encode(bytes(before) + value)
            # Only characters that do not depend on what stands before or after.
            own = encoded[-(-8 * before // 6) : 8 * (before + len(value)) // 6]
            yield f"base64 {before}", own
            yield f"base64url {before}", own.translate(bytes.maketrans(b"+/", b"-_"))
            yield f"base64 {before} in a URL", quote(own, safe="").encode()
        escaped = quote(value).encode()
        yield "URL", escaped
        yield "url", escaped.lower()
        yield "repr", repr(value)[2:-1].encode()
        text = value.decode("latin-1")
        yield "JSON", json.dumps(text)[1:-1].encode()
        for encoding in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le"):  # as Python keeps text
            yield encoding, text.encode(encoding)


@dataclass
class Search:
    """Where canaries were found: (canary, spelling, place)."""

    canaries: list
    found: set = field(default_factory=set)

    def bytes(self, data, place):
        for canary in self.canaries:
            for spelling, pattern in canary.patterns():
                if pattern in data:
                    self.found.add((canary.name, spelling, place))

    def file(self, path):
        self.bytes(path.read_bytes(), path.name)

    def memory(self, pid, place):
        """Everything that a core dump of the process has; it stands still meanwhile."""
        with stopped(pid):
            for data in memory_of(pid):
                self.bytes(data, place)

    def names(self):
        return {name for name, _, _ in self.found}


@contextmanager
def stopped(pid):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def memory_of(pid):
    """Yields what is in each writable mapping: heaps, stacks, data of libraries."""
    try:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    except PermissionError:
        pytest.skip(NO_MEMORY)
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        limits, flags, *_ = line.split()
        start, end = (int(limit, 16) for limit in limits.split("-"))
        if flags.startswith("rw"):
            yield _mapping(memory, start, end)
    os.close(memory)


def _mapping(memory, start, end):
    data = bytearray()
    with suppress(OSError):  # a guard page, or a device
        while piece := os.pread(memory, min(len(_UNTOUCHED), end - start), start):
            start += len(piece)
            if piece != _UNTOUCHED:
                data += piece
    return data
