"""Vendor profiles: the SM2 mechanisms that vendors define for themselves.

Values collide between vendors (0x80008200 is Sansec's and TASS's), so a profile is chosen by
configuration, one per module, never guessed. They come from public headers and were not run
against hardware; the probe runs them against whatever is there before they are relied on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from types import MappingProxyType
from typing import TypeVar

from pkcs11.mechanisms import KeyType, Mechanism

from hsmwrap.errors import ConfigurationError

_E = TypeVar("_E", bound=IntEnum)


class CiphertextForm(Enum):
    """What a vendor's SM2 decryption takes."""

    C1C3C2 = "04 ‖ x ‖ y ‖ C3 ‖ C2"
    DER = "SEQUENCE { x, y, hash, ciphertext } (GM/T 0009)"


@dataclass(frozen=True, slots=True)
class VendorSm2:
    """A vendor's SM2.

    Attributes:
        key_type: CKK of its SM2 keys; None: the standard CKK_EC.
        generate: Mechanism of key pair generation; None: the standard one.
        decrypt: Mechanism of C_Decrypt; None: the vendor publishes none, use ECDH.
        form: What ``decrypt`` takes.
    """

    key_type: KeyType | None
    generate: Mechanism | None
    decrypt: Mechanism | None
    form: CiphertextForm = CiphertextForm.C1C3C2


def vendor_mechanism(value: int) -> Mechanism:
    """A mechanism by number, for python-pkcs11, which takes no plain int (field note 6)."""
    return _by_number(Mechanism, value)


def vendor_key_type(value: int) -> KeyType:
    """A key type by number, for python-pkcs11."""
    return _by_number(KeyType, value)


def _by_number(kind: type[_E], value: int) -> _E:
    for member in kind:
        if member.value == value:
            return member
    made: _E = int.__new__(kind, value)
    made._name_ = f"VENDOR_{value:#010x}"
    made._value_ = value
    return made


PROFILES: Mapping[str, VendorSm2] = MappingProxyType(
    {
        "sansec": VendorSm2(
            vendor_key_type(0x80000004), vendor_mechanism(0x80008001), vendor_mechanism(0x80008200)
        ),
        "tass": VendorSm2(
            vendor_key_type(0x80000004), vendor_mechanism(0x80008001), vendor_mechanism(0x80008200)
        ),
        "ibm-ep11": VendorSm2(
            vendor_key_type(0x80050002), vendor_mechanism(0x8005000A), vendor_mechanism(0x8005000D)
        ),
        "luna": VendorSm2(vendor_key_type(0x80000016), vendor_mechanism(0x80000B20), None),
    }
)


def profile(name: str | None) -> VendorSm2 | None:
    """The profile of this name; None for None.

    Raises:
        ConfigurationError: No profile has this name.
    """
    if name is None:
        return None
    try:
        return PROFILES[name]
    except KeyError:
        raise ConfigurationError(
            f"profile: {name!r} is unknown; there are {', '.join(PROFILES)}"
        ) from None
