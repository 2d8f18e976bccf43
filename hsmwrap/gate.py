"""A gate in front of a backend: counts the calls inside, and closes when they have left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hsmwrap.errors import BackendClosed
from hsmwrap.locks import ReadWriteLock


class Gate:
    """Lets calls in until it is closed; closing waits for those inside.

    Safe from any thread, and in a child after ``fork()``, which starts with no call inside.
    """

    def __init__(self, what: str = "backend") -> None:
        """Open the gate; ``what`` names in errors the thing that it guards."""
        self._what = what
        self._closed = False
        self._calls = ReadWriteLock()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Gate {self._what} {state} in_flight={self.in_flight}>"

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called; calls may still be inside."""
        return self._closed

    @property
    def in_flight(self) -> int:
        """The number of calls inside."""
        return self._calls.reads

    def require_open(self) -> None:
        """Return if calls are let in.

        Raises:
            BackendClosed: The gate is closed.
        """
        if self._closed:
            raise BackendClosed(f"this {self._what} was closed: open a new one")

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Be inside for the length of a ``with`` block.

        Raises:
            BackendClosed: The gate is closed.
        """
        self.require_open()
        with self._calls.read():
            self.require_open()  # it may have been closed between the two lines above
            yield

    def close(self, timeout: float | None = None) -> bool:
        """Let no call in any more and wait for those inside; must not be called from inside.

        Args:
            timeout: Seconds to wait; None waits for as long as it takes.

        Returns:
            True when nothing is inside any more. Calling again waits again.
        """
        self._closed = True
        left = self._calls.acquire_write(timeout)
        self._calls.release_write()
        return left
