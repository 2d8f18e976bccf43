"""Wrapping key pairs made ahead of time, by threads in the background.

A :class:`KeyPool` is a :class:`hsmwrap.imports.KeySource`. Making an RSA pair takes an HSM a tenth
of a second or more; taking one that is there takes far less. Where none is there, one is made
inline: the caller sees no difference but the time.

A pair leaves the pool once and to one caller; a sealed one only while the key set that sealed it
is current, which costs a seal. Processes share nothing, and a child after ``fork()`` starts empty:
what the parent has made stays the parent's. Resident pairs expire in the HSM token after the
longest that the pool may keep them and the token lifetime together, so those of a process that was
killed are reaped like any other.
"""

from hsmwrap.keypool._pool import KeyPool
from hsmwrap.keypool._settings import Pair, PoolSettings
from hsmwrap.keypool._stock import PairFacts

__all__ = ["KeyPool", "Pair", "PairFacts", "PoolSettings"]
