"""SM2 wrapping keys on an HSM token: by a vendor's mechanism, or by ECDH on a standard token.

A vendor's C_UnwrapKey keeps the key material inside the token; its C_Decrypt brings it to the host.
A standard token knows no SM2 decryption, but its CKM_ECDH1_DERIVE gives x([d]C1) on any curve
that it generates keys on; the host recovers y, and C3 says which of the two it was (field note
10). C1 is checked before it reaches the token: an off-curve point would leak the private key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pkcs11.constants import Attribute
from pkcs11.mechanisms import KDF, KeyType, Mechanism
from pkcs11.types import Session

from hsmwrap.errors import ConfigurationError, HsmError
from hsmwrap.pkcs11.binding import objects
from hsmwrap.pkcs11.binding.client_errors import map_client_errors, read
from hsmwrap.pkcs11.binding.objects import Way
from hsmwrap.pkcs11.binding.profiles import VendorSm2
from hsmwrap.pkcs11.binding.templates import Template
from hsmwrap.pkcs11.wrapping.material import WrappedMaterial
from hsmwrap.sm2 import OID_DER, Sm2Ciphertext, decode_point, decrypt_with_x2, encode_spki

_POINT_HEADS = {
    68: b"\x03\x42\x00\x04",  # DER BIT STRING
    67: b"\x04\x41\x04",  # DER OCTET STRING, as PKCS#11 has it
    66: b"\x04\x40",  # DER OCTET STRING of x and y
    65: b"\x04",  # the bare point
    64: b"",  # x and y
}
"""What comes before x and y in CKA_EC_POINT, by its length: each of these occurs."""
_HEAD_BYTES = 4


def generate(
    session: Session,
    private_template: Template,
    vendor: VendorSm2 | None,
    placed: Template | None = None,
) -> tuple[Any, Any]:
    """Generate an SM2 pair; returns the public and private key objects.

    The public key is a session object, unless ``placed`` says otherwise.
    """
    key_type = (vendor and vendor.key_type) or KeyType.EC
    mechanism = (vendor and vendor.generate) or Mechanism.EC_KEY_PAIR_GEN
    return objects.generate_pair(
        session,
        {**private_template, Attribute.KEY_TYPE: key_type},
        public_template={Attribute.EC_PARAMS: OID_DER, **(placed or {})},
        mechanism=mechanism,
    )


def public_key_der(public: Any) -> bytes:
    """DER SubjectPublicKeyInfo of a public key object: the 91-byte form.

    Raises:
        HsmError: The token's CKA_EC_POINT is not a point of the curve.
    """
    told = bytes(read(public, Attribute.EC_POINT))
    head = _POINT_HEADS.get(len(told), told)
    point = b"\x04" + told[len(head) :] if told.startswith(head) else told
    try:
        decode_point(point)
    except ValueError:
        raise HsmError(
            "the HSM token's CKA_EC_POINT is not an uncompressed SM2 point: it has "
            f"{len(told)} bytes, {told[:_HEAD_BYTES].hex(' ')} …; read are x and y by themselves, "
            "after 04, and both in an OCTET STRING or BIT STRING"
        ) from None
    return encode_spki(point)


def derive_x(private: Any, point: bytes) -> bytes:
    """x([d]P) by CKM_ECDH1_DERIVE with CKD_NULL: 32 bytes; ``point`` is uncompressed.

    The caller has checked that the point is on the curve.
    """
    derived = private.derive_key(
        KeyType.GENERIC_SECRET,
        256,
        capabilities=0,
        mechanism=Mechanism.ECDH1_DERIVE,
        mechanism_param=(KDF.NULL, None, point),
        template={Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True},
    )
    try:
        return bytes(read(derived, Attribute.VALUE))
    finally:
        derived.destroy()


def wrapped_material(
    vendor: VendorSm2 | None, private: Any, parsed: Callable[[], Sm2Ciphertext], way: Way
) -> WrappedMaterial:
    """Key material that the HSM token unwraps by the vendor's mechanism.

    Args:
        vendor: The vendor's mechanisms, if the profile names some.
        private: The private key object.
        parsed: Returns the client's ciphertext; its C1 is on the curve, and its C2 as long as the
            key material has to be.
        way: What the HSM token needs.

    Raises:
        ConfigurationError: The profile, if there is one, names no mechanism.
    """
    if vendor is None or vendor.unwrap is None:
        raise ConfigurationError(
            "the wrapping key of this import token unwraps by a vendor's mechanism, and the "
            "profile that is configured names none"
        )
    layout = vendor.unwrap_layout
    return WrappedMaterial(
        private, lambda: parsed().write(layout), vendor.unwrap, vendor.unwrap_parameter, way
    )


def decrypt(private: Any, ciphertext: Sm2Ciphertext, vendor: VendorSm2 | None) -> bytes:
    """Decrypt; returns the material.

    Args:
        private: The private key object.
        ciphertext: Parsed, so its C1 is on the curve.
        vendor: The vendor's mechanisms, if the profile names some.

    Raises:
        InvalidKeyMaterial: C3 does not match, or the token refuses.
    """
    if vendor is not None and vendor.decrypt is not None:
        raw = ciphertext.write(vendor.ciphertext)
        with map_client_errors(private):
            return bytes(private.decrypt(raw, mechanism=vendor.decrypt))
    with map_client_errors(private):
        x2 = derive_x(private, ciphertext.c1)
    return decrypt_with_x2(ciphertext, x2)
