"""A worker session, what was found through it, and the objects that may be used in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from pkcs11._pkcs11 import SearchIter  # type: ignore[attr-defined]  # what Session.get_objects runs
from pkcs11.constants import Attribute
from pkcs11.exceptions import (
    FunctionFailed,
    GeneralError,
    KeyHandleInvalid,
    ObjectHandleInvalid,
    PKCS11Error,
    SessionClosed,
    SessionHandleInvalid,
    UserNotLoggedIn,
)
from pkcs11.types import Session, Token

from hsmwrap.pkcs11.binding.client_errors import attribute_reads
from hsmwrap.pkcs11.binding.identity import KnownPrivateKey, ObjectIds
from hsmwrap.pkcs11.binding.objectlock import NO_LOCK, ObjectLock
from hsmwrap.pkcs11.binding.returncodes import recovery_of
from hsmwrap.pkcs11.sessions.handles import KnownHandles
from hsmwrap.pkcs11.sessions.opened import OpenedKeys

_BATCH = 10  # objects in a call of C_FindObjects, as in python-pkcs11

SEARCHES = 10
"""How often a search begins anew because an object vanished in the middle of it."""

HANDLE_INVALID = (KeyHandleInvalid, ObjectHandleInvalid)
"""What a module answers to the handle of an object that is not there any more."""

_DESTROYED_ELSEWHERE = (*HANDLE_INVALID, FunctionFailed, GeneralError)
"""What SoftHSM answers if another process destroys the object during the call (field note 34).
FUNCTION_FAILED and GENERAL_ERROR may mean more, so the object is looked for again."""


@dataclass(slots=True)
class PendingObject:
    """A token object that a failed operation may leave behind.

    Attributes:
        object_id: Its CKA_ID.
        may_exist: Whether the operation has got as far as creating it.
    """

    object_id: bytes
    may_exist: bool = False


@dataclass(slots=True)
class HandleEpoch:
    """Counts how often an object handle turned out to be stale: older ones are looked up anew."""

    number: int = 0

    def end(self) -> None:
        """Trust no handle that was found until now."""
        self.number += 1


@dataclass(slots=True)
class PooledSession:
    """A worker session with what was found through it.

    Attributes:
        session: python-pkcs11's session, opened without PIN.
        is_logged_in: Asks the module whether a login covers the session.
        lock: Keeps threads that read token objects and one that writes some apart.
        epoch: Of the object handles, the same in all sessions of a connection.
        objects: Epoch and object by label, bound to this session (python-pkcs11 runs an operation
            on the session that an object was found with).
        handles: Of token objects, by CKA_ID, the same in all sessions of a pool.
        opened: Sealed keys that stay open between uses.
        tainted: Set after any error but a client's; the session is then closed instead of pooled.
    """

    session: Session
    is_logged_in: Callable[[Session], bool]
    lock: ObjectLock = NO_LOCK
    epoch: HandleEpoch = field(default_factory=HandleEpoch)
    handles: KnownHandles = field(default_factory=KnownHandles)
    objects: dict[str, tuple[int, Any]] = field(default_factory=dict)
    opened: OpenedKeys = field(default_factory=OpenedKeys)
    tainted: bool = False

    @property
    def token_writes(self) -> AbstractContextManager[None]:
        """To be held while token objects are created or destroyed."""
        return self.lock.write()

    @contextmanager
    def creating(self, pending: PendingObject) -> Iterator[None]:
        """Create the token object in the ``with`` block: from here on it may exist."""
        with self.token_writes:
            pending.may_exist = True
            yield

    def find(self, template: dict[Attribute, Any]) -> list[Any]:
        """All objects that match.

        Raises:
            UserNotLoggedIn: Nothing matches, and without a login nothing could.
            PKCS11Error: The search failed.
        """
        found = find_objects(self.session, template)
        if not found:
            self.require_login()
            found = find_objects(self.session, template)  # the login may have come in between
        return found

    def known(self, object_id: bytes, ids: ObjectIds | None) -> KnownPrivateKey | None:
        """The resident wrapping key with this CKA_ID by a handle that the process has, or None.

        Args:
            object_id: Its CKA_ID.
            ids: Tells whether the handle means it still; None: that cannot be told.

        Raises:
            PKCS11Error: A return code that says something about the connection.
        """
        known = self.handles.get(object_id, self.epoch.number)
        if known is None or ids is None or not ids.direct:
            return None
        key = KnownPrivateKey(self.session, known.handle, known.key_type)
        try:
            if ids.has(key, object_id):
                return key
        except PKCS11Error as error:
            # Another process destroys it at the same time (field note 34), or a search says more.
            if recovery_of(error) is not None:
                raise
        self.handles.forget(object_id)
        return None

    def keep_handle(self, object_id: bytes, key: Any, epoch: int) -> None:
        """Keep the handle of a token object that was made or found since this epoch began."""
        with attribute_reads():
            self.handles.keep(object_id, epoch, key)

    def destroy(self, template: dict[Attribute, Any]) -> int:
        """Destroy all token objects that match; another session may destroy some at the same time.

        Returns:
            How many were destroyed here. After an error some may be left; another call goes on.

        Raises:
            UserNotLoggedIn: Nothing matches, and without a login nothing could.
            PKCS11Error: The search failed, or one could not be destroyed.
        """
        destroyed = 0
        with self.token_writes:
            for each in (found := self.find(template)):
                with suppress(*_DESTROYED_ELSEWHERE):
                    each.destroy()
                    destroyed += 1
            if destroyed < len(found):
                for each in self.find(template):  # but what is found again has not vanished
                    each.destroy()
                    destroyed += 1
        return destroyed

    def require_login(self) -> None:
        """Return if a login covers the session; without one, nothing found means nothing seen.

        Raises:
            UserNotLoggedIn: Without a login, no private object can be found.
        """
        if not self.is_logged_in(self.session):
            raise UserNotLoggedIn("no login covers the session any more")


def find_objects(session: Session, template: dict[Attribute, Any]) -> list[Any]:
    """All objects that match; without a login, no private ones.

    python-pkcs11 reads attributes of what it finds, and fails if another session destroys that
    first, be it another backend's key in the same partition: then the search begins anew.
    """
    for _ in range(SEARCHES - 1):
        with suppress(*HANDLE_INVALID):
            return list(search(session, template))
    return list(search(session, template))


def search(session: Session, template: dict[Attribute, Any]) -> Iterator[Any]:
    """The objects of one search, which is ended here whatever happens.

    ``Session.get_objects`` leaves a search that could not begin to ``SearchIter.__del__``: what the
    HSM answers there is printed by the interpreter, raw and between the lines of a log (field note
    81). Of one that failed half-way it raises what the HSM answers to its end.
    """
    found = SearchIter(session, template, _BATCH)
    try:
        for batch in found.__enter__():
            yield from batch
    finally:
        with suppress(PKCS11Error):
            found._finalize()  # noqa: SLF001  # does nothing where the search has ended


def count_objects(session: Session) -> int:
    """How many objects the session sees. Of none an attribute is read, which takes longest."""
    found = SearchIter(session, {}, 1)
    try:
        return sum(1 for _batch_of_one in found.__enter__())
    finally:
        with suppress(PKCS11Error):
            found._finalize()  # noqa: SLF001  # as in search


def open_worker_session(token: Token, attribute_mapper: Any) -> Session:
    """Open a read-write session without PIN: the login of another session covers it."""
    return token.open(rw=True, attribute_mapper=attribute_mapper)


def close_quietly(session: Session) -> bool:
    """Close a session whose HSM may be gone; False if the session may still be there."""
    try:
        session.close()
    except (SessionHandleInvalid, SessionClosed):
        return True
    except PKCS11Error:
        return False
    return True
