"""Sealed blobs and message authentication codes under the master keys.

A blob is version (1 byte) ‖ master key id (4) ‖ nonce (12) ‖ AES-256-GCM ciphertext and tag (16).
Each purpose has its own key, derived from the master key by HKDF-SHA-256 (RFC 5869). Version, id
and context (backend, key spec, algorithm) are additional data, so a blob opens only for the purpose
and context it was sealed for. Nonces are random, so a master key has to be rotated well before 2^32
blobs (NIST SP 800-38D, 8.3).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Callable
from enum import Enum

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hsmwrap.backend import NONCE_LENGTH, TAG_LENGTH, Mac
from hsmwrap.errors import InvalidMac, KeyNotFound
from hsmwrap.software._keyring import KEY_ID_LENGTH, Keyring

_VERSION = 1
_HEAD = struct.Struct(f">B{KEY_ID_LENGTH}s")
_OVERHEAD = _HEAD.size + NONCE_LENGTH + TAG_LENGTH


class Purpose(Enum):
    """The purpose of a derived key; the value is its HKDF info label."""

    IMPORT_TOKEN = b"hsmwrap/software/1/import-token"
    WRAPPING_KEY = b"hsmwrap/software/1/wrapping-key"
    KEY_MATERIAL = b"hsmwrap/software/1/key-material"


class BlobRejected(Exception):
    """A blob is damaged, has another purpose or context, or its master key was retired."""


class Sealer:
    """Seals, opens and authenticates under the keyring that ``keyring()`` returns each time."""

    def __init__(self, keyring: Callable[[], Keyring]) -> None:
        """Take a function that returns the current keyring."""
        self._keyring = keyring

    def seal(self, purpose: Purpose, secret: bytes, *context: str) -> bytes:
        """Encrypt ``secret`` for this purpose and context under the current master key."""
        keyring = self._keyring()
        head = _HEAD.pack(_VERSION, bytes.fromhex(keyring.current))
        nonce = os.urandom(NONCE_LENGTH)
        aead = AESGCM(keyring.derived(keyring.current, purpose.value))
        return head + nonce + aead.encrypt(nonce, secret, _bind(head, context))

    def open(self, purpose: Purpose, blob: bytes, *context: str) -> bytes:
        """Decrypt a blob of :meth:`seal` with the same purpose and context.

        Raises:
            BlobRejected: It does not open.
        """
        key_id = key_set_of(blob)
        head, nonce = blob[: _HEAD.size], blob[_HEAD.size : _HEAD.size + NONCE_LENGTH]
        try:
            aead = AESGCM(self._keyring().derived(key_id, purpose.value))
            return aead.decrypt(nonce, blob[_HEAD.size + NONCE_LENGTH :], _bind(head, context))
        except (KeyNotFound, InvalidTag):
            raise BlobRejected from None

    def mac(self, data: bytes) -> Mac:
        """Authenticate ``data`` by HMAC-SHA-256 under the current import-token key."""
        keyring = self._keyring()
        return Mac(keyring.current, _tag(keyring, keyring.current, data))

    def verify_mac(self, data: bytes, mac: Mac) -> None:
        """Return if ``mac`` is right for ``data``; compares in constant time.

        Raises:
            InvalidMac: It is not, or its master key is not in the keyring (any more).
        """
        try:
            expected = _tag(self._keyring(), mac.key_set, data)
        except KeyNotFound:
            raise InvalidMac(f"unknown master key {mac.key_set!r}") from None
        if not hmac.compare_digest(expected, mac.tag):
            raise InvalidMac("the MAC is not right for these data")


def key_set_of(blob: bytes) -> str:
    """Id of the master key that a blob of :meth:`Sealer.seal` needs.

    Raises:
        BlobRejected: It is too short, or not of a version known here.
    """
    if len(blob) < _OVERHEAD or blob[0] != _VERSION:
        raise BlobRejected
    return blob[1 : _HEAD.size].hex()


def _tag(keyring: Keyring, key_id: str, data: bytes) -> bytes:
    key = keyring.derived(key_id, Purpose.IMPORT_TOKEN.value)
    return hmac.digest(key, data, hashlib.sha256)


def _bind(head: bytes, context: tuple[str, ...]) -> bytes:
    return b"\0".join([head, *(word.encode() for word in context)])
