"""What ``hsmwrap doctor`` asks of a PKCS#11 module beside the contract: what it is, what is in it.

Each call has a connection of its own and closes it: for as long as a backend is open, no session is
taken from it.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pkcs11.constants import Attribute, ObjectClass, TokenFlag
from pkcs11.types import Slot

from hsmwrap.pkcs11.binding import profiles
from hsmwrap.pkcs11.binding.host import ModuleHost
from hsmwrap.pkcs11.binding.module import Module
from hsmwrap.pkcs11.keysets import admin
from hsmwrap.pkcs11.sessions.session import PooledSession
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.token.pin import PinSource

TRIAL_PREFIX = "doctor"
"""Start of the ``key_prefix`` of key sets that exist for a trial only."""

Objects = Counter[tuple[str, str, str]]
"""Token objects by class, label and id (hex): how many there are of each."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What module and HSM token say they are.

    Attributes:
        module: Path, manufacturer, description, version, Cryptoki version, whether it locks.
        token: Label, serial number, manufacturer, model, versions, slot, flags.
    """

    module: dict[str, Any]
    token: dict[str, Any]

    @property
    def profiles(self) -> tuple[str, ...]:
        """Names of the vendor profiles that are for what calls itself this."""
        said = (self.token["manufacturer"], self.token["model"], self.module["description"])
        return profiles.fitting(*said)


def identify(settings: Pkcs11Settings) -> Identity:
    """Ask the module and the HSM token what they are.

    Raises:
        As :func:`admin.connected`.
    """
    with admin.connected(settings) as connection:
        token = connection.run(lambda pooled: _token(pooled.session.token.slot))
        host = ModuleHost.acquire(settings.module, settings.library_parameters)
        try:
            with host.inside(settings.session_wait) as (module, _generation):
                return Identity(_module(settings.module, module), token)
        finally:
            host.release()


def _module(path: str, module: Module) -> dict[str, Any]:
    return {
        "path": path,
        "manufacturer": _plain(module.manufacturer_id),
        "description": _plain(module.library_description),
        "version": _version(module.library_version),
        "cryptoki_version": _version(module.cryptoki_version),
        "locks": module.os_locking,
    }


def _token(slot: Slot) -> dict[str, Any]:
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


def token_objects(settings: Pkcs11Settings) -> Objects:
    """All token objects that the user sees."""

    def count(pooled: PooledSession) -> Objects:
        return Counter(map(_name, pooled.find({Attribute.TOKEN: True})))

    with admin.connected(settings) as connection:
        return connection.run(count)


@contextmanager
def trial_keys(settings: Pkcs11Settings, so_pin: PinSource | None) -> Iterator[str]:
    """Make a key set under a ``key_prefix`` of its own, yield that, destroy the key set.

    Args:
        settings: Which HSM token, and the user PIN.
        so_pin: The security officer's PIN; None makes keys that are not trusted.

    Raises:
        As :func:`admin.initialise`.
    """
    prefix = f"{TRIAL_PREFIX}-{secrets.token_hex(8)}"
    own = replace(settings, key_prefix=prefix)
    admin.initialise(own, so_pin)
    try:
        yield prefix
    finally:
        admin.destroy_all(own)


def _name(found: Any) -> tuple[str, str, str]:
    attributes = found.get_attributes([Attribute.CLASS, Attribute.LABEL, Attribute.ID])
    kind = attributes.get(Attribute.CLASS)
    named = kind.name if isinstance(kind, ObjectClass) else str(kind)
    return named, attributes.get(Attribute.LABEL, ""), attributes.get(Attribute.ID, b"").hex()


def _version(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _plain(text: str) -> str:
    return text.rstrip(" \0")
