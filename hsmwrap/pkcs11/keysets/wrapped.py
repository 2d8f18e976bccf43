"""Key sets on their way to another HSM token, wrapped key by key: what clones and backups share.

Wrapped by a trusted key of the security officer's, which is there for as long as that takes, a key
set leaves its token; unwrapped by the same kind of key it arrives with CKA_TRUSTED, which a user
cannot set. A set counts on its new token when its MAC key is there, which comes last; when a step
fails, nothing is kept of it.

What a set sealed and authenticated on its old token travels with it as a :class:`Proof`, and has to
open on the new one.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeAlias

from pkcs11.constants import Attribute, ObjectClass
from pkcs11.mechanisms import Mechanism
from pkcs11.types import Session

from hsmwrap.backend import KeySetInfo
from hsmwrap.errors import ConfigurationError, HsmError, PinError, UnsupportedOperation
from hsmwrap.pkcs11.binding import objects, traits
from hsmwrap.pkcs11.binding.client_errors import map_damage, read, read_if_known
from hsmwrap.pkcs11.binding.templates import NestedTemplate, Template
from hsmwrap.pkcs11.binding.traits import AES
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

_OF_EVERY_ROLE: Template = {
    Attribute.CLASS: ObjectClass.SECRET_KEY,
    Attribute.SENSITIVE: True,
    Attribute.TRUSTED: True,
    **ONLY_UNDER_TRUSTED,
    Attribute.ENCRYPT: False,
    Attribute.DECRYPT: False,
    Attribute.DERIVE: False,
    Attribute.VERIFY: False,
}


def of_every_role() -> NestedTemplate:
    """What keys of all roles have in common; more than that a template cannot demand."""
    return NestedTemplate(_OF_EVERY_ROLE)


@dataclass(frozen=True, slots=True)
class CarryingKey:
    """A key in the security officer's session that key sets are wrapped or unwrapped by, and how.

    Attributes:
        key: The key object.
        mechanism: What it wraps or unwraps by.
        parameter: The mechanism's parameter.
    """

    key: Any
    mechanism: Mechanism
    parameter: Any = None


CarriedBy: TypeAlias = Callable[[Session, Needs], AbstractContextManager[CarryingKey]]
"""Makes or finds that key in a security officer's session, for what the HSM token can."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What tells a key set that opens the blobs of another token from one that does not.

    Attributes:
        sealed: A key that existed for that, under a key-encryption key of imported keys, that of
            AES keys where the set has it; empty where the set has neither.
        tag: HMAC-SHA-256 of the set's name under its MAC key, 32 bytes.
    """

    sealed: bytes
    tag: bytes


@dataclass(frozen=True, slots=True)
class WrappedSet:
    """One key set, each key wrapped by a :class:`CarryingKey`.

    Attributes:
        number: Its number, which references to sealed keys carry.
        made_by: The word in the ids of its keys, by which a copy is told from another set.
        cipher: Name of the one whose keys its key-encryption keys are.
        keys: The wrapped keys by role.
        proof: What the set has to open where it arrives.
    """

    number: int
    made_by: str
    cipher: str
    keys: Mapping[Role, bytes]
    proof: Proof

    def to_document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "number": self.number,
            "made_by": self.made_by,
            "cipher": self.cipher,
            "keys": {role: text(blob) for role, blob in sorted(self.keys.items())},
            "proof": {"sealed": text(self.proof.sealed), "tag": text(self.proof.tag)},
        }

    @classmethod
    def from_document(cls, document: Any) -> Self:
        """Parse it, inside :func:`parsing`.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: It is not one, or is not complete.
        """
        keys = {Role(role): binary(blob) for role, blob in document["keys"].items()}
        number, made_by = int(document["number"]), str(document["made_by"])
        if Role.MAC not in keys or not 0 < number <= HIGHEST_NUMBER or not made_by.isalnum():
            raise ValueError
        proof = Proof(*(binary(document["proof"][each]) for each in ("sealed", "tag")))
        return cls(number, made_by, str(document["cipher"]), keys, proof)


def wrap_sets(
    settings: Pkcs11Settings, so_pin: PinSource, carried_by: CarriedBy
) -> tuple[WrappedSet, ...]:
    """Wrap every movable key set, oldest first.

    Raises:
        UnsupportedOperation: One is of another cipher than what the token seals by now.
        ConfigurationError: There is none.
        PinError, ServiceUnavailable, HsmError: As for :func:`~.admin.initialise`.
    """
    keys = key_sets_of(settings)
    movable = [each for each in survey(settings, keys).finished if each.movable]
    if not movable:
        raise ConfigurationError(
            "the HSM token has no key set whose keys can leave it; see `hsmwrap keys list`"
        )

    def prove(pooled: PooledSession) -> tuple[Needs, list[Proof]]:
        needs = needs_of(pooled.session, settings.vendor)
        for each in movable:
            _require_cipher(each.number, each.cipher.name, needs)
        return needs, [_prove(pooled, keys, each, needs) for each in movable]

    with connected(settings) as connection:
        needs, proofs = connection.run(prove, retry=False)
    with officer_session(settings, so_pin) as session, carried_by(session, needs) as carrying:
        return tuple(
            _wrapped(session, keys, each, proof, carrying)
            for each, proof in zip(movable, proofs, strict=True)
        )


def take_in(
    settings: Pkcs11Settings,
    so_pin: PinSource,
    sets: Sequence[WrappedSet],
    carried_by: CarriedBy,
) -> tuple[KeySetInfo, ...]:
    """Unwrap those key sets that the HSM token does not have.

    Returns:
        All its key sets.

    Raises:
        UnsupportedOperation: The token seals by another cipher than a set. Nothing was made.
        ConfigurationError: It has another key set of the same number. Nothing was made.
        HsmError: A key does not unwrap, or does not open what the set sealed before; nothing is
            kept of its set.
        PinError, ServiceUnavailable: As for :func:`~.admin.initialise`.
    """
    keys = key_sets_of(settings)

    def look(pooled: PooledSession) -> tuple[list[WrappedSet], Needs]:
        missing, needs = _missing(pooled, keys, sets), needs_of(pooled.session, settings.vendor)
        for each in sets:
            _require_cipher(each.number, each.cipher, needs)
            # Ids prove nothing: a set may have been planted in the place of one to come.
            if each not in missing and not _is_proven(pooled, keys, each, needs):
                raise _another(each.number)
        return missing, needs

    with connected(settings) as connection:
        missing, needs = connection.run(look, retry=False)
    for each in missing:
        key_encryption_roles = tuple(role for role in each.keys if role is not Role.MAC)
        try:
            # The MAC key in a session of its own: with it the set counts.
            for roles in filter(None, (key_encryption_roles, (Role.MAC,))):
                with (
                    officer_session(settings, so_pin) as session,
                    carried_by(session, needs) as carrying,
                ):
                    for role in roles:
                        _unwrap(keys, each, role, carrying, needs)
                made = frozenset(each.keys if Role.MAC in roles else roles)
                with connected(settings) as connection:
                    require_complete(connection, keys, each.number, made)
                    connection.run(partial(_require_proven, keys=keys, wrapped=each, needs=needs))
        except PinError:
            # Cleaning up would try a PIN again, which may lock the HSM token. What there is of the
            # set is listed as not finished, and goes when the command is run again.
            raise
        except BaseException:
            clean_up(settings, keys, each.number, each.made_by)
            raise
    return tuple(each.info() for each in survey(settings, keys).sets)


# --- keys -----------------------------------------------------------------------------------------


def _wrapped(
    session: Session, keys: KeySets, key_set: KeySet, proof: Proof, carrying: CarryingKey
) -> WrappedSet:
    made_by, blobs = "", {}
    for role in key_set.roles:
        label = keys.label(role, key_set.number)
        found = list(find_objects(session, {Attribute.LABEL: label, Attribute.TOKEN: True}))
        trusted = [each for each in found if read_if_known(each, Attribute.TRUSTED)]
        if len(trusted) != 1:
            raise ConfigurationError(f"the HSM token has not exactly one trusted key {label}")
        blobs[role] = bytes(
            carrying.key.wrap_key(
                trusted[0], mechanism=carrying.mechanism, mechanism_param=carrying.parameter
            )
        )
        made_by = bytes(read(trusted[0], Attribute.ID)).decode().rpartition(":")[2]
    return WrappedSet(key_set.number, made_by, key_set.cipher.name, blobs, proof)


def _require_cipher(number: int, cipher: str, needs: Needs) -> None:
    """Refuse a set that this HSM token does not seal by: AES and a vendor's SM4 do not mix.

    Raises:
        UnsupportedOperation: Its key-encryption keys are of another cipher.
    """
    if cipher != needs.cipher.name:
        raise UnsupportedOperation(
            f"key set {number} seals by {cipher} keys, and this HSM token by {needs.cipher.name} "
            "keys: the set cannot leave it, nor come to it"
        )


def _unwrap(
    keys: KeySets, wrapped: WrappedSet, role: Role, carrying: CarryingKey, needs: Needs
) -> None:
    named = role, wrapped.number, wrapped.made_by
    template = keys.template(*named, trusted=True, movable=True, needs=needs)
    damaged = HsmError(
        f"the key {keys.label(role, wrapped.number)} does not unwrap: the file was changed, or was "
        "made for another key"
    )
    with map_damage(damaged, _no_control):
        objects.unwrap(
            carrying.key,
            wrapped.keys[role],
            template | {Attribute.TRUSTED: True},
            mechanism=carrying.mechanism,
            parameter=carrying.parameter,
        )


def _no_control() -> None:
    """For :func:`map_damage`: nothing is there yet that unwraps for certain."""


def _missing(pooled: PooledSession, keys: KeySets, sets: Sequence[WrappedSet]) -> list[WrappedSet]:
    """Those sets that the HSM token does not have; what a killed command left of one is destroyed.

    Raises:
        ConfigurationError: It has another one of the same number.
    """
    _, numbers = keys.survey(pooled.session)
    pooled.require_login()  # without one, the private keys are not seen
    missing = []
    for each in sets:
        if each.number not in numbers:
            missing.append(each)
            continue
        found = {
            role: [
                bytes(read(key, Attribute.ID))
                for key in pooled.find({Attribute.LABEL: keys.label(role, each.number)})
            ]
            for role in Role
        }
        ours = {role: keys.key_id(role, each.number, each.made_by) for role in Role}
        if found[Role.MAC] == [ours[Role.MAC]]:
            continue
        if all(found[role] in ([], [ours[role]]) for role in Role):
            # Without its MAC key, which comes last, it sealed nothing.
            keys.destroy(pooled, each.number, each.made_by)
            missing.append(each)
        else:
            raise _another(each.number)
    return missing


def _another(number: int) -> ConfigurationError:
    return ConfigurationError(
        f"the HSM token has another key set {number}: retire what is there, or take another "
        "key_prefix"
    )


# --- proofs ---------------------------------------------------------------------------------------


def _prove(pooled: PooledSession, keys: KeySets, key_set: KeySet, needs: Needs) -> Proof:
    role, number, sealed = _proving(key_set.roles), key_set.number, b""
    if role is not None:
        kek = keys.find(pooled, role, number)
        template = keys.material_template(role, number)
        cipher = traits.here().cipher_of(template[Attribute.KEY_TYPE]) or AES
        key = objects.generate_key(pooled.session, template, cipher.length)
        try:
            sealed = bytes(kek.wrap_key(key, mechanism=needs.key_wrap))
        finally:
            key.destroy()
    return Proof(sealed, _tag(keys.find(pooled, Role.MAC, number), number))


def _proving(roles: Collection[Role]) -> Role | None:
    """Of the key-encryption key that seals a key for a proof."""
    return next((r for r in (Role.MATERIAL_AES, Role.MATERIAL_SM4) if r in roles), None)


def _require_proven(
    pooled: PooledSession, keys: KeySets, wrapped: WrappedSet, needs: Needs
) -> None:
    """Refuse a set that does not do what it did on the HSM token that it is from.

    Raises:
        HsmError: It does not.
    """
    if not _is_proven(pooled, keys, wrapped, needs):
        raise HsmError(
            f"key set {wrapped.number} does not open or authenticate what it did before, so "
            "nothing of it is kept: the file was changed"
        )


def _is_proven(pooled: PooledSession, keys: KeySets, wrapped: WrappedSet, needs: Needs) -> bool:
    """Whether those keys that are there open and authenticate as the :class:`Proof` says."""
    number = wrapped.number
    mac_key = keys.find(pooled, Role.MAC, number)
    if mac_key is not None and not hmac.compare_digest(_tag(mac_key, number), wrapped.proof.tag):
        return False
    role = _proving(wrapped.keys)
    return role is None or _opens(pooled, keys, wrapped, needs, role)


def _opens(
    pooled: PooledSession, keys: KeySets, wrapped: WrappedSet, needs: Needs, role: Role
) -> bool:
    """Key wrap has integrity and no nonce: what unwraps, and wraps again to the same, is it."""
    sealed = wrapped.proof.sealed
    kek = keys.find(pooled, role, wrapped.number)
    template = keys.material_template(role, wrapped.number)
    try:
        with map_damage(HsmError("it does not open"), _no_control):
            key = objects.unwrap(kek, sealed, template, mechanism=needs.key_wrap)
    except HsmError:
        return False
    try:
        return bytes(kek.wrap_key(key, mechanism=needs.key_wrap)) == sealed
    finally:
        key.destroy()


def _tag(mac_key: Any, number: int) -> bytes:
    # Other text than that of an import token, so this authenticates none.
    claim = f"hsmwrap key set {number}".encode()
    return bytes(mac_key.sign(claim, mechanism=Mechanism.SHA256_HMAC))


# --- files ----------------------------------------------------------------------------------------


def text(data: bytes) -> str:
    """Bytes as JSON has them: base64."""
    return base64.b64encode(data).decode()


def binary(written: Any) -> bytes:
    """The bytes of :func:`text`.

    Raises:
        ValueError, TypeError: It is not base64.
    """
    return base64.b64decode(written, validate=True)


def document_of(raw: str, expected: str) -> dict[str, Any]:
    """The JSON object of a file, inside :func:`parsing`.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: It is not one of this format.
    """
    document: dict[str, Any] = json.loads(raw)
    if document["format"] != expected:
        raise ValueError
    return document


@contextmanager
def parsing(what: str) -> Iterator[None]:
    """Say what a file is not, whichever part of it does not parse.

    Raises:
        ConfigurationError: Something did not.
    """
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, RecursionError):
        raise ConfigurationError(
            f"not a file of {what} that this version of hsmwrap reads"
        ) from None
