"""Keeps the number of a file that opencryptoki closes again and again (field note 106).

It opens its lock file once in a process, and at each C_Finalize closes the number that the file had
then. From the second C_Finalize on that would be another file of the process: a client's
connection, the database's.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK_FILE = "LCK..APIlock"
_OPEN_FILES = Path("/proc/self/fd")

_log = logging.getLogger(__name__)


@contextmanager
def kept() -> Iterator[None]:
    """Around C_Finalize: a lock file that it closes is open again afterwards, at the same number.

    So the module has its lock, and what it closes next time is this file. Another thread that opens
    a file in the same moment may get the number first; then a warning is logged.
    """
    spare = {number: fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 0) for number in _lock_files()}
    try:
        yield
    finally:
        for number, copy in spare.items():
            _open_again(number, copy)
            os.close(copy)


def _open_again(number: int, copy: int) -> None:
    if number in _lock_files():
        return
    got = fcntl.fcntl(copy, fcntl.F_DUPFD_CLOEXEC, number)  # the lowest free one from there on
    if got != number:
        os.close(got)
        _log.warning(
            "the next C_Finalize of this module closes a file that is not its own; restart the "
            "process soon",
            extra={"file_number": number},
        )


def _lock_files() -> frozenset[int]:
    found = set()
    with suppress(FileNotFoundError):  # no /proc
        for each in _OPEN_FILES.iterdir():
            with suppress(OSError):  # closed since; that of the directory itself
                if each.readlink().name.removesuffix(" (deleted)") == LOCK_FILE:
                    found.add(int(each.name))
    return frozenset(found)
