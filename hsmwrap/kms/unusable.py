"""Keys that cannot be used, counted for health and metrics.

Two kinds: keys of a backend that is not configured, which each sweep counts in the database; and
keys that their backend did not have when this process used them last, because their key set was
retired or their object is gone. The log has the number of the first kind for each backend, and
names each key of the second kind once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection

from sqlalchemy import func, select

from hsmwrap.kms.database import Database
from hsmwrap.kms.errors import KeyUnusable
from hsmwrap.kms.schema import Key

_MOST = 1000
"""Keys that are remembered; more of them are not counted."""

_log = logging.getLogger(__name__)


class UnusableKeys:
    """What is known of keys that cannot be used; for all threads of a process."""

    def __init__(self, database: Database, backends: Collection[str]) -> None:
        """Take the database, and the names of the configured backends."""
        self._database = database
        self._backends = tuple(backends)
        self._lock = threading.Lock()
        self._found: dict[str, Key] = {}
        self._of_others: dict[str, int] = {}

    def found(self, key: Key, why: Exception) -> KeyUnusable:
        """Remember and log a key that could not be used; returns the error to raise."""
        if isinstance(why, KeyUnusable):
            said = str(why)
        else:
            said = f"backend {key.backend} does not have the material of key {key.key_id}: {why}"
        with self._lock:
            new = key.key_id not in self._found
            if new and len(self._found) < _MOST:
                self._found[key.key_id] = key
        if new:
            facts = {"key_id": key.key_id, "backend": key.backend, "key_set": key.key_set}
            _log.error("a key cannot be used", extra=facts | {"why": said})
        return KeyUnusable(said)

    def works(self, key_id: str) -> None:
        """Forget a key that was used with success."""
        if key_id in self._found:
            with self._lock:
                self._found.pop(key_id, None)

    def look(self) -> None:
        """Count the keys of other backends, and forget keys that were deleted or imported again.

        The log has the count of each such backend when it changes.

        Raises:
            ServiceUnavailable: The database is unavailable.
        """
        others = Key.backend.is_not(None) & Key.backend.not_in(self._backends)
        counted = select(Key.backend, func.count()).where(others).group_by(Key.backend)
        with self._lock:
            found = dict(self._found)
        with self._database.read() as transaction:
            of_others = {str(name): count for name, count in transaction.execute(counted)}
            rows = transaction.scalars(select(Key).where(Key.key_id.in_(found)))
            references = {key.key_id: key.reference for key in rows}
        with self._lock:
            before, self._of_others = self._of_others, of_others
            for key_id, key in found.items():
                if references.get(key_id) != key.reference:
                    self._found.pop(key_id, None)
        for name, count in of_others.items():
            if before.get(name) != count:
                facts = {"backend": name, "keys": count, "why": f"add [former_backends.{name}]"}
                _log.error("keys are of a backend that is not configured", extra=facts)

    @property
    def number(self) -> int:
        """How many there are."""
        return self._missing() + sum(self._of_others.values())

    def said(self) -> str | None:
        """What there are, for health; None where there are none."""
        parts = [
            f"{count} of backend {name}, which is not configured"
            for name, count in sorted(self._of_others.items())
        ]
        if missing := self._missing():
            parts.append(f"{missing} that their backend does not have (the log names them)")
        return (
            f"ready, but {self.number} keys cannot be used: {', '.join(parts)}" if parts else None
        )

    def _missing(self) -> int:
        with self._lock:
            return sum(key.backend in self._backends for key in self._found.values())
