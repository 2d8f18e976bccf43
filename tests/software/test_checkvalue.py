import subprocess

import pytest

from hsmwrap.checkvalue import CHECK_BLOCK, METHOD_AES_ECB, check_value, same_check_value

MATERIAL = bytes(range(32))

# Computed once by OpenSSL 3.0.19:
# printf 'hsmwrap-kcv\001\0\0\0\0' | openssl enc -aes-256-ecb -nopad -K 000102…1f | xxd -p
KNOWN = {32: "f295698cb620183926ae73c2c146f257", 16: "4f8ab33ff2c3e2a71a57f62373f1aa51"}


def test_the_block_ends_in_a_counter_that_gcm_never_encrypts():
    assert CHECK_BLOCK == b"hsmwrap-kcv\x01\x00\x00\x00\x00"
    assert len(CHECK_BLOCK) == 16


@pytest.mark.parametrize("length", KNOWN)
def test_known_answers(length):
    expected = bytes([METHOD_AES_ECB]) + bytes.fromhex(KNOWN[length])
    assert check_value(MATERIAL[:length]) == expected


@pytest.mark.parametrize("length", KNOWN)
def test_openssl_agrees(length):
    cipher = f"-aes-{8 * length}-ecb"
    command = ["openssl", "enc", cipher, "-nopad", "-K", MATERIAL[:length].hex()]
    value = subprocess.run(command, input=CHECK_BLOCK, capture_output=True, check=True).stdout
    assert check_value(MATERIAL[:length]) == b"\x01" + value


def test_every_byte_of_the_material_counts():
    values = {
        check_value(MATERIAL[:position] + b"\xff" + MATERIAL[position + 1 :])
        for position in range(32)
    }
    assert len(values | {check_value(MATERIAL)}) == 33


def test_same_check_value():
    value = check_value(MATERIAL)
    assert same_check_value(value, bytes(value))
    assert not same_check_value(value, value[:-1])
    assert not same_check_value(value, b"\x02" + value[1:])
    assert not same_check_value(b"", value)
