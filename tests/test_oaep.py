import hashlib
import os

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from support.vectors import wycheproof

from hsmwrap.errors import InvalidKeyMaterial
from hsmwrap.oaep import HashName, decode, mgf1

HASHES = ("sha1", "sha256")
K = 256
VECTORS = {
    "sha1": "rsa_oaep_2048_sha1_mgf1sha1_test",
    "sha256": "rsa_oaep_2048_sha256_mgf1sha256_test",
}
each_hash = pytest.mark.parametrize("hash_name", HASHES)


def encode_block(seed: bytes, block: bytes, hash_name: HashName, first: int = 0) -> bytes:
    """RFC 8017 7.1.1 step 2, from the data block on, to build what no encoder would."""
    masked = xor(block, mgf1(seed, len(block), hash_name))
    return bytes([first]) + xor(seed, mgf1(masked, len(seed), hash_name)) + masked


def encode(message: bytes, hash_name: HashName) -> bytes:
    return encode_block(seed_for(hash_name), block_for(message, hash_name), hash_name)


def block_for(message: bytes, hash_name: HashName) -> bytes:
    label_hash = hashlib.new(hash_name).digest()
    fill = K - 2 - 2 * len(label_hash) - len(message)
    return label_hash + bytes(fill) + b"\x01" + message


def seed_for(hash_name: HashName) -> bytes:
    return os.urandom(hashlib.new(hash_name).digest_size)


def xor(left: bytes, right: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


def refused(encoded: bytes, hash_name: HashName) -> bool:
    try:
        decode(encoded, hash_name)
    except InvalidKeyMaterial:
        return True
    return False


@each_hash
@pytest.mark.parametrize("length", [0, 1, 16, 32, 64, "longest"])
def test_round_trip(hash_name, length):
    longest = K - 2 * hashlib.new(hash_name).digest_size - 2
    message = os.urandom(longest if length == "longest" else length)
    assert decode(encode(message, hash_name), hash_name) == message


@each_hash
def test_message_of_separators_and_zeros_comes_back_whole(hash_name):
    for message in (b"\x01" * 32, bytes(32), b"\x00\x01" * 16, b"\x01\x00" * 16):
        assert decode(encode(message, hash_name), hash_name) == message


@each_hash
def test_every_single_changed_byte_is_refused(hash_name):
    encoded = encode(os.urandom(32), hash_name)
    for position in range(K):
        changed = bytearray(encoded)
        changed[position] ^= 1 << (position % 8)
        assert refused(bytes(changed), hash_name), position


@each_hash
def test_first_byte_has_to_be_zero(hash_name):
    block, seed = block_for(bytes(32), hash_name), seed_for(hash_name)
    assert not refused(encode_block(seed, block, hash_name), hash_name)
    for first in range(1, 256):
        assert refused(encode_block(seed, block, hash_name, first), hash_name), first


@each_hash
def test_every_other_byte_for_the_separator_is_refused(hash_name):
    block = block_for(b"\x01" * 32, hash_name)
    separator = len(block) - 33
    for value in set(range(256)) - {0, 1}:
        damaged = block[:separator] + bytes([value]) + block[separator + 1 :]
        encoded = encode_block(seed_for(hash_name), damaged, hash_name)
        assert refused(encoded, hash_name), value


@each_hash
def test_padding_other_than_zero_is_refused(hash_name):
    block = block_for(bytes(32), hash_name)
    start = hashlib.new(hash_name).digest_size
    for position in range(start, len(block) - 33):
        damaged = block[:position] + b"\xff" + block[position + 1 :]
        assert refused(encode_block(seed_for(hash_name), damaged, hash_name), hash_name)


@each_hash
def test_block_without_separator_is_refused(hash_name):
    label_hash = hashlib.new(hash_name).digest()
    block = label_hash + bytes(K - 1 - 2 * len(label_hash))
    assert refused(encode_block(seed_for(hash_name), block, hash_name), hash_name)


@each_hash
def test_two_faults_do_not_make_up_for_each_other(hash_name):
    block, seed = block_for(bytes(32), hash_name), seed_for(hash_name)
    other_label = hashlib.new(hash_name, b"label").digest() + block[len(seed) :]
    for first in (1, 2, 255):
        assert refused(encode_block(seed, other_label, hash_name, first), hash_name)


@each_hash
def test_label_has_to_be_empty(hash_name):
    block = block_for(bytes(32), hash_name)
    label_hash = hashlib.new(hash_name, b"label").digest()
    damaged = label_hash + block[len(label_hash) :]
    assert refused(encode_block(seed_for(hash_name), damaged, hash_name), hash_name)


@each_hash
def test_short_input_is_refused(hash_name):
    least = 2 * hashlib.new(hash_name).digest_size + 2
    for length in (0, 1, least - 1, least):
        assert refused(bytes(length), hash_name)


@each_hash
def test_what_is_too_short_is_not_hashed(hash_name, monkeypatch):
    least, hashed, new = 2 * hashlib.new(hash_name).digest_size + 2, [], hashlib.new
    monkeypatch.setattr(hashlib, "new", lambda name, *data: hashed.extend(data) or new(name, *data))
    for length in range(least):
        assert refused(bytes(length), hash_name)
    assert hashed == []
    assert refused(bytes(least), hash_name)
    assert hashed


def test_other_hash_is_refused():
    assert refused(encode(bytes(32), "sha1"), "sha256")
    assert refused(encode(bytes(32), "sha256"), "sha1")


@pytest.fixture(scope="module")
def private_key():
    return rsa.generate_private_key(65537, 2048)


@each_hash
def test_decodes_what_pyca_encrypts(hash_name, private_key):
    algorithm = {"sha1": hashes.SHA1(), "sha256": hashes.SHA256()}[hash_name]
    oaep = padding.OAEP(mgf=padding.MGF1(algorithm), algorithm=algorithm, label=None)
    numbers = private_key.private_numbers()
    for _ in range(20):
        message = os.urandom(32)
        ciphertext = private_key.public_key().encrypt(message, oaep)
        encoded = pow(int.from_bytes(ciphertext), numbers.d, numbers.public_numbers.n)
        assert decode(encoded.to_bytes(K), hash_name) == message


@each_hash
def test_wycheproof(hash_name):
    outcomes = {}
    for group in wycheproof(VECTORS[hash_name])["testGroups"]:
        for vector in group["tests"]:
            outcomes[vector["tcId"]] = (raw_decrypt(group, vector, hash_name), expected(vector))
    assert len(outcomes) > 30
    assert {key: pair for key, pair in outcomes.items() if pair[0] != pair[1]} == {}


def expected(vector):
    # Here the label is always empty, so a vector with a label is one that must not decode.
    valid = vector["result"] == "valid" and not vector["label"]
    return bytes.fromhex(vector["msg"]) if valid else None


def raw_decrypt(group, vector, hash_name):
    """RFC 8017 7.1.2: steps 1 and 2 as a token does them, step 3 by us. None: refused."""
    key = {name: int(value, 16) for name, value in group["privateKey"].items()}
    ciphertext = bytes.fromhex(vector["ct"])
    if len(ciphertext) != K or int.from_bytes(ciphertext) >= key["modulus"]:
        return None
    encoded = pow(int.from_bytes(ciphertext), key["privateExponent"], key["modulus"])
    try:
        return decode(encoded.to_bytes(K), hash_name)
    except InvalidKeyMaterial:
        return None


@pytest.mark.parametrize(("length", "blocks"), [(0, 0), (1, 1), (20, 1), (21, 2), (40, 2), (41, 3)])
def test_mgf1_hashes_no_block_more_than_it_needs(monkeypatch, length, blocks):
    """More of them would be cut off unnoticed."""
    hashed, new = [], hashlib.new
    monkeypatch.setattr(hashlib, "new", lambda name, *data: hashed.extend(data) or new(name, *data))
    assert len(mgf1(b"seed", length, "sha1")) == length
    assert hashed == [b"seed" + counter.to_bytes(4) for counter in range(blocks)]


@each_hash
def test_the_shortest_block_holds_an_empty_message(hash_name):
    block = hashlib.new(hash_name).digest() + b"\x01"
    shortest = encode_block(seed_for(hash_name), block, hash_name)
    assert len(shortest) == 2 * hashlib.new(hash_name).digest_size + 2
    assert decode(shortest, hash_name) == b""
    with pytest.raises(InvalidKeyMaterial):
        decode(shortest[:-1], hash_name)
