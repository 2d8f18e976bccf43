"""Making keys in the HSM token: what was asked for is read back, or the key is destroyed.

opencryptoki 3.8.1 ignores SENSITIVE and EXTRACTABLE in the template of C_UnwrapKey without a word
(field note 82), so an answer of OK says nothing about a key's protection. Every key that the
backend keeps or uses is made here, and a test sees to it that none is made elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum, auto
from typing import Any

from pkcs11.constants import Attribute, MechanismFlag
from pkcs11.defaults import DEFAULT_GENERATE_MECHANISMS
from pkcs11.exceptions import PKCS11Error
from pkcs11.mechanisms import KeyType, Mechanism
from pkcs11.types import Session

from hsmwrap.errors import ProtectionNotKept
from hsmwrap.pkcs11.binding import traits
from hsmwrap.pkcs11.binding.client_errors import attribute_reads
from hsmwrap.pkcs11.binding.mechanisms import noted
from hsmwrap.pkcs11.binding.returncodes import recovery_of
from hsmwrap.pkcs11.binding.templates import AES_KEY_WRAP, USES, Template, for_unwrap, without

READ_BACK = (
    Attribute.SENSITIVE,
    Attribute.EXTRACTABLE,
    Attribute.PRIVATE,
    Attribute.TOKEN,
    Attribute.WRAP_WITH_TRUSTED,
    *USES,
)
"""What a key has to have as its template says. Whether the HSM token heeds the other attributes,
their values do not tell: that is tried (:mod:`hsmwrap.pkcs11.wrapping.protections`)."""

_CLOSING = frozenset({Attribute.MODIFIABLE, Attribute.COPYABLE})
_OF_STORED = frozenset({Attribute.ID, Attribute.LABEL})
_OF_COPIES = frozenset(
    {
        Attribute.TOKEN,
        Attribute.PRIVATE,
        Attribute.SENSITIVE,
        Attribute.EXTRACTABLE,
        *USES,
        *_CLOSING,
        *_OF_STORED,
    }
)


class Way(Enum):
    """How an HSM token is brought to give an unwrapped key the attributes of its template.

    In the order in which they are tried.
    """

    AS_ASKED = auto()
    """C_UnwrapKey heeds its template."""
    COPIED = auto()
    """C_CopyObject heeds its template: the key is unwrapped as a session object, which other
    processes do not see, and copied."""
    CHANGED = auto()
    """C_SetAttributeValue does, on a key without CKA_MODIFIABLE = false. It stays modifiable, and
    other processes see a token object before it is changed: the report says so."""


def unwrap(
    key: Any,
    blob: bytes,
    template: Template,
    *,
    mechanism: Mechanism = AES_KEY_WRAP,
    parameter: Any = None,
    answers: AbstractContextManager[None] | None = None,
    way: Way = Way.AS_ASKED,
) -> Any:
    """Unwrap ``blob`` by ``key`` into a key with ``template``; returns the key object.

    Args:
        key: The unwrapping key.
        blob: The wrapped key.
        template: What it becomes.
        mechanism: How it was wrapped.
        parameter: The mechanism's parameter.
        answers: What maps the answer of C_UnwrapKey itself, as that to a client's ciphertext; the
            answers of other functions are not mapped.
        way: What the HSM token needs.

    Raises:
        ProtectionNotKept: The key had other attributes, and was destroyed.
        PKCS11Error: The HSM token refuses.
    """

    def make(becomes: Template) -> Any:
        with answers or nullcontext():
            return key.unwrap_key(
                key_data=blob,
                mechanism=mechanism,
                mechanism_param=parameter,
                **for_unwrap(becomes),
            )

    return _made(make, template, way)


def create(session: Session, template: Template, value: bytes, *, way: Way = Way.AS_ASKED) -> Any:
    """Make a secret key of ``value``; by ``way``, which does the same work as unwrapping.

    Raises:
        ProtectionNotKept: The key had other attributes, and was destroyed.
        PKCS11Error: The HSM token refuses.
    """
    as_unwrapped: Template = {}
    if way is Way.CHANGED:
        as_unwrapped = {Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}

    def make(becomes: Template) -> Any:
        traits.require_sent(None, becomes)
        return session.create_object({**becomes, **as_unwrapped, Attribute.VALUE: value})

    return _made(make, template, way)


def generate_key(
    session: Session, template: Template, length: int, *, mechanism: Mechanism | None = None
) -> Any:
    """Generate a secret key of ``length`` bytes, by the mechanism of its type or by another.

    Raises:
        ProtectionNotKept: The key had other attributes, and was destroyed.
        PKCS11Error: The HSM token refuses.
    """
    key_type = template[Attribute.KEY_TYPE]
    cipher = traits.here().cipher_of(key_type)
    used = mechanism or (cipher and cipher.generate) or DEFAULT_GENERATE_MECHANISMS.get(key_type)
    traits.require_sent(used, template)
    with noted("mechanism", used):
        key = session.generate_key(
            key_type,
            8 * length,
            store=template[Attribute.TOKEN],
            capabilities=MechanismFlag(0),
            mechanism=used,
            template=template,
        )
    return _kept(key, template)


def generate_pair(
    session: Session,
    template: Template,
    *,
    public_template: Template,
    length: int | None = None,
    mechanism: Mechanism | None = None,
) -> tuple[Any, Any]:
    """Generate a pair whose private key has ``template``; returns the public and private key.

    Args:
        session: The session; the public key is its session object.
        template: Of the private key.
        public_template: Of the public key.
        length: Bits of an RSA modulus; None for keys on curves.
        mechanism: Another than the key type's own.

    Raises:
        ProtectionNotKept: The private key had other attributes, and both were destroyed.
        PKCS11Error: The HSM token refuses.
    """
    key_type: KeyType = template[Attribute.KEY_TYPE]
    public, private = session.generate_keypair(
        *((key_type,) if length is None else (key_type, length)),
        capabilities=0,
        mechanism=mechanism,
        public_template=public_template,
        private_template=template,
    )
    try:
        return public, _kept(private, template)
    except ProtectionNotKept:
        public.destroy()
        raise


def _made(make: Callable[[Template], Any], template: Template, way: Way) -> Any:
    if way is Way.AS_ASKED:
        return _kept(make(template), template)
    loose = without(template, _CLOSING)
    if way is Way.CHANGED:
        return _kept(make(loose), template)
    session_object = {**without(loose, _OF_STORED), Attribute.TOKEN: False}
    first = make(session_object)
    try:
        copy = first.copy({a: value for a, value in template.items() if a in _OF_COPIES})
    finally:
        first.destroy()
    return _kept(copy, template)


def _kept(key: Any, asked: Template) -> Any:
    """The key, if it is as it was asked for, or can be made so; without MODIFIABLE it cannot.

    Raises:
        ProtectionNotKept: It was destroyed.
    """
    different = _different(key, asked)
    if not different:
        return key
    for attribute in different:
        try:
            key[attribute] = asked[attribute]
        except PKCS11Error as error:
            if recovery_of(error) is not None:
                raise
    different = _different(key, asked)
    if not different:
        return key
    key.destroy()
    raise ProtectionNotKept(f"CKA_{each.name}" for each in different)


def _different(key: Any, asked: Template) -> Iterable[Attribute]:
    """All are read at once: python-pkcs11 asks for the lengths, then for the values.

    A use that the HSM token does not know is not a difference.
    """
    wanted = [each for each in READ_BACK if each in asked]
    with attribute_reads():
        told = key.get_attributes(wanted)
    return [a for a in wanted if told.get(a, asked[a] if a in USES else None) != asked[a]]
