import os

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from support.vectors import wycheproof

from hsmwrap.catalog import KeySpec
from hsmwrap.errors import InvalidCiphertext
from hsmwrap.software import cipher

USABLE = [spec for spec in KeySpec if cipher.is_usable(spec)]
each_spec = pytest.mark.parametrize("spec", USABLE)


def refused(spec, key, message, additional_data=b"aad"):
    try:
        cipher.decrypt(spec, key, message, additional_data)
    except InvalidCiphertext:
        return True
    return False


def test_aes_is_always_usable():
    assert KeySpec.ALIYUN_AES_256 in USABLE


@each_spec
@pytest.mark.parametrize("plaintext", [b"", b"x", bytes(1000)])
@pytest.mark.parametrize("additional_data", [b"", b"aad"])
def test_round_trip(spec, plaintext, additional_data):
    key = os.urandom(spec.material_length)
    message = cipher.encrypt(spec, key, plaintext, additional_data)
    assert message[0] == 1
    assert len(message) == 1 + 12 + len(plaintext) + 16
    assert cipher.decrypt(spec, key, message, additional_data) == plaintext


@each_spec
def test_any_change_is_refused(spec):
    key = os.urandom(spec.material_length)
    message = cipher.encrypt(spec, key, b"plaintext", b"aad")
    assert not refused(spec, key, message)
    for position in range(len(message)):
        for bit in range(8):
            changed = bytearray(message)
            changed[position] ^= 1 << bit
            assert refused(spec, key, bytes(changed)), (position, bit)
    for length in range(len(message)):
        assert refused(spec, key, message[:length]), length
    assert refused(spec, key, message + b"\0")
    assert refused(spec, key, message, b"")
    assert refused(spec, os.urandom(spec.material_length), message)


def test_pyca_reads_and_writes_aes_messages():
    spec, key, nonce = KeySpec.ALIYUN_AES_256, os.urandom(32), os.urandom(12)
    message = cipher.encrypt(spec, key, b"plaintext", b"aad")
    assert AESGCM(key).decrypt(message[1:13], message[13:], b"aad") == b"plaintext"
    foreign = b"\x01" + nonce + AESGCM(key).encrypt(nonce, b"plaintext", b"aad")
    assert cipher.decrypt(spec, key, foreign, b"aad") == b"plaintext"


def test_nonces_differ():
    key = os.urandom(32)
    messages = {cipher.encrypt(KeySpec.ALIYUN_AES_256, key, b"", b"")[1:13] for _ in range(100)}
    assert len(messages) == 100


def test_sm4_wycheproof():
    tests = [
        test
        for group in wycheproof("sm4_gcm_test")["testGroups"]
        if (group["ivSize"], group["tagSize"]) == (96, 128)
        for test in group["tests"]
    ]
    if not cipher.is_usable(KeySpec.ALIYUN_SM4):
        pytest.skip("pyca's OpenSSL has no SM4-GCM")
    assert len(tests) == 65
    assert [test["tcId"] for test in tests if sm4_open(test) != sm4_expected(test)] == []


def sm4_open(test):
    key, iv, ct, tag, aad = (
        bytes.fromhex(test[name]) for name in ("key", "iv", "ct", "tag", "aad")
    )
    try:
        return cipher.decrypt(KeySpec.ALIYUN_SM4, key, b"\x01" + iv + ct + tag, aad)
    except InvalidCiphertext:
        return None


def sm4_expected(test):
    return bytes.fromhex(test["msg"]) if test["result"] == "valid" else None


def test_sm4_encrypts_as_wycheproof_says(monkeypatch):
    if not cipher.is_usable(KeySpec.ALIYUN_SM4):
        pytest.skip("pyca's OpenSSL has no SM4-GCM")
    group = wycheproof("sm4_gcm_test")["testGroups"][0]
    for test in group["tests"]:
        if test["result"] != "valid":
            continue
        iv = bytes.fromhex(test["iv"])
        monkeypatch.setattr(cipher.os, "urandom", lambda _length, iv=iv: iv)
        key, msg, aad = (bytes.fromhex(test[name]) for name in ("key", "msg", "aad"))
        message = cipher.encrypt(KeySpec.ALIYUN_SM4, key, msg, aad)
        assert message.hex() == "01" + test["iv"] + test["ct"] + test["tag"]
