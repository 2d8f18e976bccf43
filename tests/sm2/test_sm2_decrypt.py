import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsmwrap.errors import InvalidKeyMaterial
from hsmwrap.sm2 import (
    Sm2Ciphertext,
    decrypt,
    decrypt_with_point,
    decrypt_with_x2,
    kdf,
    known_answer,
    recover_y,
    sm2_kdf,
    sm3,
)
from hsmwrap.sm2.curve import N, P
from hsmwrap.sm2.kdf import xor

# GM/T 0003.5-2012, Annex C.2: the random number, and the shared point that it gives.
K = 0x59276E27D506861A16680F3AD9C02DCCEF3CC1FA3CDBE4CE6D54B80DEAC1BC21
SECRET = int.from_bytes(known_answer.PRIVATE)


@pytest.fixture(scope="module")
def shared(reference):
    """(x2, y2) of the known answer as 32 bytes each."""
    c1 = (known_answer.CIPHERTEXT.x, known_answer.CIPHERTEXT.y)
    return tuple(c.to_bytes(32) for c in reference.multiply(SECRET, c1))


def test_known_answer_recomputed(reference, shared):
    public = reference.multiply(SECRET, reference.G)
    ciphertext, message = known_answer.CIPHERTEXT, known_answer.MESSAGE
    assert known_answer.PUBLIC[1:] == b"".join(c.to_bytes(32) for c in public)
    assert reference.multiply(K, reference.G) == (ciphertext.x, ciphertext.y)
    assert tuple(c.to_bytes(32) for c in reference.multiply(K, public)) == shared
    x2, y2 = shared
    blocks = [hashlib.new("sm3", x2 + y2 + (1).to_bytes(4)).digest()]
    assert ciphertext.c2 == xor(message, blocks[0][: len(message)])
    assert ciphertext.c3 == hashlib.new("sm3", x2 + message + y2).digest()


def test_known_answer(shared):
    x2, y2 = shared
    assert decrypt_with_x2(known_answer.CIPHERTEXT, x2) == known_answer.MESSAGE
    assert decrypt_with_point(known_answer.CIPHERTEXT, x2, y2) == known_answer.MESSAGE


def test_sm3_is_looked_up_once(monkeypatch):
    """Field note 62: each time would take longer than the hashing."""
    expected = sm3(b"abc")
    monkeypatch.setattr(kdf.hashes, "Hash", None)
    assert sm3(b"abc") == expected


def test_sm3_known_answers():
    # GB/T 32905-2016, Annex A.
    short = "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0"
    long = "debe9ff92275b8a138604889c18e5a4d6fdb70e5387e5765293dcba39c0c5732"
    assert sm3(b"abc").hex() == short
    assert sm3(b"abcd" * 16).hex() == long


@given(
    x2=st.binary(min_size=32, max_size=32),
    y2=st.binary(min_size=32, max_size=32),
    length=st.integers(1, 200),
)
def test_kdf_is_a_counter_behind_the_point(x2, y2, length):
    blocks = [sm3(x2 + y2 + counter.to_bytes(4)) for counter in range(1, 9)]
    assert sm2_kdf(x2, y2, length) == b"".join(blocks)[:length]


@pytest.mark.parametrize(("length", "blocks"), [(0, 0), (1, 1), (32, 1), (33, 2), (64, 2), (65, 3)])
def test_kdf_hashes_no_block_more_than_it_needs(monkeypatch, length, blocks):
    hashed = []
    monkeypatch.setattr(kdf, "sm3", lambda data: hashed.append(data) or bytes(32))
    assert sm2_kdf(b"x", b"y", length) == bytes(length)
    assert hashed == [b"xy" + number.to_bytes(4) for number in range(1, blocks + 1)]


def encrypt(reference, scalar, message):
    """Encrypt to the known answer's key by integers; returns the ciphertext and (x2, y2)."""
    public = known_answer.PUBLIC
    point = int.from_bytes(public[1:33]), int.from_bytes(public[33:])
    x2, y2 = (c.to_bytes(32) for c in reference.multiply(scalar, point))
    c1 = reference.multiply(scalar, reference.G)
    masked = xor(message, sm2_kdf(x2, y2, len(message)))
    return Sm2Ciphertext(*c1, sm3(x2 + message + y2), masked), (x2, y2)


@given(scalar=st.integers(1, N - 1), message=st.binary(min_size=16, max_size=40))
def test_x2_alone_decrypts(reference, scalar, message):
    ciphertext, (x2, y2) = encrypt(reference, scalar, message)
    assert decrypt_with_x2(ciphertext, x2) == message
    assert decrypt_with_point(ciphertext, x2, y2) == message


def test_both_roots_are_tried_to_the_end(reference, monkeypatch):
    tried, genuine = [], decrypt._candidate
    monkeypatch.setattr(decrypt, "_candidate", lambda *a: tried.append(a) or genuine(*a))
    roots = set()
    for scalar in range(1, 20):
        ciphertext, (x2, y2) = encrypt(reference, scalar, b"0123456789abcdef")
        tried.clear()
        assert decrypt_with_x2(ciphertext, x2) == b"0123456789abcdef"
        assert len(tried) == 2
        roots.add(recover_y(int.from_bytes(x2)) == int.from_bytes(y2))
    assert roots == {True, False}


@pytest.mark.parametrize("part", ["c2", "c3"])
def test_every_changed_bit_is_refused(shared, part):
    genuine = getattr(known_answer.CIPHERTEXT, part)
    for bit in range(8 * len(genuine)):
        changed = (int.from_bytes(genuine) ^ 1 << bit).to_bytes(len(genuine))
        ciphertext = replace(known_answer.CIPHERTEXT, **{part: changed})
        with pytest.raises(InvalidKeyMaterial):
            decrypt_with_x2(ciphertext, shared[0])
        with pytest.raises(InvalidKeyMaterial):
            decrypt_with_point(ciphertext, *shared)


def test_wrong_x2(shared):
    x2, y2 = shared
    number = int.from_bytes(x2)
    wrong = {
        "empty": b"",
        "short": x2[1:],
        "leading-zero": b"\x00" + x2,
        "trailing-zero": x2 + b"\x00",
        "other-point": (number + 1).to_bytes(32),
        "x-is-p": P.to_bytes(32),
        "y2": y2,
    }
    for name, candidate in wrong.items():
        with pytest.raises(InvalidKeyMaterial):
            pytest.fail(f"{name}: {decrypt_with_x2(known_answer.CIPHERTEXT, candidate)!r}")


def test_no_root_for_x2():
    x2 = next(x for x in range(1, 100) if recover_y(x) is None)
    with pytest.raises(InvalidKeyMaterial):
        decrypt_with_x2(known_answer.CIPHERTEXT, x2.to_bytes(32))


def test_mask_of_zeros_is_refused(shared, monkeypatch):
    x2, y2 = shared
    monkeypatch.setattr(decrypt, "sm2_kdf", lambda x2, y2, length: bytes(length))
    unmasked = replace(known_answer.CIPHERTEXT, c3=sm3(x2 + known_answer.CIPHERTEXT.c2 + y2))
    with pytest.raises(InvalidKeyMaterial):
        decrypt_with_x2(unmasked, x2)
    with pytest.raises(InvalidKeyMaterial):
        decrypt_with_point(unmasked, x2, y2)


def test_refusals_say_nothing(shared):
    changed = replace(known_answer.CIPHERTEXT, c3=bytes(32))
    with pytest.raises(InvalidKeyMaterial) as caught:
        decrypt_with_x2(changed, shared[0])
    assert str(caught.value) == "key material is invalid."
    assert caught.value.__context__ is None
