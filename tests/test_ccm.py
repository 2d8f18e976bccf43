"""CCM from ECB and CBC: the vector of RFC 8998, pyca's AES-CCM, and the message around it."""

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM

from hsmwrap import ccm
from hsmwrap.errors import InvalidCiphertext, InvalidParameter

KEY = bytes.fromhex("0123456789abcdeffedcba9876543210")
NONCE = bytes.fromhex("00001234567800000000abcd")


def blocks_of(algorithm):
    ecb, cbc = modes.ECB(), modes.CBC(bytes(16))
    return [lambda data, mode=mode: Cipher(algorithm, mode).encryptor().update(data)
            for mode in (ecb, cbc)]  # fmt: skip


SM4, AES = blocks_of(algorithms.SM4(KEY)), blocks_of(algorithms.AES(KEY))


def test_the_vector_of_rfc_8998():
    plaintext = b"".join(8 * bytes([byte]) for byte in bytes.fromhex("aabbccddeeffeeaa"))
    associated = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
    sealed = bytes.fromhex(
        "48af93501fa62adbcd414cce6034d895dda1bf8f132f042098661572e7483094"
        "fd12e518ce062c98acee28d95df4416bed31a2f04476c18bb40c84a74b97dc5b"
        "16842d4fa186f56ab33256971fa110f4"
    )
    assert ccm.seal(*SM4, NONCE, plaintext, associated) == sealed
    assert ccm.unseal(*SM4, NONCE, sealed, associated) == plaintext


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 32, 6000])
@pytest.mark.parametrize("associated", [0, 1, 13, 14, 15, 30, 0xFEFF, 0xFF00, 0x10000])
def test_it_is_pyca_s_ccm(length, associated):
    plaintext, data = bytes(range(256)) * 24, b"\xa5" * associated
    theirs = AESCCM(KEY, tag_length=16).encrypt(NONCE, plaintext[:length], data)
    assert ccm.seal(*AES, NONCE, plaintext[:length], data) == theirs


@pytest.mark.parametrize("additional_data", [b"", b"context"])
def test_a_message_names_its_format_and_authenticates_it(additional_data):
    message = ccm.encrypt(*SM4, b"message", additional_data)
    assert (message[0], len(message)) == (2, 1 + 12 + len(b"message") + 16)
    assert ccm.decrypt(*SM4, message, additional_data) == b"message"
    plain = ccm.unseal(*SM4, message[1:13], message[13:], b"\x02" + additional_data)
    assert plain == b"message"
    with pytest.raises(InvalidCiphertext):
        ccm.unseal(*SM4, message[1:13], message[13:], additional_data)


def test_no_nonce_comes_twice():
    assert len({ccm.encrypt(*SM4, b"", b"")[1:13] for _ in range(50)}) == 50


def test_every_change_is_one_error():
    message = ccm.encrypt(*SM4, b"message", b"context")
    changed = [message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :]
               for at in range(len(message))]  # fmt: skip
    for bad in (*changed, message[:-1], message + b"\0", b"", message[:28]):
        with pytest.raises(InvalidCiphertext):
            ccm.decrypt(*SM4, bad, b"context")
    with pytest.raises(InvalidCiphertext):
        ccm.decrypt(*SM4, message, b"another")


def test_what_is_too_short_reaches_no_key():
    shortest = ccm.encrypt(*SM4, b"", b"context")
    assert ccm.decrypt(*SM4, shortest, b"context") == b""
    for length in range(len(shortest)):
        with pytest.raises(InvalidCiphertext):
            ccm.decrypt(pytest.fail, pytest.fail, shortest[:length], b"context")


@pytest.mark.parametrize(("length", "blocks"), [(0, 1), (1, 2), (16, 2), (17, 3)])
def test_the_key_is_asked_for_no_more_blocks_than_the_message_has(length, blocks):
    asked = []

    def ecb(data):
        asked.append(len(data))
        return SM4[0](data)

    ccm.encrypt(ecb, SM4[1], bytes(length), b"")
    assert asked == [16 * blocks]


def test_the_longest_message_has_as_many_bytes_as_three_bytes_count():
    def zeros(data):
        return bytes(len(data))

    longest = bytes(2**24 - 1)
    sealed = ccm.seal(zeros, zeros, NONCE, longest, b"")
    assert len(sealed) == 2**24 - 1 + 16
    assert ccm.unseal(zeros, zeros, NONCE, sealed, b"") == longest


def test_what_is_too_long_for_its_length_is_refused():
    with pytest.raises(InvalidParameter, match="16777215"):
        ccm.encrypt(*SM4, bytes(2**24), b"")
    with pytest.raises(InvalidCiphertext):
        ccm.unseal(*SM4, NONCE, bytes(2**24 + 16), b"")
