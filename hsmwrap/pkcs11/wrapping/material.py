"""From key material to a usable key: length, check value, custody.

The difficulty is the length. SoftHSM makes an AES key object of any length and does not say which
(field note 17); NSS cuts to CKA_VALUE_LEN if one is given. So material becomes a session object
first, and two things together tell its length: an AES operation works with 16, 24 and 32 bytes
only, and its wrapped form has one of three lengths. The wrapped form alone would not do: SoftHSM
pads a key of 31 bytes to 32 before it wraps it (field note 29). Then the blob is either kept, or
unwrapped into the final object; the session object is destroyed.

Whatever is wrong with a ciphertext, the HSM does the same work, so that time tells nothing
(Bleichenbacher 1998). Where the unwrapping fails, a stand-in takes the material's place, a random
key of the right length, and is tried, wrapped and destroyed like material; material of a wrong
length is wrapped all the same. C_UnwrapKey makes an object when it succeeds; C_CreateObject of the
stand-in makes up for it.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Protocol

from pkcs11.constants import Attribute, ObjectClass
from pkcs11.exceptions import TemplateInconsistent
from pkcs11.mechanisms import Mechanism
from pkcs11.types import Session

from hsmwrap import checkvalue
from hsmwrap.backend import NONCE_LENGTH, Custody, Exposure, KeyRef
from hsmwrap.catalog import KeySpec
from hsmwrap.errors import (
    HsmError,
    HsmwrapError,
    InvalidKeyMaterial,
    KeyNotFound,
    UnsupportedOperation,
)
from hsmwrap.pkcs11.binding import objects
from hsmwrap.pkcs11.binding.client_errors import (
    attribute_reads,
    map_client_errors,
    map_damage,
    may_leave_an_object,
    read,
)
from hsmwrap.pkcs11.binding.identity import ObjectIds
from hsmwrap.pkcs11.binding.objects import Way
from hsmwrap.pkcs11.binding.templates import Template, stored
from hsmwrap.pkcs11.keysets.keys import KeySets, Role
from hsmwrap.pkcs11.sessions.session import PendingObject, PooledSession
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.wrapping.custody import OBJECT_ID_LENGTH, intermediate, unwrap_another
from hsmwrap.pkcs11.wrapping.features import CheckMethod, TokenFeatures

ROLE_OF = {KeySpec.ALIYUN_AES_256: Role.MATERIAL_AES, KeySpec.ALIYUN_SM4: Role.MATERIAL_SM4}
_VERSION = 1
_HEAD = struct.Struct(">BH")


class MaterialSource(Protocol):
    """Key material, wherever it is, that becomes objects of the HSM token.

    Attributes:
        exposure: Where it is in plaintext meanwhile.
    """

    exposure: ClassVar[Exposure]

    @property
    def way(self) -> Way:
        """How an object of it comes to have the attributes of its template."""

    def check_value(self) -> bytes:
        """Its check value, where only the host can compute it.

        Raises:
            InvalidKeyMaterial: The client's ciphertext does not decrypt; it is not in the host.
        """

    def make_object(self, session: Session, template: Template) -> Any:
        """Make it an object with ``template``.

        Raises:
            InvalidKeyMaterial: The client's ciphertext does not become one.
            ProtectionNotKept: The object is readable, or usable for more; it was destroyed.
        """


@dataclass(frozen=True, slots=True)
class HostMaterial:
    """Key material that the host gets: C_CreateObject.

    Attributes:
        decrypt: Returns it; called for each object.
        length: How many bytes it has to have.
    """

    exposure: ClassVar[Exposure] = Exposure.HOST
    way: ClassVar[Way] = Way.AS_ASKED

    decrypt: Callable[[], bytes] = field(repr=False)
    length: int

    def make_object(self, session: Session, template: Template) -> Any:
        """Make it an object with ``template``.

        Raises:
            InvalidKeyMaterial: It does not decrypt, or has another length.
            ProtectionNotKept: The object is readable, or usable for more; it was destroyed.
        """
        value = self.decrypt()
        if len(value) != self.length:
            raise InvalidKeyMaterial
        return objects.create(session, template, value)

    def check_value(self) -> bytes:
        """Its check value.

        Raises:
            InvalidKeyMaterial: It does not decrypt, or has another length.
        """
        value = self.decrypt()
        if len(value) != self.length:
            raise InvalidKeyMaterial
        return checkvalue.check_value(value)


@dataclass(frozen=True, slots=True)
class WrappedMaterial:
    """Key material that the HSM token unwraps: C_UnwrapKey.

    Attributes:
        private: The private key object.
        ciphertext: Returns the client's ciphertext as the mechanism takes it; called for each
            object. Raises InvalidKeyMaterial where it cannot be one.
        mechanism: Of C_UnwrapKey.
        parameter: The mechanism's.
        way: What the HSM token needs.
    """

    exposure: ClassVar[Exposure] = Exposure.IN_HSM

    private: Any
    ciphertext: Callable[[], bytes]
    mechanism: Mechanism
    parameter: Any
    way: Way

    def make_object(self, _session: Session, template: Template) -> Any:
        """Make it an object with ``template``, in the session of the private key.

        Raises:
            InvalidKeyMaterial: It cannot be a ciphertext, or the token refuses it.
            ProtectionNotKept: The object is readable, or usable for more; it was destroyed.
        """
        return objects.unwrap(
            self.private,
            self.ciphertext(),
            template,
            mechanism=self.mechanism,
            parameter=self.parameter,
            answers=map_client_errors(self.private),
            way=self.way,
        )

    def check_value(self) -> bytes:
        """Not in the host.

        Raises:
            InvalidKeyMaterial: Always.
        """
        raise InvalidKeyMaterial


@dataclass(frozen=True, slots=True)
class KeptOpen:
    """Sealed keys stay open in each session between uses (:mod:`hsmwrap.pkcs11.sessions.opened`).

    Attributes:
        most: In each session.
        ids: Tells whether a handle still means the key.
    """

    most: int
    ids: ObjectIds


@dataclass(frozen=True, slots=True)
class MaterialStore:
    """Makes, finds and destroys imported keys.

    Attributes:
        backend: Name of the backend, for key references.
        keys: The backend's own keys.
        prefix: Label prefix of this backend's objects.
        custody: How imported keys are kept.
        features: What the HSM token can do.
        kept_open: Whether sealed keys stay open between uses; None: each use unwraps the key.
    """

    backend: str
    keys: KeySets
    prefix: str
    custody: Custody
    features: TokenFeatures
    kept_open: KeptOpen | None = None

    def make(
        self,
        pooled: PooledSession,
        source: MaterialSource,
        key_spec: KeySpec,
        expected: bytes | None,
        pending: PendingObject,
    ) -> tuple[KeyRef, bytes]:
        """Turn material into a key; returns its reference and check value.

        Args:
            pooled: The session to work in.
            source: The material.
            key_spec: What it has to become.
            expected: On a re-import, the check value before.
            pending: Has the id of the token object, where custody is HSM_INTERNAL.

        Raises:
            InvalidKeyMaterial: Wrong length, or not the same material.
            ProtectionNotKept: The HSM token does not protect it; what was made of it is destroyed.
        """
        if not self.features.wraps_secret_keys:
            return self._make_object(pooled, source, key_spec, expected, pending)
        number = self.keys.current(pooled)
        blob, check = self._wrap(pooled, source, key_spec, number)
        # The guard compares too, but could only destroy a token object that others have seen.
        _require_same(expected, check)
        if self.custody is Custody.HSM_ENCRYPTED_DATABASE:
            data = _HEAD.pack(_VERSION, number) + blob
            return KeyRef(self.backend, key_spec, self.custody, data), check
        kek = self.keys.opening(pooled, ROLE_OF[key_spec], number)
        final = self.features.fit(self._final(key_spec, pending.object_id, number))
        with pooled.creating(pending):
            objects.unwrap(
                *(kek, blob, final),
                mechanism=self._key_wrap(number),
                way=self.features.ways.sealed_secret,
            )
        return self._object_ref(key_spec, pending.object_id), check

    @contextmanager
    def opened(self, pooled: PooledSession, ref: KeyRef) -> Iterator[Any]:
        """Yield the key object for the length of a ``with`` block, to use it.

        Raises:
            UnsupportedOperation: It is an SM4 key of a key set that only keeps them.
            KeyNotFound: The key, or the key-encryption key that sealed it, is gone, or the blob is
                damaged.
            PKCS11Error: The HSM token does not unwrap it, for another reason.
            ProtectionNotKept: The key would be readable.
        """
        if ref.custody is Custody.HSM_INTERNAL:
            yield self._find(pooled, ref.key_spec, parse_key_ref(ref)[1])
        elif self.kept_open is None:
            with _destroyed(self._unseal(pooled, ref)) as key:
                yield key
        else:
            yield self._open(pooled, ref, self.kept_open)

    def _open(self, pooled: PooledSession, ref: KeyRef, kept_open: KeptOpen) -> Any:
        """The key object that this session keeps open, or will from now on."""
        name, opened = (ref.key_spec, ref.data), pooled.opened
        known = opened.get(name)
        if known is not None:
            if kept_open.ids.has(known.key, known.object_id):
                return known.key
            opened.forget(name)
        opened.make_room(kept_open.most)
        object_id = secrets.token_bytes(OBJECT_ID_LENGTH)
        key = self._unseal(pooled, ref, {Attribute.ID: object_id})
        opened.keep(name, key, object_id)
        return key

    def _unseal(
        self,
        pooled: PooledSession,
        ref: KeyRef,
        more: Template | None = None,
        *,
        to_move: bool = False,
    ) -> Any:
        """Unwrap a sealed key into a session object.

        Args:
            pooled: The session to work in.
            ref: The key.
            more: Attributes that do not protect it.
            to_move: It is to be wrapped again, and need not be usable.

        Raises:
            As :meth:`opened`.
        """
        number, blob = parse_key_ref(ref)
        kek = self.keys.opening(pooled, ROLE_OF[ref.key_spec], number)
        damaged = KeyNotFound("the key's blob is damaged, or another key-encryption key sealed it")

        def unsealed(becomes: Template) -> Any:
            control = partial(unwrap_another, pooled, self.keys, self.features)
            return objects.unwrap(
                *(kek, blob, self.features.fit(becomes | (more or {}))),
                mechanism=self._key_wrap(number),
                answers=map_damage(damaged, control),
                way=self.features.ways.sealed_secret,
            )

        try:
            return unsealed(self._becomes(ref.key_spec, number))
        except TemplateInconsistent:
            if ref.key_spec is not KeySpec.ALIYUN_SM4 or not self.features.sm4:
                raise
            if not to_move:
                raise UnsupportedOperation(
                    f"key set {number}, which sealed this SM4 key, was made without the [sm4] of "
                    "the profile: `hsmwrap keys reseal` makes it usable"
                ) from None
            return unsealed(self.keys.material_template(Role.MATERIAL_SM4, number, sm4=False))

    def _becomes(self, key_spec: KeySpec, number: int | None) -> Template:
        """What an imported key is; unwrapped by a key of the set ``number``, if by one."""
        role = ROLE_OF[key_spec]
        if number is None:
            return self.keys.unwrapped_template(role, sm4=self.features.sm4)
        return self.keys.material_template(role, number, sm4=self.features.sm4)

    def reseal(self, pooled: PooledSession, ref: KeyRef, expected: bytes | None) -> KeyRef:
        """Wrap a sealed key under the current key set, inside the HSM token.

        Args:
            pooled: The session to work in.
            ref: The key, sealed.
            expected: Its check value, compared where a key of its type computes it. Of SM4 keys
                that encrypt it is seen that the one before and the one after are the same.

        Raises:
            KeyNotFound: The key does not open.
            UnsupportedOperation: The old or the current key set is not one whose keys move.
            HsmError: Another check value, before or after.
        """
        number, _ = parse_key_ref(ref)
        role, current = ROLE_OF[ref.key_spec], self.keys.current(pooled)
        nonce = secrets.token_bytes(NONCE_LENGTH)
        with _destroyed(self._unseal(pooled, ref, to_move=True)) as key:
            self._require_check_value(key, role, expected)
            if number == current:
                return ref
            for each in (number, current):
                if not self.keys.moves(each):
                    raise UnsupportedOperation(
                        f"keys do not move between key sets {number} and {current}: set {each} "
                        "was made without the SO PIN, or on a token that does not protect keys "
                        "which move; its keys have to be imported again"
                    )
            before = self._sm4_tag(role, key, nonce)
            kek = self.keys.require(pooled, role, current)
            blob = kek.wrap_key(key, mechanism=self._key_wrap(current))
        resealed = replace(ref, data=_HEAD.pack(_VERSION, current) + blob)
        with _destroyed(self._unseal(pooled, resealed)) as key:
            self._require_check_value(key, role, expected)
            if before is not None and self._sm4_tag(role, key, nonce) != before:
                raise HsmError("the key that was sealed again is not the one before")
        return resealed

    def _sm4_tag(self, role: Role, key: Any, nonce: bytes) -> bytes | None:
        """The tag of an empty message, which tells one key from another; None if it is only kept.

        The check value of an SM4 key is AES's where the token has AES, which a key object of the
        vendor's type refuses.
        """
        ciphers = self.features.ciphers.get(KeySpec.ALIYUN_SM4)
        if role is not Role.MATERIAL_SM4 or not ciphers or not read(key, Attribute.ENCRYPT):
            return None
        return ciphers[0].encrypt(key, nonce, b"", b"")

    def _require_check_value(self, key: Any, role: Role, expected: bytes | None) -> None:
        method = self.features.check
        key_type = self.keys.unwrapped_template(role, sm4=self.features.sm4)[Attribute.KEY_TYPE]
        if expected is None or method is None or key_type != self.features.cipher.key_type:
            return
        if not checkvalue.same_check_value(expected, _check_value(method, key, error=HsmError)):
            raise HsmError("the key to seal again does not have the expected check value")

    # --- with key wrap -----------------------------------------------------------------------

    def _key_wrap(self, number: int) -> Mechanism:
        return self.features.key_wrap(self.keys.cipher_of(number))

    def _intermediate(self, *, trusted: bool) -> Template:
        return intermediate(trusted=trusted, cipher=self.features.cipher)

    def _wrap(
        self, pooled: PooledSession, source: MaterialSource, key_spec: KeySpec, number: int
    ) -> tuple[bytes, bytes]:
        """Return the wrapped material, its length checked, and its check value."""
        kek = self.keys.require(pooled, ROLE_OF[key_spec], number)
        template = self.features.fit(self._intermediate(trusted=self.keys.trusts(number)))
        with self._tried(pooled, source, template, key_spec) as material:
            try:
                check = self._check(source, material)
            except InvalidKeyMaterial:
                self._wrap_in_vain(kek, material, number)
                raise
            blob = kek.wrap_key(material, mechanism=self._key_wrap(number))
        if len(blob) != self.features.wrapped_lengths[key_spec.material_length]:
            raise InvalidKeyMaterial
        return blob, check

    @contextmanager
    def _tried(
        self, pooled: PooledSession, source: MaterialSource, template: Template, key_spec: KeySpec
    ) -> Iterator[Any]:
        """Yield the material as an object with ``template`` for a ``with`` block, or a stand-in.

        Raises:
            InvalidKeyMaterial: After the block, if it was given the stand-in.
        """
        try:
            material = source.make_object(pooled.session, template)
        except InvalidKeyMaterial as error:
            pooled.tainted |= may_leave_an_object(error)
            with _destroyed(self._stand_in(pooled.session, template, key_spec, source.way)) as key:
                yield key
            raise  # with its context, which is what the HSM token answered
        with _destroyed(material) as key:
            yield key

    def _stand_in(self, session: Session, template: Template, key_spec: KeySpec, way: Way) -> Any:
        length = key_spec.material_length
        if not self.features.creates_keys:
            return objects.generate_key(session, template, length)
        return objects.create(session, template, secrets.token_bytes(length), way=way)

    # --- without -----------------------------------------------------------------------------

    def _make_object(
        self,
        pooled: PooledSession,
        source: MaterialSource,
        key_spec: KeySpec,
        expected: bytes | None,
        pending: PendingObject,
    ) -> tuple[KeyRef, bytes]:
        final = self.features.fit(self._final(key_spec, pending.object_id))
        template = self._intermediate(trusted=False) | {Attribute.EXTRACTABLE: False}
        template = self.features.fit(template)
        if not self.features.session_objects:
            # What fails leaves a token object: :meth:`Connection.run` destroys it by its id.
            named = {a: final[a] for a in (Attribute.TOKEN, Attribute.ID, Attribute.LABEL)}
            with pooled.creating(pending):
                check = self._try_object(pooled, source, template | named, key_spec, expected)
        else:
            check = self._try_object(pooled, source, template, key_spec, expected)
        with pooled.creating(pending):
            source.make_object(pooled.session, final)
        return self._object_ref(key_spec, pending.object_id), check

    def _try_object(
        self,
        pooled: PooledSession,
        source: MaterialSource,
        template: Template,
        key_spec: KeySpec,
        expected: bytes | None,
    ) -> bytes:
        """Return the check value of material that has the right length."""
        length: int | None = key_spec.material_length
        with self._tried(pooled, source, template, key_spec) as material:
            # Without CKA_VALUE_LEN the material came through the host, which checked its length.
            if self.features.value_length:
                length = _told_length(material)
            check = self._check(source, material)
        if length != key_spec.material_length:
            raise InvalidKeyMaterial
        _require_same(expected, check)
        return check

    def _check(self, source: MaterialSource, material: Any) -> bytes:
        if self.features.check is None:
            return source.check_value()
        return _check_value(self.features.check, material)

    # --- references --------------------------------------------------------------------------

    def _object_ref(self, key_spec: KeySpec, object_id: bytes) -> KeyRef:
        return KeyRef(self.backend, key_spec, Custody.HSM_INTERNAL, object_id)

    def _final(self, key_spec: KeySpec, object_id: bytes, number: int | None = None) -> Template:
        """A token object; unwrapped by a key-encryption key of the set ``number``, if by one."""
        label = f"{self.prefix}:material:{key_spec}"
        return stored(self._becomes(key_spec, number), object_id, label)

    def _find(self, pooled: PooledSession, key_spec: KeySpec, object_id: bytes) -> Any:
        usable = {Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.ENCRYPT: True}
        found = pooled.find(usable | {Attribute.ID: object_id})
        if not found:
            self.keys.look(pooled)  # is anything there?
            raise KeyNotFound("the key object is not in the HSM token (any more)")
        if not self._are_one_key(key_spec, found):
            raise KeyNotFound("more than one key in the HSM token has the id of this one")
        return found[0]

    def _wrap_in_vain(self, kek: Any, material: Any, number: int) -> None:
        """Call the HSM as for a key.

        A wrapping is two calls, the first for the length. Where that fails, as for a key of no
        bytes, it is made again.
        """
        for _ in range(2):
            with suppress(InvalidKeyMaterial), map_client_errors(kek):
                kek.wrap_key(material, mechanism=self._key_wrap(number))
                return

    def _are_one_key(self, key_spec: KeySpec, found: list[Any]) -> bool:
        """Whether these handles mean one key; another that was planted under its id is not used.

        SoftHSM 2.6.1 gives an object a second handle, in the process that made it, if another
        thread looks at the token between the making of the object's file and its entry in the list,
        and another process has written meanwhile (field note 41), and until the object is
        destroyed.
        """
        role, nonce = ROLE_OF[key_spec], secrets.token_bytes(NONCE_LENGTH)
        check = self.features.check
        if len(found) == 1 or check is None:
            return len(found) == 1
        with attribute_reads():
            return len({self._sm4_tag(role, each, nonce) or check.of(each) for each in found}) == 1


def _told_length(material: Any) -> int | None:
    """CKA_VALUE_LEN; None of a stand-in, where the HSM token does not tell that of a created key.

    CKA_CLASS is read too, so that the token gets the same calls for both.
    """
    with attribute_reads():
        told = material.get_attributes((Attribute.CLASS, Attribute.VALUE_LEN))
    length: int | None = told.get(Attribute.VALUE_LEN)
    return length


def material_custody(settings: Pkcs11Settings, features: TokenFeatures) -> Custody:
    """How imported keys are kept: as configured, or as objects where nothing can be wrapped."""
    return settings.material_custody if features.wraps_secret_keys else Custody.HSM_INTERNAL


def kept_open(settings: Pkcs11Settings) -> KeptOpen | None:
    """How sealed keys stay open, where the settings say so; once the module is loaded."""
    most = settings.opened_keys
    return KeptOpen(most, ObjectIds(settings.module)) if most else None


def parse_key_ref(ref: KeyRef) -> tuple[int, bytes]:
    """Key set number and data (blob or object id) of a reference to an imported key.

    Raises:
        KeyNotFound: It does not parse, or is of a version that is not known here.
    """
    if ref.custody is Custody.HSM_INTERNAL:
        if len(ref.data) != OBJECT_ID_LENGTH:
            raise KeyNotFound("the key reference names no object")
        return 0, ref.data
    try:
        version, number = _HEAD.unpack_from(ref.data)
    except struct.error:
        raise KeyNotFound("the key reference does not parse") from None
    if version != _VERSION:
        raise KeyNotFound("the key reference is not of a version known here")
    return number, ref.data[_HEAD.size :]


def _check_value(
    method: CheckMethod, key: Any, *, error: type[HsmwrapError] = InvalidKeyMaterial
) -> bytes:
    # Fails for material that is not an AES key, of which SoftHSM has made an object all the same.
    with map_client_errors(key, error=error):
        return bytes([method.number]) + method.of(key)


def _require_same(expected: bytes | None, check: bytes) -> None:
    if expected is not None and not checkvalue.same_check_value(expected, check):
        raise InvalidKeyMaterial


@contextmanager
def _destroyed(key: Any) -> Iterator[Any]:
    try:
        yield key
    finally:
        key.destroy()
