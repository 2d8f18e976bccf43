"""Wrapping key pairs made ahead of time, by threads in the background.

A :class:`KeyPool` is a :class:`hsmwrap.imports.KeySource`. An HSM needs a tenth of a second or more
to generate an RSA pair; taking one from the pool is much faster. If the pool has none, a pair is
generated inline, and the call only takes longer.

Each pair is given to one caller, once. A sealed pair is given only while the key set that sealed it
is current. Processes do not share pairs: after ``fork()`` the child starts with an empty pool, and
the pairs stay the parent's. A resident pair expires in the HSM token after ``max_age`` plus the
token lifetime, so the reaper also removes the pairs of a killed process.
"""

from hsmwrap.keypool._pool import KeyPool
from hsmwrap.keypool._settings import Pair, PoolSettings
from hsmwrap.keypool._stock import PairFacts

__all__ = ["KeyPool", "Pair", "PairFacts", "PoolSettings"]
