"""A bounded pool of PKCS#11 sessions.

State changes under one lock, by the small steps of :class:`PoolState`; PKCS#11 calls are made
outside it. A session that saw any error is closed, never put back (a dead session in the pool is
what users of other pools complain about), and closing takes its session objects along.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pkcs11.exceptions import PKCS11Error, SessionCount
from pkcs11.types import Session, Token

from hsmwrap.errors import HsmResourceExhausted, PoolTimeout


class StalePool(Exception):
    """The pool was closed while somebody waited: its generation is over, take the next one's."""


@dataclass(slots=True)
class PooledSession:
    """A worker session with what was found through it.

    Attributes:
        session: python-pkcs11's session, opened without PIN.
        objects: Objects by label, bound to this session (python-pkcs11 runs an operation on the
            session that an object was found with).
        tainted: Set after any error; the session is then closed instead of pooled.
    """

    session: Session
    objects: dict[str, Any] = field(default_factory=dict)
    tainted: bool = False


class PoolState:
    """The arithmetic of the pool: idle sessions, how many exist, how many there may be."""

    def __init__(self, size: int) -> None:
        """Start empty, with room for ``size`` sessions."""
        self.closed = False
        self.cap = size
        self.total = 0
        self.waiting = 0
        self.idle: list[PooledSession] = []

    @property
    def in_use(self) -> int:
        """Sessions out on loan or being opened."""
        return self.total - len(self.idle)

    @property
    def available(self) -> bool:
        """Whether :meth:`take` can give something now."""
        return not self.closed and (bool(self.idle) or self.total < self.cap)

    def take(self) -> PooledSession | None:
        """Take an idle session, or room to open one (None); check :attr:`available` first."""
        if self.idle:
            return self.idle.pop()
        self.total += 1
        return None

    def give_back(self, session: PooledSession) -> bool:
        """Put a session back; False if it has to be closed, which frees its room."""
        if session.tainted or self.closed or self.total > self.cap:
            self.total -= 1
            return False
        self.idle.append(session)
        return True

    def failed_to_open(self, *, lower_cap: bool) -> None:
        """Give up room; where the HSM has no more sessions, keep to those that there are."""
        self.total -= 1
        if lower_cap and self.total:
            self.cap = self.total


class SessionPool:
    """Worker sessions of one HSM token, for one generation of the module."""

    def __init__(self, open_session: Callable[[], Session], size: int) -> None:
        """Take the function that opens a session, and the most sessions there may be."""
        self._open = open_session
        self._state = PoolState(size)
        self._changed = threading.Condition()

    def __repr__(self) -> str:
        s = self._state
        return f"<SessionPool in_use={s.in_use} idle={len(s.idle)} waiting={s.waiting} cap={s.cap}>"

    def facts(self) -> dict[str, int]:
        """Numbers for metrics."""
        s = self._state
        return {
            "sessions_in_use": s.in_use,
            "sessions_idle": len(s.idle),
            "sessions_waiting": s.waiting,
            "sessions_cap": s.cap,
        }

    def acquire(self, deadline: float) -> PooledSession:
        """Return a session that nobody else has, by ``deadline`` (``time.monotonic()``).

        Raises:
            PoolTimeout: None became free in time.
            HsmResourceExhausted: The HSM token has no session for us at all.
            PKCS11Error: Opening one failed otherwise.
        """
        while True:
            pooled = self._take(deadline)
            if pooled is not None:
                return pooled
            try:
                return PooledSession(self._open())
            except SessionCount:
                self._failed_to_open(lower_cap=True)
                if not self._state.total:
                    raise HsmResourceExhausted("the HSM token has no free session") from None
            except BaseException:
                self._failed_to_open(lower_cap=False)
                raise

    def release(self, session: PooledSession) -> None:
        """Put a session back, or close it if it is tainted."""
        with self._changed:
            kept = self._state.give_back(session)
            self._changed.notify()
        if not kept:
            close_quietly(session.session)

    def close(self) -> None:
        """Close the idle sessions and open no more; those on loan are closed as they come back."""
        for pooled in self._stop():
            close_quietly(pooled.session)

    def abandon(self) -> None:
        """Forget all sessions without closing them: the module that knew them was restarted.

        Their handles may be other sessions' by now. Nobody may hold one (the module is only
        restarted when no call is in flight).
        """
        self._stop()

    def _stop(self) -> list[PooledSession]:
        with self._changed:
            idle, self._state.idle = self._state.idle, []
            self._state.total -= len(idle)
            self._state.closed = True
            self._changed.notify_all()
        return idle

    def _take(self, deadline: float) -> PooledSession | None:
        with self._changed:
            self._state.waiting += 1
            try:
                left = max(0.0, deadline - time.monotonic())
                self._changed.wait_for(lambda: self._state.available or self._state.closed, left)
                if self._state.closed:
                    raise StalePool
                if not self._state.available:
                    raise PoolTimeout(
                        f"no HSM session became free in time ({self._state.cap} in use); "
                        "raise 'sessions' or lower the load"
                    )
                return self._state.take()
            finally:
                self._state.waiting -= 1

    def _failed_to_open(self, *, lower_cap: bool) -> None:
        with self._changed:
            self._state.failed_to_open(lower_cap=lower_cap)
            self._changed.notify()


def open_worker_session(token: Token, attribute_mapper: Any) -> Session:
    """Open a read-write session without PIN: the login of another session covers it."""
    return token.open(rw=True, attribute_mapper=attribute_mapper)


def close_quietly(session: Session) -> None:
    """Close a session whose HSM may be gone; there is nothing more to do about it then."""
    with contextlib.suppress(PKCS11Error):
        session.close()
