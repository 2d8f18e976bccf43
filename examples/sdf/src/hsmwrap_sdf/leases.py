"""Leases: which pair of the pool serves which import token.

SDF makes no key pairs, so a wrapping key is a pair that was made ahead, leased for the life of one
import token. The leases are in a SQLite file. What holds across threads, processes and restarts of
a host: a pair has at most one lease that is not over, and the lease's number, which is random, is
in the import token; a token whose number is not the pair's present one is refused. Two hosts have
two files, so they need pools without a common index.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hsmwrap.errors import (
    HsmError,
    InvalidImportToken,
    InvalidKeyMaterial,
    ServiceUnavailable,
    TooManyWrappingKeys,
)
from hsmwrap_sdf.binding import Point

NUMBER_LENGTH = 16
GRACE = timedelta(minutes=15)
"""How long after its expiry a lease is over: another clock may be behind."""
LOOK_AGAIN = 60.0
"""Seconds between two looks for new pairs under indexes that are used up."""
_BUSY_SECONDS = 10.0

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS lease (
    pair INTEGER PRIMARY KEY,
    number BLOB NOT NULL,
    public_key BLOB UNIQUE,
    expires REAL NOT NULL,
    over INTEGER NOT NULL DEFAULT 0,
    trial TEXT
) STRICT""",
    """CREATE TABLE IF NOT EXISTS ciphertext (
    pair INTEGER NOT NULL,
    digest BLOB NOT NULL,
    number BLOB NOT NULL,
    PRIMARY KEY (pair, digest)
) STRICT, WITHOUT ROWID""",
)


@dataclass(frozen=True, slots=True)
class Lease:
    """One pair for one import token.

    Attributes:
        pair: Its index in the device.
        number: Of this lease, 16 random bytes.
    """

    pair: int
    number: bytes


@dataclass(frozen=True, slots=True)
class Counts:
    """How the pool is: pairs that are free, leased, and used up; and when the next lease ends."""

    free: int
    leased: int
    used_up: int
    next_expiry: float | None


class Leases:
    """The leases of one host."""

    def __init__(
        self, file: Path, pool: Sequence[int], *, reuse: bool, trial: str | None = None
    ) -> None:
        """Take the file, which is made if it is not there, and the indexes of the pool.

        Args:
            file: The leases of the host.
            pool: Indexes of the pairs.
            reuse: Whether a pair serves again.
            trial: Name of the trial that takes the leases, which :meth:`end_trial` ends.
        """
        self._trial = trial
        self._file = file
        self._pool = pool
        self._reuse = reuse
        self._looked = 0.0
        with self._transaction() as database:
            for statement in _SCHEMA:
                database.execute(statement)
        file.chmod(0o600)

    def take(self, expires_at: datetime, public_key: Callable[[int], Point]) -> tuple[Lease, Point]:
        """Lease a pair.

        Args:
            expires_at: When its import token expires.
            public_key: Asks the device for the public key under an index.

        Raises:
            TooManyWrappingKeys: All pairs are leased or used up; the text says what to do.
            HsmError: The device has the same pair under another index as well.
        """
        lease = self._reserve(expires_at)
        if lease is None and not self._reuse:
            self._find_new_pairs(public_key)
            lease = self._reserve(expires_at)
        if lease is None:
            raise TooManyWrappingKeys(self._exhausted())
        try:
            key = public_key(lease.pair)
            with self._transaction() as database:
                database.execute(
                    "UPDATE lease SET public_key = ? WHERE pair = ?", (_digest(key), lease.pair)
                )
        except sqlite3.IntegrityError:
            self._forget(lease)
            raise HsmError(
                f"the pair under index {lease.pair} is also under another index of the pool: an "
                "import token has to have a pair of its own"
            ) from None
        except BaseException:
            self._forget(lease)  # no client has seen its public key
            raise
        return lease, key

    def require(self, lease: Lease, public_key: Callable[[int], Point]) -> None:
        """Return if this lease is its pair's present one, and the pair is still the same.

        Raises:
            InvalidImportToken: It is over: it expired, or was given back; or there is another pair.
        """
        with self._transaction() as database:
            found = database.execute(
                "SELECT public_key FROM lease"
                " WHERE pair = ? AND number = ? AND NOT over AND expires > ?",
                (lease.pair, lease.number, _over()),
            ).fetchone()
        if found is None or lease.pair not in self._pool:
            raise InvalidImportToken("the lease of this import token's wrapping key is over")
        if _digest(public_key(lease.pair)) != found[0]:
            raise InvalidImportToken(f"there is another pair under index {lease.pair} now")

    def require_first(self, lease: Lease, ciphertext: bytes) -> None:
        """Refuse what came under an earlier lease of the same pair.

        The client of another import token made it; for the holder of this one to have it is enough
        to have seen it. Needed only where pairs are leased again.

        Args:
            lease: The present one.
            ciphertext: The client's, as :meth:`hsmwrap.sm2.Sm2Ciphertext.to_c1c3c2` writes it.

        Raises:
            InvalidKeyMaterial: It came before.
        """
        if not self._reuse:
            return
        row = lease.pair, hashlib.sha256(ciphertext).digest(), lease.number
        with self._transaction() as database:
            database.execute("INSERT OR IGNORE INTO ciphertext VALUES (?, ?, ?)", row)
            (number,) = database.execute(
                "SELECT number FROM ciphertext WHERE pair = ? AND digest = ?", row[:2]
            ).fetchone()
        if number != lease.number:
            raise InvalidKeyMaterial

    def end(self, lease: Lease) -> None:
        """Give a lease back; a second call does nothing."""
        with self._transaction() as database:
            database.execute(
                "UPDATE lease SET over = 1 WHERE pair = ? AND number = ?",
                (lease.pair, lease.number),
            )

    def end_trial(self) -> None:
        """Give back all that the trial took."""
        with self._transaction() as database:
            database.execute("UPDATE lease SET over = 1 WHERE trial = ?", (self._trial,))

    def end_expired(self, now: datetime) -> tuple[int, list[Lease]]:
        """End leases that expired :data:`GRACE` before ``now``.

        Returns:
            How many were not over, and those that are now.
        """
        with self._transaction() as database:
            (examined,) = database.execute("SELECT count(*) FROM lease WHERE NOT over").fetchone()
            rows = database.execute(
                "UPDATE lease SET over = 1 WHERE NOT over AND expires <= ? RETURNING pair, number",
                ((now - GRACE).timestamp(),),
            ).fetchall()
        return examined, [Lease(*row) for row in rows]

    def counts(self) -> Counts:
        """How the pool is."""
        with self._transaction() as database:
            rows = database.execute("SELECT pair, expires, over FROM lease").fetchall()
        ours = [row for row in rows if row[0] in self._pool]
        leased = [expires for _, expires, over in ours if not over and expires > _over()]
        over = len(ours) - len(leased)
        used_up = 0 if self._reuse else over
        free = len(self._pool) - len(leased) - used_up
        return Counts(free, len(leased), used_up, min(leased, default=None))

    def _reserve(self, expires_at: datetime) -> Lease | None:
        number = secrets.token_bytes(NUMBER_LENGTH)
        with self._transaction() as database:
            pair = self._free_pair(database)
            if pair is None:
                return None
            database.execute(
                "INSERT OR REPLACE INTO lease (pair, number, expires, trial) VALUES (?, ?, ?, ?)",
                (pair, number, expires_at.timestamp(), self._trial),
            )
        return Lease(pair, number)

    def _free_pair(self, database: sqlite3.Connection) -> int | None:
        """One that had no lease; where pairs serve again, the one whose lease is over longest."""
        known = dict.fromkeys(each for (each,) in database.execute("SELECT pair FROM lease"))
        fresh = next((pair for pair in self._pool if pair not in known), None)
        if fresh is not None or not self._reuse:
            return fresh
        rows = database.execute(
            "SELECT pair FROM lease WHERE over OR expires <= ? ORDER BY expires", (_over(),)
        )
        return next((pair for (pair,) in rows if pair in self._pool), None)

    def _find_new_pairs(self, public_key: Callable[[int], Point]) -> None:
        """Free the indexes under which the device has another pair than the one that was leased."""
        if time.monotonic() < self._looked + LOOK_AGAIN and self._looked:
            return
        self._looked = time.monotonic()
        with self._transaction() as database:
            rows = database.execute(
                "SELECT pair, public_key FROM lease WHERE over OR expires <= ?", (_over(),)
            ).fetchall()
        replaced = [
            (pair, known)
            for pair, known in rows
            if pair in self._pool and _digest(public_key(pair)) != known
        ]
        with self._transaction() as database:
            database.executemany("DELETE FROM lease WHERE pair = ? AND public_key IS ?", replaced)

    def _forget(self, lease: Lease) -> None:
        with self._transaction() as database:
            database.execute(
                "DELETE FROM lease WHERE pair = ? AND number = ?", (lease.pair, lease.number)
            )

    def _exhausted(self) -> str:
        counts = self.counts()
        said = [
            f"all {len(self._pool)} key pairs of the pool are taken: {counts.leased} are leased"
        ]
        if counts.next_expiry is not None:
            returns = datetime.fromtimestamp(counts.next_expiry, UTC) + GRACE
            said.append(f" (the next lease ends at {returns:%Y-%m-%d %H:%M} UTC)")
        if counts.used_up:
            said.append(
                f", {counts.used_up} are used up: make new pairs under these indexes with the "
                "device's management tool"
            )
        return "".join([*said, "; or add indexes to `pool`"])

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own for each: nothing is shared by threads or across a fork."""
        try:
            connection = sqlite3.connect(self._file, timeout=_BUSY_SECONDS, isolation_level=None)
            with closing(connection):
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise ServiceUnavailable(f"leases {self._file}: {error}") from None


def _over() -> float:
    """The time of expiry from which on back a lease is over now."""
    return (datetime.now(UTC) - GRACE).timestamp()


def _digest(key: Point) -> bytes:
    return hashlib.sha256(key.x + key.y).digest()
