"""EME-OAEP decoding in the host, for HSM tokens that only do raw RSA here (RFC 8017, 7.1.2).

Manger (Crypto 2001) recovers a plaintext from an oracle that tells only whether the first byte of
the encoded message is zero. So the cause of a decoding error must not be visible.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Literal

from hsmwrap.errors import InvalidKeyMaterial

HashName = Literal["sha1", "sha256"]


def decode(encoded: bytes, hash_name: HashName) -> bytes:
    """Return the message of an OAEP-encoded block; MGF1 with the same hash, empty label.

    Every check runs on every input, in the same order, over all positions. The results are
    collected in one integer that is tested once, at the end. Before that, no branch and no index
    depends on the decoded bytes. In Python this gives the same sequence of bytecodes and hash calls
    for every error, and one error. It does not give constant time of the interpreter (allocation,
    caches, integer arithmetic, although all integers here are small ones that CPython caches), nor
    erasure of intermediate bytes. An HSM token that decodes OAEP itself is preferred.

    Args:
        encoded: Result of a raw RSA decryption, as long as the modulus, with the leading zero.
        hash_name: The hash of the label and of MGF1.

    Returns:
        The message, zero or more bytes. Success and the length are not hidden.

    Raises:
        InvalidKeyMaterial: The block is not a valid encoding; never says why.
    """
    size = hashlib.new(hash_name).digest_size
    if len(encoded) < 2 * size + 2:  # the length of the modulus: public
        raise InvalidKeyMaterial
    masked_seed, masked_block = encoded[1 : 1 + size], encoded[1 + size :]
    seed = _xor(masked_seed, mgf1(masked_block, size, hash_name))
    block = _xor(masked_block, mgf1(seed, len(masked_block), hash_name))
    label_hash = hashlib.new(hash_name).digest()
    bad = encoded[0] | (1 - hmac.compare_digest(block[:size], label_hash))
    padding, bad_padding = _scan_padding(block[size:])
    if bad | bad_padding:
        raise InvalidKeyMaterial
    return block[size + padding + 1 :]


def mgf1(seed: bytes, length: int, hash_name: HashName) -> bytes:
    """Return the mask of ``length`` bytes for ``seed`` (RFC 8017, B.2.1)."""
    size = hashlib.new(hash_name).digest_size
    blocks = (
        hashlib.new(hash_name, seed + counter.to_bytes(4, "big")).digest()
        for counter in range(-(-length // size))
    )
    return b"".join(blocks)[:length]


def _scan_padding(data: bytes) -> tuple[int, int]:
    """Return the number of 00 bytes before the first 01, and 0 if no other byte precedes it."""
    padding, bad, searching = 0, 0, 1
    for byte in data:
        zero = _is_zero(byte)
        one = _is_zero(byte ^ 1)
        padding += searching & zero
        bad |= searching & (zero ^ 1) & (one ^ 1)
        searching &= zero
    return padding, bad | searching


def _is_zero(byte: int) -> int:
    """Return 1 for 0 and 0 for 1 to 255: only 0 - 1 has the bits above the eighth set."""
    return ((byte - 1) >> 8) & 1


def _xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))
