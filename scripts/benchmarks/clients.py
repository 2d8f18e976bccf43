"""A client that is too fast to affect the measurement: pyca, and libcrypto for SM2."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.sm2 import open_engine

_SHA1 = SHA1()  # noqa: S303  # the API's algorithm
PADDINGS: Mapping[WrappingAlgorithm, padding.AsymmetricPadding] = MappingProxyType(
    {
        WrappingAlgorithm.RSAES_PKCS1_V1_5: padding.PKCS1v15(),
        WrappingAlgorithm.RSAES_OAEP_SHA_1: padding.OAEP(padding.MGF1(_SHA1), _SHA1, None),
        WrappingAlgorithm.RSAES_OAEP_SHA_256: padding.OAEP(padding.MGF1(SHA256()), SHA256(), None),
    }
)
_POINT_LENGTH = 65


def encrypt(algorithm: WrappingAlgorithm, public_key: bytes, material: bytes) -> bytes:
    """Encrypt key material to a DER SubjectPublicKeyInfo; SM2 in DER form."""
    if algorithm is WrappingAlgorithm.SM2PKE:
        engine = open_engine("libcrypto")
        return engine.encrypt(public_key[-_POINT_LENGTH:], material).to_der()
    key = load_der_public_key(public_key)
    if not isinstance(key, rsa.RSAPublicKey):
        raise TypeError("not an RSA key")
    return key.encrypt(material, PADDINGS[algorithm])
