"""A bounded pool of PKCS#11 sessions.

State changes under one lock, by the small steps of :class:`PoolState`; PKCS#11 calls are made
outside it. A session that saw any error is closed, never put back (a dead session in the pool is
what users of other pools complain about), and closing takes its session objects along. The one
exception is an error of the client's: it says nothing of the session.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from pkcs11.exceptions import PKCS11Error, SessionCount
from pkcs11.types import Session

from hsmwrap.errors import HsmResourceExhausted, PoolTimeout
from hsmwrap.pkcs11.binding.objectlock import ObjectLock
from hsmwrap.pkcs11.binding.returncodes import HsmLost, Remedy, recovery_of, said
from hsmwrap.pkcs11.sessions.handles import KnownHandles
from hsmwrap.pkcs11.sessions.session import HandleEpoch, PooledSession, close_quietly

CAP_LIFETIME = 2.0
"""Seconds until the HSM, which had no more sessions, is asked again whether it has."""


_log = logging.getLogger(__name__)


class StalePool(Exception):
    """The pool was closed while this thread waited: take that of the next generation."""


class Ticket:
    """A place in the queue for a session."""

    __slots__ = ("called", "session", "stale")

    def __init__(self) -> None:
        self.called = threading.Event()
        self.session: PooledSession | None = None
        self.stale = False


class PoolState:
    """The arithmetic of the pool: idle sessions, how many exist, which calls wait in which order.

    What is given is an idle session, or room to open one (None).
    """

    def __init__(self, size: int) -> None:
        """Start empty, with room for ``size`` sessions."""
        self.closed = False
        self.size = self.cap = size
        self.total = 0
        self.idle: list[PooledSession] = []
        self.queue: deque[Ticket] = deque()

    @property
    def in_use(self) -> int:
        """Sessions out on loan or being opened."""
        return self.total - len(self.idle)

    @property
    def available(self) -> bool:
        """Whether there is something to give."""
        return bool(self.idle) or self.total < self.cap

    def take(self) -> PooledSession | None:
        """Take an idle session, or room to open one; check :attr:`available` first."""
        if self.idle:
            return self.idle.pop()
        self.total += 1
        return None

    def serve(self) -> None:
        """Serve the calls whose turn it is.

        First come, first served: a busy thread that gives its session back and asks again must
        not overtake one that waits.
        """
        while self.queue and self.available:
            ticket = self.queue.popleft()
            ticket.session = self.take()
            ticket.called.set()

    def give_back(self, session: PooledSession) -> bool:
        """Put a session back; False if it has to be closed, which frees its room."""
        keep = not (session.tainted or self.closed or self.total > self.cap)
        if keep:
            self.idle.append(session)
        else:
            self.total -= 1
        return keep

    def failed_to_open(self, *, lower_cap: bool) -> None:
        """Give up room; where the HSM has no more sessions, keep to those that there are."""
        self.total -= 1
        if lower_cap and self.total:
            self.cap = self.total

    def restore_cap(self) -> None:
        """Allow as many sessions again as were asked for."""
        self.cap = self.size
        self.serve()

    def close(self) -> list[PooledSession]:
        """Give nothing any more; returns the idle sessions."""
        self.closed = True
        for ticket in self.queue:
            ticket.stale = True
            ticket.called.set()
        self.queue.clear()
        return self.take_idle()

    def take_idle(
        self, which: Callable[[PooledSession], bool] = lambda _session: True
    ) -> list[PooledSession]:
        """Take idle sessions out of the pool, to be closed."""
        taken = [each for each in self.idle if which(each)]
        self.idle = [each for each in self.idle if not which(each)]
        self.total -= len(taken)
        return taken


class SessionPool:
    """Worker sessions of one HSM token, for one generation of the module."""

    def __init__(
        self,
        open_session: Callable[[], Session],
        is_logged_in: Callable[[Session], bool],
        lock: ObjectLock,
        epoch: HandleEpoch,
        size: int,
    ) -> None:
        """Take what makes a :class:`PooledSession`, and the most sessions there may be."""
        self._open = open_session
        self._is_logged_in = is_logged_in
        self._object_lock = lock
        self._epoch = epoch
        self._handles = KnownHandles()
        self._state = PoolState(size)
        self._cap_ends = 0.0
        self._unclosed: list[Session] = []
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        s = self._state
        return (
            f"<SessionPool in_use={s.in_use} idle={len(s.idle)} waiting={len(s.queue)} cap={s.cap}>"
        )

    def facts(self) -> dict[str, int]:
        """Numbers for metrics."""
        s = self._state
        return {
            "sessions_in_use": s.in_use,
            "sessions_idle": len(s.idle),
            "sessions_waiting": len(s.queue),
            "sessions_cap": s.cap,
        }

    def acquire(self, deadline: float) -> PooledSession:
        """Return a session for this thread alone, by ``deadline`` (``time.monotonic()``).

        Raises:
            PoolTimeout: None became free in time.
            HsmResourceExhausted: The HSM token has no session for us at all.
            HsmLost: It opens none, with a code that may mean anything.
            PKCS11Error: Opening one failed otherwise.
        """
        while True:
            pooled = self._take(deadline)
            self._close_unclosed()
            if pooled is not None:
                return pooled
            try:
                return PooledSession(
                    *(self._open(), self._is_logged_in, self._object_lock, self._epoch),
                    self._handles,
                )
            except PKCS11Error as error:
                enough = _may_be_too_many(error)
                self._failed_to_open(lower_cap=enough)
                if enough and self._state.total:
                    _log.warning("no more sessions", extra={"said": said(error), **self.facts()})
                    continue
                if isinstance(error, SessionCount):
                    raise HsmResourceExhausted("the HSM token has no free session") from None
                if recovery_of(error) is None:
                    raise HsmLost(said(error), error) from None
                raise
            except BaseException:
                self._failed_to_open(lower_cap=False)
                raise

    def release(self, session: PooledSession) -> None:
        """Put a session back, or close it if it is tainted."""
        with self._lock:
            kept = self._state.give_back(session)
            self._state.serve()
        if not kept:
            self._discard(session.session)

    def close_idle(self, which: Callable[[PooledSession], bool] = lambda _session: True) -> None:
        """Close idle sessions, and with each its session objects.

        All, where one was dead and others may have died with it.
        """
        with self._lock:
            idle = self._state.take_idle(which)
            self._state.serve()
        for pooled in idle:
            self._discard(pooled.session)

    def close(self) -> None:
        """Close the idle sessions and open no more; those on loan are closed as they come back."""
        for pooled in self._stop():
            self._discard(pooled.session)
        self._close_unclosed()

    def abandon(self) -> None:
        """Forget all sessions without closing them: the module that knew them was restarted.

        Their handles may be other sessions' by now. None may be on loan (the module is only
        restarted when no call is in flight).
        """
        self._stop()

    def _stop(self) -> list[PooledSession]:
        with self._lock:
            return self._state.close()

    def _take(self, deadline: float) -> PooledSession | None:
        with self._lock:
            if self._state.closed:
                raise StalePool
            if self._state.cap < self._state.size and time.monotonic() >= self._cap_ends:
                self._state.restore_cap()
            if self._state.available and not self._state.queue:
                return self._state.take()
            ticket = Ticket()
            self._state.queue.append(ticket)
        try:
            called = ticket.called.wait(max(0.0, deadline - time.monotonic()))
        except BaseException:  # a signal handler's: the place must not be served any more
            self._leave(ticket)
            raise
        if not called:
            self._give_up(ticket)
        if ticket.stale:
            raise StalePool
        return ticket.session

    def _leave(self, ticket: Ticket) -> None:
        """Leave the queue, or give back what was given meanwhile."""
        with self._lock:
            if ticket.stale:
                return
            if not ticket.called.is_set():
                self._state.queue.remove(ticket)
                return
        if ticket.session is None:
            self._failed_to_open(lower_cap=False)
        else:
            self.release(ticket.session)

    def _give_up(self, ticket: Ticket) -> None:
        with self._lock:
            if ticket.called.is_set():
                return  # just in time
            self._state.queue.remove(ticket)
        raise PoolTimeout(
            f"no HSM session became free in time ({self._state.cap} in use); "
            "raise 'sessions' or lower the load"
        )

    def _failed_to_open(self, *, lower_cap: bool) -> None:
        with self._lock:
            self._state.failed_to_open(lower_cap=lower_cap)
            self._cap_ends = time.monotonic() + CAP_LIFETIME
            self._state.serve()

    def _discard(self, session: Session) -> None:
        """Close a session; one that does not close is tried again at the next loan."""
        if not close_quietly(session):
            with self._lock:
                self._unclosed.append(session)

    def _close_unclosed(self) -> None:
        if self._unclosed:
            with self._lock:
                unclosed, self._unclosed = self._unclosed, []
            for session in unclosed:
                self._discard(session)


def _may_be_too_many(error: PKCS11Error) -> bool:
    """Whether C_OpenSession may mean that there are enough sessions.

    SESSION_COUNT says so; HSM tokens say it by no memory, too, and by any code that has no meaning
    there (ARGUMENTS_BAD, a vendor's own).
    """
    recovery = recovery_of(error)
    return recovery is None or recovery.remedy in {Remedy.FEWER_SESSIONS, Remedy.REAP}
