"""Use of an imported key: AES-256-GCM and SM4-GCM.

A message is version (1 byte) ‖ nonce (12) ‖ ciphertext ‖ tag (16). The additional data is exactly
the caller's, so any GCM implementation can read what follows the version byte. The version byte
itself is not authenticated; only one value is accepted. Version 2 authenticates its own
(:mod:`hsmwrap.ccm`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers import BlockCipherAlgorithm, Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.modes import GCM

from hsmwrap.backend import MESSAGE_VERSION, NONCE_LENGTH, TAG_LENGTH
from hsmwrap.catalog import KeySpec
from hsmwrap.errors import InvalidCiphertext

_VERSION = bytes([MESSAGE_VERSION])
_HEAD_LENGTH = len(_VERSION) + NONCE_LENGTH

_ALGORITHMS: Mapping[KeySpec, Callable[[bytes], BlockCipherAlgorithm]] = MappingProxyType(
    {KeySpec.ALIYUN_AES_256: algorithms.AES, KeySpec.ALIYUN_SM4: algorithms.SM4}
)


def encrypt(key_spec: KeySpec, key: bytes, plaintext: bytes, additional_data: bytes) -> bytes:
    """Encrypt to a message with a random nonce."""
    nonce = os.urandom(NONCE_LENGTH)
    gcm = Cipher(_ALGORITHMS[key_spec](key), GCM(nonce)).encryptor()
    gcm.authenticate_additional_data(additional_data)
    return _VERSION + nonce + gcm.update(plaintext) + gcm.finalize() + gcm.tag


def decrypt(key_spec: KeySpec, key: bytes, message: bytes, additional_data: bytes) -> bytes:
    """Decrypt a message of :func:`encrypt`.

    Raises:
        InvalidCiphertext: Too short, unknown version, or not authentic; never says which.
    """
    if len(message) < _HEAD_LENGTH + TAG_LENGTH or message[:1] != _VERSION:
        raise InvalidCiphertext
    nonce, tag = message[1:_HEAD_LENGTH], message[-TAG_LENGTH:]
    gcm = Cipher(_ALGORITHMS[key_spec](key), GCM(nonce)).decryptor()
    gcm.authenticate_additional_data(additional_data)
    plaintext = gcm.update(message[_HEAD_LENGTH:-TAG_LENGTH])
    try:
        return plaintext + gcm.finalize_with_tag(tag)
    except InvalidTag:
        raise InvalidCiphertext from None


@cache
def is_usable(key_spec: KeySpec) -> bool:
    """Whether pyca has this cipher; SM4-GCM depends on the OpenSSL that it was built with."""
    try:
        encrypt(key_spec, bytes(key_spec.material_length), b"", b"")
    except UnsupportedAlgorithm:
        return False
    return True
