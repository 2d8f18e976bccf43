import hmac
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.importing import flip

from hsmwrap import tokens
from hsmwrap.backend import Custody, KeyRef, Mac, PrivateKeyRef
from hsmwrap.catalog import KeySpec, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import (
    ConfigurationError,
    HsmError,
    InvalidImportToken,
    InvalidMac,
    InvalidParameter,
)
from hsmwrap.registry import open_backend
from hsmwrap.software import KeyringFile
from hsmwrap.tokens import MAX_CMK_ID_LENGTH, MAX_TOKEN_LENGTH, ImportTokenClaims

KEY = b"a MAC key that only the tests have"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
EXAMPLE = ImportTokenClaims(
    token_id=bytes(range(16)),
    cmk_id="cmk-1",
    key_spec=KeySpec.ALIYUN_SM4,
    spec=WrappingKeySpec.RSA_2048,
    algorithm=WrappingAlgorithm.RSAES_OAEP_SHA_256,
    protection_level=ProtectionLevel.HSM,
    backend="pkcs11",
    public_key_sha256=bytes(range(32)),
    expires_at=NOW,
    private_key=PrivateKeyRef(Custody.HSM_ENCRYPTED_DATABASE, b"private key"),
)


def sized_text(alphabet, longest):
    return st.text(alphabet, max_size=longest).filter(lambda t: len(t.encode()) <= longest)


unicode = st.characters(exclude_categories=["Cs"])
ascii_text = st.characters(codec="ascii")
END_OF_2999 = 32503679999
offsets = st.integers(-14 * 60, 14 * 60).map(lambda m: timezone(timedelta(minutes=m)))
any_claims = st.builds(
    ImportTokenClaims,
    token_id=st.binary(min_size=16, max_size=16),
    cmk_id=sized_text(unicode, MAX_CMK_ID_LENGTH),
    key_spec=st.sampled_from(KeySpec),
    spec=st.sampled_from(WrappingKeySpec),
    algorithm=st.sampled_from(WrappingAlgorithm),
    protection_level=st.sampled_from(ProtectionLevel),
    backend=sized_text(ascii_text, 32),
    public_key_sha256=st.binary(min_size=32, max_size=32),
    expires_at=st.builds(datetime.fromtimestamp, st.integers(0, END_OF_2999), offsets),
    private_key=st.builds(PrivateKeyRef, st.sampled_from(Custody), st.binary(max_size=1500)),
)


def mac(data, key_set="7"):
    return Mac(key_set, hmac.digest(KEY, data, "sha256"))


def verify_mac(data, given_mac):
    if given_mac != mac(data):
        raise InvalidMac


def refused(token, check=verify_mac):
    try:
        tokens.decode(token, check)
    except InvalidImportToken:
        return True
    return False


def forged(body):
    """An authentic token with any body, as a newer or broken hsmwrap could issue."""
    tag = mac(b"hsmwrap import token\x01" + body).tag
    return b"\x01\x017" + body + tag


# --- round trip ---------------------------------------------------------------------------------


@given(any_claims)
def test_round_trip(claims):
    token = tokens.encode(claims, mac)
    assert len(token) <= MAX_TOKEN_LENGTH
    assert tokens.decode(token, verify_mac) == claims


@given(any_claims)
def test_one_encoding(claims):
    token = tokens.encode(claims, mac)
    assert tokens.encode(tokens.decode(token, verify_mac), mac) == token


@given(any_claims, any_claims)
def test_different_claims_have_different_tokens(left, right):
    assert (tokens.encode(left, mac) == tokens.encode(right, mac)) == (left == right)


def test_the_documented_layout():
    body = (
        bytes(range(16))
        + int(NOW.timestamp()).to_bytes(8)
        + bytes([0, 2, 1, 1, 1])
        + bytes(range(32))
        + b"\x05cmk-1"
        + b"\x06pkcs11"
        + b"\x00\x0bprivate key"
    )
    assert tokens.encode(EXAMPLE, mac) == forged(body)


def test_a_claim_that_does_not_fit_is_refused_and_not_cut():
    wrong = {
        "token_id": (HsmError, [b"", bytes(15), bytes(17)]),
        "public_key_sha256": (HsmError, [b"", bytes(31), bytes(33)]),
        "cmk_id": (InvalidParameter, ["x" * 256, "é" * 128, "\ud800"]),
        "backend": (HsmError, ["x" * 256, "é"]),
        "spec": (HsmError, ["RSA_4096"]),
        "key_spec": (HsmError, ["Aliyun_AES_128"]),
        "expires_at": (
            ConfigurationError,
            [
                NOW.replace(microsecond=1),
                NOW.replace(tzinfo=None),
                datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC),
            ],
        ),
        "private_key": (
            HsmError,
            [
                PrivateKeyRef(Custody.HSM_INTERNAL, bytes(1 << 16)),
                PrivateKeyRef(Custody.HSM_INTERNAL, bytes(MAX_TOKEN_LENGTH)),
                PrivateKeyRef("HsmExternal", b""),
            ],
        ),
    }
    for name, (error, values) in wrong.items():
        for value in values:
            claims = replace(EXAMPLE, **{name: value})
            with pytest.raises(error):
                pytest.fail(f"{name}: {tokens.encode(claims, mac)!r}")


def test_what_just_fits_is_taken():
    def with_reference(length):
        return replace(EXAMPLE, private_key=PrivateKeyRef(Custody.HSM_INTERNAL, bytes(length)))

    room = MAX_TOKEN_LENGTH - len(tokens.encode(with_reference(0), mac))
    fitting = [
        with_reference(room),
        replace(EXAMPLE, backend="x" * 255),
        replace(EXAMPLE, cmk_id="x" * MAX_CMK_ID_LENGTH),
        replace(EXAMPLE, expires_at=datetime.fromtimestamp(0, UTC)),
    ]
    assert MAX_CMK_ID_LENGTH == 255
    for claims in fitting:
        assert tokens.decode(tokens.encode(claims, mac), verify_mac) == claims
    with pytest.raises(HsmError, match="4097 bytes, and 4096 is the most"):
        tokens.encode(with_reference(room + 1), mac)
    token = tokens.encode(EXAMPLE, lambda data: mac(data, "7" * 255))
    assert tokens.decode(token, lambda *_: None) == EXAMPLE


@pytest.mark.parametrize(
    "unfit",
    [Mac("7" * 256, bytes(32)), Mac("é", bytes(32)), Mac("7", bytes(31)), Mac("7", b"")],
)
def test_a_mac_that_does_not_fit_is_refused(unfit):
    with pytest.raises(HsmError, match="does not fit an import token"):
        tokens.encode(EXAMPLE, lambda _data: unfit)


def test_a_key_reference_that_cannot_be_stored_is_refused():
    fitting = KeyRef("x" * 255, KeySpec.ALIYUN_SM4, Custody.HSM_INTERNAL, b"id")
    assert KeyRef.from_bytes(fitting.to_bytes()) == fitting
    wrong = {"backend": ["x" * 256, "é"], "key_spec": ["RSA"], "custody": ["HsmExternal"]}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(HsmError, match="cannot be stored"):
                replace(fitting, **{name: value}).to_bytes()


# --- changes ------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(any_claims)
def test_every_changed_bit_is_refused(claims):
    token = tokens.encode(claims, mac)
    assert not refused(token)
    assert [bit for bit in range(8 * len(token)) if not refused(flip(token, bit))] == []


@given(any_claims, st.binary(min_size=1, max_size=40))
def test_every_cut_and_extension_is_refused(claims, extra):
    token = tokens.encode(claims, mac)
    assert all(refused(token[:length]) for length in range(len(token)))
    assert all(refused(token[length:]) for length in range(1, len(token)))
    assert refused(token + extra)
    assert refused(extra + token)


@given(st.binary(max_size=3000))
def test_random_bytes_are_refused(data):
    assert refused(data)
    assert refused(b"\x01\x017" + data)


@given(any_claims, any_claims)
def test_spliced_tokens_are_refused(left, right):
    one, other = tokens.encode(left, mac), tokens.encode(right, mac)
    mixed = one[:-32] + other[-32:]
    assert refused(mixed) == (mixed not in {one, other})


@pytest.mark.parametrize("length", [MAX_TOKEN_LENGTH + 1, 1 << 20])
def test_huge_input_is_refused_before_any_seal_is_computed(length):
    token = tokens.encode(EXAMPLE, mac)
    assert refused(token.ljust(length, b"\0"), check=None)


def test_what_is_too_short_is_refused_before_any_seal_is_computed():
    token = tokens.encode(EXAMPLE, mac)
    assert all(refused(token[:length], check=None) for length in range(3 + 32))


def test_a_token_cut_exactly_at_its_mac_is_refused_by_the_mac():
    """The shortest envelope: no byte of a body, and a whole MAC."""
    asked = []

    def check(data, given_mac):
        asked.append((data, given_mac))
        verify_mac(data, given_mac)

    token = tokens.encode(EXAMPLE, mac)
    assert refused(token[: 3 + 32], check)
    assert asked == [(b"hsmwrap import token\x01", Mac("7", token[3 : 3 + 32]))]
    assert refused(forged(b""))


@pytest.mark.parametrize("version", [0, 2, 3, 127, 255])
def test_other_versions_are_refused_even_where_the_seal_would_hold(version):
    token = tokens.encode(EXAMPLE, mac)
    assert refused(bytes([version]) + token[1:], check=lambda *_: True)


def test_the_seal_is_for_import_tokens_of_this_version_only():
    sealed = []
    tokens.encode(EXAMPLE, lambda data: sealed.append(data) or mac(data))
    assert sealed[0].startswith(b"hsmwrap import token\x01")


def test_the_body_is_not_looked_at_before_the_seal(monkeypatch):
    monkeypatch.setattr(tokens, "_decode_body", lambda body: pytest.fail("looked"))
    assert refused(flip(tokens.encode(EXAMPLE, mac), 100))


def test_an_unknown_mac_key_is_refused():
    assert refused(tokens.encode(EXAMPLE, lambda data: mac(data, key_set="8")))


# --- authentic bodies that do not parse ---------------------------------------------------------


@given(st.binary(max_size=300))
def test_authentic_bytes_are_refused_unless_they_are_the_one_encoding(body):
    token = forged(body)
    try:
        claims = tokens.decode(token, verify_mac)
    except InvalidImportToken:
        return
    assert tokens.encode(claims, mac) == token


@given(any_claims, st.data())
def test_authentic_changes_are_refused_or_other_claims(claims, data):
    body = tokens.encode(claims, mac)[3:-32]
    changed = flip(body, data.draw(st.integers(0, 8 * len(body) - 1)))
    try:
        other = tokens.decode(forged(changed), verify_mac)
    except InvalidImportToken:
        return
    assert other != claims
    assert tokens.encode(other, mac) == forged(changed)


@pytest.mark.parametrize(
    ("position", "name"),
    [(24, "spec"), (25, "algorithm"), (26, "level"), (27, "custody"), (28, "key spec")],
)
def test_unknown_codes_are_refused(position, name):
    body = bytearray(tokens.encode(EXAMPLE, mac)[3:-32])
    body[position] = 4
    assert refused(forged(bytes(body))), name


def test_bytes_left_over_and_fields_past_the_end_are_refused():
    body = tokens.encode(EXAMPLE, mac)[3:-32]
    assert not refused(forged(body))
    assert refused(forged(body + b"\0"))
    assert [length for length in range(len(body)) if not refused(forged(body[:length]))] == []


def test_an_expiry_beyond_all_years_is_refused():
    body = tokens.encode(EXAMPLE, mac)[3:-32]
    for expiry in (1 << 40, 1 << 63, (1 << 64) - 1):
        assert refused(forged(body[:16] + expiry.to_bytes(8) + body[24:])), expiry


# --- what it shows ------------------------------------------------------------------------------


def test_the_private_key_does_not_show():
    hidden = replace(EXAMPLE, private_key=PrivateKeyRef(Custody.HSM_INTERNAL, b"SECRET-BLOB"))
    assert "SECRET-BLOB" not in repr(hidden) + repr(hidden.private_key)
    assert "PrivateKeyRef" not in repr(hidden)
    assert len(fields(hidden)) == 10


# --- rotation of the MAC key -------------------------------------------------------------------


@pytest.fixture
def keyring(tmp_path):
    file = KeyringFile(tmp_path / "keyring.json")
    file.create()
    return file


@pytest.fixture
def backend(tmp_path, keyring):
    with open_backend("software", {"keyring_file": str(tmp_path / "keyring.json")}) as opened:
        yield opened


def test_tokens_survive_a_rotation_but_not_the_retirement_of_their_mac_key(backend, keyring):
    old_id = keyring.read().current
    old = tokens.encode(EXAMPLE, backend.mac)
    keyring.rotate()
    new = tokens.encode(EXAMPLE, backend.mac)
    assert old != new
    assert old[2:10] == old_id.encode()
    for token in (old, new):
        assert tokens.decode(token, backend.verify_mac) == EXAMPLE
    keyring.retire(old_id)
    assert refused(old, backend.verify_mac)
    assert tokens.decode(new, backend.verify_mac) == EXAMPLE


def test_a_token_under_another_mac_key_s_id_is_refused(backend, keyring):
    old = tokens.encode(EXAMPLE, backend.mac)
    new_id = keyring.rotate().current.encode()
    assert refused(old[:2] + new_id + old[10:], backend.verify_mac)
