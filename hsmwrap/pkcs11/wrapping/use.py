"""How imported keys encrypt: which ciphers there are for a key spec, and their known answers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

from hsmwrap.backend import MESSAGE_VERSION, MESSAGE_VERSION_CCM
from hsmwrap.pkcs11.binding.ccm import Ccm
from hsmwrap.pkcs11.binding.gcm import Gcm
from hsmwrap.pkcs11.binding.profiles import VendorSm4


class MessageCipher(Protocol):
    """Authenticated encryption by a key object; the tag (16 bytes) follows the ciphertext."""

    @property
    def name(self) -> str:
        """What it is, in words."""

    @property
    def version(self) -> int:
        """First byte of its messages."""

    def encrypt(self, key: Any, nonce: bytes, plaintext: bytes, additional_data: bytes) -> bytes:
        """Encrypt; raises PKCS11Error or an error of the contract."""

    def decrypt(self, key: Any, nonce: bytes, sealed: bytes, additional_data: bytes) -> bytes:
        """Decrypt; raises InvalidCiphertext where the tag does not fit."""


def authenticated(version: int, additional_data: bytes) -> bytes:
    """The additional data of a message: from version 2 on with the version itself."""
    return additional_data if version == MESSAGE_VERSION else bytes([version]) + additional_data


def sm4_ciphers(module: str, sm4: VendorSm4) -> tuple[MessageCipher, ...]:
    """Those that a profile has mechanisms for, the best first."""
    ciphers: list[MessageCipher] = []
    if sm4.gcm is not None:
        ciphers.append(Gcm(module, sm4.gcm))
    counter = sm4.ecb or sm4.ctr
    if sm4.cbc is not None and counter is not None:
        ciphers.append(Ccm(sm4.cbc, counter, by_ctr=sm4.ecb is None))
    return tuple(ciphers)


# RFC 8998, appendix A. The key is also that of the example in GB/T 32907-2016, appendix A.
SM4_KEY = bytes.fromhex("0123456789abcdeffedcba9876543210")
SM4_NONCE = bytes.fromhex("00001234567800000000abcd")
SM4_DATA = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
SM4_PLAINTEXT = b"".join(bytes([each]) * 8 for each in b"\xaa\xbb\xcc\xdd\xee\xff\xee\xaa")
SM4_SEALED: Mapping[int, bytes] = MappingProxyType(
    {
        MESSAGE_VERSION: bytes.fromhex(
            "17f399f08c67d5ee19d0dc9969c4bb7d5fd46fd3756489069157b282bb200735"
            "d82710ca5c22f0ccfa7cbf93d496ac15a56834cbcf98c397b4024a2691233b8d"
            "83de3541e4c2b58177e065a9bf7b62ec"
        ),
        MESSAGE_VERSION_CCM: bytes.fromhex(
            "48af93501fa62adbcd414cce6034d895dda1bf8f132f042098661572e7483094"
            "fd12e518ce062c98acee28d95df4416bed31a2f04476c18bb40c84a74b97dc5b"
            "16842d4fa186f56ab33256971fa110f4"
        ),
    }
)
"""Ciphertext ‖ tag of :data:`SM4_PLAINTEXT`, by the version of the message."""
