"""CCM from what an HSM without an authenticated mode has: ECB, and CBC with an IV of zeros.

Source: NIST SP 800-38C, formatting of its appendix A with a nonce of 12 bytes (q = 3) and a tag of
16; for SM4 the same parameters as RFC 8998.

Why CCM: GCM from ECB would give the host E(0), with which messages can be forged for ever. CBC or
CTR with an HMAC or CMAC needs a second key, and a client imports one. CCM uses one key for both,
which its proof covers (Jonsson, SAC 2002), and only encrypts blocks: two calls of the HSM for a
message, where GCM is one.

The host sees the key stream of a message that it has, and the chaining values of its CBC-MAC. These
tell nothing of the key, and open no other message; with them, text that cannot be chosen freely
could be forged under the same nonce. What reads them in this process can use the HSM as well.

Nonces are random, so a key is for 2^32 messages (as NIST SP 800-38D, 8.3, has it for GCM).

A message is version (1 byte) ‖ nonce (12) ‖ ciphertext ‖ tag (16), and its associated data is
version ‖ additional data: a message of this format passes for no other one.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable

from hsmwrap.backend import MESSAGE_VERSION_CCM, NONCE_LENGTH, TAG_LENGTH
from hsmwrap.errors import InvalidCiphertext, InvalidParameter

Blocks = Callable[[bytes], bytes]
"""Encrypts whole blocks under the key."""

BLOCK = 16
MAX_LENGTH = 2**24 - 1
"""Longest message in bytes: its length has three bytes."""

_VERSION = bytes([MESSAGE_VERSION_CCM])
_HEAD_LENGTH = len(_VERSION) + NONCE_LENGTH
_LENGTH_BYTES = BLOCK - 1 - NONCE_LENGTH
_SHORT = 2**16 - 2**8
_ASSOCIATED = 0x40


def encrypt(ecb: Blocks, cbc: Blocks, plaintext: bytes, additional_data: bytes) -> bytes:
    """Encrypt to a message with a random nonce.

    Args:
        ecb: Encrypts each block by itself.
        cbc: Encrypts in CBC mode with an IV of zeros; its last block alone is used.
        plaintext: Up to :data:`MAX_LENGTH` bytes.
        additional_data: Is authenticated, and not in the message.

    Raises:
        InvalidParameter: The plaintext is longer.
    """
    nonce = os.urandom(NONCE_LENGTH)
    return _VERSION + nonce + seal(ecb, cbc, nonce, plaintext, _VERSION + additional_data)


def decrypt(ecb: Blocks, cbc: Blocks, message: bytes, additional_data: bytes) -> bytes:
    """Decrypt a message of :func:`encrypt`.

    Raises:
        InvalidCiphertext: Too short, another version, or not authentic; never says which.
    """
    if len(message) < _HEAD_LENGTH + TAG_LENGTH or message[:1] != _VERSION:
        raise InvalidCiphertext
    nonce, sealed = message[1:_HEAD_LENGTH], message[_HEAD_LENGTH:]
    return unseal(ecb, cbc, nonce, sealed, _VERSION + additional_data)


def seal(ecb: Blocks, cbc: Blocks, nonce: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """CCM as the standard has it: ciphertext ‖ tag.

    Raises:
        InvalidParameter: The plaintext is too long.
    """
    if len(plaintext) > MAX_LENGTH:
        raise InvalidParameter("Plaintext", f"has more than {MAX_LENGTH} bytes")
    tag_mask, key_stream = _key_stream(ecb, nonce, len(plaintext))
    tag = _xor(_authenticate(cbc, nonce, plaintext, associated), tag_mask)
    return _xor(plaintext, key_stream) + tag


def unseal(ecb: Blocks, cbc: Blocks, nonce: bytes, sealed: bytes, associated: bytes) -> bytes:
    """CCM backwards.

    Raises:
        InvalidCiphertext: It is not authentic, or too long.
    """
    ciphertext, tag = sealed[:-TAG_LENGTH], sealed[-TAG_LENGTH:]
    if len(ciphertext) > MAX_LENGTH:
        raise InvalidCiphertext
    tag_mask, key_stream = _key_stream(ecb, nonce, len(ciphertext))
    plaintext = _xor(ciphertext, key_stream)
    right = _xor(_authenticate(cbc, nonce, plaintext, associated), tag_mask)
    if not hmac.compare_digest(right, tag):
        raise InvalidCiphertext
    return plaintext


def _key_stream(ecb: Blocks, nonce: bytes, length: int) -> tuple[bytes, bytes]:
    """What the tag is masked with, and the key stream of the payload (A.3)."""
    flags = bytes([_LENGTH_BYTES - 1])
    counters = range(1 + -(-length // BLOCK))
    blocks = ecb(b"".join(flags + nonce + i.to_bytes(_LENGTH_BYTES) for i in counters))
    return blocks[:TAG_LENGTH], blocks[BLOCK:]


def _authenticate(cbc: Blocks, nonce: bytes, payload: bytes, associated: bytes) -> bytes:
    """CBC-MAC of the formatted input (A.2), which says its lengths: none is a prefix of another."""
    flags = (_ASSOCIATED if associated else 0) + (TAG_LENGTH // 2 - 1) * 8 + _LENGTH_BYTES - 1
    formatted = bytes([flags]) + nonce + len(payload).to_bytes(_LENGTH_BYTES)
    if associated:
        size = len(associated)
        length = size.to_bytes(2) if size < _SHORT else b"\xff\xfe" + size.to_bytes(4)
        formatted += _padded(length + associated)
    return cbc(formatted + _padded(payload))[-TAG_LENGTH:]


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def _xor(data: bytes, mask: bytes) -> bytes:
    length = len(data)
    return (int.from_bytes(data) ^ int.from_bytes(mask[:length])).to_bytes(length)
