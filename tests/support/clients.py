"""A client in this process, where the openssl command would take too long."""

from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.sm2 import decode_spki, open_engine
from hsmwrap.testing.clients import pyca_encrypt


def encrypt_as_client(algorithm: WrappingAlgorithm, public_key: bytes, material: bytes) -> bytes:
    """RSA by pyca; SM2 by an engine of its own, in layout C1C3C2."""
    if algorithm is not WrappingAlgorithm.SM2PKE:
        return pyca_encrypt(algorithm, public_key, material)
    point = decode_spki(public_key)
    return open_engine("libcrypto").encrypt(point, material).to_c1c3c2()
