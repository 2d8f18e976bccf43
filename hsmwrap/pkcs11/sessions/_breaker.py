"""A circuit breaker in front of a lost HSM: fail fast, and try again after a backoff."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from hsmwrap.errors import HsmUnavailable


@dataclass(frozen=True, slots=True)
class Pass:
    """What a call was let through with.

    Attributes:
        turn: How often the breaker had opened or closed by then. Of calls from before its last
            turn the breaker learns nothing: one outage ends many calls, and counts once.
        trial: Whether this is the one call that finds out whether the HSM is back.
    """

    turn: int
    trial: bool = False


class Breaker:
    """Closed (calls pass), open (calls fail fast), half-open (one trial call passes).

    Each failed trial call doubles the time until the next, up to ``max_backoff`` seconds.
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
        self._reason = ""
        self._open_until: float | None = None
        self._trial_under_way = False
        self.reset()

    @property
    def state(self) -> str:
        """``closed``, ``open`` or ``half-open``."""
        if self._open_until is None:
            return "closed"
        return "half-open" if self._trial_under_way or self._clock() >= self._open_until else "open"

    @property
    def reason(self) -> str:
        """Why it opened last."""
        return self._reason

    @property
    def wait(self) -> float:
        """Seconds until a trial call may pass; 0 where one may now, or none is needed."""
        until = self._open_until
        return 0.0 if until is None else max(0.0, until - self._clock())

    def check(self) -> Pass:
        """Let a call pass, as the trial call if it is time for one.

        Raises:
            HsmUnavailable: The breaker is open, or another call is the trial call.
        """
        with self._lock:
            if self._open_until is None:
                return Pass(self._turn)
            if self.wait or self._trial_under_way:
                raise HsmUnavailable(
                    f"the HSM is unavailable ({self._reason}); next try in {self.wait:.1f} s"
                )
            self._trial_under_way = True
            return Pass(self._turn, trial=True)

    def is_current(self, held: Pass) -> bool:
        """Whether the breaker is still as it was when this call was let through."""
        return held.turn == self._turn

    def succeeded(self, held: Pass) -> None:
        """A call went through: close."""
        if self._open_until is None:
            return
        with self._lock:
            if self.is_current(held):
                self._turn += 1
                self._open_until = None
                self._trial_under_way = False
                self._backoff = self._initial

    def failed(self, held: Pass, reason: str) -> None:
        """The HSM did not come back: open, for longer each time."""
        with self._lock:
            if self.is_current(held):
                self._turn += 1
                self._reason = reason
                self._open_until = self._clock() + self._backoff
                self._trial_under_way = False
                self._backoff = min(self._backoff * 2, self._max)

    def undecided(self, held: Pass) -> None:
        """A call ended and told nothing of the HSM: if it was the trial call, another may be."""
        if held.trial:
            with self._lock:
                if self.is_current(held):
                    self._trial_under_way = False

    def reset(self) -> None:
        """Close, with a lock that is free: at the start, and in a forked child."""
        self._lock = threading.Lock()
        self._turn = 0
        self._backoff = self._initial
        self._open_until = None
        self._trial_under_way = False
