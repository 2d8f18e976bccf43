"""What a key-pair pool makes ahead: how much, of which kinds, for how long."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import ConfigurationError
from hsmwrap.imports import TOKEN_LIFETIME

Pair = tuple[WrappingKeySpec, WrappingAlgorithm]
"""A kind of key pair; a pair is made for one algorithm and serves no other."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """How much is made ahead, and how long it is kept.

    Attributes:
        high_water: Pairs of each kind that a refill ends with; 0 switches the pool off.
        low_water: A refill starts when no more than this many are left.
        pairs: The kinds that are pooled; None: each kind that is asked for.
        max_age: Older pairs are discarded.
        token_lifetime: The longest validity of an import token that pooled pairs have to serve;
            for longer ones pairs are made inline.
        threads: Pairs made at the same time; each keeps one session of the HSM busy.
        initial_backoff: Seconds until the next try after an error; doubles with each further one.
        max_backoff: Most seconds between two tries.
    """

    high_water: int = 16
    low_water: int = 8
    pairs: frozenset[Pair] | None = None
    max_age: timedelta = timedelta(hours=1)
    token_lifetime: timedelta = TOKEN_LIFETIME
    threads: int = 1
    initial_backoff: float = 0.5
    max_backoff: float = 30.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigurationError: They contradict each other; the text says which.
        """
        off, never = self.high_water == 0, timedelta(0)
        for holds, rule in (
            (self.high_water >= 0, "high_water is 0 (off) or more"),
            (off or 0 <= self.low_water < self.high_water, "low_water is 0 to high_water - 1"),
            (self.threads >= 1, "threads is 1 or more; high_water = 0 switches the pool off"),
            (self.max_age > never, "max_age is positive"),
            (self.token_lifetime > never, "token_lifetime is positive"),
            (self.initial_backoff > 0, "initial_backoff is positive"),
            (self.initial_backoff <= self.max_backoff, "initial_backoff is at most max_backoff"),
        ):
            if not holds:
                raise ConfigurationError(f"key-pair pool: {rule}")
