"""RSA wrapping keys on an HSM token: three paths from ciphertext to key material.

UNWRAP keeps the material inside the token. DECRYPT and RAW bring it through the host, where the
token cannot unwrap this algorithm (OAEP with SHA-256 on SoftHSM 2.6.1), or cannot tell how long
an unwrapped key is. PKCS#1 v1.5 is never decoded in the host: that is Bleichenbacher's oracle.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pkcs11.constants import Attribute
from pkcs11.mechanisms import Mechanism
from pkcs11.types import Session

from hsmwrap import oaep
from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.errors import InvalidKeyMaterial
from hsmwrap.pkcs11.binding import objects
from hsmwrap.pkcs11.binding.client_errors import map_client_errors, read
from hsmwrap.pkcs11.binding.objects import Way
from hsmwrap.pkcs11.binding.templates import Template
from hsmwrap.pkcs11.binding.traits import DATA_SPECIFIED
from hsmwrap.pkcs11.wrapping.features import mechanism_of
from hsmwrap.pkcs11.wrapping.material import WrappedMaterial

MODULUS_BYTES = 256
_OAEP_HASH: dict[WrappingAlgorithm, oaep.HashName] = {
    WrappingAlgorithm.RSAES_OAEP_SHA_1: "sha1",
    WrappingAlgorithm.RSAES_OAEP_SHA_256: "sha256",
}


def generate(
    session: Session, private_template: Template, placed: Template | None = None
) -> tuple[Any, Any]:
    """Generate an RSA-2048 pair (e = 65537); returns the public and private key objects.

    The public key is a session object for the host to read, unless ``placed`` says otherwise. It
    may encrypt, as public keys may: NSS tries a pair that decrypts before it hands it out (field
    note 51).
    """
    return objects.generate_pair(
        session,
        private_template,
        public_template={Attribute.ENCRYPT: True, **(placed or {})},
        length=2048,
    )


def public_key_der(public: Any) -> bytes:
    """DER SubjectPublicKeyInfo of a public key object: 294 bytes."""
    numbers = rsa.RSAPublicNumbers(
        int.from_bytes(read(public, Attribute.PUBLIC_EXPONENT), "big"),
        int.from_bytes(read(public, Attribute.MODULUS), "big"),
    )
    return numbers.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def wrapped_material(
    private: Any,
    algorithm: WrappingAlgorithm,
    ciphertext: bytes,
    way: Way,
    source: int = DATA_SPECIFIED,
) -> WrappedMaterial:
    """Key material that the HSM token unwraps from a client's ciphertext."""
    mechanism, parameter = mechanism_of(algorithm, source)
    whole = partial(_of_right_length, ciphertext)
    return WrappedMaterial(private, whole, mechanism, parameter, way)


def decrypt(
    private: Any,
    algorithm: WrappingAlgorithm,
    ciphertext: bytes,
    *,
    native: bool,
    source: int = DATA_SPECIFIED,
) -> bytes:
    """Decrypt into the host; returns the material, of any length.

    Raises:
        InvalidKeyMaterial: The ciphertext does not decrypt.
    """
    ciphertext = _of_right_length(ciphertext)
    if native:
        mechanism, parameter = mechanism_of(algorithm, source)
        with map_client_errors(private):
            return bytes(
                private.decrypt(ciphertext, mechanism=mechanism, mechanism_param=parameter)
            )
    with map_client_errors(private):
        encoded = private.decrypt(ciphertext, mechanism=Mechanism.RSA_X_509)
    return oaep.decode(bytes(encoded).rjust(MODULUS_BYTES, b"\0"), _OAEP_HASH[algorithm])


def _of_right_length(ciphertext: bytes) -> bytes:
    if len(ciphertext) != MODULUS_BYTES:
        raise InvalidKeyMaterial
    return ciphertext
