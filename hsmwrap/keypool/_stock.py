"""The pairs of one kind of one backend: arithmetic only, no call and no lock in here."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import datetime

from hsmwrap.backend import Backend, Custody, PrivateKeyRef, WrappingKey
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.keypool._settings import PoolSettings

LONGEST_PAUSE = 60.0
"""Seconds; a wall clock that was set is noticed at the latest then."""


@dataclass(frozen=True, slots=True)
class PairFacts:
    """One kind of pair of one backend, for metrics; the counts are those of this process.

    Attributes:
        backend: Name of the backend.
        spec: Wrapping key spec.
        algorithm: Wrapping algorithm.
        level: Pairs ready now.
        hits: Calls that were given a ready pair.
        misses: Calls for which none was ready.
        generated: Pairs made ahead.
        discarded: Pairs that nobody was given: too old, of an old key set, or left at the end.
        errors: Calls of the backend that failed in the background.
        stopped: Whether making pairs ahead was given up, for an error that does not pass.
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
class Made:
    """A pair that is ready.

    Attributes:
        key: The pair.
        made_at: When it was made.
        expires_at: When its resident private key may be reaped.
        key_set: The backend's key set before it was made (:attr:`Seal.key_id`); if that was
            replaced meanwhile, the pair passes for older than it is.
    """

    key: WrappingKey
    made_at: datetime
    expires_at: datetime
    key_set: str

    @property
    def sealed(self) -> bool:
        """Whether the private key can be used only as long as a key set is there."""
        return self.key.private_key.custody is Custody.HSM_ENCRYPTED_DATABASE


@dataclass(slots=True, eq=False)
class Stock:
    """What is ready, being made and to be discarded. Its user holds a lock around each step."""

    backend: Backend
    spec: WrappingKeySpec
    algorithm: WrappingAlgorithm
    settings: PoolSettings
    ready: deque[Made] = field(default_factory=deque)
    doomed: deque[PrivateKeyRef] = field(default_factory=deque)
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
        """The same kind, with nothing in it and nothing counted."""
        return Stock(self.backend, self.spec, self.algorithm, self.settings, stopped=self.stopped)

    @property
    def level(self) -> int:
        """Pairs that are ready or being made."""
        return len(self.ready) + self.making

    @property
    def needy(self) -> bool:
        """Whether another pair should be made, once the backoff is over."""
        return self.refilling and not self.stopped and self.level < self.settings.high_water

    @property
    def laden(self) -> bool:
        """Whether there is something to discard, once the backoff is over."""
        return bool(self.doomed) and not self.stopped

    @property
    def has_sealed(self) -> bool:
        """Whether it has pairs that a key set opens; all pairs of a kind are kept alike."""
        return bool(self.ready) and self.ready[0].sealed

    def take(
        self, expires_at: datetime, now: datetime, key_set: str | None = None
    ) -> WrappingKey | None:
        """Give away the oldest pair that lasts until ``expires_at``.

        Args:
            expires_at: How long it has to last.
            now: The current time.
            key_set: The backend's current key set: pairs that another one seals are dropped, as
                their import tokens would last only until that one is retired. None: not known.
        """
        self.drop_aged(now)
        if key_set is not None:
            self._drop_sealed_by_others(key_set)
        made = next((made for made in self.ready if made.expires_at >= expires_at), None)
        if made is None:
            self.misses += 1
            return None
        self.hits += 1
        self.ready.remove(made)
        self._lowered()
        return made.key

    def put(self, made: Made) -> None:
        """Add a pair that :attr:`making` counted."""
        self.making -= 1
        self.generated += 1
        self.worked()
        self.ready.append(made)
        if len(self.ready) >= self.settings.high_water:
            self.refilling = False

    def drop_aged(self, now: datetime) -> None:
        """Doom the pairs that are too old."""
        while self.ready and self.ready[0].made_at + self.settings.max_age <= now:
            self._doom(self.ready.popleft())
        self._lowered()

    def _drop_sealed_by_others(self, key_set: str) -> None:
        kept: deque[Made] = deque()
        for made in self.ready:
            if made.sealed and made.key_set != key_set:
                self._doom(made)
            else:
                kept.append(made)
        self.ready = kept
        self._lowered()

    def drop_all(self) -> None:
        """Doom every pair."""
        while self.ready:
            self._doom(self.ready.popleft())

    def failed(self, tick: float) -> float:
        """Back off after an error; returns for how many seconds."""
        s = self.settings
        self.errors += 1
        # The exponent is capped as well: after a weekend the power would not fit a float.
        pause = min(s.max_backoff, s.initial_backoff * 2.0 ** min(self.failures, 64))
        self.failures += 1
        self.resume_at = tick + pause
        return pause

    def worked(self) -> None:
        """The backend answers: no backoff any more."""
        self.failures = 0
        self.resume_at = 0.0

    def pause(self, now: datetime, tick: float) -> float:
        """Seconds until there may be something to do without anybody calling."""
        pauses = [LONGEST_PAUSE]
        if self.needy or self.laden:
            pauses.append(self.resume_at - tick)
        if self.ready:
            due = self.ready[0].made_at + self.settings.max_age
            pauses.append((due - now).total_seconds())
        return max(0.0, min(pauses))

    def facts(self) -> PairFacts:
        """The numbers now."""
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
        """What a log record says of it."""
        return {"backend": self.backend.name, "spec": self.spec, "algorithm": self.algorithm}

    def _doom(self, made: Made) -> None:
        self.discarded += 1
        private_key = made.key.private_key
        # A sealed key exists nowhere but in its blob, which goes with the last reference to it.
        if private_key.custody is Custody.HSM_INTERNAL:
            self.doomed.append(private_key)

    def _lowered(self) -> None:
        if len(self.ready) <= self.settings.low_water:
            self.refilling = True
