"""The settings of the plug-in."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hsmwrap.errors import ConfigurationError
from hsmwrap.privatefile import PrivateFile, owner_fault
from hsmwrap.settings import (
    NAME,
    REQUIRED,
    SWITCH,
    TEXT,
    Kind,
    Settings,
    integer,
    seconds,
    setting,
    typed,
)
from hsmwrap.sm2 import DEFAULT_LAYOUTS, Layout, check_layouts

HIGHEST_INDEX = 2**31 - 1
MOST_PAIRS = 65536
SHORTEST_PASSWORD = 8
"""Bytes; of the standard."""


def _pool(value: Any) -> tuple[int, ...]:
    chosen: set[int] = set()
    for each in typed(value, list, tuple):
        first, dash, last = str(typed(each, int, str)).partition("-")
        numbers = range(int(first), int(last if dash else first) + 1)
        if not numbers or numbers[0] < 1 or numbers[-1] > HIGHEST_INDEX:
            raise ValueError
        if len(chosen) + len(numbers) > MOST_PAIRS or not chosen.isdisjoint(numbers):
            raise ValueError
        chosen.update(numbers)
    if not chosen:
        raise ValueError
    return tuple(sorted(chosen))


def _layouts(value: Any) -> tuple[Layout, ...]:
    names = [str(typed(each, str)) for each in typed(value, list, tuple)]
    check_layouts(names)
    return tuple(map(Layout, names))


_POOL = Kind('a list of indexes and ranges, as [7, "10-73"], each index once', _pool)
_INDEX = integer(1, HIGHEST_INDEX)


@dataclass(frozen=True, slots=True)
class SdfSettings(Settings):
    """One device (or cluster of devices with the same keys), as one host uses it."""

    component: ClassVar[str] = "sdf backend"

    library: str = setting(TEXT, "The vendor's SDF library.", REQUIRED)
    password_file: str = setting(
        TEXT, "Private file with the password of the private keys that are used.", REQUIRED
    )
    state_directory: str = setting(
        TEXT, "Directory of leases and key sets, on a local disk, mode 0700.", REQUIRED
    )
    pool: tuple[int, ...] = setting(
        _POOL, "Indexes of the SM2 pairs for wrapping keys: of this host alone.", REQUIRED
    )
    storage_index: int = setting(
        _INDEX, "Index of the SM2 pair that seals imported keys.", REQUIRED
    )
    kek_index: int = setting(
        _INDEX, "Index of the SM4 key-encryption key that seals MAC keys.", REQUIRED
    )
    reuse_pairs: bool = setting(
        SWITCH,
        "true: a pair serves again when its import token has expired. false: it serves one import "
        "token, and its index waits for a new pair. See README.md: a choice of the operator.",
        REQUIRED,
    )
    name: str = setting(NAME, "Name in import tokens and key references.", "sdf")
    sessions: int = setting(integer(1, 1024), "Most sessions of one process.", 16)
    session_timeout: float = setting(seconds(), "How long a call waits for a session.", 10.0)
    sm2_layouts: tuple[Layout, ...] = setting(
        Kind(f"a list of {', '.join(Layout)}", _layouts),
        "SM2 ciphertext layouts that clients send.",
        DEFAULT_LAYOUTS,
    )
    trial: str | None = setting(NAME, "Of the conformance kit: key sets of a trial.")

    def key_sets(self) -> Path:
        """The directory of key sets; that of a trial is in the state directory.

        Raises:
            ConfigurationError: As for :meth:`state`.
        """
        return self.state() / f"trial-{self.trial}" if self.trial else self.state()

    def password(self) -> bytes:
        """The password, without the line's end.

        Raises:
            ConfigurationError: The file is not private, or holds less than the standard demands.
        """
        password = PrivateFile(self.password_file, "SDF password file").read_bytes().rstrip(b"\r\n")
        if len(password) < SHORTEST_PASSWORD:
            raise ConfigurationError(
                f"SDF password file {self.password_file}: has fewer than {SHORTEST_PASSWORD} bytes"
            )
        return password

    def state(self) -> Path:
        """The state directory.

        Raises:
            ConfigurationError: It is not there, another user's, or open to others: who writes
                there lets two import tokens have one pair.
        """
        path = Path(self.state_directory)
        try:
            status = path.stat()
        except OSError as error:
            raise ConfigurationError(
                f"state directory {path}: {error.strerror}; make it: mkdir -m 700"
            ) from None
        fault = owner_fault(status)
        if not stat.S_ISDIR(status.st_mode):
            fault = "is not a directory"
        elif not fault and status.st_mode & 0o077:
            fault = f"is open to others (mode {stat.S_IMODE(status.st_mode):04o}): chmod 0700 it"
        if fault:
            raise ConfigurationError(f"state directory {path}: {fault}")
        return path
