"""A gate in front of a backend: counts the calls inside, and closes when they have left."""

from __future__ import annotations

from typing import Self

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

    def enter(self) -> Self:
        """Be inside for the length of a ``with`` block.

        Raises:
            BackendClosed: The gate is closed; where ``with`` begins.
        """
        return self

    def __enter__(self) -> Self:
        self.require_open()
        self._calls.acquire_read()
        if self._closed:  # between the two lines above
            self._calls.release_read()
            self.require_open()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._calls.release_read()

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
