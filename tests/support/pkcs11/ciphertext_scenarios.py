"""What bad ciphertexts cost the HSM, behind the fault shim, each scenario in its own process.

Usage: python -m support.pkcs11.ciphertext_scenarios SCENARIO SHIM_DIRECTORY SETTINGS
"""

import contextlib
import os
from collections import Counter
from datetime import UTC, datetime, timedelta

from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.customer import encrypt_key_material
from hsmwrap.errors import (
    HsmwrapError,
    InvalidCiphertext,
    InvalidImportToken,
    InvalidKeyMaterial,
    InvalidMac,
)
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.testing.faults import CKR
from support.bad_input import changed_rsa, wrong_pkcs1
from support.pkcs11 import scenarios

AES = KeySpec.ALIYUN_AES_256
PKCS1, OAEP1, OAEP256, SM2PKE = WrappingAlgorithm
LONGEST = 245
ENCRYPTED = Counter(C_Encrypt=4)  # in two tries, each with a call for the length
SESSIONS = ("C_OpenSession", "C_CloseSession", "C_Login", "C_FindObjectsInit")


class Desk:
    """A backend with one wrapping key, and the calls of the HSM that an import takes."""

    def __init__(self, shim, settings, algorithm=PKCS1):
        self.shim, self.algorithm = shim, algorithm
        self.backend = Pkcs11Backend.from_settings(settings)
        spec = WrappingKeySpec.EC_SM2 if algorithm is SM2PKE else WrappingKeySpec.RSA_2048
        expires = datetime.now(UTC) + timedelta(hours=1)
        self.key = self.backend.generate_wrapping_key(spec, algorithm, expires_at=expires)
        self.good = self.encrypted(bytes(32))
        self.outcome(self.good)

    def encrypted(self, material):
        return encrypt_key_material(self.algorithm, self.key.public_key, material)

    def outcome(self, ciphertext, **more):
        try:
            return self.backend.unwrap_material(
                self.key.private_key, self.algorithm, ciphertext, key_spec=AES, **more
            )
        except HsmwrapError as error:
            return type(error)

    def calls(self, ciphertext, **more):
        """Calls by function, of an import that has to fail."""
        before = self.shim.counters()
        assert self.outcome(ciphertext, **more) is InvalidKeyMaterial
        after = self.shim.counters()
        assert after.held == before.held
        return Counter(after.calls_since(before))

    def calls_of_good(self):
        before = self.shim.counters()
        assert self.outcome(self.good) is not InvalidKeyMaterial
        return Counter(self.shim.counters().calls_since(before))


def twice(calls):
    return Counter({name: 2 * count for name, count in calls.items()})


def every_fault_of_pkcs1_is_the_same_work(shim, settings):
    """Wrong padding, wrong length and other material: the client's clock may not tell them apart.

    All are tried twice, and then the login is looked at. What differs is written out: a stand-in
    is made by a call of its own, where C_UnwrapKey makes the material by itself, and where the
    length is not one of AES the encryption does not get further than C_EncryptInit.
    """
    desk = Desk(shim, settings)
    if desk.backend.health().facts["implicit_rejection"]:
        return  # then no padding is wrong
    good = desk.calls_of_good()
    assert good["C_CreateObject"] == 0
    padded = [desk.calls(each) for each in wrong_pkcs1(desk.key.public_key, bytes(32))]
    padded += [desk.calls(each) for each in changed_rsa(desk.good, desk.key.public_key, None)]
    assert all(each == padded[0] for each in padded)

    lengths = {n: desk.calls(desk.encrypted(os.urandom(n))) for n in range(LONGEST + 1) if n != 32}
    other = [calls for length, calls in lengths.items() if length not in {16, 24}]
    assert all(each == other[0] for each in other)
    aes = [lengths[16], lengths[24], desk.calls(desk.good, expected_check_value=bytes(17))]
    assert all(each == aes[0] for each in aes)
    assert aes[0] == other[0] + ENCRYPTED
    assert padded[0] == aes[0] + Counter(C_CreateObject=2)
    assert aes[0] == twice(good) + Counter(C_GetSessionInfo=2)


def every_fault_of_oaep_in_the_token_is_the_same_work(shim, settings):
    desk = Desk(shim, settings, OAEP1)
    faults = [desk.calls(each) for each in changed_rsa(desk.good, desk.key.public_key, None)]
    pkcs1 = load_der_public_key(desk.key.public_key).encrypt(bytes(32), padding.PKCS1v15())
    faults.append(desk.calls(pkcs1))
    assert all(each == faults[0] for each in faults)


def material_that_comes_through_the_host_is_the_same_work(shim, settings):
    for algorithm in (OAEP256, SM2PKE):
        desk = Desk(shim, settings, algorithm)
        last = desk.good[:-1] + bytes([desk.good[-1] ^ 1])  # in the last byte of C2, where SM2
        faults = [desk.calls(each) for each in (last, desk.encrypted(os.urandom(32))[:-2] + b"xx")]
        if algorithm is OAEP256:
            faults += [desk.calls(desk.encrypted(os.urandom(n))) for n in (0, 16, 31, 33, 190)]
        assert all(each == faults[0] for each in faults)
        assert desk.calls(desk.good, expected_check_value=bytes(17)) == faults[0]


def bad_ciphertexts_close_no_session_and_search_no_key(shim, settings):
    """Each closed two sessions, and the next call searched its keys again."""
    for more in ({}, {"wrapping_custody": "HsmInternal"}):
        desk = Desk(shim, settings | more)
        good = desk.calls_of_good()
        before = shim.counters()
        for _ in range(10):
            desk.calls(bytes(255) + b"\3")
        since = Counter(shim.counters().calls_since(before))
        used = {name: since[name] for name in SESSIONS}
        searches = 20 * good["C_FindObjectsInit"]  # a resident key is searched at each try
        assert used == dict.fromkeys(SESSIONS, 0) | {"C_FindObjectsInit": searches}
        assert desk.calls_of_good() == good
        if not more:
            assert searches == 0
        desk.backend.discard_wrapping_key(desk.key.private_key)


def other_faults_of_the_client_close_no_session_either(shim, settings):
    desk = Desk(shim, settings)
    key = desk.outcome(desk.good).key
    message = desk.backend.encrypt(key, b"message")
    damaged = desk.key.private_key.data[:-1] + bytes([desk.key.private_key.data[-1] ^ 1])
    reference = type(desk.key.private_key)(desk.key.private_key.custody, damaged)
    mac = desk.backend.mac(b"data")
    before = shim.counters()
    for _ in range(3):
        with contextlib.suppress(InvalidMac):  # a forged import token
            desk.backend.verify_mac(b"other data", mac)
            raise AssertionError
        with contextlib.suppress(InvalidCiphertext):
            desk.backend.decrypt(key, message[:-1] + bytes([message[-1] ^ 1]))
            raise AssertionError
        with contextlib.suppress(InvalidImportToken):
            desk.backend.unwrap_material(reference, PKCS1, desk.good, key_spec=AES)
            raise AssertionError
    since = Counter(shim.counters().calls_since(before))
    assert {name: since[name] for name in SESSIONS} == dict.fromkeys(SESSIONS, 0)
    assert shim.counters().held == before.held


def a_token_that_takes_no_plaintext_keys_makes_the_stand_in_itself(shim, settings):
    """As certified HSMs do; the client's fault stays the client's."""
    shim.fail("C_CreateObject", CKR.FUNCTION_NOT_SUPPORTED, always=True)
    desk = Desk(shim, settings, OAEP1)  # no padding of PKCS#1 v1.5 is wrong with OpenSSL 3.2
    calls = desk.calls(bytes(255) + b"\3")
    assert (calls["C_CreateObject"], calls["C_GenerateKey"]) == (0, 2)


def a_stand_in_that_cannot_be_made_is_the_hsm_s_fault(shim, settings):
    desk = Desk(shim, settings, OAEP1)
    before = shim.counters()
    for code, error in (
        (CKR.DEVICE_MEMORY, "HsmResourceExhausted"),
        (CKR.GENERAL_ERROR, "HsmError"),
    ):
        shim.fail("C_CreateObject", code, always=True)
        assert desk.outcome(bytes(255) + b"\3").__name__ == error
        shim.clear()
    assert desk.outcome(bytes(255) + b"\3") is InvalidKeyMaterial
    assert shim.counters().held == before.held


def an_object_without_a_handle_goes_with_its_session(shim, settings):
    """The unwrapping succeeded, but its answer or its attributes could not be read."""
    desk = Desk(shim, settings)
    before = shim.counters()
    reads = desk.calls_of_good()["C_GetAttributeValue"]
    for nth in range(1, reads + 1):
        shim.fail("C_GetAttributeValue", CKR.GENERAL_ERROR, nth=nth)
        assert desk.outcome(desk.good) is not InvalidKeyMaterial, nth
        shim.clear()
    for nth in (1, 2):  # of the wrapping key, and of the material
        shim.fail("C_UnwrapKey", CKR.FUNCTION_FAILED, nth=nth, after=True)
        assert desk.outcome(desk.good) is not InvalidKeyMaterial, nth
        assert shim.counters().held == before.held


if __name__ == "__main__":
    scenarios.main(globals())
