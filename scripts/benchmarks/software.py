"""Raw pyca and libcrypto: the software backend's calls of them, without the backend."""

from __future__ import annotations

import hashlib
import hmac
import os
from functools import partial

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from benchmarks.clients import encrypt
from benchmarks.hsm import TOKEN_BYTES, Raw
from benchmarks.libcrypto import RawSm2
from benchmarks.timing import Side
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.checkvalue import check_value
from hsmwrap.customer import PADDINGS

_KEY = os.urandom(32)
_NONCE = bytes(12)
_RSA_SECRET_LENGTH = 384
_SM2_SECRET_LENGTH = 97


def issue(spec: WrappingKeySpec) -> Raw:
    """Key generation; the loop also has the further calls for the pair."""
    bare = _generate_rsa if spec is WrappingKeySpec.RSA_2048 else RawSm2().generate
    secret = _RSA_SECRET_LENGTH if spec is WrappingKeySpec.RSA_2048 else _SM2_SECRET_LENGTH

    def loop() -> None:
        key = bare()
        if key is not None:
            key.private_numbers()
            key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        AESGCM(_KEY).encrypt(_NONCE, bytes(secret), None)
        _authenticate()

    return Raw(Side(loop), Side(bare))


def _generate_rsa() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def bring_in(algorithm: WrappingAlgorithm, material: bytes) -> Raw:
    """Decryption by a loaded key; the loop first unseals the key and, for RSA, loads it.

    The backend loads and checks an SM2 key each time; that counts as ours.
    """
    if algorithm is WrappingAlgorithm.SM2PKE:
        return _sm2(material)
    key = _generate_rsa()
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    ciphertext, numbers = encrypt(algorithm, spki, material), key.private_numbers()
    sealed = AESGCM(_KEY).encrypt(_NONCE, bytes(_RSA_SECRET_LENGTH), None)

    def loop() -> None:
        _authenticate()
        AESGCM(_KEY).decrypt(_NONCE, sealed, None)
        private = numbers.private_key(unsafe_skip_rsa_key_validation=True)
        _seal(private.decrypt(ciphertext, PADDINGS[algorithm]))

    return Raw(Side(loop), Side(partial(key.decrypt, ciphertext, PADDINGS[algorithm])))


def _sm2(material: bytes) -> Raw:
    raw = RawSm2()
    ciphertext = encrypt(WrappingAlgorithm.SM2PKE, raw.public_key, material)
    sealed = AESGCM(_KEY).encrypt(_NONCE, bytes(_SM2_SECRET_LENGTH), None)

    def loop() -> None:
        _authenticate()
        AESGCM(_KEY).decrypt(_NONCE, sealed, None)
        _seal(raw.decrypt(ciphertext))

    return Raw(Side(loop), Side(partial(raw.decrypt, ciphertext)))


def _seal(material: bytes) -> None:
    check_value(material)
    AESGCM(_KEY).encrypt(_NONCE, material, None)


def _authenticate() -> None:
    hmac.digest(_KEY, TOKEN_BYTES, hashlib.sha256)
