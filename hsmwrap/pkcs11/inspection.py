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

from pkcs11.constants import Attribute, ObjectClass
from pkcs11.mechanisms import Mechanism

from hsmwrap.pkcs11.binding import profiles
from hsmwrap.pkcs11.keysets import admin
from hsmwrap.pkcs11.sessions.identity import (
    VENDOR_DEFINED,
    describe_module,
    describe_token,
    vendor_mechanisms,
)
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
        mechanisms: Those of the vendor's own, and of the profile: number, what the module says
            that it is for, what the profile calls it.
    """

    module: dict[str, Any]
    token: dict[str, Any]
    mechanisms: list[dict[str, Any]]

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
        mechanisms = _mechanisms(settings, vendor_mechanisms(connection))
        return Identity(describe_module(settings), describe_token(connection), mechanisms)


def _mechanisms(settings: Pkcs11Settings, said: dict[int, list[str]]) -> list[dict[str, Any]]:
    of_profile: dict[int, list[str]] = {}
    for name, number in profiles.vendor_numbers(settings.vendor, settings.sm4).items():
        if isinstance(number, Mechanism) and number >= VENDOR_DEFINED:
            of_profile.setdefault(int(number), []).append(name)
    return [
        {
            "mechanism": f"{number:#x}",
            "listed": number in said,
            "for": said.get(number, []),
            "profile": of_profile.get(number, []),
        }
        for number in sorted({*said, *of_profile})
    ]


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
