"""Keys that cannot be used, counted for health and metrics.

Three kinds. Each sweep counts in the database the keys of a backend that is not configured, and
those of a key set that their backend does not have (if it :class:`~hsmwrap.backend.ListsKeySets`);
the log has each number when it changes. And keys that their backend did not have when this process
used them last, because their object is gone: the log names each once.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress

from sqlalchemy import select

from hsmwrap.backend import Backend, ListsKeySets
from hsmwrap.errors import HsmwrapError
from hsmwrap.kms.database import Database
from hsmwrap.kms.errors import KeyUnusable
from hsmwrap.kms.keysets import usage_of_backends
from hsmwrap.kms.schema import Key

_MOST = 1000
"""Keys that are remembered; more of them are not counted."""

_log = logging.getLogger(__name__)

_Counted = Counter[tuple[str, str | None]]
"""Keys by backend, and by key set or None: those of a backend that is not configured."""


class UnusableKeys:
    """What is known of keys that cannot be used; for all threads of a process."""

    def __init__(self, database: Database, backends: Mapping[str, Backend]) -> None:
        """Take the database, and the configured backends by name."""
        self._database = database
        self._backends = backends
        self._lock = threading.Lock()
        self._found: dict[str, Key] = {}
        self._counted = _Counted()
        self._sets: dict[str, frozenset[str]] = {}

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
        """Count keys of other backends and of lost key sets, and forget what works again.

        That is keys that were deleted or imported again. The log has each number when it changes.
        A backend that does not answer now has the key sets that it had before.

        Raises:
            ServiceUnavailable: The database is unavailable.
        """
        for name, backend in self._backends.items():
            if (listing := ListsKeySets.of(backend)) is not None:
                with suppress(HsmwrapError):
                    self._sets[name] = frozenset(listing.key_set_ids())
        counted = _Counted()
        for used in usage_of_backends(self._database):
            if used.backend not in self._backends:
                counted[used.backend, None] += used.keys
            elif used.key_set and not self.has_key_set(used.backend, used.key_set):
                counted[used.backend, used.key_set] += used.keys
        with self._lock:
            found = dict(self._found)
        with self._database.read() as transaction:
            rows = transaction.scalars(select(Key).where(Key.key_id.in_(found)))
            references = {key.key_id: key.reference for key in rows}
        with self._lock:
            before, self._counted = self._counted, counted
            for key_id, key in found.items():
                if references.get(key_id) != key.reference:
                    self._found.pop(key_id, None)
        _log_changes(before, counted)

    def has_key_set(self, backend: str, key_set: str) -> bool:
        """Whether a backend has a key set, as it said last; True if it never said."""
        return key_set in self._sets.get(backend, {key_set})

    @property
    def number(self) -> int:
        """How many there are."""
        return self._missing() + self._counted.total()

    def said(self) -> str | None:
        """What there are, for health; None where there are none."""
        parts = [
            f"{count} of backend {name}, which is not configured"
            if key_set is None
            else f"{count} of key set {key_set}, which backend {name} does not have"
            for (name, key_set), count in sorted(self._counted.items(), key=str)
        ]
        if missing := self._missing():
            parts.append(f"{missing} that their backend does not have (the log names them)")
        return (
            f"ready, but {self.number} keys cannot be used: {', '.join(parts)}" if parts else None
        )

    def _missing(self) -> int:
        with self._lock:
            return sum(
                key.backend in self._backends and (key.backend, key.key_set) not in self._counted
                for key in self._found.values()
            )


def _log_changes(before: _Counted, counted: _Counted) -> None:
    for (name, key_set), count in counted.items():
        if before[name, key_set] == count:
            continue
        facts = {"backend": name, "keys": count}
        if key_set is None:
            facts["why"] = f"add [former_backends.{name}]"
            _log.error("keys are of a backend that is not configured", extra=facts)
        else:
            facts["key_set"] = key_set
            _log.error("keys are of a key set that their backend does not have", extra=facts)
