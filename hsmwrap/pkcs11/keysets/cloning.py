"""Key sets in another HSM token, in three steps with files; never in plaintext outside a token.

1. The target makes a transport key: an RSA pair whose private half unwraps key sets and nothing
   else, and never leaves the token. Its public half is a file.
2. The source wraps its movable key sets for it. Its security officer makes the public half trusted
   for as long as that takes, once the operator has confirmed its fingerprint: what is wrapped for
   another key is that key's.
3. The target unwraps them, once the operator has confirmed the fingerprint of the source's file:
   a file like that takes no more than the public half. A set counts when its MAC key is there,
   which comes last. The transport key is destroyed.

Each key is wrapped by RSAES-OAEP with SHA-1, which every token has (field note 8), under an RSA key
of 3072 bits. The transport key's CKA_UNWRAP_TEMPLATE demands CKA_TRUSTED, which a user cannot set,
so the holder of the user PIN can do nothing with it and the file.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
)
from pkcs11.constants import Attribute, ObjectClass
from pkcs11.exceptions import MechanismInvalid
from pkcs11.mechanisms import MGF, KeyType, Mechanism
from pkcs11.types import Session

from hsmwrap.backend import KeySetInfo
from hsmwrap.errors import ConfigurationError, UnsupportedOperation
from hsmwrap.pkcs11.binding import objects
from hsmwrap.pkcs11.binding.client_errors import read
from hsmwrap.pkcs11.binding.returncodes import said
from hsmwrap.pkcs11.binding.templates import private_key, stored
from hsmwrap.pkcs11.keysets import movability
from hsmwrap.pkcs11.keysets.admin import connected, officer_session
from hsmwrap.pkcs11.keysets.keys import Needs
from hsmwrap.pkcs11.keysets.needs import needs_of
from hsmwrap.pkcs11.keysets.wrapped import (
    CarryingKey,
    WrappedSet,
    binary,
    document_of,
    of_every_role,
    parsing,
    take_in,
    text,
    wrap_sets,
)
from hsmwrap.pkcs11.sessions.session import find_objects
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.token.pin import PinSource

_MODULUS_BITS = 3072
_EXPONENT = 65537
_OAEP = (Mechanism.SHA_1, MGF.SHA1, None)
_TRANSPORT = "hsmwrap-transport-key/1"
_KEY_SETS = "hsmwrap-key-sets/1"


@dataclass(frozen=True, slots=True)
class TransportKey:
    """The public half of a target's transport key.

    Attributes:
        public_key: DER SubjectPublicKeyInfo.
    """

    public_key: bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the public key, 64 hexadecimal digits."""
        return hashlib.sha256(self.public_key).hexdigest()

    def to_json(self) -> str:
        """The file."""
        document = {"format": _TRANSPORT, "public_key": text(self.public_key)}
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, raw: str) -> Self:
        """Parse the file.

        Raises:
            ConfigurationError: It is not one.
        """
        with parsing("transport key"):
            document = document_of(raw, _TRANSPORT)
            return cls(binary(document["public_key"]))


@dataclass(frozen=True, slots=True)
class WrappedSets:
    """Key sets that were wrapped for one transport key.

    Attributes:
        transport_key: Fingerprint of that.
        sets: Oldest first.
    """

    transport_key: str
    sets: tuple[WrappedSet, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self._document(), sort_keys=True).encode()).hexdigest()

    def _document(self) -> dict[str, Any]:
        return {
            "format": _KEY_SETS,
            "transport_key": self.transport_key,
            "key_sets": [each.to_document() for each in self.sets],
        }

    def to_json(self) -> str:
        """The file. It is of no use without the transport key's private half."""
        return json.dumps(self._document(), indent=2) + "\n"

    @classmethod
    def from_json(cls, raw: str) -> Self:
        """Parse the file.

        Raises:
            ConfigurationError: It is not one, or a key set in it is not complete.
        """
        with parsing("key sets"):
            document = document_of(raw, _KEY_SETS)
            sets = tuple(map(WrappedSet.from_document, document["key_sets"]))
            return cls(str(document["transport_key"]), sets)


def make_transport_key(settings: Pkcs11Settings, so_pin: PinSource) -> TransportKey:
    """Make a transport key in the HSM token that key sets are to come to; replaces an older one.

    Raises:
        UnsupportedOperation: The token does not keep extractable keys for trusted keys alone, or
            has no RSA.
        PinError, ServiceUnavailable, HsmError: As for :func:`~.admin.initialise`.
    """
    label = _label(settings)
    with connected(settings) as connection:
        needs = connection.run(
            lambda pooled: needs_of(pooled.session, settings.vendor), retry=False
        )
    with officer_session(settings, so_pin) as session:
        if not movability.is_kept(session, needs.cipher, needs.key_wrap):
            raise UnsupportedOperation(
                "this HSM token does not keep extractable keys for trusted keys alone, so key sets "
                "cannot come to it"
            )
        _destroy(session, label)
        template = private_key(KeyType.RSA, Attribute.UNWRAP) | {
            Attribute.PRIVATE: False,
            Attribute.UNWRAP_TEMPLATE: of_every_role(),
            Attribute.ALLOWED_MECHANISMS: (Mechanism.RSA_PKCS_OAEP,),
        }
        with _rsa():
            public, private = objects.generate_pair(
                session,
                stored(template, secrets.token_bytes(16), label),
                public_template={Attribute.PRIVATE: False, Attribute.ENCRYPT: False},
                length=_MODULUS_BITS,
            )
        public.destroy()
        return _public_half(private)


def export(
    settings: Pkcs11Settings, so_pin: PinSource, transport_key: TransportKey, fingerprint: str
) -> WrappedSets:
    """Wrap every movable key set for a transport key.

    Args:
        settings: The source.
        so_pin: The source's security officer's PIN.
        transport_key: From the target's file.
        fingerprint: As the target showed it, by another way than the file.

    Raises:
        UnsupportedOperation: The source has no RSA.
        ConfigurationError: The fingerprint is another one, or the source has no movable key set.
        PinError, ServiceUnavailable, HsmError: As for :func:`~.admin.initialise`.
    """
    _require_fingerprint(fingerprint, transport_key.fingerprint, "transport key")
    numbers = _public_numbers(transport_key)

    @contextmanager
    def public_half(session: Session, _needs: Needs) -> Iterator[CarryingKey]:
        public = session.create_object(
            {
                Attribute.CLASS: ObjectClass.PUBLIC_KEY,
                Attribute.KEY_TYPE: KeyType.RSA,
                Attribute.TOKEN: False,
                Attribute.PRIVATE: False,
                Attribute.TRUSTED: True,
                Attribute.WRAP: True,
                Attribute.WRAP_TEMPLATE: of_every_role(),
                Attribute.ENCRYPT: False,
                Attribute.VERIFY: False,
                Attribute.MODULUS: numbers.n.to_bytes(_MODULUS_BITS // 8, "big"),
                Attribute.PUBLIC_EXPONENT: numbers.e.to_bytes(3, "big"),
            }
        )
        try:
            with _rsa():
                yield CarryingKey(public, Mechanism.RSA_PKCS_OAEP, _OAEP)
        finally:
            public.destroy()

    return WrappedSets(transport_key.fingerprint, wrap_sets(settings, so_pin, public_half))


def import_sets(
    settings: Pkcs11Settings, so_pin: PinSource, wrapped: WrappedSets, fingerprint: str
) -> tuple[KeySetInfo, ...]:
    """Unwrap key sets with the transport key, which is destroyed afterwards.

    Sets that are there already are left alone.

    Args:
        settings: The target.
        so_pin: The target's security officer's PIN.
        wrapped: From the source's file.
        fingerprint: As the source showed it, by another way than the file.

    Returns:
        All key sets of the target.

    Raises:
        ConfigurationError: The fingerprint is another one, the file is for another target, or a
            number is that of another key set. Nothing was made.
        HsmError: A key does not unwrap, or does not open what the set sealed before; nothing is
            kept of its set.
        PinError, ServiceUnavailable: As for :func:`~.admin.initialise`.
    """
    _require_fingerprint(fingerprint, wrapped.fingerprint, "file of key sets")
    label = _label(settings)

    @contextmanager
    def private_half(session: Session, _needs: Needs) -> Iterator[CarryingKey]:
        private = _transport_key(session, label, wrapped.transport_key)
        yield CarryingKey(private, Mechanism.RSA_PKCS_OAEP, _OAEP)

    sets = take_in(settings, so_pin, wrapped.sets, private_half)
    discard_transport_key(settings, so_pin)
    return sets


def discard_transport_key(settings: Pkcs11Settings, so_pin: PinSource) -> None:
    """Destroy the transport key, if there is one.

    Raises:
        PinError, ServiceUnavailable, HsmError: As for :func:`~.admin.initialise`.
    """
    with officer_session(settings, so_pin) as session:
        _destroy(session, _label(settings))


# --- keys -----------------------------------------------------------------------------------------


@contextmanager
def _rsa() -> Iterator[None]:
    """Say that an HSM token without RSA can neither give nor take key sets.

    Raises:
        UnsupportedOperation: It does not know the mechanism.
    """
    try:
        yield
    except MechanismInvalid as error:
        raise UnsupportedOperation(
            "key sets travel between HSM tokens under an RSA key of "
            f"{_MODULUS_BITS} bits, and this one has no RSA: {said(error)}"
        ) from None


def _transport_key(session: Session, label: str, fingerprint: str) -> Any:
    wanted = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.LABEL: label}
    for key in list(find_objects(session, wanted)):
        if _public_half(key).fingerprint == fingerprint:
            return key
    raise ConfigurationError(
        "the file is for another transport key than the one of this HSM token; make one here "
        "(`hsmwrap keys transport-key`) and export for it"
    )


def _public_half(private: Any) -> TransportKey:
    numbers = rsa.RSAPublicNumbers(
        int.from_bytes(read(private, Attribute.PUBLIC_EXPONENT), "big"),
        int.from_bytes(read(private, Attribute.MODULUS), "big"),
    )
    der = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    return TransportKey(numbers.public_key().public_bytes(*der))


def _destroy(session: Session, label: str) -> None:
    wanted = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.LABEL: label}
    for key in list(find_objects(session, wanted)):
        key.destroy()


def _label(settings: Pkcs11Settings) -> str:
    return f"{settings.key_prefix}:transport"


# --- files ----------------------------------------------------------------------------------------


def _require_fingerprint(confirmed: str, actual: str, what: str) -> None:
    given = confirmed.replace(":", "").replace(" ", "").lower()
    if not hmac.compare_digest(given.encode(), actual.encode()):
        raise ConfigurationError(
            f"the {what} has the fingerprint {actual}, which is not the one that was confirmed; "
            "compare it with what the other side showed"
        )


def _public_numbers(transport_key: TransportKey) -> rsa.RSAPublicNumbers:
    try:
        key = load_der_public_key(transport_key.public_key)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if isinstance(key, rsa.RSAPublicKey) and key.key_size == _MODULUS_BITS:
        numbers = key.public_numbers()
        if numbers.e == _EXPONENT:
            return numbers
    raise ConfigurationError(
        f"the transport key is not an RSA key of {_MODULUS_BITS} bits with the exponent {_EXPONENT}"
    )
