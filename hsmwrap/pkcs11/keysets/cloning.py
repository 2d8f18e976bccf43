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

import base64
import binascii
import hashlib
import hmac
import json
import secrets
from collections.abc import Iterator, Mapping
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
from pkcs11.exceptions import PKCS11Error
from pkcs11.mechanisms import MGF, KeyType, Mechanism
from pkcs11.types import Session

from hsmwrap.backend import KeySetInfo
from hsmwrap.errors import ConfigurationError, HsmError, UnsupportedOperation
from hsmwrap.pkcs11.binding import objects
from hsmwrap.pkcs11.binding.client_errors import read, read_if_known
from hsmwrap.pkcs11.binding.returncodes import recovery_of
from hsmwrap.pkcs11.binding.templates import NestedTemplate, Template, private_key, stored
from hsmwrap.pkcs11.keysets import movability
from hsmwrap.pkcs11.keysets.admin import (
    clean_up,
    connected,
    key_sets_of,
    officer_session,
    require_complete,
    survey,
)
from hsmwrap.pkcs11.keysets.keys import HIGHEST_NUMBER, KeySet, KeySets, Needs, Role
from hsmwrap.pkcs11.keysets.movability import ONLY_UNDER_TRUSTED
from hsmwrap.pkcs11.keysets.needs import needs_of
from hsmwrap.pkcs11.sessions.session import PooledSession, find_objects
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.token.pin import PinSource

_MODULUS_BITS = 3072
_OAEP = (Mechanism.SHA_1, MGF.SHA1, None)
_TRANSPORT = "hsmwrap-transport-key/1"
_KEY_SETS = "hsmwrap-key-sets/1"
# What keys of all roles have in common; more than that an unwrap template cannot demand.
_BECOMES: Template = {
    Attribute.CLASS: ObjectClass.SECRET_KEY,
    Attribute.SENSITIVE: True,
    Attribute.TRUSTED: True,
    **ONLY_UNDER_TRUSTED,
    Attribute.ENCRYPT: False,
    Attribute.DECRYPT: False,
    Attribute.DERIVE: False,
    Attribute.VERIFY: False,
}


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
        document = {"format": _TRANSPORT, "public_key": _text(self.public_key)}
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, raw: str) -> Self:
        """Parse the file.

        Raises:
            ConfigurationError: It is not one.
        """
        with _parsing("transport key"):
            document = _document(raw, _TRANSPORT)
            return cls(base64.b64decode(document["public_key"], validate=True))


@dataclass(frozen=True, slots=True)
class WrappedSet:
    """One key set, each key wrapped for the transport key.

    Attributes:
        number: Its number, which references to sealed keys carry.
        made_by: The word in the ids of its keys, by which a clone is told from another set.
        keys: The wrapped keys by role.
    """

    number: int
    made_by: str
    keys: Mapping[Role, bytes]


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
            "key_sets": [
                {
                    "number": each.number,
                    "made_by": each.made_by,
                    "keys": {role: _text(blob) for role, blob in sorted(each.keys.items())},
                }
                for each in self.sets
            ],
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
        with _parsing("key sets"):
            document = _document(raw, _KEY_SETS)
            return cls(str(document["transport_key"]), tuple(map(_set, document["key_sets"])))


def make_transport_key(settings: Pkcs11Settings, so_pin: PinSource) -> TransportKey:
    """Make a transport key in the HSM token that key sets are to come to; replaces an older one.

    Raises:
        UnsupportedOperation: The token does not keep extractable keys for trusted keys alone.
        PinError, ServiceUnavailable, HsmError: As for :func:`~.admin.initialise`.
    """
    label = _label(settings)
    with connected(settings) as connection:
        needs = connection.run(lambda pooled: needs_of(pooled.session), retry=False)
    with officer_session(settings, so_pin) as session:
        if not movability.is_kept(session, needs.key_wrap):
            raise UnsupportedOperation(
                "this HSM token does not keep extractable keys for trusted keys alone, so key sets "
                "cannot come to it"
            )
        _destroy(session, label)
        template = private_key(KeyType.RSA, Attribute.UNWRAP) | {
            Attribute.PRIVATE: False,
            Attribute.UNWRAP_TEMPLATE: NestedTemplate(_BECOMES),
            Attribute.ALLOWED_MECHANISMS: (Mechanism.RSA_PKCS_OAEP,),
        }
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
        ConfigurationError: The fingerprint is another one, or the source has no movable key set.
        PinError, ServiceUnavailable, HsmError: As for :func:`~.admin.initialise`.
    """
    _require_fingerprint(fingerprint, transport_key.fingerprint, "transport key")
    numbers = _public_numbers(transport_key)
    keys = key_sets_of(settings)
    movable = [each for each in survey(settings, keys).finished if each.movable]
    if not movable:
        raise ConfigurationError("the HSM token has no key set that can be cloned; see `keys list`")
    with officer_session(settings, so_pin) as session:
        public = session.create_object(
            {
                Attribute.CLASS: ObjectClass.PUBLIC_KEY,
                Attribute.KEY_TYPE: KeyType.RSA,
                Attribute.TOKEN: False,
                Attribute.PRIVATE: False,
                Attribute.TRUSTED: True,
                Attribute.WRAP: True,
                Attribute.ENCRYPT: False,
                Attribute.VERIFY: False,
                Attribute.MODULUS: numbers.n.to_bytes(_MODULUS_BITS // 8, "big"),
                Attribute.PUBLIC_EXPONENT: numbers.e.to_bytes(3, "big"),
            }
        )
        try:
            sets = tuple(_wrapped(session, keys, each, public) for each in movable)
        finally:
            public.destroy()
    return WrappedSets(transport_key.fingerprint, sets)


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
        HsmError: A key does not unwrap; nothing is kept of its set.
        PinError, ServiceUnavailable: As for :func:`~.admin.initialise`.
    """
    _require_fingerprint(fingerprint, wrapped.fingerprint, "file of key sets")
    keys, label = key_sets_of(settings), _label(settings)
    with connected(settings) as connection:
        missing, needs = connection.run(
            lambda pooled: (_missing(pooled, keys, wrapped), needs_of(pooled.session)), retry=False
        )
    for each in missing:
        key_encryption_roles = tuple(role for role in each.keys if role is not Role.MAC)
        try:
            # The MAC key in a session of its own: with it the set counts.
            for roles in filter(None, (key_encryption_roles, (Role.MAC,))):
                with officer_session(settings, so_pin) as session:
                    private = _transport_key(session, label, wrapped.transport_key)
                    for role in roles:
                        _unwrap(keys, each, role, private, needs)
                made = frozenset(each.keys if Role.MAC in roles else roles)
                with connected(settings) as connection:
                    require_complete(connection, keys, each.number, made)
        except BaseException:
            clean_up(settings, keys, each.number, each.made_by)
            raise
    with officer_session(settings, so_pin) as session:
        _destroy(session, label)
    return tuple(each.info() for each in survey(settings, keys).sets)


# --- keys -----------------------------------------------------------------------------------------


def _wrapped(session: Session, keys: KeySets, key_set: KeySet, public: Any) -> WrappedSet:
    made_by, blobs = "", {}
    for role in key_set.roles:
        label = keys.label(role, key_set.number)
        found = list(find_objects(session, {Attribute.LABEL: label, Attribute.TOKEN: True}))
        trusted = [each for each in found if read_if_known(each, Attribute.TRUSTED)]
        if len(trusted) != 1:
            raise ConfigurationError(f"the HSM token has not exactly one trusted key {label}")
        blobs[role] = bytes(
            public.wrap_key(trusted[0], mechanism=Mechanism.RSA_PKCS_OAEP, mechanism_param=_OAEP)
        )
        made_by = bytes(read(trusted[0], Attribute.ID)).decode().rpartition(":")[2]
    return WrappedSet(key_set.number, made_by, blobs)


def _unwrap(keys: KeySets, wrapped: WrappedSet, role: Role, private: Any, needs: Needs) -> None:
    named = role, wrapped.number, wrapped.made_by
    template = keys.template(*named, trusted=True, movable=True, needs=needs)
    try:
        objects.unwrap(
            private,
            wrapped.keys[role],
            template | {Attribute.TRUSTED: True},
            mechanism=Mechanism.RSA_PKCS_OAEP,
            parameter=_OAEP,
        )
    except PKCS11Error as error:
        if recovery_of(error) is not None:
            raise
        raise HsmError(
            f"the key {keys.label(role, wrapped.number)} does not unwrap: the file was changed, or "
            "is for another transport key"
        ) from None


def _missing(pooled: PooledSession, keys: KeySets, wrapped: WrappedSets) -> list[WrappedSet]:
    """Those sets that the target does not have.

    Raises:
        ConfigurationError: It has another one of the same number, or a part of this one.
    """
    _, numbers = keys.survey(pooled.session)
    pooled.require_login()  # without one, the private keys are not seen
    missing = []
    for each in wrapped.sets:
        if each.number not in numbers:
            missing.append(each)
            continue
        found = pooled.find({Attribute.LABEL: keys.label(Role.MAC, each.number)})
        ids = [bytes(read(key, Attribute.ID)) for key in found]
        if ids != [keys.key_id(Role.MAC, each.number, each.made_by)]:
            raise ConfigurationError(
                f"the HSM token has another key set {each.number}: retire what is there, or take "
                "another key_prefix"
            )
    return missing


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
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size != _MODULUS_BITS:
        raise ConfigurationError(f"the transport key is not an RSA key of {_MODULUS_BITS} bits")
    return key.public_numbers()


def _set(document: Any) -> WrappedSet:
    keys = {
        Role(role): base64.b64decode(blob, validate=True) for role, blob in document["keys"].items()
    }
    number, made_by = int(document["number"]), str(document["made_by"])
    if Role.MAC not in keys or not 0 < number <= HIGHEST_NUMBER or not made_by.isalnum():
        raise ValueError
    return WrappedSet(number, made_by, keys)


def _document(raw: str, expected: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(raw)
    if document["format"] != expected:
        raise ValueError
    return document


@contextmanager
def _parsing(what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, RecursionError):
        raise ConfigurationError(
            f"not a file of {what} that this version of hsmwrap reads"
        ) from None


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
