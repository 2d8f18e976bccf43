"""What an HSM token can do, found out by doing it: mechanism lists do not say (field note 8).

Everything is done with session objects in one session, once per backend.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from pkcs11 import MGF
from pkcs11.constants import Attribute, MechanismFlag
from pkcs11.exceptions import PKCS11Error
from pkcs11.mechanisms import KeyType, Mechanism
from pkcs11.types import Session

from hsmwrap.backend import Protection
from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.errors import InvalidKeyMaterial, ProtectionNotKept
from hsmwrap.pkcs11.binding import objects
from hsmwrap.pkcs11.binding.client_errors import read
from hsmwrap.pkcs11.binding.gcm import AesGcm
from hsmwrap.pkcs11.binding.objects import Way
from hsmwrap.pkcs11.binding.profiles import VendorSm2
from hsmwrap.pkcs11.binding.returncodes import recovery_of
from hsmwrap.pkcs11.binding.templates import (
    AES_KEY_WRAP,
    Template,
    for_unwrap,
    private_key,
    secret_key,
    without,
)
from hsmwrap.pkcs11.keysets import hardening
from hsmwrap.pkcs11.keysets.keys import Role, is_trusted, unwrapped_template
from hsmwrap.pkcs11.wrapping import protections, sm2
from hsmwrap.sm2 import decode_spki, open_engine
from hsmwrap.sm2.curve import FIELD_BYTES, GX, GY, encode_point

MECHANISMS: Mapping[WrappingAlgorithm, tuple[Mechanism, Any]] = MappingProxyType(
    {
        WrappingAlgorithm.RSAES_PKCS1_V1_5: (Mechanism.RSA_PKCS, None),
        WrappingAlgorithm.RSAES_OAEP_SHA_1: (
            Mechanism.RSA_PKCS_OAEP,
            (Mechanism.SHA_1, MGF.SHA1, None),
        ),
        WrappingAlgorithm.RSAES_OAEP_SHA_256: (
            Mechanism.RSA_PKCS_OAEP,
            (Mechanism.SHA256, MGF.SHA256, None),
        ),
    }
)
"""Mechanism and parameter of each RSA wrapping algorithm."""

_T = TypeVar("_T")
_AES_128, _AES_256, _BLOCK = 16, 32, 16
_BROKEN_CIPHERTEXTS = 3


@dataclass(frozen=True, slots=True)
class TokenFeatures:
    """What the probe found.

    Attributes:
        unwraps: Algorithms whose ciphertext C_UnwrapKey turns into a key object.
        decrypts: Algorithms that C_Decrypt does natively.
        raw_rsa: CKM_RSA_X_509 decrypts.
        wrapped_lengths: Length of AES keys of each material length under CKM_AES_KEY_WRAP_PAD, in
            bytes; empty where the token does not wrap and unwrap them. Not the same everywhere:
            SoftHSM pads by RFC 5649, NSS as PKCS#7 does (field note 39).
        wraps_rsa: CKM_AES_KEY_WRAP_PAD wraps and unwraps RSA private keys.
        wraps_sm2: The same for SM2 private keys.
        sm2: SM2 key pairs and CKM_ECDH1_DERIVE on them work.
        gcm: CKM_AES_GCM works, additional data and forgery check included.
        ecb: CKM_AES_ECB works (for check values).
        value_length: CKA_VALUE_LEN of an unwrapped key tells its true length.
        implicit_rejection: A ciphertext of wrong PKCS#1 v1.5 padding becomes random bytes, in each
            function that serves RSAES_PKCS1_V1_5; False where it is an error.
        creates_keys: C_CreateObject makes AES keys from plaintext.
        ways: How unwrapped keys come to have the attributes of their templates.
        refused: Hardening attributes that the token's keys have to do without.
        protections: What the token honours, each tried with a control.
    """

    unwraps: frozenset[WrappingAlgorithm]
    decrypts: frozenset[WrappingAlgorithm]
    raw_rsa: bool
    wrapped_lengths: Mapping[int, int]
    wraps_rsa: bool
    wraps_sm2: bool
    sm2: bool
    gcm: bool
    ecb: bool
    value_length: bool
    implicit_rejection: bool
    creates_keys: bool
    ways: Ways
    refused: frozenset[Attribute]
    protections: tuple[Protection, ...]

    @property
    def wraps_secret_keys(self) -> bool:
        """CKM_AES_KEY_WRAP_PAD wraps and unwraps AES keys."""
        return bool(self.wrapped_lengths)

    def fit(self, template: Mapping[Attribute, Any]) -> Template:
        """The template without the attributes that this token refuses."""
        return without(template, self.refused)


@dataclass(frozen=True, slots=True)
class Ways:
    """How unwrapped keys come to have the attributes of their templates, by what is unwrapped.

    Attributes:
        material: Clients' ciphertexts, by RSA.
        sealed_secret: Imported keys, by AES key wrap.
        sealed_private: Private wrapping keys, by AES key wrap.
    """

    material: Way
    sealed_secret: Way
    sealed_private: Way


@dataclass(frozen=True, slots=True)
class OwnKeys:
    """The backend's own key-encryption keys that the probe tries: by the role of what they wrap."""

    unwrap: Any
    derive: Any


def probe(
    session: Session, own: OwnKeys, gcm: AesGcm, vendor: VendorSm2 | None = None
) -> TokenFeatures:
    """Try everything that the backend might want to do.

    Args:
        session: A session to make session objects in.
        own: The backend's own key-encryption keys of wrapping keys.
        gcm: How the backend will use imported keys.
        vendor: The vendor's SM2, if the profile names some.

    Raises:
        PKCS11Error: A return code that says something about the connection, not the token.
        ConfigurationError: A vendor's SM2 cannot be tried, without an engine to encrypt with.
    """
    trials = _Probe(session, hardening.missing_on(own.unwrap), vendor)
    try:
        return trials.run(own, gcm)
    finally:
        trials.clean_up()


class _Probe:
    def __init__(
        self, session: Session, refused: frozenset[Attribute], vendor: VendorSm2 | None
    ) -> None:
        self._session = session
        self._refused = refused
        self._vendor = vendor
        self._made: list[Any] = []
        self._ways = dict.fromkeys(("material", "sealed_secret", "sealed_private"), Way.AS_ASKED)

    def run(self, own: OwnKeys, gcm: AesGcm) -> TokenFeatures:
        public, private = self._keep_pair(
            self._session.generate_keypair(
                KeyType.RSA,
                2048,
                capabilities=MechanismFlag.UNWRAP | MechanismFlag.DECRYPT | MechanismFlag.ENCRYPT,
                private_template={Attribute.EXTRACTABLE: True},
            )
        )
        client = _public_key(public)
        wraps = MechanismFlag.WRAP | MechanismFlag.UNWRAP
        kek = self._keep(self._session.generate_key(KeyType.AES, 256, capabilities=wraps))
        rsa_key = private_key(KeyType.RSA, Attribute.UNWRAP)
        works, in_a_way = self._works, self._in_a_way
        unwraps = self._unwraps(private, client)
        decrypts = self._working(lambda a: self._decrypt(private, client, a))
        tried = self._protections(own.unwrap, private)
        return TokenFeatures(
            unwraps=unwraps,
            decrypts=decrypts,
            raw_rsa=works(lambda: self._raw(private, client)),
            wrapped_lengths=in_a_way("sealed_secret", lambda: self._wrapped_lengths(kek), {}),
            wraps_rsa=in_a_way(
                "sealed_private",
                lambda: self._wrap_and_unwrap(kek, private, rsa_key),
                otherwise=False,
            ),
            wraps_sm2=works(lambda: self._wrap_sm2(own.derive)),
            sm2=works(self._sm2),
            gcm=works(lambda: self._gcm(gcm)),
            ecb=works(self._ecb),
            value_length=works(lambda: self._value_length(private, client, sorted(unwraps))),
            implicit_rejection=self._rejects_implicitly(private, client, unwraps, decrypts),
            creates_keys=works(self._creates_keys),
            ways=Ways(**self._ways),
            refused=self._refused | protections.useless(tried),
            protections=tried,
        )

    def clean_up(self) -> None:
        """Destroy what was made; what cannot be destroyed goes with the session."""
        for key in self._made:
            try:
                key.destroy()
            except PKCS11Error as error:
                if recovery_of(error) is not None:
                    raise

    @staticmethod
    def _try(attempt: Callable[[], _T], otherwise: _T) -> _T:
        # The answer is kept for as long as the backend is open: what fails once may work again.
        for _ in range(2):
            try:
                return attempt()
            except ProtectionNotKept:
                break  # the HSM token's answer, and no failure
            except PKCS11Error as error:
                if recovery_of(error) is not None:
                    raise
        return otherwise

    def _works(self, attempt: Callable[[], bool]) -> bool:
        return self._try(attempt, otherwise=False)

    def _working(
        self, attempt: Callable[[WrappingAlgorithm], bool]
    ) -> frozenset[WrappingAlgorithm]:
        return frozenset(a for a in MECHANISMS if self._works(partial(attempt, a)))

    def _keep(self, key: Any) -> Any:
        self._made.append(key)
        return key

    def _keep_pair(self, pair: tuple[Any, Any]) -> tuple[Any, Any]:
        self._made.extend(pair)
        return pair

    def _unwraps(self, private: Any, client: rsa.RSAPublicKey) -> frozenset[WrappingAlgorithm]:
        return self._in_a_way(
            "material",
            lambda: self._working(lambda a: bool(self._unwrapped(private, client, a, _AES_256))),
            frozenset(),
        )

    def _in_a_way(self, what: str, attempt: Callable[[], _T], otherwise: _T) -> _T:
        """What the attempt returns in the first way in which it does not fail."""
        for self._ways[what] in Way:
            if found := self._try(attempt, otherwise):
                return found
        self._ways[what] = Way.AS_ASKED
        return otherwise

    def _unwrapped(
        self, private: Any, client: rsa.RSAPublicKey, algorithm: WrappingAlgorithm, length: int
    ) -> Any:
        ciphertext = client.encrypt(secrets.token_bytes(length), _padding(algorithm))
        mechanism, parameter = MECHANISMS[algorithm]
        return self._keep(
            objects.unwrap(
                private,
                ciphertext,
                without(secret_key(KeyType.AES, Attribute.ENCRYPT), self._refused),
                mechanism=mechanism,
                parameter=parameter,
                way=self._ways["material"],
            )
        )

    def _decrypt(
        self, private: Any, client: rsa.RSAPublicKey, algorithm: WrappingAlgorithm
    ) -> bool:
        message = secrets.token_bytes(32)
        mechanism, parameter = MECHANISMS[algorithm]
        ciphertext = client.encrypt(message, _padding(algorithm))
        return bool(
            private.decrypt(ciphertext, mechanism=mechanism, mechanism_param=parameter) == message
        )

    def _rejects_implicitly(
        self,
        private: Any,
        client: rsa.RSAPublicKey,
        unwraps: frozenset[WrappingAlgorithm],
        decrypts: frozenset[WrappingAlgorithm],
    ) -> bool:
        algorithm = WrappingAlgorithm.RSAES_PKCS1_V1_5
        mechanism, numbers = MECHANISMS[algorithm][0], client.public_numbers()
        # Not an AES key: the random bytes have a random length.
        becomes = self._for_unwrap(secret_key(KeyType.GENERIC_SECRET))
        tries: list[Callable[[bytes], Any]] = []
        if algorithm in unwraps:
            tries.append(
                lambda c: self._keep(private.unwrap_key(key_data=c, mechanism=mechanism, **becomes))
            )
        if algorithm in decrypts:
            tries.append(lambda c: private.decrypt(c, mechanism=mechanism))

        def accepted(attempt: Callable[[bytes], Any]) -> bool:
            # As a block it starts with 00 03 where 00 02 is due.
            block = int.from_bytes(b"\3" + secrets.token_bytes(254), "big")
            ciphertext = pow(block, numbers.e, numbers.n).to_bytes(256, "big")
            return self._works(lambda: attempt(ciphertext) is not None)

        # Several, as the random length may be one that cannot be a key: none.
        return bool(tries) and all(
            any(accepted(each) for _ in range(_BROKEN_CIPHERTEXTS)) for each in tries
        )

    def _creates_keys(self) -> bool:
        template = secret_key(KeyType.AES, Attribute.ENCRYPT, extractable=True)
        value = secrets.token_bytes(_AES_256)
        self._keep(objects.create(self._session, without(template, self._refused), value))
        return True

    def _raw(self, private: Any, client: rsa.RSAPublicKey) -> bool:
        numbers = client.public_numbers()
        message = 2
        ciphertext = pow(message, numbers.e, numbers.n).to_bytes(256, "big")
        plain = private.decrypt(ciphertext, mechanism=Mechanism.RSA_X_509)
        return int.from_bytes(plain, "big") == message

    def _value_length(
        self, private: Any, client: rsa.RSAPublicKey, algorithms: list[WrappingAlgorithm]
    ) -> bool:
        if not algorithms:
            return False
        key = self._unwrapped(private, client, algorithms[0], _AES_128)
        return bool(key[Attribute.VALUE_LEN] == _AES_128)

    def _wrapped_lengths(self, kek: Any) -> Mapping[int, int]:
        lengths = {length: self._wrapped_length(kek, length) for length in (_AES_128, _AES_256)}
        return lengths if lengths[_AES_128] != lengths[_AES_256] else {}

    def _wrapped_length(self, kek: Any, length: int) -> int:
        key = self._keep(
            self._session.generate_key(
                KeyType.AES,
                length * 8,
                capabilities=MechanismFlag.ENCRYPT,
                template={Attribute.EXTRACTABLE: True},
            )
        )
        blob = kek.wrap_key(key, mechanism=AES_KEY_WRAP)
        becomes = without(secret_key(KeyType.AES, Attribute.ENCRYPT), self._refused)
        self._keep(objects.unwrap(kek, blob, becomes, way=self._ways["sealed_secret"]))
        return len(blob)

    def _wrap_and_unwrap(self, kek: Any, private: Any, becomes: Template) -> bool:
        blob = kek.wrap_key(private, mechanism=AES_KEY_WRAP)
        fitting = without(becomes, self._refused)
        way = self._ways["sealed_private"]
        self._keep(objects.unwrap(kek, blob, fitting, way=way))
        return True

    def _sm2_pair(self) -> tuple[Any, Any]:
        template = {
            **unwrapped_template(Role.WRAPPING_DERIVE, self._vendor),
            Attribute.EXTRACTABLE: True,
        }
        fitting = without(template, self._refused)
        return self._keep_pair(sm2.generate(self._session, fitting, self._vendor))

    def _wrap_sm2(self, own: Any) -> bool:
        # By our own key: its unwrap template has to let this very kind of key through.
        becomes = unwrapped_template(Role.WRAPPING_DERIVE, self._vendor)
        return self._wrap_and_unwrap(own, self._sm2_pair()[1], becomes)

    def _sm2(self) -> bool:
        public, private = self._sm2_pair()
        if self._vendor is None or self._vendor.decrypt is None:
            return len(sm2.derive_x(private, encode_point(GX, GY))) == FIELD_BYTES
        message, point = secrets.token_bytes(_AES_256), decode_spki(sm2.public_key_der(public))
        ciphertext = open_engine("libcrypto").encrypt(point, message)
        try:
            return sm2.decrypt(private, ciphertext, self._vendor) == message
        except InvalidKeyMaterial:
            return False

    def _gcm(self, gcm: AesGcm) -> bool:
        capabilities = MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT
        key = self._keep(self._session.generate_key(KeyType.AES, 256, capabilities=capabilities))
        nonce, message = secrets.token_bytes(12), secrets.token_bytes(24)
        sealed = gcm.encrypt(key, nonce, message, b"a")
        opened = gcm.decrypt(key, nonce, sealed, b"a")
        forged = self._works(lambda: bool(gcm.decrypt(key, nonce, sealed, b"b")))
        return bool(opened == message) and not forged

    def _ecb(self) -> bool:
        key = self._keep(
            self._session.generate_key(KeyType.AES, 256, capabilities=MechanismFlag.ENCRYPT)
        )
        return len(key.encrypt(bytes(_BLOCK), mechanism=Mechanism.AES_ECB)) == _BLOCK

    def _protections(self, own: Any, private: Any) -> tuple[Protection, ...]:
        key = protections.OwnKey(
            key=own,
            becomes=private_key(KeyType.RSA, Attribute.UNWRAP),
            private=private,
            trusted=is_trusted(own),
            lacks=self._refused,
        )
        return protections.tried(self._session, key, lambda t: without(t, self._refused))

    def _for_unwrap(self, template: Template) -> dict[str, Any]:
        return for_unwrap(without(template, self._refused))


def _padding(algorithm: WrappingAlgorithm) -> padding.AsymmetricPadding:
    if algorithm is WrappingAlgorithm.RSAES_PKCS1_V1_5:
        return padding.PKCS1v15()
    sha1 = algorithm is WrappingAlgorithm.RSAES_OAEP_SHA_1
    digest = hashes.SHA1() if sha1 else hashes.SHA256()  # noqa: S303  # the API's algorithm
    return padding.OAEP(padding.MGF1(digest), digest, None)


def _public_key(public: Any) -> rsa.RSAPublicKey:
    return rsa.RSAPublicNumbers(
        int.from_bytes(read(public, Attribute.PUBLIC_EXPONENT), "big"),
        int.from_bytes(read(public, Attribute.MODULUS), "big"),
    ).public_key()
