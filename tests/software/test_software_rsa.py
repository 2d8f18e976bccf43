import os

import pytest
from cryptography.hazmat.primitives.serialization import load_der_public_key
from support import rsa_pairs
from support.vectors import wycheproof

from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.errors import InvalidKeyMaterial
from hsmwrap.software import rsa

OAEP = {
    WrappingAlgorithm.RSAES_OAEP_SHA_1: "rsa_oaep_2048_sha1_mgf1sha1_test",
    WrappingAlgorithm.RSAES_OAEP_SHA_256: "rsa_oaep_2048_sha256_mgf1sha256_test",
}
PKCS1 = WrappingAlgorithm.RSAES_PKCS1_V1_5
REFUSED = "refused"


def vectors(name):
    """Yield each vector with its private key, loaded as a sealed one is: from p, q and 1/q."""
    for group in wycheproof(name)["testGroups"]:
        numbers = {key: int(value, 16) for key, value in group["privateKey"].items()}
        assert numbers["publicExponent"] == 65537
        parts = (numbers[name] for name in ("prime1", "prime2", "coefficient"))
        key = rsa.load(b"".join(part.to_bytes(128) for part in parts))
        assert key.public_key().public_numbers().n == numbers["modulus"]
        for vector in group["tests"]:
            yield key, vector


def decrypt(key, algorithm, vector):
    try:
        return rsa.decrypt(key, algorithm, bytes.fromhex(vector["ct"])).hex()
    except InvalidKeyMaterial:
        return REFUSED


@pytest.mark.parametrize("algorithm", OAEP)
def test_wycheproof_oaep(algorithm):
    outcomes = {}
    for key, vector in vectors(OAEP[algorithm]):
        # The label is empty here, so a vector with a label is one that must not decrypt.
        valid = vector["result"] == "valid" and not vector["label"]
        expected = vector["msg"] if valid else REFUSED
        outcomes[vector["tcId"]] = (decrypt(key, algorithm, vector), expected)
    assert len(outcomes) >= 36
    assert {key: pair for key, pair in outcomes.items() if pair[0] != pair[1]} == {}


def test_wycheproof_pkcs1():
    """Valid ones decrypt, malformed ciphertexts never do; wrong padding: all alike.

    With implicit rejection (OpenSSL 3.2) none of the wrong paddings fails: each decrypts to bytes
    that are not the vector's and the same each time. Without it every one fails. A mixture would
    be Bleichenbacher's oracle.
    """
    paddings = {}
    tried = list(vectors("rsa_pkcs1_2048_test"))
    for key, vector in tried:
        outcome, again = (decrypt(key, PKCS1, vector) for _ in range(2))
        assert outcome == again, vector["tcId"]
        if vector["result"] == "valid":
            assert outcome == vector["msg"], vector["tcId"]
        elif "InvalidCiphertextFormat" in vector["flags"]:
            assert outcome == REFUSED, vector["tcId"]
        else:
            assert vector["flags"] == ["InvalidPkcs1Padding"]
            assert outcome != vector["msg"], vector["tcId"]
            paddings[vector["tcId"]] = outcome
    assert (len(tried), len(paddings)) == (67, 19)
    refused = {outcome == REFUSED for outcome in paddings.values()}
    assert refused == {not rsa.rejects_implicitly()}


@pytest.mark.parametrize("there", [True, False])
def test_what_openssl_does_with_wrong_padding_is_tried(monkeypatch, there):
    class Key:
        def decrypt(self, ciphertext, padding):
            assert (len(ciphertext), type(padding).__name__) == (256, "PKCS1v15")
            if not there:
                raise ValueError("Decryption failed")
            return b"random bytes"

    monkeypatch.setattr(rsa.rsa, "generate_private_key", lambda *_: Key())
    assert rsa.rejects_implicitly.__wrapped__() is there


@pytest.fixture
def really_generated(monkeypatch):
    """Elsewhere in the tests, pairs come from a list."""
    monkeypatch.setattr(rsa.rsa, "generate_private_key", rsa_pairs.generate)


def test_generated_pair_loads_whole(really_generated):
    spki, secret = rsa.generate()
    assert (len(spki), len(secret)) == (294, 384)
    key = rsa.load(secret)
    numbers = key.public_key().public_numbers()
    assert (numbers.e, numbers.n.bit_length()) == (65537, 2048)
    assert load_der_public_key(spki).public_numbers() == numbers
    # pyca's own check of the key, which load() leaves out.
    assert key.private_numbers().private_key().key_size == 2048


def test_pairs_differ(really_generated):
    assert len({rsa.generate()[0] for _ in range(3)}) == 3


@pytest.mark.parametrize("algorithm", [*OAEP, PKCS1])
@pytest.mark.parametrize("length", [0, 1, 255, 257, 512])
def test_other_lengths_are_refused(algorithm, length):
    _, secret = rsa.generate()
    with pytest.raises(InvalidKeyMaterial, match=r"^key material is invalid\.$") as caught:
        rsa.decrypt(rsa.load(secret), algorithm, os.urandom(length))
    assert caught.value.__suppress_context__
