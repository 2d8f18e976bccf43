"""Custody of private wrapping keys: sealed in the import token, or resident in the HSM token.

Sealed: wrapped by key wrap with padding under a key-encryption key; nothing in the HSM grows
with outstanding import tokens. Resident: a token object whose label says when it expires, so that
a reaper of any process can remove it.
"""

from __future__ import annotations

import logging
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from pkcs11.constants import Attribute, ObjectClass
from pkcs11.exceptions import WrappingKeyHandleInvalid
from pkcs11.mechanisms import KeyType, Mechanism

from hsmwrap.backend import Custody, PrivateKeyRef
from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.errors import InvalidImportToken
from hsmwrap.pkcs11.binding import objects
from hsmwrap.pkcs11.binding.client_errors import map_damage
from hsmwrap.pkcs11.binding.identity import ObjectIds
from hsmwrap.pkcs11.binding.templates import (
    NestedTemplate,
    Template,
    secret_key,
    stored,
)
from hsmwrap.pkcs11.binding.traits import AES, BlockCipher
from hsmwrap.pkcs11.keysets.keys import KeySets, Role
from hsmwrap.pkcs11.sessions.session import HANDLE_INVALID, PooledSession
from hsmwrap.pkcs11.wrapping import reaper
from hsmwrap.pkcs11.wrapping.features import TokenFeatures, mechanism_of

OBJECT_ID_LENGTH = 16
_KEK_HANDLE_INVALID = (*HANDLE_INVALID, WrappingKeyHandleInvalid)
_VERSION = 1
_HEAD = struct.Struct(">BBH")

# What a wrapping key is for. Codes on the wire: never reused, never renumbered.
_ROLES = (
    Role.WRAPPING_UNWRAP,
    Role.WRAPPING_DECRYPT,
    Role.WRAPPING_DERIVE,
    Role.WRAPPING_SM2_UNWRAP,
)

_log = logging.getLogger(__name__)


def intermediate(*, trusted: bool, cipher: BlockCipher = AES) -> Template:
    """Material just unwrapped: a session object that exists until its length has been checked.

    It has to be extractable for that; only a trusted key may wrap it, where there is one.
    """
    key = secret_key(cipher.key_type, Attribute.ENCRYPT, extractable=True)
    return key | _guard(trusted=trusted)


def _guard(*, trusted: bool) -> Template:
    return {Attribute.WRAP_WITH_TRUSTED: True} if trusted else {}


def _pinned(mechanism: Mechanism, becomes: Template) -> Template:
    """What keeps the holder of the PIN from reading a client's ciphertext by C_UnwrapKey.

    The outcome is pinned to the intermediate that this backend makes. The mechanism is pinned
    because C_UnwrapKey by PKCS#1 v1.5 is a padding oracle for OAEP ciphertexts as well (Bardou et
    al., CRYPTO 2012). A sealed key cannot carry this along (SECURITY.md).
    """
    return {
        Attribute.UNWRAP_TEMPLATE: NestedTemplate(becomes),
        Attribute.ALLOWED_MECHANISMS: (mechanism,),
    }


@dataclass(frozen=True, slots=True)
class WrappingKeyStore:
    """Keeps and fetches private wrapping keys.

    Attributes:
        keys: The backend's own keys.
        prefix: Label prefix of this backend's objects.
        features: What the HSM token can do.
        ids: Tells whether a known handle still means a resident key; None: each is searched for.
    """

    keys: KeySets
    prefix: str
    features: TokenFeatures
    ids: ObjectIds | None = None

    def sealing_template(self, role: Role, *, trusted: bool) -> Template:
        """Template to generate a private key with that will be sealed: extractable, no use."""
        becomes = self.keys.unwrapped_template(role)
        idle = {k: (False if v is True and k in _ACTIVE else v) for k, v in becomes.items()}
        template = {**idle, Attribute.EXTRACTABLE: True, **_guard(trusted=trusted)}
        return self.features.fit(template)

    def resident_template(
        self,
        role: Role,
        algorithm: WrappingAlgorithm,
        object_id: bytes,
        expires_at: datetime,
        *,
        trusted: bool,
    ) -> Template:
        """Template to generate a private key with that stays in the HSM token."""
        becomes = self.features.fit(intermediate(trusted=trusted, cipher=self.features.cipher))
        mechanism: Mechanism | None = None
        if role is Role.WRAPPING_UNWRAP:
            mechanism = mechanism_of(algorithm)[0]
        elif role is Role.WRAPPING_SM2_UNWRAP and self.keys.vendor is not None:
            mechanism = self.keys.vendor.unwrap
        pins = {} if mechanism is None else _pinned(mechanism, becomes)
        label = reaper.label(self.prefix, expires_at)
        return stored(
            self.features.fit({**self.keys.unwrapped_template(role), **pins}), object_id, label
        )

    def seal(self, pooled: PooledSession, role: Role, private: Any, number: int) -> PrivateKeyRef:
        """Wrap a freshly generated private key under the key set ``number``.

        Under the one that is current instead, if that one was retired while the pair was made:
        generating another pair would take long.

        Raises:
            ConfigurationError: The HSM token has no current key set, or the set lacks the key.
        """
        try:
            return self._seal(pooled, role, private, number)
        except _KEK_HANDLE_INVALID:
            pooled.epoch.end()
            return self._seal(pooled, role, private, self.keys.current(pooled))

    def _seal(self, pooled: PooledSession, role: Role, private: Any, number: int) -> PrivateKeyRef:
        kek = self.keys.require(pooled, role, number)
        mechanism = self.features.key_wrap(self.keys.cipher_of(number))
        blob = kek.wrap_key(private, mechanism=mechanism)
        head = _HEAD.pack(_VERSION, _ROLES.index(role), number)
        return PrivateKeyRef(Custody.HSM_ENCRYPTED_DATABASE, head + blob)

    @staticmethod
    def resident(role: Role, object_id: bytes) -> PrivateKeyRef:
        """Reference to a resident private key."""
        head = _HEAD.pack(_VERSION, _ROLES.index(role), 0)
        return PrivateKeyRef(Custody.HSM_INTERNAL, head + object_id)

    @contextmanager
    def fetched(self, pooled: PooledSession, ref: PrivateKeyRef) -> Iterator[tuple[Role, Any]]:
        """Yield the role and the private key object for the length of a ``with`` block.

        Raises:
            InvalidImportToken: The key, or the key-encryption key that sealed it, is gone, or
                the blob is damaged.
            PKCS11Error: The HSM token does not unwrap it, for another reason.
            ProtectionNotKept: The key would be readable.
        """
        role, number, data = parse_ref(ref)
        if ref.custody is Custody.HSM_INTERNAL:
            yield role, self._find_resident(pooled, data)
            return
        kek = self.keys.find(pooled, role, number)
        if kek is None:
            raise InvalidImportToken("the key set that sealed this import token was retired")
        damaged = InvalidImportToken("the private key in this import token does not unwrap")
        private = objects.unwrap(
            kek,
            data,
            self.features.fit(self.keys.unwrapped_template(role)),
            mechanism=self.features.key_wrap(self.keys.cipher_of(number)),
            answers=map_damage(damaged, partial(unwrap_another, pooled, self.keys, self.features)),
            way=self.features.ways.sealed_private,
        )
        try:
            yield role, private
        finally:
            private.destroy()

    def destroy_known(self, pooled: PooledSession, object_id: bytes) -> bool:
        """Destroy a resident key by a handle that this process has; False: search for it.

        Where the HSM token keeps public keys as well, they have the same id, and are searched for.
        """
        known = pooled.known(object_id, self.ids)
        if known is None or self.ids is None or not self.features.session_objects:
            return False
        with pooled.token_writes:
            self.ids.destroy(known)
        pooled.handles.forget(object_id)
        return True

    def _find_resident(self, pooled: PooledSession, object_id: bytes) -> Any:
        known = pooled.known(object_id, self.ids)
        if known is not None:
            return known
        epoch = pooled.epoch.number
        found = pooled.find({Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.ID: object_id})
        if not found:
            self.keys.look(pooled)  # is anything there?
            raise InvalidImportToken("the wrapping key of this import token is gone")
        # Two may be one (see hsmwrap.pkcs11.wrapping.material). A planted one opens nothing that
        # was encrypted under the public key that the client got: it denies, as destroying would.
        first, *others = found
        if not others:
            pooled.keep_handle(object_id, first, epoch)
        return first


def unwrap_another(pooled: PooledSession, keys: KeySets, features: TokenFeatures) -> None:
    """Wrap and unwrap a new key under a key-encryption key of ours: does C_UnwrapKey work?

    Raises:
        PKCS11Error: It does not.
    """
    number = keys.current(pooled)
    role = Role.MATERIAL_AES if features.cipher.key_type == KeyType.AES else Role.MATERIAL_SM4
    kek = keys.find(pooled, role, number)
    if kek is None:
        return  # this key set needs none
    key_wrap = features.key_wrap(keys.cipher_of(number))
    template = intermediate(trusted=keys.trusts(number), cipher=features.cipher)
    made = objects.generate_key(pooled.session, features.fit(template), features.cipher.length)
    blob = kek.wrap_key(made, mechanism=key_wrap)
    made.destroy()
    becomes = features.fit(keys.material_template(role, number, sm4=features.sm4))
    way = features.ways.sealed_secret
    objects.unwrap(kek, blob, becomes, mechanism=key_wrap, way=way).destroy()


_ACTIVE = frozenset({Attribute.UNWRAP, Attribute.DECRYPT, Attribute.DERIVE, Attribute.SIGN})


def parse_ref(ref: PrivateKeyRef) -> tuple[Role, int, bytes]:
    """Role, key set number and data (blob or object id) of a private key reference.

    Raises:
        InvalidImportToken: It does not parse, or is of a version that is not known here.
    """
    try:
        version, code, number = _HEAD.unpack_from(ref.data)
        role, data = _ROLES[code], ref.data[_HEAD.size :]
    except (struct.error, IndexError):
        raise InvalidImportToken("the import token's private key does not parse") from None
    if version != _VERSION:
        raise InvalidImportToken("the import token's private key has an unknown version")
    # An empty id would name every object that has none.
    if ref.custody is Custody.HSM_INTERNAL and len(data) != OBJECT_ID_LENGTH:
        raise InvalidImportToken("the import token's private key names no object")
    return role, number, data


def new_object_id() -> bytes:
    """A fresh CKA_ID: 16 random bytes."""
    return secrets.token_bytes(OBJECT_ID_LENGTH)
