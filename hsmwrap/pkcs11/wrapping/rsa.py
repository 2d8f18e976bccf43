"""RSA wrapping keys on an HSM token: three paths from ciphertext to key material.

UNWRAP keeps the material inside the token. DECRYPT and RAW bring it through the host, where the
token cannot unwrap this algorithm (OAEP with SHA-256 on SoftHSM 2.6.1), or cannot tell how long
an unwrapped key is. PKCS#1 v1.5 is never decoded in the host: that is Bleichenbacher's oracle.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pkcs11.constants import Attribute
from pkcs11.mechanisms import Mechanism
from pkcs11.types import Session

from hsmwrap import oaep
from hsmwrap.backend import Exposure
from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.errors import InvalidKeyMaterial
from hsmwrap.pkcs11.binding import objects
from hsmwrap.pkcs11.binding.client_errors import map_client_errors, read
from hsmwrap.pkcs11.binding.objects import Way
from hsmwrap.pkcs11.binding.templates import Template
from hsmwrap.pkcs11.keysets.keys import Role
from hsmwrap.pkcs11.wrapping.probe import MECHANISMS, TokenFeatures

MODULUS_BYTES = 256
_OAEP_HASH: dict[WrappingAlgorithm, oaep.HashName] = {
    WrappingAlgorithm.RSAES_OAEP_SHA_1: "sha1",
    WrappingAlgorithm.RSAES_OAEP_SHA_256: "sha256",
}


class RsaPath(Enum):
    """How an algorithm is done; value: key-encryption key role, exposure, description."""

    UNWRAP = (Role.WRAPPING_UNWRAP, Exposure.IN_HSM, "C_UnwrapKey")
    DECRYPT = (Role.WRAPPING_DECRYPT, Exposure.HOST, "C_Decrypt, then C_CreateObject")
    RAW = (Role.WRAPPING_DECRYPT, Exposure.HOST, "CKM_RSA_X_509, OAEP decoded in the host")

    @property
    def role(self) -> Role:
        """Role of the key-encryption key for private keys of this path."""
        return self.value[0]

    @property
    def exposure(self) -> Exposure:
        """Where the material is in plaintext."""
        return self.value[1]

    @property
    def description(self) -> str:
        """For the capability report."""
        return self.value[2]


def path_of(algorithm: WrappingAlgorithm, features: TokenFeatures) -> RsaPath | None:
    """The best path that the HSM token has for this algorithm."""
    knows_length = features.wraps_secret_keys or features.value_length
    if algorithm in features.unwraps and knows_length and features.ecb:
        return RsaPath.UNWRAP
    if algorithm in features.decrypts:
        return RsaPath.DECRYPT
    if algorithm in _OAEP_HASH and features.raw_rsa:
        return RsaPath.RAW
    return None


def generate(session: Session, private_template: Template) -> tuple[Any, Any]:
    """Generate an RSA-2048 pair (e = 65537); returns the public and private key objects.

    The public key is a session object for the host to read. It may encrypt, as public keys may: NSS
    tries a pair that decrypts before it hands it out (field note 51).
    """
    return objects.generate_pair(
        session, private_template, public_template={Attribute.ENCRYPT: True}, length=2048
    )


def public_key_der(public: Any) -> bytes:
    """DER SubjectPublicKeyInfo of a public key object: 294 bytes."""
    numbers = rsa.RSAPublicNumbers(
        int.from_bytes(read(public, Attribute.PUBLIC_EXPONENT), "big"),
        int.from_bytes(read(public, Attribute.MODULUS), "big"),
    )
    return numbers.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


@dataclass(frozen=True, slots=True)
class WrappedMaterial:
    """Key material that the HSM token unwraps: C_UnwrapKey."""

    exposure: ClassVar[Exposure] = Exposure.IN_HSM

    private: Any
    algorithm: WrappingAlgorithm
    ciphertext: bytes
    way: Way

    def make_object(self, _session: Session, template: Template) -> Any:
        """Make it an object with ``template``, in the session of the private key.

        Raises:
            InvalidKeyMaterial: The token refuses the ciphertext.
            ProtectionNotKept: The object is readable, or usable for more; it was destroyed.
        """
        _require_length(self.ciphertext)
        mechanism, parameter = MECHANISMS[self.algorithm]
        return objects.unwrap(
            self.private,
            self.ciphertext,
            template,
            mechanism=mechanism,
            parameter=parameter,
            answers=map_client_errors(self.private),
            way=self.way,
        )


def decrypt(
    private: Any, algorithm: WrappingAlgorithm, ciphertext: bytes, *, native: bool
) -> bytes:
    """Decrypt into the host; returns the material, of any length.

    Raises:
        InvalidKeyMaterial: The ciphertext does not decrypt.
    """
    _require_length(ciphertext)
    if native:
        mechanism, parameter = MECHANISMS[algorithm]
        with map_client_errors(private):
            return bytes(
                private.decrypt(ciphertext, mechanism=mechanism, mechanism_param=parameter)
            )
    with map_client_errors(private):
        encoded = private.decrypt(ciphertext, mechanism=Mechanism.RSA_X_509)
    return oaep.decode(bytes(encoded).rjust(MODULUS_BYTES, b"\0"), _OAEP_HASH[algorithm])


def _require_length(ciphertext: bytes) -> None:
    if len(ciphertext) != MODULUS_BYTES:
        raise InvalidKeyMaterial
