"""Known answers through real sessions: GM/T 0003.5, Wycheproof's RSA and AES key wrap vectors.

The keys are the vectors' own, so they come into the HSM token by C_CreateObject.
"""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.keywrap import aes_key_wrap_with_padding
from pkcs11.constants import Attribute
from pkcs11.exceptions import PKCS11Error
from pkcs11.mechanisms import KeyType
from support.importing import (
    AES,
    MATERIAL,
    OAEP1,
    OAEP256,
    PKCS1,
    SM2PKE,
    each_key_spec,
    open_pkcs11,
)
from support.vectors import wycheproof

from hsmwrap.errors import InvalidKeyMaterial
from hsmwrap.guard import bound
from hsmwrap.pkcs11.binding.objects import Way
from hsmwrap.pkcs11.binding.templates import (
    AES_KEY_WRAP,
    for_unwrap,
    private_key,
    secret_key,
    stored,
)
from hsmwrap.pkcs11.keysets.keys import UNWRAPPED, Role
from hsmwrap.pkcs11.wrapping import rsa, sm2
from hsmwrap.pkcs11.wrapping.custody import WrappingKeyStore, new_object_id
from hsmwrap.sm2 import (
    OID_DER,
    Sm2Ciphertext,
    encode_spki,
    known_answer,
    open_engine,
    recover_y,
    sm2_kdf,
    sm3,
)
from hsmwrap.sm2.curve import P
from hsmwrap.sm2.kdf import xor
from hsmwrap.testing.clients import gmssl_encrypt, openssl_encrypt

REFUSED = "refused"
SPKI = encode_spki(known_answer.PUBLIC)
READABLE = {
    **secret_key(KeyType.GENERIC_SECRET, extractable=True),
    Attribute.SENSITIVE: False,
}


@pytest.fixture(scope="module")
def backend(softhsm):
    with open_pkcs11(softhsm, "known") as opened:
        opened.capabilities()
        yield opened


# --- SM2 by ECDH: GM/T 0003.5 -------------------------------------------------------------------


def sm2_template(template):
    return {**template, Attribute.EC_PARAMS: OID_DER, Attribute.VALUE: known_answer.PRIVATE}


@pytest.fixture
def private(session):
    """The standard's private key as a session object."""
    return session.create_object(sm2_template(UNWRAPPED[Role.WRAPPING_DERIVE]))


@pytest.fixture
def resident(session):
    """The standard's private key as a resident wrapping key, and the reference to it."""
    object_id = new_object_id()
    template = stored(UNWRAPPED[Role.WRAPPING_DERIVE], object_id, "known:wrapping:4102444800")
    key = session.create_object(sm2_template(template))
    yield bound(WrappingKeyStore.resident(Role.WRAPPING_DERIVE, object_id), SM2PKE)
    key.destroy()


def sm2_decrypted(private, ciphertext):
    try:
        return sm2.decrypt(private, ciphertext, None)
    except InvalidKeyMaterial:
        return REFUSED


def test_the_standard_s_message(private):
    assert sm2_decrypted(private, known_answer.CIPHERTEXT) == b"encryption standard"


@pytest.mark.parametrize("part", ["c2", "c3"])
def test_the_standard_s_message_with_any_bit_changed(private, part):
    genuine = getattr(known_answer.CIPHERTEXT, part)
    for bit in range(8 * len(genuine)):
        changed = (int.from_bytes(genuine) ^ 1 << bit).to_bytes(len(genuine))
        ciphertext = replace(known_answer.CIPHERTEXT, **{part: changed})
        assert sm2_decrypted(private, ciphertext) == REFUSED, bit


@pytest.mark.parametrize(
    "encrypt",
    [
        lambda message: openssl_encrypt(SM2PKE, SPKI, message),
        lambda message: gmssl_encrypt(SM2PKE, SPKI, message),
        lambda message: open_engine("libcrypto").encrypt(known_answer.PUBLIC, message).to_c1c3c2(),
    ],
    ids=["openssl", "gmssl", "libcrypto"],
)
@each_key_spec
def test_import_under_the_standard_s_key(backend, resident, encrypt, key_spec):
    material = MATERIAL[key_spec]
    values = {
        backend.unwrap_material(resident, SM2PKE, encrypt(material), key_spec=key_spec).check_value
        for _ in range(4)
    }
    assert len(values) == 1
    with pytest.raises(InvalidKeyMaterial):
        backend.unwrap_material(resident, SM2PKE, encrypt(material + b"x"), key_spec=key_spec)


def small_c1():
    """A ciphertext for the standard's key whose C1 has an x below 2^256 - p: x + p fits as well."""
    x = next(x for x in range(1, 100) if recover_y(x) is not None)
    return x, recover_y(x)


def encrypted_under_c1(private, x, y):
    """The ciphertext for any C1, made with the private key."""
    x2 = sm2.derive_x(private, Sm2Ciphertext(x, y, bytes(32), b"-").c1)
    y2 = recover_y(int.from_bytes(x2)).to_bytes(32)
    mask = sm2_kdf(x2, y2, AES.material_length)
    return sm3(x2 + MATERIAL[AES] + y2), xor(MATERIAL[AES], mask)


def raw(x, y, c3, c2):
    return b"\x04" + x.to_bytes(32) + y.to_bytes(32) + c3 + c2


def test_x_plus_p_is_refused_where_x_decrypts(backend, private, resident):
    x, y = small_c1()
    c3, c2 = encrypted_under_c1(private, x, y)
    backend.unwrap_material(resident, SM2PKE, raw(x, y, c3, c2), key_spec=AES)
    with pytest.raises(InvalidKeyMaterial):
        backend.unwrap_material(resident, SM2PKE, raw(x + P, y, c3, c2), key_spec=AES)


def test_no_bad_c1_reaches_the_private_key(backend, resident, monkeypatch):
    good = Sm2Ciphertext(*small_c1(), bytes(32), bytes(32))
    derived = []
    monkeypatch.setattr(sm2, "derive_x", lambda private, c1: derived.append(c1) or bytes(32))
    bad_points = [(good.x, good.y ^ 1), (good.x + P, good.y), (0, 0), (P, good.y), (good.y, good.x)]
    for x, y in [*bad_points, (good.x, good.y)]:
        with pytest.raises(InvalidKeyMaterial):
            backend.unwrap_material(resident, SM2PKE, raw(x, y, good.c3, good.c2), key_spec=AES)
    assert set(derived) == {good.c1}


def test_a_negated_c1_is_all_that_ecdh_does_not_see(private):
    """x([d]C1) is x([d](-C1)), and C3 confirms it: known, and harmless to a key import."""
    genuine = known_answer.CIPHERTEXT
    negated = replace(genuine, y=P - genuine.y)
    assert sm2_decrypted(private, negated) == known_answer.MESSAGE
    with pytest.raises(InvalidKeyMaterial):
        open_engine("libcrypto").decrypt(known_answer.PRIVATE, known_answer.PUBLIC, negated)


# --- RSA: Wycheproof ----------------------------------------------------------------------------

FILES = {
    PKCS1: "rsa_pkcs1_2048_test",
    OAEP1: "rsa_oaep_2048_sha1_mgf1sha1_test",
    OAEP256: "rsa_oaep_2048_sha256_mgf1sha256_test",
}
_PARTS = {
    "modulus": Attribute.MODULUS,
    "publicExponent": Attribute.PUBLIC_EXPONENT,
    "privateExponent": Attribute.PRIVATE_EXPONENT,
    "prime1": Attribute.PRIME_1,
    "prime2": Attribute.PRIME_2,
    "exponent1": Attribute.EXPONENT_1,
    "exponent2": Attribute.EXPONENT_2,
    "coefficient": Attribute.COEFFICIENT,
}


def rsa_vectors(session, algorithm):
    """Yield each vector with its private key as an object."""
    for group in wycheproof(FILES[algorithm])["testGroups"]:
        # Integers in the file have a leading zero octet where they would look negative.
        numbers = {name: int(group["privateKey"][name], 16) for name in _PARTS}
        template = private_key(KeyType.RSA, Attribute.UNWRAP, Attribute.DECRYPT)
        for name, number in numbers.items():
            template[_PARTS[name]] = number.to_bytes((number.bit_length() + 7) // 8)
        key = session.create_object(template)
        for vector in group["tests"]:
            yield key, vector


def unwrapped(key, algorithm, ciphertext):
    """C_UnwrapKey into a key that the test may read."""
    secret = rsa.wrapped_material(key, algorithm, ciphertext, Way.AS_ASKED).make_object(
        None, READABLE
    )
    try:
        return bytes(secret[Attribute.VALUE])
    finally:
        secret.destroy()


def decrypted(key, algorithm, ciphertext):
    return rsa.decrypt(key, algorithm, ciphertext, native=True)


def decoded_in_the_host(key, algorithm, ciphertext):
    return rsa.decrypt(key, algorithm, ciphertext, native=False)


def outcome(path, key, algorithm, vector):
    try:
        return path(key, algorithm, bytes.fromhex(vector["ct"])).hex()
    except InvalidKeyMaterial:
        return REFUSED


@pytest.mark.parametrize(
    ("algorithm", "path"),
    [
        (OAEP1, unwrapped),
        (OAEP1, decrypted),
        (OAEP1, decoded_in_the_host),
        (OAEP256, decoded_in_the_host),
    ],
)
def test_wycheproof_oaep(session, algorithm, path):
    outcomes = {}
    for key, vector in rsa_vectors(session, algorithm):
        # The label is empty here, so a vector with a label is one that must not decrypt.
        valid = vector["result"] == "valid" and not vector["label"]
        expected = vector["msg"] if valid else REFUSED
        outcomes[vector["tcId"]] = (outcome(path, key, algorithm, vector), expected)
    assert len(outcomes) >= 36
    assert {key: pair for key, pair in outcomes.items() if pair[0] != pair[1]} == {}


def test_a_token_that_strips_leading_zeros_of_raw_rsa(session):
    for key, vector in rsa_vectors(session, OAEP256):
        if vector["flags"] == ["Normal"]:
            assert outcome(decoded_in_the_host, Stripping(key), OAEP256, vector) == vector["msg"]


class Stripping:
    def __init__(self, key):
        self._key = key

    def __getattr__(self, name):
        return getattr(self._key, name)

    def decrypt(self, ciphertext, mechanism):
        return self._key.decrypt(ciphertext, mechanism=mechanism).lstrip(b"\0")


@pytest.mark.parametrize("path", [unwrapped, decrypted])
def test_wycheproof_pkcs1(session, path):
    """Wrong paddings are all refused, or with implicit rejection none is and all are random."""
    paddings, tried = {}, 0
    for key, vector in rsa_vectors(session, PKCS1):
        found, tried = outcome(path, key, PKCS1, vector), tried + 1
        if vector["result"] == "valid":
            assert found == vector["msg"], vector["tcId"]
        elif "InvalidCiphertextFormat" in vector["flags"]:
            assert found == REFUSED, vector["tcId"]
        else:
            assert vector["flags"] == ["InvalidPkcs1Padding"]
            assert found != vector["msg"], vector["tcId"]
            paddings[vector["tcId"]] = found
    assert (tried, len(paddings)) == (67, 19)
    assert len({found == REFUSED for found in paddings.values()}) == 1


@pytest.mark.parametrize("algorithm", [PKCS1, OAEP1, OAEP256])
@pytest.mark.parametrize("length", [0, 1, 255, 257, 512])
def test_no_other_length_reaches_the_private_key(algorithm, length):
    for path in (unwrapped, decrypted, decoded_in_the_host):
        with pytest.raises(InvalidKeyMaterial):
            path(None, algorithm, bytes(length))


# --- AES key wrap with padding: Wycheproof ------------------------------------------------------


def wrap_vectors(session):
    for group in wycheproof("aes_kwp_test")["testGroups"]:
        for vector in group["tests"]:
            template = secret_key(KeyType.AES, Attribute.WRAP, Attribute.UNWRAP)
            value = bytes.fromhex(vector["key"])
            yield session.create_object({**template, Attribute.VALUE: value}), vector


def kwp_unwrapped(kek, ciphertext):
    try:
        key = kek.unwrap_key(key_data=ciphertext, mechanism=AES_KEY_WRAP, **for_unwrap(READABLE))
        return bytes(key[Attribute.VALUE]).hex()
    except PKCS11Error:
        return REFUSED


def test_wycheproof_key_wrap(session):
    outcomes = {}
    for kek, vector in wrap_vectors(session):
        expected = vector["msg"] if vector["result"] == "valid" else REFUSED
        outcomes[vector["tcId"]] = (kwp_unwrapped(kek, bytes.fromhex(vector["ct"])), expected)
    assert len(outcomes) == 254
    assert {key: pair for key, pair in outcomes.items() if pair[0] != pair[1]} == {}


def test_wycheproof_key_wrap_the_other_way(session):
    """Right for whole blocks; SoftHSM fills up the others before it wraps, so what is wrapped
    does not tell 31 bytes from 32: AES has to refuse them (hsmwrap.pkcs11.wrapping.material)."""
    tried = set()
    for kek, vector in wrap_vectors(session):
        material = bytes.fromhex(vector["msg"])
        if vector["result"] != "valid":
            continue
        key = session.create_object({**READABLE, Attribute.VALUE: material})
        wrapped = bytes(kek.wrap_key(key, mechanism=AES_KEY_WRAP))
        filled = material + bytes(-len(material) % 8)
        assert wrapped == aes_key_wrap_with_padding(bytes.fromhex(vector["key"]), filled)
        assert (wrapped.hex() == vector["ct"]) == (filled == material)
        tried.add(len(material))
    assert {16, 24, 32} < tried
