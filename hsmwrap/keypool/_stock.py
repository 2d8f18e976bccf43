"""The pairs of one kind of one backend: pure state, without backend calls and without locks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import datetime

from hsmwrap.backend import Backend, Custody, PrivateKeyRef, WrappingKey
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.keypool._settings import PoolSettings

LONGEST_PAUSE = 60.0
"""Longest wait in seconds; limits the delay after the wall clock was changed."""


@dataclass(frozen=True, slots=True)
class PairFacts:
    """One kind of pair of one backend, for metrics; the counts are those of this process.

    Attributes:
        backend: Name of the backend.
        spec: Wrapping key spec.
        algorithm: Wrapping algorithm.
        level: Pairs ready now.
        hits: Calls that got a ready pair.
        misses: Calls for which no pair was ready.
        generated: Pairs made ahead.
        discarded: Pairs that were never used: too old, sealed by an old key set, or left at close.
        errors: Backend calls that failed in the background.
        stopped: Whether the pool stopped making pairs ahead, after a permanent error.
    """

    backend: str
    spec: WrappingKeySpec
    algorithm: WrappingAlgorithm
    level: int
    hits: int
    misses: int
    generated: int
    discarded: int
    errors: int
    stopped: bool


@dataclass(frozen=True, slots=True, eq=False)
class ReadyPair:
    """A pair that was made ahead.

    Attributes:
        key: The pair.
        made_at: When it was made.
        expires_at: When its resident private key may be reaped.
    """

    key: WrappingKey
    made_at: datetime
    expires_at: datetime


@dataclass(slots=True, eq=False)
class Stock:
    """Pairs that are ready, being made or to be discarded. The caller locks around each call."""

    backend: Backend
    spec: WrappingKeySpec
    algorithm: WrappingAlgorithm
    settings: PoolSettings
    ready: deque[ReadyPair] = field(default_factory=deque)
    discards: deque[PrivateKeyRef] = field(default_factory=deque)
    making: int = 0
    refilling: bool = True
    stopped: bool = False
    failures: int = 0
    resume_at: float = 0.0
    hits: int = 0
    misses: int = 0
    generated: int = 0
    discarded: int = 0
    errors: int = 0

    def emptied(self) -> Stock:
        """An empty stock of the same kind, with its counters at zero."""
        return Stock(self.backend, self.spec, self.algorithm, self.settings, stopped=self.stopped)

    @property
    def level(self) -> int:
        """Pairs that are ready or being made."""
        return len(self.ready) + self.making

    @property
    def wants_refill(self) -> bool:
        """Whether another pair should be made, once the backoff is over."""
        return self.refilling and not self.stopped and self.level < self.settings.high_water

    @property
    def has_discards(self) -> bool:
        """Whether there are keys to discard, once the backoff is over."""
        return bool(self.discards) and not self.stopped

    @property
    def needs_key_set(self) -> bool:
        """Whether its pairs are of use only while their key set exists."""
        return any(made.key.key_set is not None for made in self.ready)

    def take(
        self, expires_at: datetime, now: datetime, key_set: str | None = None
    ) -> WrappingKey | None:
        """Remove and return the oldest pair that is valid until ``expires_at``; None: a miss.

        Args:
            expires_at: How long the pair has to be valid.
            now: The current time.
            key_set: The backend's current key set. Pairs sealed by another set are dropped: their
                import tokens would become invalid when that set is retired. None: not known.
        """
        self.drop_aged(now)
        if key_set is not None:
            self._drop_of_other_sets(key_set)
        made = next((made for made in self.ready if made.expires_at >= expires_at), None)
        if made is None:
            self.misses += 1
            return None
        self.hits += 1
        self.ready.remove(made)
        self._start_refill_if_low()
        return made.key

    def put(self, made: ReadyPair) -> None:
        """Add a pair that :attr:`making` counted."""
        self.making -= 1
        self.generated += 1
        self.succeeded()
        self.ready.append(made)
        if len(self.ready) >= self.settings.high_water:
            self.refilling = False

    def drop_aged(self, now: datetime) -> None:
        """Drop the pairs that are too old."""
        while self.ready and self.ready[0].made_at + self.settings.max_age <= now:
            self._drop(self.ready.popleft())
        self._start_refill_if_low()

    def _drop_of_other_sets(self, key_set: str) -> None:
        kept: deque[ReadyPair] = deque()
        for made in self.ready:
            if made.key.key_set not in {None, key_set}:
                self._drop(made)
            else:
                kept.append(made)
        self.ready = kept
        self._start_refill_if_low()

    def drop_all(self) -> None:
        """Drop every pair."""
        while self.ready:
            self._drop(self.ready.popleft())

    def failed(self, tick: float) -> float:
        """Start or extend the backoff after an error; returns its length in seconds."""
        s = self.settings
        self.errors += 1
        # The exponent is capped too: after days of failures the power would overflow a float.
        pause = min(s.max_backoff, s.initial_backoff * 2.0 ** min(self.failures, 64))
        self.failures += 1
        self.resume_at = tick + pause
        return pause

    def succeeded(self) -> None:
        """End the backoff after a call that succeeded."""
        self.failures = 0
        self.resume_at = 0.0

    def pause(self, now: datetime, tick: float) -> float:
        """Seconds until the background threads have work, if no caller takes a pair before."""
        pauses = [LONGEST_PAUSE]
        if self.wants_refill or self.has_discards:
            pauses.append(self.resume_at - tick)
        if self.ready:
            due = self.ready[0].made_at + self.settings.max_age
            pauses.append((due - now).total_seconds())
        return max(0.0, min(pauses))

    def facts(self) -> PairFacts:
        """The current numbers."""
        return PairFacts(
            backend=self.backend.name,
            spec=self.spec,
            algorithm=self.algorithm,
            level=len(self.ready),
            hits=self.hits,
            misses=self.misses,
            generated=self.generated,
            discarded=self.discarded,
            errors=self.errors,
            stopped=self.stopped,
        )

    def described(self) -> dict[str, object]:
        """The fields that identify it in a log record."""
        return {"backend": self.backend.name, "spec": self.spec, "algorithm": self.algorithm}

    def _drop(self, made: ReadyPair) -> None:
        self.discarded += 1
        private_key = made.key.private_key
        # A sealed key exists only in its blob; dropping the reference is enough.
        if private_key.custody is Custody.HSM_INTERNAL:
            self.discards.append(private_key)

    def _start_refill_if_low(self) -> None:
        if len(self.ready) <= self.settings.low_water:
            self.refilling = True
