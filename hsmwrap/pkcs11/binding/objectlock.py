"""Keeps threads that read token objects apart from one that writes some. For SoftHSM.

There, any call that touches a token object first looks whether its file or the list of files has
changed, and reads them anew if so: also what another thread of the same process is in the middle of
writing, as locks on files do not hold between threads (and a thread that closes a file gives up the
lock of the thread that writes it, for other processes). A few in a thousand new token objects then
got a second handle in the process that made them, or were never seen there again until C_Finalize,
or could not be made (field note 41). With one writer alone, its objects are whole before another
thread reads them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from hsmwrap.locks import ReadWriteLock

WAIT = 30.0
"""Seconds that a thread waits for others to be done with token objects."""


class ObjectLock(Protocol):
    """What an operation holds while it uses an HSM token's objects."""

    def read(self) -> AbstractContextManager[None]:
        """For the length of an operation."""

    def write(self) -> AbstractContextManager[None]:
        """While it creates or destroys token objects."""

    def yielded(self) -> AbstractContextManager[None]:
        """While it makes a long call that touches no token object."""


class NoObjectLock:
    """Null object for modules that keep threads apart themselves: nothing is held."""

    def read(self) -> AbstractContextManager[None]:
        """Hold nothing."""
        return nullcontext()

    write = yielded = read


NO_LOCK = NoObjectLock()


def softhsm_object_lock() -> ReadWriteLock:
    """The lock for the objects of one SoftHSM module in this process."""
    return ReadWriteLock(busy="other threads are busy with the HSM token's objects", timeout=WAIT)
