"""Keeps threads that look at token objects out of the way of one that writes some.

For SoftHSM. There, any call that touches a token object first looks whether its file or the list of
files has changed, and reads them anew if so: also what another thread of the same process is in the
middle of writing, as locks on files do not hold between threads (and a thread that closes a file
gives up the lock of the thread that writes it, for other processes). A few in a thousand new token
objects then got a second handle in the process that made them, or were never seen there again until
C_Finalize, or could not be made (field note 41). Alone, a writer's objects are whole before anybody
looks.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hsmwrap.errors import PoolTimeout


class ObjectLock:
    """Many threads that look, or one that writes; first come, first served.

    A thread that looks may write for a while, and step aside for calls that touch no token object.
    """

    def __init__(self, timeout: float) -> None:
        """Wait for at most ``timeout`` seconds at a time."""
        self._timeout = timeout
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._looking: set[int] = set()
        self._writing: int | None = None

    @contextmanager
    def looking(self) -> Iterator[None]:
        """For the length of an operation.

        Raises:
            PoolTimeout: Others wrote for too long.
        """
        me = threading.get_ident()
        self._look(me)
        try:
            yield
        finally:
            self._leave(me)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While token objects are created or destroyed; may be nested.

        Raises:
            PoolTimeout: Others looked or wrote for too long.
        """
        me = threading.get_ident()
        if self._writing == me:
            yield
            return
        looked = self._leave(me)
        with self._changed:
            self._wait(lambda: self._writing is None and not self._looking)
            self._writing = me
        try:
            yield
        finally:
            with self._changed:
                self._writing = None
                if looked:
                    self._looking.add(me)
                self._changed.notify_all()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While a thread that looks makes a long call that touches no token object.

        Raises:
            PoolTimeout: Others wrote for too long; not where ``with`` begins, but where it ends.
        """
        me = threading.get_ident()
        looked = self._leave(me)
        try:
            yield
        finally:
            if looked:
                self._look(me)

    def _look(self, me: int) -> None:
        with self._changed:
            if self._queue or self._writing is not None:
                self._wait(lambda: self._writing is None)
            self._looking.add(me)

    def _leave(self, me: int) -> bool:
        with self._changed:
            looked = me in self._looking
            self._looking.discard(me)
            if self._queue:
                self._changed.notify_all()
            return looked

    def _wait(self, free: Callable[[], bool]) -> None:
        place = object()
        self._queue.append(place)
        try:
            if not self._changed.wait_for(
                lambda: self._queue[0] is place and free(), self._timeout
            ):
                raise PoolTimeout("other threads are busy with the HSM token's objects")
        finally:
            self._queue.remove(place)
            self._changed.notify_all()


class _NoLock(ObjectLock):
    def __init__(self) -> None:
        """Wait for nobody."""
        super().__init__(0.0)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """At once."""
        yield

    @contextmanager
    def writing(self) -> Iterator[None]:
        """At once."""
        yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """At once."""
        yield


NO_LOCK = _NoLock()
"""For modules that look after themselves."""
