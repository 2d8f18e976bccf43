"""Clients that are not ours: the openssl command and gmssl, in both directions."""

import subprocess

import pytest

from hsmwrap.sm2 import (
    OID_DER,
    Layout,
    decode_spki,
    decrypt_with_x2,
    encode_spki,
    known_answer,
    parse,
)

MATERIAL = [pytest.param(bytes(range(n)), id=f"{n}-bytes") for n in (16, 32)]


def openssl(*arguments, data=b""):
    return subprocess.run(
        ["openssl", *arguments], input=data, capture_output=True, check=True
    ).stdout


def sec1(pair):
    """ECPrivateKey (RFC 5915) with the curve's OID and the public key."""
    head = bytes.fromhex("30770201010420")
    return head + pair.private + b"\xa0\x0a" + OID_DER + b"\xa1\x44\x03\x42\x00" + pair.public


@pytest.fixture
def pair(engine):
    return engine.generate()


@pytest.fixture
def key_files(pair, tmp_path):
    public, private = tmp_path / "public.der", tmp_path / "private.der"
    public.write_bytes(encode_spki(pair.public))
    private.write_bytes(sec1(pair))
    return public, private


def test_openssl_reads_the_public_key(key_files):
    shown = openssl("pkey", "-pubin", "-inform", "DER", "-in", key_files[0], "-text", "-noout")
    assert b"SM2" in shown


@pytest.mark.parametrize("material", MATERIAL)
def test_openssl_encrypts(engine, pair, key_files, material):
    key = ("-pubin", "-keyform", "DER", "-inkey", key_files[0])
    for _ in range(5):
        raw = openssl("pkeyutl", "-encrypt", *key, data=material)
        ciphertext = parse(raw, len(material))
        assert ciphertext.to_der() == raw
        assert engine.decrypt(pair.private, pair.public, ciphertext) == material


@pytest.mark.parametrize("material", MATERIAL)
def test_openssl_decrypts(engine, pair, key_files, material):
    raw = engine.encrypt(pair.public, material).to_der()
    key = ("-keyform", "DER", "-inkey", key_files[1])
    assert openssl("pkeyutl", "-decrypt", *key, data=raw) == material


def test_openssl_decrypts_the_known_answer(tmp_path):
    private = tmp_path / "private.der"

    class Known:
        private = known_answer.PRIVATE
        public = known_answer.PUBLIC

    private.write_bytes(sec1(Known))
    raw = known_answer.CIPHERTEXT.to_der()
    plain = openssl("pkeyutl", "-decrypt", "-keyform", "DER", "-inkey", private, data=raw)
    assert plain == known_answer.MESSAGE


def test_openssl_makes_the_key(engine, tmp_path):
    """The pair is openssl's, and so is the ciphertext; only the decryption is ours."""
    pem = tmp_path / "key.pem"
    openssl("genpkey", "-algorithm", "SM2", "-out", pem)
    spki = openssl("pkey", "-in", pem, "-pubout", "-outform", "DER")
    text = openssl("pkey", "-in", pem, "-noout", "-text").decode()
    digits = text.split("priv:")[1].split("pub:")[0]
    private = int("".join(digits.split()).replace(":", ""), 16).to_bytes(32)
    raw = openssl("pkeyutl", "-encrypt", "-inkey", pem, data=b"0123456789abcdef")
    plain = engine.decrypt(private, decode_spki(spki), parse(raw, 16))
    assert plain == b"0123456789abcdef"


def test_x2_path_decrypts_openssl(reference, pair, key_files):
    key = ("-pubin", "-keyform", "DER", "-inkey", key_files[0])
    for _ in range(5):
        ciphertext = parse(openssl("pkeyutl", "-encrypt", *key, data=bytes(32)), 32)
        x2, _ = reference.multiply(int.from_bytes(pair.private), (ciphertext.x, ciphertext.y))
        assert decrypt_with_x2(ciphertext, x2.to_bytes(32)) == bytes(32)


@pytest.fixture
def gmssl_client(pair):
    from gmssl.sm2 import CryptSM2

    def client(mode):
        made = CryptSM2(private_key=pair.private.hex(), public_key="", mode=mode)
        made.public_key = pair.public[1:].hex()  # the constructor would strip zeros and fours
        return made

    return client


@pytest.mark.parametrize("material", MATERIAL)
def test_gmssl_encrypts_c1c3c2(engine, pair, gmssl_client, material):
    for _ in range(5):
        ciphertext = parse(gmssl_client(mode=1).encrypt(material), len(material))
        assert engine.decrypt(pair.private, pair.public, ciphertext) == material


@pytest.mark.parametrize("material", MATERIAL)
def test_gmssl_encrypts_c1c2c3(engine, pair, gmssl_client, material):
    raw = b"\x04" + gmssl_client(mode=0).encrypt(material)
    ciphertext = parse(raw, len(material), [Layout.C1C2C3])
    assert engine.decrypt(pair.private, pair.public, ciphertext) == material


@pytest.mark.parametrize("material", MATERIAL)
def test_gmssl_decrypts(engine, pair, gmssl_client, material):
    ciphertext = engine.encrypt(pair.public, material)
    assert gmssl_client(mode=1).decrypt(ciphertext.to_c1c3c2()[1:]) == material
    old = ciphertext.c1[1:] + ciphertext.c2 + ciphertext.c3
    assert gmssl_client(mode=0).decrypt(old) == material
