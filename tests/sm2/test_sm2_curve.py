import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsmwrap.sm2 import (
    OID_DER,
    decode_point,
    decode_spki,
    encode_point,
    encode_spki,
    is_on_curve,
    known_answer,
    recover_y,
)
from hsmwrap.sm2.curve import FIELD_BYTES, GX, GY, A, B, N, P

G = encode_point(GX, GY)


def test_constants_belong_together(reference):
    # GB/T 32918.5 prints a in full; the OID is 1.2.156.10197.1.301.
    assert A == 0xFFFFFFFEFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF00000000FFFFFFFFFFFFFFFC
    assert bytes.fromhex("06082a811ccf5501822d") == OID_DER
    assert reference.multiply(N - 1, reference.G) == (GX, P - GY)
    assert P % 4 == 3


@pytest.mark.parametrize(
    ("x", "y"),
    [
        pytest.param(GX, GY + 1, id="off-curve"),
        pytest.param(GX + P, GY, id="x-plus-p"),
        pytest.param(GX, GY + P, id="y-plus-p"),
        pytest.param(GX - P, GY, id="x-minus-p"),
        pytest.param(GX, -GY, id="negative-y"),
        pytest.param(0, 0, id="infinity-as-zeros"),
        pytest.param(P, pow(B, (P + 1) // 4, P), id="x-is-p"),
    ],
)
def test_no_point(x, y):
    assert not is_on_curve(x, y)
    with pytest.raises(ValueError):
        encode_point(x, y)


@given(scalar=st.integers(1, N - 1))
def test_recover_y(reference, scalar):
    x, y = reference.multiply(scalar, reference.G)
    root = recover_y(x)
    assert root is not None
    assert {root, P - root} == {y, P - y}


def test_recover_y_of_no_point():
    found = [recover_y(x) for x in range(100)]
    assert 30 < found.count(None) < 70
    assert recover_y(P) is None
    assert recover_y(GX + P) is None
    assert recover_y(-1) is None


def test_point_round_trip():
    assert decode_point(G) == (GX, GY)
    assert len(G) == 65


NO_POINTS = {
    "empty": b"",
    "infinity": b"\x00",
    "infinity-padded": bytes(65),
    "zeros": b"\x04" + bytes(64),
    "compressed": b"\x02" + G[1:33],
    "compressed-padded": b"\x02" + G[1:33] + bytes(32),
    "hybrid": b"\x06" + G[1:],
    "hybrid-odd": b"\x07" + G[1:],
    "without-04": G[1:],
    "short": G[:-1],
    "long": G + b"\x00",
    "padded-y": G[:33] + b"\x00" + G[33:],
    "off-curve": G[:-1] + bytes([G[-1] ^ 1]),
    "swapped": b"\x04" + G[33:] + G[1:33],
}


@pytest.mark.parametrize("data", NO_POINTS.values(), ids=NO_POINTS.keys())
def test_decode_point_is_strict(data):
    with pytest.raises(ValueError):
        decode_point(data)
    with pytest.raises(ValueError):
        encode_spki(data)


def test_decode_point_refuses_x_plus_p(reference):
    x, y = reference.point_from(1)
    assert is_on_curve(x, y)
    assert x + P < 1 << 8 * FIELD_BYTES
    with pytest.raises(ValueError):
        decode_point(b"\x04" + (x + P).to_bytes(32) + y.to_bytes(32))


def test_spki_is_the_91_byte_form():
    der = encode_spki(known_answer.PUBLIC)
    assert len(der) == 91
    assert der.hex() == (
        "3059301306072a8648ce3d020106082a811ccf5501822d034200" + known_answer.PUBLIC.hex()
    )
    assert decode_spki(der) == known_answer.PUBLIC


GOOD_SPKI = encode_spki(G)
P256_SPKI = GOOD_SPKI.replace(OID_DER, bytes.fromhex("06082a8648ce3d030107"))
NO_SPKI = {
    "empty": b"",
    "point-alone": G,
    "trailing": GOOD_SPKI + b"\x00",
    "short": GOOD_SPKI[:-1],
    "other-curve": P256_SPKI,
    "ber-length": b"\x30\x81" + GOOD_SPKI[1:],
    "unused-bits": GOOD_SPKI.replace(b"\x03\x42\x00", b"\x03\x42\x01"),
    "off-curve": GOOD_SPKI[:-1] + bytes([GOOD_SPKI[-1] ^ 1]),
    "compressed": bytes.fromhex("3039301306072a8648ce3d020106082a811ccf5501822d032200")
    + b"\x02"
    + G[1:33],
}


@pytest.mark.parametrize("der", NO_SPKI.values(), ids=NO_SPKI.keys())
def test_decode_spki_is_strict(der):
    with pytest.raises(ValueError):
        decode_spki(der)


def test_decode_spki_refuses_every_changed_bit():
    for bit in range(8 * len(GOOD_SPKI)):
        changed = int.from_bytes(GOOD_SPKI) ^ (1 << bit)
        with pytest.raises(ValueError):
            decode_spki(changed.to_bytes(len(GOOD_SPKI)))
