"""Making, rotating, retiring and listing the backend's own keys: ``hsmwrap keys``.

A key set is made key by key. One that is not finished has no MAC key, is never current, and is
destroyed again if its making fails; what a killed process leaves of one does no harm, is listed,
and can be retired.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from pkcs11.constants import Attribute, TokenFlag
from pkcs11.exceptions import PKCS11Error
from pkcs11.types import Session, Token

from hsmwrap.backend import KeySetInfo
from hsmwrap.errors import (
    ConfigurationError,
    HsmwrapError,
    PinError,
    TokenSelectionError,
    UnsupportedOperation,
)
from hsmwrap.pkcs11.binding.host import ModuleHost
from hsmwrap.pkcs11.binding.module import Module
from hsmwrap.pkcs11.binding.returncodes import code_name, recovery_of, said, typed_error
from hsmwrap.pkcs11.binding.templates import HsmAttributeMapper
from hsmwrap.pkcs11.keysets import movability
from hsmwrap.pkcs11.keysets.keys import HIGHEST_NUMBER, KeySet, KeySets, Needs, Role
from hsmwrap.pkcs11.keysets.needs import needs_of
from hsmwrap.pkcs11.sessions.connecting import PAUSES, sleep_with_jitter
from hsmwrap.pkcs11.sessions.connection import Connection
from hsmwrap.pkcs11.sessions.session import PooledSession
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.token.pin import PinPad, PinSource
from hsmwrap.pkcs11.token.selection import find_token

_DOUBTFUL_SO_PIN = (
    TokenFlag.SO_PIN_COUNT_LOW,
    TokenFlag.SO_PIN_FINAL_TRY,
    TokenFlag.SO_PIN_LOCKED,
)

_log = logging.getLogger(__name__)


def list_key_sets(settings: Pkcs11Settings) -> tuple[KeySetInfo, ...]:
    """All key sets in the HSM token, oldest first; also those that were never finished."""
    return tuple(each.info() for each in survey(settings, key_sets_of(settings)).sets)


@dataclass(frozen=True, slots=True)
class Survey:
    """What there is: the key sets, and every number that a label of ours has."""

    sets: tuple[KeySet, ...]
    numbers: frozenset[int]

    @property
    def finished(self) -> tuple[KeySet, ...]:
        """The complete ones."""
        return tuple(each for each in self.sets if each.finished)

    def free_number(self) -> int:
        """Above every number, of unfinished sets as well: their keys would be in its way.

        Raises:
            ConfigurationError: There is none left.
        """
        number = max(self.numbers, default=0) + 1
        if number > HIGHEST_NUMBER:
            raise ConfigurationError(
                f"a key is labelled as of key set {HIGHEST_NUMBER}, the highest that there can be; "
                "retire that set if it is not current, else take another key_prefix"
            )
        return number


def survey(settings: Pkcs11Settings, keys: KeySets) -> Survey:
    """What there is, as the user sees it."""

    def look(pooled: PooledSession) -> Survey:
        sets, numbers = keys.survey(pooled.session)
        pooled.require_login()  # without one, the private keys are not seen
        return Survey(sets, numbers)

    with connected(settings) as connection:
        return connection.run(look)


def initialise(settings: Pkcs11Settings, so_pin: PinSource | None) -> KeySetInfo:
    """Make the first key set.

    Args:
        settings: Which HSM token, and the user PIN.
        so_pin: The security officer's PIN; None makes key-encryption keys that are not trusted.

    Raises:
        ConfigurationError: There is a key set already, another one is being made at the same
            time, or a backend of this process is open.
        PinError: A PIN is refused, or the next wrong one may lock the HSM token. As it is not
            tried again, keys that were made by then are left; :func:`list_key_sets` shows them.
        UnsupportedOperation: The HSM token makes no trusted keys.
        ServiceUnavailable, HsmError: The HSM failed; nothing is kept of the new set.
    """
    keys = key_sets_of(settings)
    present = survey(settings, keys)
    if present.finished:
        raise ConfigurationError(
            "the HSM token has keys of this prefix already; `hsmwrap keys rotate` makes new ones"
        )
    return _create(settings, so_pin, keys, present.free_number())


def rotate(settings: Pkcs11Settings, so_pin: PinSource | None) -> KeySetInfo:
    """Make another key set and make it current; the old ones keep opening what they sealed.

    Args:
        settings: Which HSM token, and the user PIN.
        so_pin: As for :func:`initialise`.

    Raises:
        ConfigurationError: There is none yet, the present one is trusted and the SO PIN is
            missing, another one is being made at the same time, or a backend of this process is
            open.
        PinError, UnsupportedOperation, ServiceUnavailable, HsmError: As for :func:`initialise`.
    """
    keys = key_sets_of(settings)
    present = survey(settings, keys)
    if not present.finished:
        raise ConfigurationError("the HSM token has no key set to rotate; run `hsmwrap keys init`")
    if so_pin is None and any(each.trusted for each in present.finished):
        raise ConfigurationError(
            "the HSM token has trusted keys, and untrusted ones would not replace them; "
            "rotate with the SO PIN"
        )
    return _create(settings, so_pin, keys, present.free_number())


def retire(settings: Pkcs11Settings, key_set: str) -> None:
    """Destroy a key set that is not current, whole or what there is of it.

    Whatever it sealed is lost. Import tokens: so wait, after the rotation, for the lifetime of an
    import token, the ``max_age`` of key-pair pools and :data:`~.keys.CURRENT_SET_LIFETIME`, in
    which processes go on with the set that they know (25 hours and a minute, as they come).
    Imported keys in custody HsmEncryptedDatabase: so import them again first. When the rotation
    was and what was sealed since, the HSM token does not tell; nothing is refused for it.

    Args:
        settings: Which HSM token, and the user PIN.
        key_set: Number of the key set.

    Raises:
        ConfigurationError: It is not there, or it is the current one.
        ServiceUnavailable, HsmError: The HSM failed; call again to destroy what is left.
    """
    keys = key_sets_of(settings)
    present = survey(settings, keys)
    if key_set not in map(str, present.numbers):
        there = ", ".join(map(str, sorted(present.numbers))) or "none"
        raise ConfigurationError(f"the HSM token has no key set {key_set}; it has {there}")
    if any(each.current for each in present.sets if str(each.number) == key_set):
        raise ConfigurationError(f"key set {key_set} is current; rotate first")
    with connected(settings) as connection:
        connection.run(lambda pooled: keys.destroy(pooled, int(key_set)))


def destroy_all(settings: Pkcs11Settings) -> None:
    """Destroy all under this prefix, the current key set too: for a prefix made for a trial.

    Raises:
        ServiceUnavailable, HsmError: The HSM failed; call again to destroy what is left.
    """
    keys = key_sets_of(settings)
    with connected(settings) as connection:
        for number in connection.run(lambda pooled: keys.numbers(pooled.session)):
            connection.run(partial(keys.destroy, number=number))
        # Imported keys, wrapping keys, a transport key: labelled with the same prefix.
        connection.run(partial(_destroy_labelled, start=f"{settings.key_prefix}:"))


def _destroy_labelled(pooled: PooledSession, start: str) -> None:
    found = pooled.find({Attribute.TOKEN: True})
    labels = {each.get_attributes([Attribute.LABEL]).get(Attribute.LABEL, "") for each in found}
    for label in labels:
        if label.startswith(start):
            pooled.destroy({Attribute.LABEL: label, Attribute.TOKEN: True})


# --- making ------------------------------------------------------------------------------------


def _create(
    settings: Pkcs11Settings, so_pin: PinSource | None, keys: KeySets, number: int
) -> KeySetInfo:
    """Make a key set, or leave nothing of it. The MAC key comes last: with it, the set counts."""
    made_by = secrets.token_hex(8)
    movable: bool | None = None
    with connected(settings) as connection:
        needs = connection.run(
            lambda pooled: needs_of(pooled.session, settings.vendor), retry=False
        )
    key_encryption_roles = tuple(role for role in needs.roles if role is not Role.MAC)
    listed: Sequence[KeySet] = ()
    try:
        for roles in filter(None, (key_encryption_roles, (Role.MAC,))):
            if so_pin is None:
                _make(settings, keys, number, made_by, roles, needs=needs)
            else:
                with officer_session(settings, so_pin) as session, _says_where_trust_ends():
                    if movable is None:
                        movable = movability.is_kept(session, needs.cipher, needs.key_wrap)
                    for role in roles:
                        keys.create(
                            *(session, role, number, made_by),
                            trusted=True,
                            movable=movable,
                            needs=needs,
                        )
            with connected(settings) as connection:
                made = frozenset(needs.roles if Role.MAC in roles else roles)
                require_complete(connection, keys, number, made)
                if Role.MAC in roles:
                    listed = connection.run(lambda pooled: keys.list(pooled.session))
        return next(each.info() for each in listed if each.number == number)
    except PinError:
        # Cleaning up would try a PIN again, which may lock the HSM token. What there is of the
        # set, if anything, is listed as not finished.
        raise
    except BaseException:
        clean_up(settings, keys, number, made_by)
        raise


@contextmanager
def _says_where_trust_ends() -> Iterator[None]:
    """Say what to do where the security officer makes no trusted keys, as on HSMs without trust.

    Raises:
        UnsupportedOperation: The HSM token refuses them.
    """
    try:
        yield
    except PKCS11Error as error:
        if recovery_of(error) is not None:
            raise
        raise UnsupportedOperation(
            f"the HSM token makes no trusted keys for its security officer: {said(error)}; without "
            "the SO PIN (--so-pin-file) the user makes keys that are not trusted"
        ) from None


def _make(
    settings: Pkcs11Settings,
    keys: KeySets,
    number: int,
    made_by: str,
    roles: Iterable[Role],
    *,
    needs: Needs,
) -> None:
    """Make keys that are not trusted, as the user."""

    def create(pooled: PooledSession, role: Role) -> None:
        with pooled.token_writes:
            keys.create(pooled.session, role, number, made_by, trusted=False, needs=needs)

    with connected(settings) as connection:
        for role in roles:
            connection.run(partial(create, role=role), retry=False)


def require_complete(
    connection: Connection, keys: KeySets, number: int, roles: frozenset[Role]
) -> None:
    """Two at once may have chosen the same number; with two keys of a kind neither would be used.

    Raises:
        ConfigurationError: There is not exactly one of each.
    """
    if not connection.run(lambda pooled: keys.is_complete(pooled.session, number, roles)):
        raise ConfigurationError(
            f"key set {number} would not have exactly one key of each kind with the attributes "
            "that it was made with, so nothing of it is kept; if another command is making a key "
            "set, run this one again when it has finished"
        )


def clean_up(settings: Pkcs11Settings, keys: KeySets, number: int, made_by: str) -> None:
    """Destroy what was made of a key set; a failure is logged, as the caller has another error."""
    try:
        with connected(settings) as connection:
            connection.run(lambda pooled: keys.destroy(pooled, number, made_by))
    except HsmwrapError as error:
        # The caller gets the first error. What is left is listed as not finished.
        what = {"key_set": number, "error": type(error).__name__}
        _log.warning("keys of an unfinished key set are left", extra=what)


# --- sessions ----------------------------------------------------------------------------------


def key_sets_of(settings: Pkcs11Settings) -> KeySets:
    """Finds and makes the keys that these settings name."""
    return KeySets(settings.key_prefix, vendor=settings.vendor, sm4=settings.sm4)


@contextmanager
def connected(settings: Pkcs11Settings) -> Iterator[Connection]:
    """A connection for the length of a ``with`` block; see :class:`Connection` for the errors."""
    connection = Connection(settings)
    try:
        yield connection
    finally:
        connection.close()


@contextmanager
def officer_session(settings: Pkcs11Settings, so_pin: PinSource) -> Iterator[Session]:
    """A security officer's session; no user may be logged in in this process."""
    host = ModuleHost.acquire(settings.module, settings.reserved, settings.traits)
    try:
        _await_token(host, settings)
        with host.inside(settings.session_wait) as (module, _generation):
            token = find_token(module, settings.selector)
            if not settings.force_login:
                _require_safe(token)
            session = _open_officer_session(module, token, so_pin)
            try:
                yield session
            finally:
                module.close_officer_session(session)
    except PKCS11Error as error:
        raise typed_error(error) from None
    finally:
        host.release()


def _await_token(host: ModuleHost, settings: Pkcs11Settings) -> None:
    """Try more than once, as a connection does: another process's login hides the token briefly.

    Raises:
        TokenSelectionError: Not exactly one HSM token matches.
    """
    for pause in (*PAUSES, None):
        try:
            with host.inside(settings.session_wait) as (module, _generation):
                find_token(module, settings.selector)
                return
        except TokenSelectionError:
            if pause is None:
                raise
            sleep_with_jitter(pause)
        host.restart(host.generation, settings.session_wait)


def _require_safe(token: Token) -> None:
    """Stop where one more wrong PIN may lock the HSM token, as for the user PIN.

    Raises:
        PinError: It says so.
    """
    doubtful = [str(flag.name) for flag in _DOUBTFUL_SO_PIN if token.flags & flag]
    if doubtful:
        raise PinError(
            f"not logging the security officer in: the HSM token says {', '.join(doubtful)}, so a "
            "wrong PIN may lock it. Check the SO PIN, then set force_login once"
        )


def _open_officer_session(module: Module, token: Token, so_pin: PinSource) -> Any:
    typed = isinstance(so_pin, PinPad)
    if typed and not token.flags & TokenFlag.PROTECTED_AUTHENTICATION_PATH:
        raise ConfigurationError(
            "the HSM token has no PIN pad of its own (CKF_PROTECTED_AUTHENTICATION_PATH is not "
            "set); give a file with the SO PIN"
        )
    mapper = HsmAttributeMapper()
    try:
        if typed:
            return module.open_officer_session(token, None, mapper)
        with so_pin.read() as pin:
            return module.open_officer_session(token, pin, mapper)
    except PKCS11Error as error:
        if code_name(error).startswith("PIN_"):
            raise PinError(
                f"{said(error)} to the security officer's PIN; check it before the next try, as "
                "more wrong ones may lock the HSM token"
            ) from None
        if recovery_of(error) is not None:
            raise
        raise ConfigurationError(
            f"the security officer cannot log in: {said(error)}; close this process's "
            "backends first"
        ) from None
