"""SM4 inside the HSM, through python-pkcs11 and profiles, with vendors that are played.

Known answers: GB/T 32907-2016, appendix A; draft-ribose-cfrg-sm4-10, A.2; RFC 8998, appendix A.
"""

import ctypes
import secrets

import pytest
from pkcs11 import exceptions as ck
from pkcs11.constants import Attribute, MechanismFlag
from pkcs11.mechanisms import KeyType, Mechanism
from support.faults.shim import nothing_left
from support.importing import SM4, flip
from support.pkcs11.attacker import force
from support.pkcs11.holder import Holder
from support.pkcs11.sm4_importing import bring, issue, told
from support.pkcs11.sm4_vendors import WITH_GCM, WITHOUT_GCM

from hsmwrap import registry
from hsmwrap.backend import Custody, Exposure
from hsmwrap.checkvalue import check_value
from hsmwrap.errors import HsmError, InvalidCiphertext, InvalidParameter
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding.gcm import Gcm
from hsmwrap.pkcs11.binding.profiles import by_number
from hsmwrap.pkcs11.binding.templates import for_unwrap, secret_key
from hsmwrap.pkcs11.keysets.keys import Role
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.wrapping import probe, use
from hsmwrap.pkcs11.wrapping.material import parse_key_ref
from hsmwrap.testing.clients import decrypt_message, encrypt_message

SEALED, RESIDENT = Custody.HSM_ENCRYPTED_DATABASE, Custody.HSM_INTERNAL
KWP = Mechanism.AES_KEY_WRAP_PAD
READABLE = {Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}


@pytest.fixture(scope="module")
def settings(play):
    return play("sm4")


@pytest.fixture(scope="module")
def backend(settings, shim):
    with nothing_left(shim), registry.open_backend("pkcs11", settings) as opened:
        opened.capabilities()
        yield opened


@pytest.fixture(scope="module")
def wrapping_key(backend):
    return issue(backend)


# --- what the module that is played does ----------------------------------------------------------

DRAFT_IV = bytes(range(16))
DRAFT_PLAINTEXT = b"".join(bytes([each]) * 4 for each in b"\xaa\xbb\xcc\xdd\xee\xff\xaa\xbb")
DRAFT_CBC = "78ebb11cc40b0a48312aaeb2040244cb4cb7016951909226979b0d15dc6a8f6d"
DRAFT_CTR_PLAINTEXT = b"".join(bytes([each]) * 8 for each in b"\xaa\xbb\xcc\xdd\xee\xff\xaa\xbb")
DRAFT_CTR = (
    "ac3236cb970cc20791364c395a1342d1a3cbc1878c6f30cd074cce385cdd70c7"
    "f234bc0e24c11980fd1286310ce37b926e02fcd0faa0baf38b2933851d824514"
)


def known(session, settings, value=use.SM4_KEY, more=None):
    sm4 = Pkcs11Settings.from_mapping(settings).sm4
    template = secret_key(sm4.key_type, Attribute.ENCRYPT, Attribute.DECRYPT)
    key = session.create_object({**template, Attribute.VALUE: value, **(more or {})})
    return sm4, force(key)


def both_ways(key, mechanism, plaintext, ciphertext, parameter=None):
    assert mechanism is not None
    named = {"mechanism": mechanism, "mechanism_param": parameter}
    assert key.encrypt(plaintext, **named) == bytes.fromhex(ciphertext)
    assert key.decrypt(bytes.fromhex(ciphertext), **named) == plaintext


def test_the_standard_s_block(session, settings):
    sm4, key = known(session, settings)
    block = use.SM4_KEY + use.SM4_KEY
    both_ways(key, sm4.ecb, block, 2 * "681edf34d206965e86b3e94f536e4246")
    with pytest.raises(ck.DataLenRange):
        key.encrypt(block[:-1], mechanism=sm4.ecb)


def test_chained_blocks(session, settings):
    sm4, key = known(session, settings)
    both_ways(key, sm4.cbc, DRAFT_PLAINTEXT, DRAFT_CBC, DRAFT_IV)


@pytest.mark.parametrize("vendor", [WITH_GCM], indirect=True, ids=str)
def test_counters_and_gcm(session, settings):
    sm4, key = known(session, settings)
    parameter = bytes(ctypes.c_ulong(32)) + DRAFT_IV
    both_ways(key, sm4.ctr, DRAFT_CTR_PLAINTEXT, DRAFT_CTR, parameter)
    gcm, sealed = Gcm(settings["module"], sm4.gcm), use.SM4_SEALED[1]
    assert gcm.encrypt(key, use.SM4_NONCE, use.SM4_PLAINTEXT, use.SM4_DATA) == sealed
    assert gcm.decrypt(key, use.SM4_NONCE, sealed, use.SM4_DATA) == use.SM4_PLAINTEXT
    for bad in (flip(sealed, 0), flip(sealed, 8 * len(sealed) - 1), sealed[:-1], b""):
        with pytest.raises(InvalidCiphertext):
            gcm.decrypt(key, use.SM4_NONCE, bad, use.SM4_DATA)


def test_a_key_is_of_its_type(session, settings):
    sm4, key = known(session, settings)
    assert (key[Attribute.KEY_TYPE], key[Attribute.SENSITIVE]) == (sm4.key_type, True)
    for length in (15, 17, 32):
        with pytest.raises(ck.AttributeValueInvalid):
            known(session, settings, bytes(length))
    with pytest.raises(ck.PKCS11Error):
        key.encrypt(bytes(16), mechanism=Mechanism.AES_ECB)
    aes = session.generate_key(KeyType.AES, 128)
    with pytest.raises(ck.KeyTypeInconsistent):
        aes.encrypt(bytes(16), mechanism=sm4.ecb)


def test_a_generated_key_tells_that_it_is_one(session, settings):
    sm4 = Pkcs11Settings.from_mapping(settings).sm4
    made = session.generate_key(
        sm4.key_type,
        128,
        mechanism=sm4.generate,
        capabilities=MechanismFlag(0),
        template=secret_key(sm4.key_type, Attribute.ENCRYPT),
    )
    told = made.get_attributes([Attribute.LOCAL, Attribute.NEVER_EXTRACTABLE])
    assert set(told.values()) == {True}
    assert not known(session, settings)[1][Attribute.LOCAL]


def test_a_key_is_read_or_wrapped_only_if_it_was_made_so(session, settings):
    own = session.generate_key(KeyType.AES, 256, template={Attribute.WRAP: True})
    _, readable = known(session, settings, more=READABLE)
    assert readable[Attribute.VALUE] == use.SM4_KEY
    assert own.wrap_key(readable, mechanism=KWP)
    _, kept = known(session, settings, more={Attribute.COPYABLE: True, Attribute.MODIFIABLE: True})
    with pytest.raises(ck.AttributeSensitive):
        kept[Attribute.VALUE]
    with pytest.raises(ck.KeyUnextractable):
        own.wrap_key(kept, mechanism=KWP)
    for attribute, value in READABLE.items():
        with pytest.raises(ck.AttributeReadOnly):
            kept[attribute] = value
        with pytest.raises(ck.AttributeReadOnly):
            kept.copy({attribute: value})


# --- imports and use ------------------------------------------------------------------------------


@pytest.mark.parametrize("custody", [SEALED, RESIDENT])
def test_keys_encrypt_inside_the_hsm(settings, shim, vendor, custody):
    before = shim.counters().held
    with registry.open_backend("pkcs11", {**settings, "material_custody": custody}) as opened:
        capability = opened.capabilities().key_for(SM4)
        assert (capability.usable, capability.custody) == (True, custody)
        material = secrets.token_bytes(16)
        imported = bring(opened, issue(opened), material)
        assert imported.check_value == check_value(material)
        assert imported.exposure is Exposure.IN_HSM
        message = opened.encrypt(imported.key, b"message", b"context")
        assert message[0] == vendor.version
        assert decrypt_message(SM4, material, message, b"context") == b"message"
        message = encrypt_message(SM4, material, b"theirs", b"", version=vendor.version)
        assert opened.decrypt(imported.key, message) == b"theirs"
        assert Holder(opened).reads(imported.key) is None
        opened.destroy_key(imported.key)
    assert shim.counters().held == before


def test_the_host_sees_no_key(backend, wrapping_key, shim):
    before = shim.counters()
    key = bring(backend, wrapping_key).key
    backend.decrypt(key, backend.encrypt(key, b"message"))
    calls = shim.counters().calls_since(before)
    assert "C_CreateObject" not in calls
    assert calls["C_UnwrapKey"] == 4  # the wrapping key, the material, and the sealed key twice


def test_what_a_message_costs(backend, wrapping_key, shim, vendor):
    key = bring(backend, wrapping_key).key
    before = shim.counters()
    message = backend.encrypt(key, bytes(6000))
    calls = shim.counters().calls_since(before)
    assert calls["C_EncryptInit"] == (1 if vendor is WITH_GCM else 2)
    before = shim.counters()
    assert backend.decrypt(key, message) == bytes(6000)
    calls = shim.counters().calls_since(before)
    assert (calls.get("C_DecryptInit", 0), calls.get("C_EncryptInit", 0)) == (
        (1, 0) if vendor is WITH_GCM else (0, 2)
    )


def test_a_message_of_another_version_is_not_one(backend, wrapping_key, vendor):
    key = bring(backend, wrapping_key).key
    message = backend.encrypt(key, b"message")
    other = {1: 2, 2: 1}[vendor.version]
    with pytest.raises(InvalidCiphertext):
        backend.decrypt(key, bytes([other]) + message[1:])


@pytest.mark.parametrize("vendor", [WITHOUT_GCM], indirect=True, ids=str)
def test_the_hsm_s_fault_is_not_the_message_s(backend, wrapping_key, shim):
    """CCM gives the HSM whole blocks only, whatever the client sent."""
    key = bring(backend, wrapping_key).key
    message = backend.encrypt(key, b"message")
    shim.fail("C_EncryptInit", 0x21, always=True)  # CKR_DATA_LEN_RANGE
    try:
        with pytest.raises(HsmError, match="C_EncryptInit"):
            backend.decrypt(key, message)
    finally:
        shim.clear()


@pytest.mark.parametrize("vendor", [WITHOUT_GCM], indirect=True, ids=str)
def test_what_is_too_long_for_ccm_is_refused(backend, wrapping_key):
    key = bring(backend, wrapping_key).key
    with pytest.raises(InvalidParameter, match="16777215"):
        backend.encrypt(key, bytes(2**24))


# --- what the report says -------------------------------------------------------------------------


def test_ccm_is_told(backend, vendor):
    assert ("SM4-CCM" in told(backend.capabilities())) == (vendor is WITHOUT_GCM)


class Cipher:
    """One that answers as it should, but for what a test changes."""

    name, version = "GCM", 1

    def __init__(self, **changed):
        self.changed = changed

    def encrypt(self, _key, *_):
        return self.changed.get("encrypts", use.SM4_SEALED[1])

    def decrypt(self, _key, _nonce, _sealed, additional_data):
        if additional_data != use.SM4_DATA and not self.changed.get("lenient"):
            raise InvalidCiphertext
        return self.changed.get("decrypts", use.SM4_PLAINTEXT)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"encrypts": use.SM4_SEALED[2]}, "is not that of GCM"),
        ({"decrypts": b""}, "does not decrypt what it encrypted"),
        ({"lenient": True}, "decrypts under other additional data"),
    ],
)
def test_a_cipher_that_is_wrong_is_not_offered(changed, says):
    def tried(cipher):
        return probe.Probe._encrypts_by(None, cipher, None, use.SM4_KEY, control=True)

    assert tried(Cipher())
    with pytest.raises(probe._Wrong, match=says):
        tried(Cipher(**changed))


# --- attacks with the PIN -------------------------------------------------------------------------


def test_a_blob_unwraps_as_it_should_and_in_no_other_way(backend, wrapping_key, session, settings):
    own = backend.ability(Pkcs11Backend)
    number, blob = parse_key_ref(bring(backend, wrapping_key).key)
    (kek,) = session.get_objects({Attribute.LABEL: own._keys.label(Role.MATERIAL_SM4, number)})
    becomes = own._keys.material_template(Role.MATERIAL_SM4, number)
    attacks = {
        "readable": READABLE,
        "sensitive, extractable": {Attribute.EXTRACTABLE: True, Attribute.WRAP_WITH_TRUSTED: False},
        "aes": {Attribute.KEY_TYPE: KeyType.AES},
        "generic": {Attribute.KEY_TYPE: KeyType.GENERIC_SECRET},
        "wraps": {Attribute.WRAP: True},
    }

    def succeed(by, wrapped):
        done = set()
        for name, deviation in attacks.items():
            template = for_unwrap({**becomes, **deviation})
            try:
                by.unwrap_key(key_data=wrapped, mechanism=KWP, **template)
            except ck.TemplateInconsistent:
                continue
            done.add(name)
        return done

    naive = session.generate_key(KeyType.AES, 256, template={Attribute.WRAP: True})
    _, control = known(session, settings, more=READABLE)
    assert succeed(naive, naive.wrap_key(control, mechanism=KWP)) == set(attacks)
    assert succeed(kek, blob) == set()


def test_two_handles_of_one_key_and_a_planted_one(settings, backend, session):
    own = backend.ability(Pkcs11Backend)
    store = own._token().material
    _, first = known(session, settings)
    _, other = known(session, settings, bytes(16))
    assert store._are_one_key(SM4, [first, first])
    assert not store._are_one_key(SM4, [first, other])


def test_the_number_of_a_mechanism_is_the_profile_s(settings, vendor):
    sm4 = Pkcs11Settings.from_mapping(settings).sm4
    assert (sm4.gcm is None) == (vendor is WITHOUT_GCM)
    assert sm4.ecb == by_number(Mechanism, 0x8000A100 if vendor is WITH_GCM else 0x80000108)
