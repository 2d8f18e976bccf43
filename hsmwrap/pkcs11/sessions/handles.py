"""Handles of token objects that this process has made or found: an object again without a search.

SoftHSM's search looks at every object (field note 53). A handle is kept for one initialisation
generation of the module and one epoch (:class:`hsmwrap.pkcs11.sessions.session.HandleEpoch`), and
is used only if it still means an object of that CKA_ID: PKCS#11 lets a module give the handle of an
object that is gone to another one. What is not, is searched for.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

MOST = 20_000
"""Handles that are kept; beyond it, the one that was kept first goes. Twice as many as there may be
resident wrapping keys by default."""


@dataclass(frozen=True, slots=True)
class KnownHandle:
    """A handle, the epoch that it is of, and the type of the key."""

    epoch: int
    handle: int
    key_type: Any


class KnownHandles:
    """Handles by CKA_ID, shared by the sessions of one pool."""

    def __init__(self) -> None:
        """Know of none."""
        self._lock = threading.Lock()
        self._known: dict[bytes, KnownHandle] = {}

    def __len__(self) -> int:
        return len(self._known)

    def keep(self, object_id: bytes, epoch: int, key: Any) -> None:
        """Keep the handle of a key that was made or found."""
        kept = KnownHandle(epoch, key.handle, key.key_type)
        with self._lock:
            self._known.pop(object_id, None)
            self._known[object_id] = kept
            if len(self._known) > MOST:
                del self._known[next(iter(self._known))]

    def get(self, object_id: bytes, epoch: int) -> KnownHandle | None:
        """The handle, if it is of this epoch."""
        known = self._known.get(object_id)
        return known if known is not None and known.epoch == epoch else None

    def forget(self, object_id: bytes) -> None:
        """Drop a handle that means something else, or nothing."""
        with self._lock:
            self._known.pop(object_id, None)
