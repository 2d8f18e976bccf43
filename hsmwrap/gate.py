"""A gate in front of a backend: counts the calls inside, and closes when they have left."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from hsmwrap.errors import BackendClosed


class Gate:
    """Lets calls in until it is closed; closing waits for those inside.

    Safe from any thread, and in a child after ``fork()``: there only the forking thread lives
    on, so the child starts with no call inside and a lock that nobody holds.
    """

    def __init__(self, what: str = "backend") -> None:
        """Open the gate; ``what`` names in errors the thing that it guards."""
        self._what = what
        self._closed = False
        self._reset()
        _GATES.add(self)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Gate {self._what} {state} in_flight={self._in_flight}>"

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called; calls may still be inside."""
        return self._closed

    @property
    def in_flight(self) -> int:
        """The number of calls inside."""
        return self._in_flight

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
        changed = self._changed
        with changed:
            self.require_open()
            self._in_flight += 1
        try:
            yield
        finally:
            self._leave(changed)

    def close(self, timeout: float | None = None) -> bool:
        """Let no call in any more and wait for those inside; must not be called from inside.

        Args:
            timeout: Seconds to wait; None waits for as long as it takes.

        Returns:
            True when nothing is inside any more. Calling again waits again.
        """
        with self._changed:
            self._closed = True
            return self._changed.wait_for(lambda: not self._in_flight, timeout)

    def _leave(self, entered: threading.Condition) -> None:
        # A call that forked leaves in the child too, where nobody counts it any more.
        if entered is not self._changed:
            return
        with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._in_flight = 0


_GATES: WeakSet[Gate] = WeakSet()


def _reset_in_child() -> None:
    # In the child before any other code: another thread may have held a lock when we forked.
    for gate in _GATES:
        gate._reset()  # noqa: SLF001  # the hook is part of the class, but must not keep it alive


os.register_at_fork(after_in_child=_reset_in_child)
