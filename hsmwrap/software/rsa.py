"""RSA-2048 wrapping keys by pyca/cryptography."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import ClassVar

from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import InvalidKeyMaterial

_EXPONENT = 65537
_BITS = 2048
_PRIME_LENGTH = _BITS // 16

_PADDINGS: Mapping[WrappingAlgorithm, padding.AsymmetricPadding] = MappingProxyType(
    {
        WrappingAlgorithm.RSAES_PKCS1_V1_5: padding.PKCS1v15(),
        WrappingAlgorithm.RSAES_OAEP_SHA_1: padding.OAEP(
            mgf=padding.MGF1(SHA1()),  # noqa: S303  # the API's algorithm; OAEP needs no collision resistance
            algorithm=SHA1(),  # noqa: S303  # as above
            label=None,
        ),
        WrappingAlgorithm.RSAES_OAEP_SHA_256: padding.OAEP(
            mgf=padding.MGF1(SHA256()), algorithm=SHA256(), label=None
        ),
    }
)


@dataclass(frozen=True, slots=True)
class RsaScheme:
    """Key pairs and decryption for one RSA algorithm."""

    ALGORITHMS: ClassVar = tuple(_PADDINGS)

    algorithm: WrappingAlgorithm
    spec: ClassVar = WrappingKeySpec.RSA_2048
    production: ClassVar = True

    @property
    def path(self) -> str:
        """The implementation, for the capability report."""
        return f"pyca {self.algorithm}"

    def generate(self) -> tuple[bytes, bytes]:
        """Generate a key pair, see :func:`generate`."""
        return generate()

    def decrypt(
        self,
        secret: bytes,
        ciphertext: bytes,
        material_length: int,  # noqa: ARG002  # RSA paddings carry the length
    ) -> bytes:
        """Decrypt a client's ciphertext to a message of any length, see :func:`decrypt`."""
        return decrypt(load(secret), self.algorithm, ciphertext)


def generate() -> tuple[bytes, bytes]:
    """Generate a key pair: DER SubjectPublicKeyInfo (294 bytes), and the secret for :func:`load`.

    The secret is p ‖ q ‖ q⁻¹ mod p, 128 bytes each. The rest of the private key is rebuilt with a
    few additions and divisions, as e is fixed and small; the inverse would take as long as
    everything else together (field note 63). It has a third of the size of PKCS#8, which matters
    because the import token carries it.
    """
    private_key = rsa.generate_private_key(_EXPONENT, _BITS)
    numbers = private_key.private_numbers()
    spki = private_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    parts = numbers.p, numbers.q, numbers.iqmp
    return spki, b"".join(part.to_bytes(_PRIME_LENGTH, "big") for part in parts)


def load(secret: bytes) -> rsa.RSAPrivateKey:
    """Rebuild the private key from :func:`generate`'s secret.

    Takes 0.03 ms, against 37 ms with pyca's check of the key (field note 63). The check is skipped
    because the caller got the secret out of a blob that our own AEAD has authenticated, and that
    :func:`generate` filled; for a key from anywhere else it would be wrong. The arithmetic is that
    of Python's integers and not constant time; its operands are the same at every call, and no
    client chooses them.
    """
    p, q, iqmp = (
        int.from_bytes(secret[start : start + _PRIME_LENGTH], "big")
        for start in range(0, 3 * _PRIME_LENGTH, _PRIME_LENGTH)
    )
    d = rsa.rsa_recover_private_exponent(_EXPONENT, p, q)
    numbers = rsa.RSAPrivateNumbers(
        p=p,
        q=q,
        d=d,
        dmp1=rsa.rsa_crt_dmp1(d, p),
        dmq1=rsa.rsa_crt_dmq1(d, q),
        iqmp=iqmp,
        public_numbers=rsa.RSAPublicNumbers(_EXPONENT, p * q),
    )
    return numbers.private_key(unsafe_skip_rsa_key_validation=True)


@cache
def rejects_implicitly() -> bool:
    """Whether pyca's OpenSSL answers wrong PKCS#1 v1.5 padding with random bytes, not an error.

    Tried once per process, on a fresh key: one with a fixed key would be quicker by 0.1 s, and a
    private key in the source. OpenSSL does it from 3.2 on, and distributions brought it to older
    ones and can turn it off, so its version does not tell.
    """
    private_key = rsa.generate_private_key(_EXPONENT, _BITS)
    # The number 1 is its own encryption, and as a block starts with neither 00 02 nor a filling.
    block = (1).to_bytes(_BITS // 8, "big")
    try:
        private_key.decrypt(block, _PADDINGS[WrappingAlgorithm.RSAES_PKCS1_V1_5])
    except ValueError:
        return False
    return True


def decrypt(
    private_key: rsa.RSAPrivateKey, algorithm: WrappingAlgorithm, ciphertext: bytes
) -> bytes:
    """Decrypt a client's ciphertext to a message of any length.

    With RSAES_PKCS1_V1_5 and implicit rejection (see :func:`rejects_implicitly`) wrong padding does
    not fail: it decrypts to bytes of random length that depend on key and ciphertext only. That is
    the right answer to Bleichenbacher's attack, and means that success proves nothing. Without it
    wrong padding fails here and a wrong length after it, with the same error but not in the same
    time.

    Raises:
        InvalidKeyMaterial: It does not decrypt; never says why.
    """
    try:
        return private_key.decrypt(ciphertext, _PADDINGS[algorithm])
    except ValueError:
        raise InvalidKeyMaterial from None
