"""A client that is fast enough not to be what is measured: pyca, and libcrypto for SM2."""

from __future__ import annotations

from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.sm2 import open_engine
from hsmwrap.testing.clients import pyca_encrypt

_POINT_LENGTH = 65


def encrypt(algorithm: WrappingAlgorithm, public_key: bytes, material: bytes) -> bytes:
    """Encrypt key material to a DER SubjectPublicKeyInfo; SM2 in DER form."""
    if algorithm is WrappingAlgorithm.SM2PKE:
        engine = open_engine("libcrypto")
        return engine.encrypt(public_key[-_POINT_LENGTH:], material).to_der()
    return pyca_encrypt(algorithm, public_key, material)
