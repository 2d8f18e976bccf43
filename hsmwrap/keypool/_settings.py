"""What a key-pair pool makes ahead: how much, of which kinds, for how long."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import ConfigurationError
from hsmwrap.imports import TOKEN_LIFETIME
from hsmwrap.settings import DURATION, Kind, Settings, integer, seconds, setting, typed

Pair = tuple[WrappingKeySpec, WrappingAlgorithm]
"""A kind of key pair; a pair is made for one algorithm and serves no other."""


def _pairs(value: Any) -> frozenset[Pair]:
    pairs = typed(value, list, tuple, set, frozenset)
    return frozenset((WrappingKeySpec(spec), WrappingAlgorithm(name)) for spec, name in pairs)


@dataclass(frozen=True, slots=True)
class PoolSettings(Settings):
    """How much is made ahead, and how long it is kept."""

    component: ClassVar[str] = "key-pair pool"

    high_water: int = setting(
        integer(0),
        "Pairs of each kind that a refill ends with; 0 switches the pool off.",
        16,
    )
    low_water: int = setting(
        integer(0),
        "A refill starts when no more than this many are left; less than high_water.",
        8,
    )
    pairs: frozenset[Pair] | None = setting(
        Kind("a set of (wrapping key spec, wrapping algorithm)", _pairs),
        "The kinds of pairs that are pooled. Without it: each kind that is asked for.",
    )
    max_age: timedelta = setting(DURATION, "Older pairs are discarded.", timedelta(hours=1))
    token_lifetime: timedelta = setting(
        DURATION,
        "The longest validity of an import token that pooled pairs have to serve; for longer ones "
        "pairs are made inline.",
        TOKEN_LIFETIME,
    )
    threads: int = setting(
        integer(1),
        "Pairs made at the same time; each keeps one session of the HSM busy.",
        1,
    )
    initial_backoff: float = setting(
        seconds(zero=False),
        "Wait before the next try after an error; doubles with each further one.",
        0.5,
    )
    max_backoff: float = setting(seconds(zero=False), "Longest wait between two tries.", 30.0)

    def __post_init__(self) -> None:
        """Check the values, and that they do not contradict each other.

        Raises:
            ConfigurationError: The text says which do.
        """
        Settings.__post_init__(self)
        if self.high_water and self.low_water >= self.high_water:
            raise ConfigurationError("key-pair pool: low_water is at most high_water - 1")
        if self.initial_backoff > self.max_backoff:
            raise ConfigurationError("key-pair pool: initial_backoff is at most max_backoff")
