"""What a PKCS#11 module and an HSM token say they are."""

from __future__ import annotations

from typing import Any

from pkcs11.constants import MechanismFlag, TokenFlag
from pkcs11.exceptions import PKCS11Error

from hsmwrap.pkcs11.binding import traits
from hsmwrap.pkcs11.binding.host import ModuleHost
from hsmwrap.pkcs11.binding.returncodes import recovery_of
from hsmwrap.pkcs11.sessions.connection import Connection
from hsmwrap.pkcs11.sessions.session import PooledSession
from hsmwrap.pkcs11.settings import Pkcs11Settings

VENDOR_DEFINED = 0x80000000
"""CKM_VENDOR_DEFINED: numbers from here on are a vendor's."""


def describe_module(settings: Pkcs11Settings) -> dict[str, Any]:
    """Path, manufacturer, description, version, Cryptoki version, whether it locks."""
    host = ModuleHost.acquire(settings.module, settings.reserved, settings.traits)
    try:
        with host.inside(settings.session_wait) as (module, _generation):
            return {
                "path": settings.module,
                "manufacturer": _plain(module.manufacturer_id),
                "description": _plain(module.library_description),
                "version": _version(module.library_version),
                "cryptoki_version": _version(module.cryptoki_version),
                "locks": module.os_locking,
            }
    finally:
        host.release()


def describe_token(connection: Connection) -> dict[str, Any]:
    """Label, serial number, manufacturer, model, versions, slot, flags."""
    return connection.run(_token)


def _token(pooled: PooledSession) -> dict[str, Any]:
    slot = pooled.session.token.slot
    token = slot.get_token()
    return {
        "label": _plain(token.label),
        "serial": _plain(token.serial.decode("utf-8", "replace")),
        "manufacturer": _plain(token.manufacturer_id),
        "model": _plain(token.model),
        "hardware_version": _version(token.hardware_version),
        "firmware_version": _version(token.firmware_version),
        "slot": slot.slot_id,
        "slot_description": _plain(slot.slot_description),
        "flags": [flag.name for flag in TokenFlag if token.flags & flag],
    }


def vendor_mechanisms(connection: Connection) -> dict[int, list[str]]:
    """The mechanisms with a number of the vendor's, and what the module says that each is for.

    A module says what it likes there (field note 8): what works is tried.
    """
    return connection.run(_vendor_mechanisms)


def _vendor_mechanisms(pooled: PooledSession) -> dict[int, list[str]]:
    slot, never = pooled.session.token.slot, traits.here().never_mechanisms
    said: dict[int, list[str]] = {}
    for each in sorted(each for each in slot.get_mechanisms() if each >= VENDOR_DEFINED):
        said[int(each)] = []
        if each in never:
            continue
        try:
            flags = slot.get_mechanism_info(each).flags
        except PKCS11Error as error:
            if recovery_of(error) is not None:
                raise
            continue  # it is listed all the same
        said[int(each)] = [str(flag.name) for flag in MechanismFlag if flags & flag]
    return said


def _version(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _plain(text: str) -> str:
    return text.rstrip(" \0")
