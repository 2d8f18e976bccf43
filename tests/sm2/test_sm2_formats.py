from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hsmwrap.errors import ConfigurationError, InvalidKeyMaterial
from hsmwrap.sm2 import (
    DEFAULT_LAYOUTS,
    Layout,
    Sm2Ciphertext,
    check_layouts,
    encode_point,
    formats,
    parse,
    recover_y,
)
from hsmwrap.sm2.curve import GX, GY, P

C3 = bytes(range(0x80, 0xA0))
C2 = bytes(range(0x40, 0x60))
GOOD = Sm2Ciphertext(GX, GY, C3, C2)
ALL_LAYOUTS = tuple(Layout)
LENGTHS = pytest.mark.parametrize("length", [16, 32])

WRITERS = {
    Layout.C1C3C2: Sm2Ciphertext.to_c1c3c2,
    Layout.C1C3C2_BARE: lambda c: c.to_c1c3c2()[1:],
    Layout.DER: Sm2Ciphertext.to_der,
    Layout.C1C2C3: lambda c: c.c1 + c.c2 + c.c3,
}


def tlv(tag, value, length=None):
    return bytes([tag]) + (length or bytes([len(value)])) + value


def integer(number):
    return number.to_bytes(number.bit_length() // 8 + 1)


def der(x=None, y=None, c3=None, c2=None, *, more=b"", outer=None, tags=(2, 2, 4, 4, 0x30)):
    """DER put together by hand; each part can be replaced by a TLV of the test's own."""
    content = (
        (x or tlv(tags[0], integer(GX)))
        + (y or tlv(tags[1], integer(GY)))
        + (c3 or tlv(tags[2], C3))
        + (c2 or tlv(tags[3], C2))
        + more
    )
    return tlv(tags[4], content, outer or bytes([0x81, len(content)]))


def refused(data, length=32, layouts=DEFAULT_LAYOUTS):
    with pytest.raises(InvalidKeyMaterial) as caught:
        parse(data, length, layouts)
    assert str(caught.value) == "key material is invalid."


def test_writers_agree_with_bytes_put_together_by_hand():
    assert GOOD.to_c1c3c2() == b"\x04" + GX.to_bytes(32) + GY.to_bytes(32) + C3 + C2
    assert GOOD.to_der() == der()
    assert GOOD.c1 == encode_point(GX, GY)


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_a_layout_is_written_by_its_name(layout):
    assert GOOD.write(layout) == WRITERS[layout](GOOD)


@pytest.mark.parametrize(
    ("length", "encoded"),
    [
        (127, "7f"),
        (128, "8180"),
        (255, "81ff"),
        (256, "820100"),
        (65_535, "82ffff"),
        (65_536, "83010000"),
    ],
)
def test_lengths_in_der_have_as_many_octets_as_they_need(length, encoded):
    """X.690, 8.1.3 and 10.1; a key has 32 bytes at most, other plaintexts may have more."""
    ciphertext = replace(GOOD, c2=bytes(length))
    written = ciphertext.to_der()
    assert written.endswith(C3 + b"\x04" + bytes.fromhex(encoded) + bytes(length))
    assert parse(written, length, [Layout.DER]) == ciphertext


@LENGTHS
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_each_layout_is_read(layout, length):
    ciphertext = replace(GOOD, c2=C2[:length])
    assert parse(WRITERS[layout](ciphertext), length, [layout]) == ciphertext


@pytest.mark.parametrize("layout", DEFAULT_LAYOUTS)
def test_default_layouts_are_told_apart(layout):
    assert parse(WRITERS[layout](GOOD), len(C2)) == GOOD


def test_c1c2c3_is_read_only_where_configured():
    data = WRITERS[Layout.C1C2C3](GOOD)
    with_old = [Layout.C1C2C3, Layout.C1C3C2_BARE, Layout.DER]
    assert parse(data, len(C2), with_old) == GOOD
    # Same length, so it is taken for C1C3C2: another C3, which no decryption confirms.
    assert parse(data, len(C2)) != GOOD
    assert parse(GOOD.to_der(), len(C2), with_old) == GOOD


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_layout_that_is_not_configured_is_refused(layout):
    others = [other for other in ALL_LAYOUTS if len({other, layout}) == 2 and other != "C1C2C3"]
    if layout is Layout.C1C2C3:
        others.remove(Layout.C1C3C2)
    refused(WRITERS[layout](GOOD), len(C2), others)


@pytest.mark.parametrize(
    ("layouts", "hint"),
    [
        pytest.param(ALL_LAYOUTS, "cannot be told apart", id="all"),
        pytest.param(["C1C3C2", "C1C2C3"], "cannot be told apart", id="both-orders"),
        pytest.param([], "at least one", id="none"),
        pytest.param(["C1C3C2", "c1c2"], "C1C3C2, C1C3C2_BARE, DER, C1C2C3", id="unknown"),
    ],
)
def test_ambiguous_or_unknown_layouts(layouts, hint):
    with pytest.raises(ConfigurationError, match=hint):
        check_layouts(layouts)
    with pytest.raises(ConfigurationError, match=hint):
        parse(GOOD.to_der(), len(C2), layouts)


def test_check_layouts_takes_names():
    assert check_layouts(["C1C2C3", "DER"]) == {Layout.C1C2C3, Layout.DER}
    assert check_layouts(DEFAULT_LAYOUTS) == set(DEFAULT_LAYOUTS)


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("expected", [-1, 0, 1, 16, 31, 33, 97 + 32])
def test_other_material_length(layout, expected):
    refused(WRITERS[layout](GOOD), expected, [layout])


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_empty_message(layout):
    with pytest.raises(InvalidKeyMaterial):
        replace(GOOD, c2=b"")
    full = WRITERS[layout](replace(GOOD, c2=b"\x00"))
    empty = der(c2=b"\x04\x00") if layout is Layout.DER else full[:-1]
    refused(empty, 0, [layout])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"y": GY ^ 1}, id="off-curve"),
        pytest.param({"x": GX + P}, id="x-plus-p"),
        pytest.param({"y": GY - P}, id="y-minus-p"),
        pytest.param({"x": 0, "y": 0}, id="infinity"),
        pytest.param({"c3": C3[:-1]}, id="short-c3"),
        pytest.param({"c3": C3 + b"\x00"}, id="long-c3"),
    ],
)
def test_no_ciphertext_object_of_such_parts(change):
    with pytest.raises(InvalidKeyMaterial):
        replace(GOOD, **change)


SMALL_X = next(x for x in range(1, 100) if recover_y(x) is not None)
SMALL_Y = recover_y(SMALL_X)
RAW = GOOD.to_c1c3c2()
REST = C3 + C2

MALFORMED = {
    "empty": b"",
    "one-byte": b"\x30",
    "sequence-head-alone": b"\x30\x81",
    # raw
    "raw-trailing-byte": RAW + b"\x00",
    "raw-short-by-two": RAW[:-2],
    "raw-first-byte-00": b"\x00" + RAW[1:],
    "raw-first-byte-05": b"\x05" + RAW[1:],
    "raw-first-byte-30": b"\x30" + RAW[1:],
    "raw-hybrid": b"\x06" + RAW[1:],
    "raw-hybrid-odd": b"\x07" + RAW[1:],
    "raw-compressed": b"\x02" + RAW[1:33] + REST,
    "raw-compressed-padded": b"\x02" + RAW[1:33] + bytes(32) + REST,
    "raw-off-curve": RAW[:64] + bytes([RAW[64] ^ 1]) + REST,
    "raw-x-plus-p": b"\x04" + (SMALL_X + P).to_bytes(32) + SMALL_Y.to_bytes(32) + REST,
    "raw-x-is-p": b"\x04" + P.to_bytes(32) + recover_y(0).to_bytes(32) + REST,
    "raw-infinity": b"\x00" + REST,
    "raw-infinity-padded": bytes(65) + REST,
    "raw-infinity-as-04-zeros": b"\x04" + bytes(64) + REST,
    "bare-off-curve": RAW[1:64] + bytes([RAW[64] ^ 1]) + REST,
    "bare-x-plus-p": (SMALL_X + P).to_bytes(32) + SMALL_Y.to_bytes(32) + REST,
    "bare-infinity": bytes(64) + REST,
    "bare-with-wrong-length": RAW[1:] + b"\x00\x00",
    # DER
    "der-trailing-byte": der() + b"\x00",
    "der-truncated": der()[:-1],
    "der-more-in-sequence": der(more=b"\x05\x00"),
    "der-long-outer-length": der(outer=bytes([0x82, 0, len(der()) - 3])),
    "der-outer-length-too-long": der(outer=bytes([0x81, len(der()) - 2])),
    "der-outer-length-too-short": der(outer=bytes([0x81, len(der()) - 4])),
    "der-indefinite-length": der(more=b"\x00\x00", outer=b"\x80"),
    "der-reserved-length": der(outer=b"\xff"),
    "der-huge-length": der(outer=b"\x84\xff\xff\xff\xff"),
    "der-long-x-length": der(x=tlv(2, integer(GX), b"\x81\x20")),
    "der-padded-x": der(x=tlv(2, b"\x00" + integer(GX))),
    "der-padded-y": der(y=tlv(2, b"\x00" + integer(GY))),
    "der-negative-y": der(y=tlv(2, GY.to_bytes(32))),
    "der-empty-integer": der(x=b"\x02\x00"),
    "der-x-plus-p": der(x=tlv(2, integer(GX + P))),
    "der-y-plus-p": der(y=tlv(2, integer(GY + P))),
    "der-small-x-plus-p": der(x=tlv(2, integer(SMALL_X + P)), y=tlv(2, integer(SMALL_Y))),
    "der-off-curve": der(y=tlv(2, integer(GY ^ 1))),
    "der-infinity": der(x=b"\x02\x01\x00", y=b"\x02\x01\x00"),
    "der-huge-integer": der(x=tlv(2, b"\x01" * 100), outer=b"\x81\xcb"),
    "der-short-hash": der(c3=tlv(4, C3[:-1])),
    "der-long-hash": der(c3=tlv(4, C3 + b"\x00")),
    "der-long-hash-length": der(c3=tlv(4, C3, b"\x81\x20")),
    "der-short-ct": der(c2=tlv(4, C2[:-1])),
    "der-long-ct": der(c2=tlv(4, C2 + b"\x00")),
    "der-long-ct-length": der(c2=tlv(4, C2, b"\x81\x20")),
    "der-swapped-hash-and-ct-lengths": der(c3=tlv(4, C3 + C2[:1]), c2=tlv(4, C2[1:])),
    "der-set": der(tags=(2, 2, 4, 4, 0x31)),
    "der-primitive-sequence": der(tags=(2, 2, 4, 4, 0x10)),
    "der-x-octet-string": der(tags=(4, 2, 4, 4, 0x30)),
    "der-hash-bit-string": der(tags=(2, 2, 3, 4, 0x30)),
    "der-ct-constructed": der(tags=(2, 2, 4, 0x24, 0x30)),
    "der-hash-missing": tlv(0x30, tlv(2, integer(GX)) + tlv(2, integer(GY)) + tlv(4, C2)),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(data):
    refused(data)


# --- DER as short as the raw layouts (see the module's docstring) -----------------------------


def short_der(reference, total, length):
    """DER with short INTEGERs, lx + ly = total, of a point of the curve."""

    def fits(x, y):
        return len(integer(x)) + len(integer(y)) == total

    x, y = reference.point_from(1 << 8 * 21, fits)
    return Sm2Ciphertext(x, y, C3, C2[:length])


@LENGTHS
@pytest.mark.parametrize(("total", "overhead"), [(54, 96), (55, 97)])
def test_der_as_long_as_a_raw_layout(reference, total, overhead, length):
    ciphertext = short_der(reference, total, length)
    data = ciphertext.to_der()
    assert len(data) == overhead + length
    assert parse(data, length) == ciphertext
    refused(data, length, [Layout.C1C3C2, Layout.C1C3C2_BARE])
    refused(data + b"\x00", length)
    refused(data[:-1], length)


@LENGTHS
def test_bare_that_starts_like_der(reference, length):
    start = bytes.fromhex("30") + bytes([94 + length]) + bytes.fromhex("0216")
    x, y = reference.point_from(int.from_bytes(start + bytes(28)))
    ciphertext = Sm2Ciphertext(x, y, C3, C2[:length])
    data = WRITERS[Layout.C1C3C2_BARE](ciphertext)
    assert data.startswith(start)
    assert parse(data, length) == ciphertext


def test_bytes_with_two_readings_are_refused(reference, monkeypatch):
    """Such bytes cannot be found on the real curve, so the curve check is disabled."""
    data = short_der(reference, 54, 32).to_der()
    monkeypatch.setattr(formats, "is_on_curve", lambda x, y: True)
    for layout in (Layout.DER, Layout.C1C3C2_BARE):
        parse(data, 32, [layout])
    refused(data, 32)


# --- properties -------------------------------------------------------------------------------


@st.composite
def ciphertexts(draw, length):
    x = draw(st.one_of(st.integers(0, P - 1), st.integers(0, 2**20), st.integers(P - 2**20, P - 1)))
    y = recover_y(x)
    assume(y is not None)
    y = draw(st.sampled_from([y, P - y]))
    c3 = draw(st.binary(min_size=32, max_size=32))
    return Sm2Ciphertext(x, y, c3, draw(st.binary(min_size=length, max_size=length)))


material_lengths = st.sampled_from([16, 32])


@given(data=st.data(), length=st.integers(1, 300), layout=st.sampled_from(ALL_LAYOUTS))
def test_what_is_written_is_read(data, length, layout):
    ciphertext = data.draw(ciphertexts(length))
    raw = WRITERS[layout](ciphertext)
    assert parse(raw, length, [layout]) == ciphertext
    if layout in DEFAULT_LAYOUTS:
        assert parse(raw, length) == ciphertext


@given(raw=st.binary(max_size=160), length=material_lengths)
def test_random_bytes(raw, length):
    check_outcome(raw, length)


@given(data=st.data(), length=material_lengths)
def test_random_bytes_of_the_right_length(data, length):
    size = data.draw(st.sampled_from([96 + length, 97 + length]))
    head = data.draw(
        st.sampled_from([b"", b"\x04", b"\x30", b"\x30" + bytes([size - 2]) + b"\x02"])
    )
    tail = data.draw(st.binary(min_size=size - len(head), max_size=size - len(head)))
    check_outcome(head + tail, length)


@given(data=st.data(), length=material_lengths, layout=st.sampled_from(DEFAULT_LAYOUTS))
def test_mutations(data, length, layout):
    raw = bytearray(WRITERS[layout](data.draw(ciphertexts(length))))
    position = data.draw(st.integers(0, min(len(raw) - 1, 80)))
    match data.draw(st.sampled_from(["replace", "insert", "delete", "append"])):
        case "replace":
            raw[position] = data.draw(st.integers(0, 255))
        case "insert":
            raw.insert(position, data.draw(st.integers(0, 255)))
        case "delete":
            del raw[position]
        case "append":
            raw += data.draw(st.binary(min_size=1, max_size=3))
    check_outcome(bytes(raw), length)


def check_outcome(raw, length):
    """InvalidKeyMaterial, or a ciphertext that is these bytes in one layout and no other."""
    try:
        ciphertext = parse(raw, length)
    except InvalidKeyMaterial:
        return
    assert [WRITERS[layout](ciphertext) for layout in DEFAULT_LAYOUTS].count(raw) == 1
    assert len(ciphertext.c2) == length
