"""The backend's own keys in the HSM token: one seal key and the key-encryption keys.

A *key set* has a number; the highest is current, older ones keep opening what they sealed until
they are retired. Each key does one job. A key-encryption key wraps and unwraps, nothing else, and
carries CKA_UNWRAP_TEMPLATE: whoever has the PIN can unwrap a blob only into the very kind of
object that this backend would make, sensitive, not extractable, and of no other use. Where the
security officer helps, it is CKA_TRUSTED too, and what it is to wrap is marked
CKA_WRAP_WITH_TRUSTED, so that no other key can wrap it (field note 20).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from pkcs11.constants import Attribute, MechanismFlag, ObjectClass
from pkcs11.exceptions import PKCS11Error
from pkcs11.mechanisms import KeyType
from pkcs11.types import Session

from hsmwrap.backend import KeySetInfo
from hsmwrap.errors import ConfigurationError
from hsmwrap.pkcs11.pool import PooledSession
from hsmwrap.pkcs11.templates import (
    AES_KEY_WRAP,
    NestedTemplate,
    Template,
    private_key,
    secret_key,
)

CURRENT_SET_LIFETIME = 60.0
"""Seconds until a process looks again whether another one rotated the keys."""


class Role(StrEnum):
    """What a key of a key set does; part of its label."""

    SEAL = "seal"
    """Authenticates import tokens (SHA256-HMAC)."""
    WRAPPING_UNWRAP = "kek-wrapping-unwrap"
    """Wraps RSA wrapping keys that may only C_UnwrapKey."""
    WRAPPING_DECRYPT = "kek-wrapping-decrypt"
    """Wraps RSA wrapping keys that may only C_Decrypt, for the paths through the host."""
    WRAPPING_DERIVE = "kek-wrapping-derive"
    """Wraps SM2 wrapping keys, where the token can unwrap them."""
    MATERIAL_AES = "kek-material-aes"
    """Wraps imported AES keys."""
    MATERIAL_SM4 = "kek-material-sm4"
    """Wraps imported SM4 keys that the token only keeps (as generic secrets)."""


OPENS: Mapping[Role, Template] = MappingProxyType(
    {
        Role.WRAPPING_UNWRAP: private_key(KeyType.RSA, Attribute.UNWRAP),
        Role.WRAPPING_DECRYPT: private_key(KeyType.RSA, Attribute.DECRYPT),
        Role.WRAPPING_DERIVE: private_key(KeyType.EC, Attribute.DERIVE),
        Role.MATERIAL_AES: secret_key(KeyType.AES, Attribute.ENCRYPT, Attribute.DECRYPT),
        Role.MATERIAL_SM4: secret_key(KeyType.GENERIC_SECRET),
    }
)
"""What a blob of each key-encryption key becomes, and the only thing that it can become."""


@dataclass(frozen=True, slots=True)
class KeySet:
    """A key set as found in the HSM token."""

    number: int
    current: bool
    roles: tuple[Role, ...]
    trusted: bool

    def info(self) -> KeySetInfo:
        """For ``hsmwrap keys list``."""
        trust = "trusted" if self.trusted else "NOT trusted (made without the SO PIN)"
        return KeySetInfo(
            str(self.number), self.current, f"{len(self.roles)} keys, key-encryption keys {trust}"
        )


class KeySets:
    """Finds the key sets of one prefix; an instance is shared by the threads of a backend."""

    def __init__(self, prefix: str) -> None:
        """Take the label prefix of this backend's objects."""
        self._prefix = prefix
        self._current: tuple[int, float] | None = None

    @property
    def marker(self) -> bytes:
        """CKA_ID that all keys of all sets share."""
        return f"{self._prefix}:keys".encode()

    def label(self, role: Role, number: int) -> str:
        """CKA_LABEL of one key."""
        return f"{self._prefix}:{role}:{number}"

    def current(self, pooled: PooledSession) -> int:
        """Number of the current key set.

        Raises:
            ConfigurationError: There is none.
        """
        known = self._current
        if known is not None and time.monotonic() < known[1]:
            return known[0]
        numbers = [each.number for each in self.list(pooled.session)]
        if not numbers:
            raise ConfigurationError(
                f"the HSM token has no keys labelled {self._prefix}:…; run `hsmwrap keys init`"
            )
        self._current = (max(numbers), time.monotonic() + CURRENT_SET_LIFETIME)
        return max(numbers)

    def find(self, pooled: PooledSession, role: Role, number: int) -> Any:
        """The key object of this session, or None when there is no such key (any more)."""
        label = self.label(role, number)
        if label not in pooled.objects:
            found = list(pooled.session.get_objects({Attribute.LABEL: label}))
            if len(found) != 1:
                return None
            pooled.objects[label] = found[0]
        return pooled.objects[label]

    def list(self, session: Session) -> list[KeySet]:
        """All key sets, oldest first; one without a seal key was never finished."""
        sets: dict[int, list[tuple[Role, bool]]] = {}
        for key in session.get_objects({Attribute.ID: self.marker}):
            attributes = key.get_attributes([Attribute.LABEL, Attribute.TRUSTED])
            _, role, number = attributes[Attribute.LABEL].rsplit(":", 2)
            trusted = bool(attributes.get(Attribute.TRUSTED, False))
            sets.setdefault(int(number), []).append((Role(role), trusted))
        sets = {number: keys for number, keys in sets.items() if _is_finished(keys)}
        return [
            KeySet(
                number=number,
                current=number == max(sets),
                roles=tuple(role for role, _ in sorted(keys)),
                trusted=all(trusted for role, trusted in keys if role is not Role.SEAL),
            )
            for number, keys in sorted(sets.items())
        ]

    def create(self, session: Session, role: Role, number: int, *, trusted: bool) -> None:
        """Create one key; a trusted key-encryption key needs the security officer's session."""
        if role is Role.SEAL:
            template, capabilities, key_type = _SEAL_KEY, MechanismFlag.SIGN, KeyType.GENERIC_SECRET
        else:
            template, key_type = _key_encryption_key(role, trusted=trusted), KeyType.AES
            capabilities = MechanismFlag.WRAP | MechanismFlag.UNWRAP
        session.generate_key(
            key_type,
            256,
            id=self.marker,
            label=self.label(role, number),
            store=True,
            capabilities=capabilities,
            template=template,
        )

    def destroy(self, session: Session, number: int) -> int:
        """Destroy a key set; returns the number of keys destroyed."""
        labels = {self.label(role, number) for role in Role}
        found = [
            key
            for key in session.get_objects({Attribute.ID: self.marker})
            if key[Attribute.LABEL] in labels
        ]
        for key in found:
            key.destroy()
        self._current = None
        return len(found)


def _is_finished(keys: list[tuple[Role, bool]]) -> bool:
    return any(role is Role.SEAL for role, _ in keys)


_SEAL_KEY: Template = {
    Attribute.CLASS: ObjectClass.SECRET_KEY,
    Attribute.PRIVATE: True,
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
    Attribute.MODIFIABLE: False,
    Attribute.COPYABLE: False,
}


def _key_encryption_key(role: Role, *, trusted: bool) -> Template:
    opens: Template = {
        key: value for key, value in OPENS[role].items() if key is not Attribute.TOKEN
    }
    template: Template = {
        **_SEAL_KEY,
        Attribute.UNWRAP_TEMPLATE: NestedTemplate(opens),
        Attribute.ALLOWED_MECHANISMS: (AES_KEY_WRAP,),
    }
    if trusted:
        # The security officer sees public objects only. Private or not, the key is sensitive,
        # and what it unwraps has to be private, which takes a login.
        template |= {Attribute.TRUSTED: True, Attribute.PRIVATE: False}
    return template


def is_trusted(key: Any) -> bool:
    """Whether this key-encryption key is CKA_TRUSTED."""
    try:
        return bool(key[Attribute.TRUSTED])
    except PKCS11Error:
        return False
