"""Token objects that failed operations left: destroyed at once, or as soon as that is possible."""

from __future__ import annotations

import logging

from pkcs11.constants import Attribute

from hsmwrap.errors import HsmUnavailable, HsmwrapError
from hsmwrap.pkcs11.sessions.recovery import Attempts, Failure
from hsmwrap.pkcs11.sessions.session import PendingObject

_log = logging.getLogger(__name__)


class PendingObjects:
    """Destroys pending objects, and remembers those for which that has failed."""

    def __init__(self, attempts: Attempts) -> None:
        """Take what runs an operation in a session."""
        self._attempts = attempts
        self.reset()

    def __len__(self) -> int:
        return len(self._left)

    def require_free(self, object_id: bytes) -> None:
        """Return if an operation may make an object under this id.

        Raises:
            HsmUnavailable: An earlier call left one, which cannot be destroyed yet: it would be
                destroyed by its id later, and the new one with it.
        """
        if object_id in self._left and not self._destroy(object_id):
            raise HsmUnavailable("what an earlier call left under this id cannot be destroyed yet")

    def destroy(self, pending: PendingObject | None) -> bool:
        """Destroy what an attempt left; False if that is for later, so that no retry may follow.

        It would be destroyed by its id, and what the retry made under the id with it.
        """
        if pending is None or not pending.may_exist:
            return True
        return self._destroy(pending.object_id)

    def destroy_all(self) -> None:
        """Try again to destroy what is left."""
        for object_id in tuple(self._left):
            self._destroy(object_id)

    def reset(self) -> None:
        """Know of none, as in a forked child: they are the parent's to destroy."""
        self._left: set[bytes] = set()

    def _destroy(self, object_id: bytes) -> bool:
        """Destroy every object with this id; if that fails now, remember it and return False.

        Not remembered before it fails: another thread would destroy what a retry made.
        """
        try:
            self._attempts.attempt(lambda pooled: pooled.destroy({Attribute.ID: object_id}))
        except Failure as failure:
            self._attempts.leave(failure)
        except HsmwrapError:
            pass  # not yet
        else:
            self._left.discard(object_id)
            return True
        self._left.add(object_id)
        _log.warning("left for the reaper", extra={"object_id": object_id.hex()})
        return False
