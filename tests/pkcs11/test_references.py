"""The references that import tokens and database rows carry: one layout, and no other is read."""

import pytest

from hsmwrap.backend import Custody, KeyRef, PrivateKeyRef
from hsmwrap.catalog import KeySpec
from hsmwrap.errors import InvalidImportToken, KeyNotFound
from hsmwrap.pkcs11.keysets.keys import Role
from hsmwrap.pkcs11.wrapping.custody import WrappingKeyStore, parse_ref
from hsmwrap.pkcs11.wrapping.material import parse_key_ref

# Codes on the wire: never reused, never renumbered.
ROLES = {
    0: Role.WRAPPING_UNWRAP,
    1: Role.WRAPPING_DECRYPT,
    2: Role.WRAPPING_DERIVE,
    3: Role.WRAPPING_SM2_UNWRAP,
}
SEALED, RESIDENT = Custody.HSM_ENCRYPTED_DATABASE, Custody.HSM_INTERNAL
ID = bytes(range(16))


def key_ref(custody, data):
    return KeyRef("pkcs11", KeySpec.ALIYUN_AES_256, custody, data)


@pytest.mark.parametrize(("code", "role"), ROLES.items())
def test_a_wrapping_key_has_a_version_the_code_of_its_role_and_a_key_set(code, role):
    assert WrappingKeyStore.resident(role, ID).data == bytes([1, code, 0, 0]) + ID
    assert parse_ref(PrivateKeyRef(RESIDENT, bytes([1, code, 0, 0]) + ID)) == (role, 0, ID)
    sealed = PrivateKeyRef(SEALED, bytes([1, code, 0x12, 0x34]) + b"blob")
    assert parse_ref(sealed) == (role, 0x1234, b"blob")


@pytest.mark.parametrize("head", ["", "010000", "00000000", "02000000", "01040000", "01ff0000"])
def test_a_wrapping_key_of_another_version_or_role_is_refused(head):
    with pytest.raises(InvalidImportToken):
        parse_ref(PrivateKeyRef(SEALED, bytes.fromhex(head)))


@pytest.mark.parametrize("length", [0, 15, 17, 255])
def test_a_resident_reference_has_an_id_of_16_bytes(length):
    head = WrappingKeyStore.resident(Role.WRAPPING_UNWRAP, b"").data
    with pytest.raises(InvalidImportToken, match="names no object"):
        parse_ref(PrivateKeyRef(RESIDENT, head + bytes(length)))
    with pytest.raises(KeyNotFound, match="names no object"):
        parse_key_ref(key_ref(RESIDENT, bytes(length)))


def test_an_imported_key_has_a_version_and_a_key_set_or_is_an_id():
    assert parse_key_ref(key_ref(SEALED, b"\x01\x12\x34blob")) == (0x1234, b"blob")
    assert parse_key_ref(key_ref(RESIDENT, ID)) == (0, ID)


@pytest.mark.parametrize("head", ["", "0100", "000001", "020001"])
def test_an_imported_key_of_another_version_is_refused(head):
    with pytest.raises(KeyNotFound):
        parse_key_ref(key_ref(SEALED, bytes.fromhex(head)))
