"""Making, rotating, retiring and listing the backend's own keys: ``hsmwrap keys``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from pkcs11.exceptions import PKCS11Error
from pkcs11.types import Session

from hsmwrap.backend import KeySetInfo
from hsmwrap.errors import ConfigurationError, HsmError, PinError
from hsmwrap.pkcs11.connection import Connection, find_token
from hsmwrap.pkcs11.host import ModuleHost
from hsmwrap.pkcs11.keys import KeySet, KeySets, Role
from hsmwrap.pkcs11.pin import PinSource
from hsmwrap.pkcs11.pool import PooledSession
from hsmwrap.pkcs11.returncodes import code_name
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.templates import HsmAttributeMapper


def list_key_sets(settings: Pkcs11Settings) -> tuple[KeySetInfo, ...]:
    """All key sets in the HSM token, oldest first."""
    return tuple(each.info() for each in _found(settings))


def _found(settings: Pkcs11Settings) -> list[KeySet]:
    keys = KeySets(settings.key_prefix)
    connection = Connection(settings)
    try:
        return connection.run(lambda pooled: keys.list(pooled.session))
    finally:
        connection.close()


def initialise(settings: Pkcs11Settings, so_pin: PinSource | None) -> KeySetInfo:
    """Make the first key set.

    Args:
        settings: Which HSM token, and the user PIN.
        so_pin: The security officer's PIN; None makes key-encryption keys that are not trusted.

    Raises:
        ConfigurationError: There is a key set already, or a backend of this process is open.
    """
    if _found(settings):
        raise ConfigurationError(
            "the HSM token has keys of this prefix already; `hsmwrap keys rotate` makes new ones"
        )
    return _create(settings, so_pin, 1)


def rotate(settings: Pkcs11Settings, so_pin: PinSource | None) -> KeySetInfo:
    """Make another key set and make it current; the old ones keep opening what they sealed.

    Raises:
        ConfigurationError: There is none yet, the present one is trusted and the SO PIN is
            missing, or a backend of this process is open.
    """
    present = _found(settings)
    if not present:
        raise ConfigurationError("there are no keys to rotate; run `hsmwrap keys init`")
    if so_pin is None and any(each.trusted for each in present):
        raise ConfigurationError(
            "the HSM token has trusted keys, and untrusted ones would not replace them; "
            "rotate with the SO PIN"
        )
    return _create(settings, so_pin, present[-1].number + 1)


def retire(settings: Pkcs11Settings, key_id: str) -> None:
    """Destroy a key set that is not current.

    Whatever it sealed is lost: import tokens (so wait 24 hours after the rotation) and imported
    keys in custody HsmEncryptedDatabase (so import them again first).

    Raises:
        ConfigurationError: It is not there, or it is the current one.
    """
    sets = {str(each.number): each for each in _found(settings)}
    if key_id not in sets:
        raise ConfigurationError(f"there is no key set {key_id}; there are {', '.join(sets)}")
    if sets[key_id].current:
        raise ConfigurationError(f"key set {key_id} is current; rotate first")
    keys = KeySets(settings.key_prefix)
    connection = Connection(settings)
    try:
        connection.run(lambda pooled: keys.destroy(pooled.session, sets[key_id].number))
    finally:
        connection.close()


def _create(settings: Pkcs11Settings, so_pin: PinSource | None, number: int) -> KeySetInfo:
    keys = KeySets(settings.key_prefix)
    keks: list[Role] = [role for role in Role if role is not Role.SEAL]
    if so_pin is not None:
        with _officer_session(settings, so_pin) as session:
            for role in keks:
                keys.create(session, role, number, trusted=True)
        keks = []
    connection = Connection(settings)
    try:
        # The seal key comes last: a set without one does not count (KeySets.list).
        for role in (*keks, Role.SEAL):
            connection.run(partial(_create_one, keys, role, number), retry=False)
        listed = connection.run(lambda pooled: keys.list(pooled.session))
        return next(each.info() for each in listed if each.number == number)
    finally:
        connection.close()


def _create_one(keys: KeySets, role: Role, number: int, pooled: PooledSession) -> None:
    keys.create(pooled.session, role, number, trusted=False)


@contextmanager
def _officer_session(settings: Pkcs11Settings, so_pin: PinSource) -> Iterator[Session]:
    """A security officer's session; nobody else may be logged in in this process."""
    host = ModuleHost.acquire(settings.module, settings.library_parameters)
    try:
        with host.inside(settings.session_wait) as (module, _generation):
            token = find_token(module, settings.selector)
            try:
                session = token.open(
                    rw=True, so_pin=so_pin.read().reveal(), attribute_mapper=HsmAttributeMapper()
                )
            except PKCS11Error as error:
                raise _officer_error(error) from None
            try:
                yield session
            except PKCS11Error as error:
                raise HsmError(f"the HSM answered {code_name(error)}") from None
            finally:
                session.close()
    finally:
        host.release()


def _officer_error(error: PKCS11Error) -> PinError | ConfigurationError:
    name = code_name(error)
    if name.startswith("PIN_"):
        return PinError(f"the HSM token answered {name} to the security officer's PIN")
    return ConfigurationError(
        f"the security officer cannot log in ({name}); close this process's backends first"
    )
