"""Sealed keys that a session keeps open between uses: bounded in number and in time.

An opened key is a session object. It dies with its session, which is closed after any error. Each
is used for at most :data:`OPENED_SECONDS`, then unwrapped anew: so the keys of a key set that was
retired stop working within that time, in every process, as sealing under it does.

A handle alone does not show that it still means this key: a module may give it to another object
after a logout that it made by itself. So each opened key has a random CKA_ID, and is used only if
the handle still has it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

OPENED_SECONDS = 60.0
"""How long an opened key is used before it is unwrapped anew."""


@dataclass(frozen=True, slots=True)
class OpenedKey:
    """A key object, and what tells it.

    Attributes:
        key: The session object.
        object_id: Its CKA_ID.
        until: When it has to be closed, by ``time.monotonic``.
    """

    key: Any
    object_id: bytes
    until: float


@dataclass(slots=True)
class OpenedKeys:
    """The opened keys of one session; only the thread that has the session may use this."""

    _keys: OrderedDict[Any, OpenedKey] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def expired(self) -> bool:
        """Whether one has to be closed."""
        first = next(iter(self._keys.values()), None)
        return first is not None and first.until <= time.monotonic()

    def get(self, name: object) -> OpenedKey | None:
        """The key that was kept under this name; closes the expired ones first.

        Raises:
            PKCS11Error: One could not be closed.
        """
        while self.expired:
            self._close_first()
        return self._keys.get(name)

    def forget(self, name: object) -> None:
        """Drop a key that is not there any more."""
        self._keys.pop(name, None)

    def make_room(self, most: int) -> None:
        """Close the oldest keys, so that with one more there are at most ``most``.

        Raises:
            PKCS11Error: One could not be closed.
        """
        while len(self._keys) >= most:
            self._close_first()

    def keep(self, name: object, key: Any, object_id: bytes) -> None:
        """Keep a key that was just unwrapped."""
        self._keys[name] = OpenedKey(key, object_id, time.monotonic() + OPENED_SECONDS)

    def _close_first(self) -> None:
        _, oldest = self._keys.popitem(last=False)
        oldest.key.destroy()
