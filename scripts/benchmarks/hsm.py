"""Raw PKCS#11: the backend's calls of the HSM token, made with python-pkcs11 alone.

``loop`` makes the same C_ calls in the same order on one session of the same kind, with prepared
templates except for the id of a resident key. ``bare`` is the main call of the operation. Work of
the host (OAEP, y of the SM2 point, the import token) is in neither; it counts as ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from pkcs11.constants import Attribute, ObjectClass
from pkcs11.mechanisms import Mechanism

from benchmarks.timing import Side
from hsmwrap import checkvalue
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.guard import plugin_ref
from hsmwrap.pkcs11.binding.gcm import Gcm
from hsmwrap.pkcs11.binding.host import ModuleHost
from hsmwrap.pkcs11.binding.module import Module
from hsmwrap.pkcs11.binding.templates import AES_KEY_WRAP, HsmAttributeMapper, for_unwrap
from hsmwrap.pkcs11.keysets.keys import KeySets, Role, is_trusted, unwrapped_template
from hsmwrap.pkcs11.sessions.session import PooledSession, open_worker_session
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.token.selection import find_token
from hsmwrap.pkcs11.wrapping import rsa, sm2
from hsmwrap.pkcs11.wrapping.custody import WrappingKeyStore, intermediate, new_object_id, parse_ref
from hsmwrap.pkcs11.wrapping.features import TokenFeatures, mechanism_of
from hsmwrap.pkcs11.wrapping.probe import probe
from hsmwrap.sm2 import DEFAULT_LAYOUTS, parse
from hsmwrap.tokens import ImportTokenClaims

TOKEN_BYTES = bytes(1340)
"""As long as the authenticated part of an import token with a sealed RSA key."""
_SHORT_TOKEN_BYTES = bytes(135)
"""The same for an import token that only names a resident key."""


@dataclass(frozen=True, slots=True)
class Raw:
    """The two raw sides of a comparison."""

    loop: Side
    bare: Side


class RawToken:
    """The module, login and keys of the backend, which has to be open already."""

    def __init__(self, settings: dict[str, Any]) -> None:
        checked = Pkcs11Settings.from_mapping(settings)
        self.prefix = checked.key_prefix
        self._host = ModuleHost.acquire(checked.module)
        with self._host.inside(1.0) as (module, _):
            self.module: Module = module
            self._token = find_token(module, checked.selector)
        self._keys = KeySets(self.prefix)
        session = self.session()
        self.trusted = is_trusted(session.key(Role.MATERIAL_AES))
        gcm = Gcm(checked.module)
        self.features: TokenFeatures = probe(session.pooled, self._keys, checked, gcm)

    def session(self) -> RawSession:
        """Open a session like the backend's own."""
        opened = open_worker_session(self._token, HsmAttributeMapper())
        return RawSession(self, PooledSession(opened, self.module.is_logged_in), self._keys)

    def wrapping_template(self, algorithm: WrappingAlgorithm, role: Role) -> dict[Any, Any]:
        """The template of the backend for generating a private wrapping key."""
        store = WrappingKeyStore(self._keys, self.prefix, self.features)
        if role is not Role.WRAPPING_DERIVE:
            return store.sealing_template(role, trusted=self.trusted)
        tomorrow = datetime.now(UTC) + timedelta(days=1)
        identity = new_object_id()
        return store.resident_template(role, algorithm, identity, tomorrow, trusted=self.trusted)

    def token_writes(self) -> Any:
        """The lock that SoftHSM needs around the creation of token objects."""
        return self._host.object_lock().write()


class RawSession:
    """One session, and the backend's keys on it."""

    def __init__(self, token: RawToken, pooled: PooledSession, keys: KeySets) -> None:
        self._token, self.pooled, self._keys = token, pooled, keys
        self._number = keys.current(pooled)
        self._mac = self.key(Role.MAC)
        self.session = pooled.session

    def key(self, role: Role) -> Any:
        """One of the backend's own keys."""
        return self._keys.require(self.pooled, role, self._number)

    def material_template(self, role: Role) -> dict[Any, Any]:
        """What the backend unwraps an imported key into."""
        return self._keys.material_template(role, self._number)

    def authenticate(self, token: bytes = TOKEN_BYTES) -> None:
        """Compute the MAC of an import token."""
        self._mac.sign(token, mechanism=Mechanism.SHA256_HMAC)

    # --- issue -------------------------------------------------------------------------------

    def issue(self, spec: WrappingKeySpec, algorithm: WrappingAlgorithm) -> Raw:
        """C_GenerateKeyPair, and the further calls for the pair."""
        if spec is WrappingKeySpec.RSA_2048:
            return self._issue_sealed(algorithm)
        return self._issue_resident(algorithm)

    def _issue_sealed(self, algorithm: WrappingAlgorithm) -> Raw:
        path = self._token.features.rows[algorithm].path
        template, kek = self._token.wrapping_template(algorithm, path.role), self.key(path.role)

        def loop() -> None:
            public, private = rsa.generate(self.session, template)
            public.get_attributes([Attribute.PUBLIC_EXPONENT, Attribute.MODULUS])
            kek.wrap_key(private, mechanism=AES_KEY_WRAP)
            private.destroy()
            public.destroy()
            self.authenticate()

        return Raw(Side(loop), Side(partial(rsa.generate, self.session, template), _destroy))

    def _issue_resident(self, algorithm: WrappingAlgorithm) -> Raw:
        def loop() -> tuple[Any, ...]:
            template = self._token.wrapping_template(algorithm, Role.WRAPPING_DERIVE)
            with self._token.token_writes():
                public, private = sm2.generate(self.session, template, None)
            public[Attribute.EC_POINT]
            public.destroy()
            self.authenticate(_SHORT_TOKEN_BYTES)
            return (private,)

        def bare() -> tuple[Any, ...]:
            template = self._token.wrapping_template(algorithm, Role.WRAPPING_DERIVE)
            with self._token.token_writes():
                return sm2.generate(self.session, template, None)

        return Raw(Side(loop, self._destroy_stored), Side(bare, self._destroy_stored))

    def _destroy_stored(self, objects: tuple[Any, ...]) -> None:
        with self._token.token_writes():
            _destroy(objects)

    # --- import ------------------------------------------------------------------------------

    def bring_in(self, claims: ImportTokenClaims, ciphertext: bytes, material: bytes) -> Raw:
        """From the ciphertext to a sealed key; bare: only the unwrapping call."""
        role, _, data = parse_ref(plugin_ref(claims.private_key))
        if role is Role.WRAPPING_DERIVE:
            return self._by_derivation(data, ciphertext, material)
        if role is Role.WRAPPING_UNWRAP:
            return self._by_unwrapping(data, claims.algorithm, ciphertext)
        return self._by_decryption(data, ciphertext, material)

    def _by_unwrapping(self, blob: bytes, algorithm: WrappingAlgorithm, ciphertext: bytes) -> Raw:
        mechanism, parameter = mechanism_of(algorithm)
        becomes = self._token.features.fit(intermediate(trusted=self._token.trusted))
        arguments = {
            "key_data": ciphertext,
            "mechanism": mechanism,
            "mechanism_param": parameter,
            **for_unwrap(becomes),
        }
        unseal, seal = self._unsealing(Role.WRAPPING_UNWRAP, blob), self._sealing()

        def loop() -> None:
            self.authenticate()
            private = unseal()
            seal(private.unwrap_key(**arguments))
            private.destroy()

        private = unseal()
        return Raw(Side(loop), Side(lambda: (private.unwrap_key(**arguments),), _destroy))

    def _by_decryption(self, blob: bytes, ciphertext: bytes, material: bytes) -> Raw:
        unseal, create = self._unsealing(Role.WRAPPING_DECRYPT, blob), self._creating(material)
        seal = self._sealing()

        def loop() -> None:
            self.authenticate()
            private = unseal()
            private.decrypt(ciphertext, mechanism=Mechanism.RSA_X_509)
            seal(create())
            private.destroy()

        private = unseal()
        return Raw(
            Side(loop), Side(lambda: private.decrypt(ciphertext, mechanism=Mechanism.RSA_X_509))
        )

    def _by_derivation(self, object_id: bytes, ciphertext: bytes, material: bytes) -> Raw:
        point = parse(ciphertext, len(material), DEFAULT_LAYOUTS).c1
        wanted = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.ID: object_id}
        seal, create = self._sealing(), self._creating(material)

        def loop() -> None:
            self.authenticate(_SHORT_TOKEN_BYTES)
            (private,) = self.session.get_objects(wanted)
            sm2.derive_x(private, point)
            seal(create())

        (private,) = self.session.get_objects(wanted)
        return Raw(Side(loop), Side(lambda: sm2.derive_x(private, point)))

    def _unsealing(self, role: Role, blob: bytes) -> Callable[[], Any]:
        arguments = for_unwrap(self._token.features.fit(unwrapped_template(role)))
        return partial(
            self.key(role).unwrap_key, key_data=blob, mechanism=AES_KEY_WRAP, **arguments
        )

    def _creating(self, material: bytes) -> Callable[[], Any]:
        becomes = self._token.features.fit(intermediate(trusted=self._token.trusted))
        template = {**becomes, Attribute.VALUE: material}
        return lambda: self.session.create_object(template)

    def _sealing(self) -> Callable[[Any], None]:
        kek = self.key(Role.MATERIAL_AES)

        def seal(material: Any) -> None:
            material.encrypt(checkvalue.CHECK_BLOCK, mechanism=Mechanism.AES_ECB)
            kek.wrap_key(material, mechanism=AES_KEY_WRAP)
            material.destroy()

        return seal


def _destroy(objects: tuple[Any, ...]) -> None:
    for each in objects:
        each.destroy()
