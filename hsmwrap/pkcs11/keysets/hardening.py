"""Attributes that harden a key beyond its uses, and which of them an HSM token knows.

Older and simpler tokens refuse some of them; then keys are made without, and the capability
report says what is weaker. Session objects do not tell: NSS gives them any attribute and refuses
it for token objects (field note 48). So this is tried on token objects when a key set is made, and
every process later reads it from the key-encryption keys.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pkcs11.constants import Attribute, MechanismFlag
from pkcs11.exceptions import PKCS11Error
from pkcs11.types import Session

from hsmwrap.pkcs11.binding import traits
from hsmwrap.pkcs11.binding.client_errors import read_if_known
from hsmwrap.pkcs11.binding.templates import (
    AES_KEY_WRAP,
    NestedTemplate,
    Template,
    secret_key,
)
from hsmwrap.pkcs11.binding.traits import BlockCipher
from hsmwrap.pkcs11.binding.trials import generate_trial_key

NOTHING: frozenset[Attribute] = frozenset()
OF_UNWRAPPED_KEYS = frozenset({Attribute.COPYABLE, Attribute.MODIFIABLE})
"""Those that are in the unwrap templates of key-encryption keys."""
_FALSE: Mapping[Attribute, Any] = MappingProxyType(
    {Attribute.COPYABLE: False, Attribute.MODIFIABLE: False}
)


def refused_by(session: Session, cipher: BlockCipher) -> frozenset[Attribute]:
    """Try each attribute on a token object, which is destroyed at once.

    Raises:
        PKCS11Error: The HSM token does not even make the plain object.
    """
    tried: Template = {
        **_FALSE,
        Attribute.ALLOWED_MECHANISMS: (*cipher.key_wraps, AES_KEY_WRAP)[:1],
        Attribute.UNWRAP_TEMPLATE: NestedTemplate(secret_key(cipher.key_type)),
    }
    _make_and_destroy(session, cipher, {})
    return frozenset(a for a, value in tried.items() if _refuses(session, cipher, {a: value}))


def _refuses(session: Session, cipher: BlockCipher, template: Template) -> bool:
    """Whether it refuses twice, and makes the plain object in between.

    The return code does not tell: p11-kit's client answers DEVICE_ERROR to CKA_UNWRAP_TEMPLATE
    (field note 49), which elsewhere means that the HSM is gone.
    """
    for _ in range(2):
        try:
            _make_and_destroy(session, cipher, template)
        except PKCS11Error:
            _make_and_destroy(session, cipher, {})
        else:
            return False
    return True


def _make_and_destroy(session: Session, cipher: BlockCipher, template: Template) -> None:
    # Public, so that the security officer can make it too; with an id, as NSS replaces a key by
    # another of its id (field note 46).
    public: Template = {
        Attribute.KEY_TYPE: cipher.key_type,
        Attribute.ID: secrets.token_bytes(16),
        Attribute.TOKEN: True,
        Attribute.PRIVATE: False,
    }
    uses = MechanismFlag.WRAP | MechanismFlag.UNWRAP
    generate_trial_key(
        session, public | template, cipher.length, cipher.generate, uses=uses
    ).destroy()


def missing_on(key_encryption_key: Any) -> frozenset[Attribute]:
    """Attributes that the key lacks; CKA_UNWRAP_TEMPLATE cannot be read (field note 50)."""
    # Values of which a key-encryption key has one.
    wraps = [(each,) for cipher in traits.here().ciphers for each in cipher.key_wraps]
    as_made = {each: [value] for each, value in _FALSE.items()}
    as_made[Attribute.ALLOWED_MECHANISMS] = wraps
    return frozenset(
        attribute
        for attribute, values in as_made.items()
        if read_if_known(key_encryption_key, attribute) not in values
    )
