"""Whether an HSM token tells keys that it generated from keys whose value may be known.

A key that was created, unwrapped or derived may have a value that the holder of the PIN knows:
CKM_AES_ECB_ENCRYPT_DATA derives one from data that the same key encrypts. Derived keys inherit
ALWAYS_SENSITIVE and NEVER_EXTRACTABLE from their base key (PKCS#11 v2.40, 2.8.11; field note 74).
CKA_LOCAL tells them apart, and CKA_KEY_GEN_MECHANISM tells generation from generation by password,
where a token is right about them. NSS is not (field note 47). So it is tried.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from pkcs11.constants import Attribute, MechanismFlag, ObjectClass
from pkcs11.exceptions import (
    AttributeReadOnly,
    MechanismInvalid,
    PKCS11Error,
    UserNotLoggedIn,
)
from pkcs11.mechanisms import KeyType, Mechanism
from pkcs11.types import Session

from hsmwrap.pkcs11.binding import traits
from hsmwrap.pkcs11.binding.client_errors import read_if_known
from hsmwrap.pkcs11.binding.returncodes import recovery_of
from hsmwrap.pkcs11.binding.templates import Template
from hsmwrap.pkcs11.binding.traits import BlockCipher
from hsmwrap.pkcs11.binding.trials import generate_trial_key, unless_refused
from hsmwrap.pkcs11.sessions.session import find_objects

Told = Mapping[int, frozenset[Attribute]]
"""By the type of the key: which of the attributes below the HSM token is right about."""

_AES_BYTES = 32
_DERIVATIONS: Mapping[int, tuple[tuple[Mechanism, Any], ...]] = MappingProxyType(
    {
        KeyType.AES: (
            (Mechanism.AES_ECB_ENCRYPT_DATA, bytes(_AES_BYTES)),
            (Mechanism.AES_CBC_ENCRYPT_DATA, (bytes(16), bytes(_AES_BYTES))),
        )
    }
)
"""That are known of a cipher; of a vendor's none is."""


def generated(key_type: KeyType) -> Mapping[Attribute, Any]:
    """What a token that tells the truth says of a key of this type that it generated."""
    cipher = traits.here().cipher_of(key_type)
    mechanism = Mechanism.GENERIC_SECRET_KEY_GEN if cipher is None else cipher.generate
    return {Attribute.LOCAL: True, Attribute.KEY_GEN_MECHANISM: mechanism}


def told_by(session: Session) -> Told:
    """Which of these attributes the HSM token is right about: of each kind of key, tried.

    An attribute counts if a generated key has it, and no key has it that was created, unwrapped
    or derived. Makes session objects, and destroys them. Of a cipher whose keys are not made the
    result has nothing.

    Raises:
        PKCS11Error: A return code that says something about the connection, not the token.
    """
    told = {each.key_type: _told_of(session, each) for each in traits.here().ciphers}
    return {key_type: each for key_type, each in told.items() if each is not None}


def of_others(told: Told) -> frozenset[Attribute]:
    """Of keys of another type, such as MAC keys: what is right of every type that was tried."""
    return frozenset.intersection(*told.values()) if told else frozenset()


def _told_of(session: Session, cipher: BlockCipher) -> frozenset[Attribute] | None:
    uses = MechanismFlag.ENCRYPT | MechanismFlag.WRAP | MechanismFlag.UNWRAP
    generate = partial(_generate, session, cipher)
    known = _DERIVATIONS.get(cipher.key_type, ())
    base = known and unless_refused(partial(generate, uses | MechanismFlag.DERIVE))
    derivations = known if base else ()
    base = base or unless_refused(partial(generate, uses))
    if base is None:
        return None
    ways = [partial(_create, session, cipher), partial(_unwrap, session, cipher, base)]
    ways += [partial(_derive, base, *derivation) for derivation in derivations]
    try:
        told = _said(base, cipher)
        for make in ways:
            key = unless_refused(make)
            if key is not None:
                try:
                    told -= _said(key, cipher)
                finally:
                    _discard(key)
    finally:
        _discard(base)
    return told


def user_makes_trusted(session: Session) -> bool | None:
    """Whether the holder of the user PIN can make a key with CKA_TRUSTED.

    None if not one without, or if the profile forbids to ask.

    Makes session objects, and destroys them; by their label, as SoftHSM leaves the one that it
    refuses, without the attribute (field note 84). opencryptoki 3.23 refuses with
    USER_NOT_LOGGED_IN (field note 105).

    Raises:
        PKCS11Error: A return code that says something about the connection, not the token.
    """
    if Attribute.TRUSTED in traits.here().never_attributes:
        return None
    label = f"trust:{secrets.token_hex(8)}"
    named = {Attribute.LABEL: label}
    made = False
    try:
        for cipher in traits.here().ciphers:
            generate = partial(_generate, session, cipher, MechanismFlag.WRAP)
            made |= (
                unless_refused(partial(generate, {**named, Attribute.PRIVATE: False})) is not None
            )
            trusted = unless_refused(partial(_generate_trusted, generate, named))
            if trusted is not None and read_if_known(trusted, Attribute.TRUSTED):
                return True
        return False if made else None
    finally:
        for key in list(find_objects(session, {Attribute.LABEL: label, Attribute.TOKEN: False})):
            _discard(key)


def _generate(
    session: Session, cipher: BlockCipher, uses: MechanismFlag, more: Template | None = None
) -> Any:
    template = {Attribute.KEY_TYPE: cipher.key_type, **(more or {})}
    return generate_trial_key(session, template, cipher.length, cipher.generate, uses=uses)


def _generate_trusted(generate: Callable[[Template], Any], named: Template) -> Any:
    try:
        return generate({**named, Attribute.PRIVATE: False, Attribute.TRUSTED: True})
    except UserNotLoggedIn as error:
        # The security officer's login is meant, or the user's; without that, this fails as well.
        generate({**named, Attribute.PRIVATE: True})
        raise AttributeReadOnly(str(error)) from None


def _said(key: Any, cipher: BlockCipher) -> frozenset[Attribute]:
    """The attributes by which the token calls this key one that it generated."""
    expected = generated(cipher.key_type)
    return frozenset(each for each in expected if read_if_known(key, each) == expected[each])


def _create(
    session: Session, cipher: BlockCipher, more: Mapping[Attribute, Any] | None = None
) -> Any:
    return session.create_object(
        {
            Attribute.CLASS: ObjectClass.SECRET_KEY,
            Attribute.KEY_TYPE: cipher.key_type,
            Attribute.VALUE: secrets.token_bytes(cipher.length),
            # Public, so that a session without a login can make it too.
            Attribute.TOKEN: False,
            Attribute.PRIVATE: False,
            **(more or {}),
        }
    )


def _unwrap(session: Session, cipher: BlockCipher, base: Any) -> Any:
    key = _create(session, cipher, {Attribute.EXTRACTABLE: True})
    try:
        mechanism, blob = _wrapped(cipher, base, key)
    finally:
        _discard(key)
    return base.unwrap_key(ObjectClass.SECRET_KEY, cipher.key_type, blob, mechanism=mechanism)


def _wrapped(cipher: BlockCipher, base: Any, key: Any) -> tuple[Mechanism, bytes]:
    refused: PKCS11Error = MechanismInvalid(f"the profile has no {cipher.name} key wrap")
    for mechanism in cipher.key_wraps:
        try:
            return mechanism, base.wrap_key(key, mechanism=mechanism)
        except PKCS11Error as error:
            if recovery_of(error) is not None:
                raise
            refused = error
    raise refused


def _derive(base: Any, mechanism: Mechanism, parameter: Any) -> Any:
    length = 8 * _AES_BYTES
    return base.derive_key(KeyType.AES, length, mechanism=mechanism, mechanism_param=parameter)


def _discard(key: Any) -> None:
    """Destroy a session object; what cannot be destroyed goes with the session."""
    try:
        key.destroy()
    except PKCS11Error as error:
        if recovery_of(error) is not None:
            raise
