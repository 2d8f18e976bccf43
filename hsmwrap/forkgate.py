"""A gate that keeps ``fork()`` out of calls into a library with locks of its own.

A child of a process with threads inherits every lock as it was, also those that other threads
held at that moment inside libcrypto, and nobody will release them.
Without the gate about one child in 240 hung in its first key generation, with it none (field note
37). It covers the calls that pass it, not those of other users of the same library.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ForkGate:
    """Calls pass together; a fork waits until none is under way, and holds new ones back.

    Calls may be nested in one thread: only the outermost counts. A signal handler may fork in the
    middle of a call: Python runs it between two calls into the library, when this thread holds
    none of the library's locks, so a fork waits for other threads alone.
    """

    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(
            before=self._before, after_in_parent=self._after, after_in_child=self._reset
        )

    @contextmanager
    def passing(self) -> Iterator[None]:
        """For the duration of one call."""
        me = threading.get_ident()
        if me in self._inside:
            yield
            return
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._forking)
                self._inside.add(me)
            yield
        finally:
            with self._changed:
                self._inside.discard(me)
                self._changed.notify_all()

    def _reset(self) -> None:
        """A child starts afresh: of the parent's threads it has none but the one that forked."""
        # Reentrant: a signal handler may find its own thread holding it.
        self._changed = threading.Condition(threading.RLock())
        self._inside: set[int] = set()
        self._forking: set[int] = set()

    def _before(self) -> None:
        # The lock stays held over the fork, so that nobody comes in before it.
        self._changed.acquire()
        self._forking.add(threading.get_ident())
        # Two threads that both fork inside a call would else wait for each other.
        self._changed.wait_for(lambda: self._inside <= self._forking)

    def _after(self) -> None:
        self._forking.discard(threading.get_ident())
        self._changed.notify_all()
        self._changed.release()


LIBCRYPTO = ForkGate()
"""The gate of this process for calls into libcrypto, the distribution's and pyca's own."""
