"""Whether an HSM token tells keys that it generated from keys whose value may be known.

A key that was created, unwrapped or derived may have a value that the holder of the PIN knows:
CKM_AES_ECB_ENCRYPT_DATA derives one from data that the same key encrypts. Derived keys inherit
ALWAYS_SENSITIVE and NEVER_EXTRACTABLE from their base key (PKCS#11 v2.40, 2.8.11; field note 74).
CKA_LOCAL tells them apart, and CKA_KEY_GEN_MECHANISM tells generation from generation by password,
where a token is right about them. NSS is not (field note 47). So it is tried.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import partial
from typing import Any

from pkcs11.constants import Attribute, MechanismFlag, ObjectClass
from pkcs11.exceptions import MechanismInvalid, PKCS11Error
from pkcs11.mechanisms import KeyType, Mechanism
from pkcs11.types import Session

from hsmwrap.pkcs11.binding import traits
from hsmwrap.pkcs11.binding.client_errors import read_if_known
from hsmwrap.pkcs11.binding.returncodes import recovery_of
from hsmwrap.pkcs11.binding.trials import unless_refused
from hsmwrap.pkcs11.sessions.session import find_objects

_BYTES = 32
_DERIVATIONS: tuple[tuple[Mechanism, Any], ...] = (
    (Mechanism.AES_ECB_ENCRYPT_DATA, bytes(_BYTES)),
    (Mechanism.AES_CBC_ENCRYPT_DATA, (bytes(16), bytes(_BYTES))),
)


def generated(key_type: KeyType) -> Mapping[Attribute, Any]:
    """What a token that tells the truth says of a key of this type that it generated."""
    aes = key_type is KeyType.AES
    mechanism = Mechanism.AES_KEY_GEN if aes else Mechanism.GENERIC_SECRET_KEY_GEN
    return {Attribute.LOCAL: True, Attribute.KEY_GEN_MECHANISM: mechanism}


def told_by(session: Session) -> frozenset[Attribute]:
    """Which of these attributes the HSM token is right about: of each kind of key, tried.

    An attribute counts if a generated key has it, and no key has it that was created, unwrapped
    or derived. Makes session objects, and destroys them.

    Raises:
        PKCS11Error: A return code that says something about the connection, not the token.
    """
    uses = MechanismFlag.ENCRYPT | MechanismFlag.WRAP | MechanismFlag.UNWRAP
    generate = partial(session.generate_key, KeyType.AES, 8 * _BYTES)
    base = unless_refused(partial(generate, capabilities=uses | MechanismFlag.DERIVE))
    derivations = () if base is None else _DERIVATIONS
    base = base or unless_refused(partial(generate, capabilities=uses))
    if base is None:
        return frozenset()
    ways = [partial(_create, session), partial(_unwrap, session, base)]
    ways += [partial(_derive, base, *derivation) for derivation in derivations]
    try:
        told = _said(base)
        for make in ways:
            key = unless_refused(make)
            if key is not None:
                try:
                    told -= _said(key)
                finally:
                    _discard(key)
    finally:
        _discard(base)
    return told


def user_makes_trusted(session: Session) -> bool | None:
    """Whether the holder of the user PIN can make a key with CKA_TRUSTED.

    None if not one without, or if the profile forbids to ask.

    Makes session objects, and destroys them; by their label, as SoftHSM leaves the one that it
    refuses, without the attribute (field note 84).

    Raises:
        PKCS11Error: A return code that says something about the connection, not the token.
    """
    if Attribute.TRUSTED in traits.here().never_attributes:
        return None
    label = f"trust:{secrets.token_hex(8)}"

    def generate(more: Mapping[Attribute, Any]) -> Any:
        template = {Attribute.PRIVATE: False, **more}
        return session.generate_key(
            KeyType.AES,
            8 * _BYTES,
            label=label,
            capabilities=MechanismFlag.WRAP,
            template=template,
        )

    try:
        plain = unless_refused(partial(generate, {}))
        trusted = unless_refused(partial(generate, {Attribute.TRUSTED: True}))
        if trusted is not None and read_if_known(trusted, Attribute.TRUSTED):
            return True
        return None if plain is None else False
    finally:
        for key in list(find_objects(session, {Attribute.LABEL: label, Attribute.TOKEN: False})):
            _discard(key)


def _said(key: Any) -> frozenset[Attribute]:
    """The attributes by which the token calls this key one that it generated."""
    expected = generated(KeyType.AES)
    return frozenset(each for each in expected if read_if_known(key, each) == expected[each])


def _create(session: Session) -> Any:
    return session.create_object(
        {
            Attribute.CLASS: ObjectClass.SECRET_KEY,
            Attribute.KEY_TYPE: KeyType.AES,
            Attribute.VALUE: secrets.token_bytes(_BYTES),
            # Public, so that a session without a login can make it too.
            Attribute.TOKEN: False,
            Attribute.PRIVATE: False,
        }
    )


def _unwrap(session: Session, base: Any) -> Any:
    key = _create(session)
    try:
        mechanism, blob = _wrapped(base, key)
    finally:
        _discard(key)
    return base.unwrap_key(ObjectClass.SECRET_KEY, KeyType.AES, blob, mechanism=mechanism)


def _wrapped(base: Any, key: Any) -> tuple[Mechanism, bytes]:
    refused: PKCS11Error = MechanismInvalid("the profile has no AES key wrap")
    for mechanism in traits.here().key_wraps:
        try:
            return mechanism, base.wrap_key(key, mechanism=mechanism)
        except PKCS11Error as error:
            if recovery_of(error) is not None:
                raise
            refused = error
    raise refused


def _derive(base: Any, mechanism: Mechanism, parameter: Any) -> Any:
    length = 8 * _BYTES
    return base.derive_key(KeyType.AES, length, mechanism=mechanism, mechanism_param=parameter)


def _discard(key: Any) -> None:
    """Destroy a session object; what cannot be destroyed goes with the session."""
    try:
        key.destroy()
    except PKCS11Error as error:
        if recovery_of(error) is not None:
            raise
