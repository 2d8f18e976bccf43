"""A circuit breaker in front of a lost HSM: fail fast, probe with backoff, come back by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from hsmwrap.errors import HsmUnavailable


class Breaker:
    """Closed (calls pass), open (calls fail fast), half-open (one call probes).

    Each failed probe doubles the time until the next, up to ``max_backoff`` seconds.
    """

    def __init__(
        self,
        initial_backoff: float,
        max_backoff: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start closed; times are in seconds, ``clock`` is monotonic."""
        self._initial = initial_backoff
        self._max = max_backoff
        self._clock = clock
        self._backoff = initial_backoff
        self._open_until: float | None = None
        self._probing = False
        self._reason = ""
        self.reset_lock()

    @property
    def state(self) -> str:
        """``closed``, ``open`` or ``half-open``."""
        if self._open_until is None:
            return "closed"
        return "half-open" if self._probing or self._clock() >= self._open_until else "open"

    def check(self) -> None:
        """Let the call pass, as the probe if it is time for one.

        Raises:
            HsmUnavailable: The breaker is open, or another call is probing.
        """
        with self._lock:
            if self._open_until is None:
                return
            wait = self._open_until - self._clock()
            if wait > 0 or self._probing:
                raise HsmUnavailable(
                    f"the HSM is away ({self._reason}); next try in {max(wait, 0):.1f} s"
                )
            self._probing = True

    def succeeded(self) -> None:
        """A call went through: close."""
        if self._open_until is None:
            return
        with self._lock:
            self._open_until = None
            self._probing = False
            self._backoff = self._initial

    def failed(self, reason: str) -> None:
        """The HSM did not come back: open, for longer each time."""
        with self._lock:
            self._reason = reason
            self._open_until = self._clock() + self._backoff
            self._probing = False
            self._backoff = min(self._backoff * 2, self._max)

    def probe_undecided(self) -> None:
        """The probing call ended without touching the HSM: let another one probe."""
        with self._lock:
            self._probing = False

    def reset_lock(self) -> None:
        """Make the lock anew, in a forked child."""
        self._lock = threading.Lock()
