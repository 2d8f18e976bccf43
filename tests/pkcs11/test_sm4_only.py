"""An HSM that has SM2 and SM4 of its vendor's and no AES, played: SM4 keys seal.

Every attack has a control on a key that the attacker made.
"""

import secrets

import pytest
from cryptography.hazmat.primitives.ciphers import algorithms
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_wrap_with_padding
from pkcs11 import exceptions as ck
from pkcs11.constants import Attribute, MechanismFlag
from pkcs11.mechanisms import KeyType, Mechanism
from support.faults.shim import nothing_left
from support.importing import AES, MATERIAL, RSA_ALGORITHMS, SM2PKE, SM4, flip
from support.pkcs11 import sm4_key_wrap
from support.pkcs11.attacker import force
from support.pkcs11.holder import Holder
from support.pkcs11.sm4_importing import told
from support.pkcs11.sm4_vendors import KEY_WRAP, KEYS, MODES
from support.pkcs11.sm_only import bring, issue, played
from support.pkcs11.vendors import vendor_of

from hsmwrap import registry
from hsmwrap.backend import Custody, Exposure, HasKeySets, Outcome
from hsmwrap.checkvalue import METHOD_SM4_ECB, check_value
from hsmwrap.errors import (
    InvalidKeyMaterial,
    UnsupportedOperation,
)
from hsmwrap.guard import plugin_ref
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding.profiles import by_number
from hsmwrap.pkcs11.binding.templates import for_unwrap, secret_key
from hsmwrap.pkcs11.keysets.keys import Role
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.wrapping.custody import intermediate, parse_ref
from hsmwrap.pkcs11.wrapping.material import parse_key_ref
from hsmwrap.sm2 import decode_spki, open_engine
from hsmwrap.testing.clients import decrypt_message, encrypt_message

SEALED, RESIDENT = Custody.HSM_ENCRYPTED_DATABASE, Custody.HSM_INTERNAL
READABLE = {Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}
SM4_TYPE = by_number(KeyType, KEYS["key_type"])
GENERATE = by_number(Mechanism, KEYS["generate"])
WRAP = by_number(Mechanism, KEY_WRAP)
NOT_PERMITTED = "0x68"


@pytest.fixture(scope="module", params=[True, False], ids=["trusted", "untrusted"])
def trusted(request):
    return request.param


@pytest.fixture(scope="module")
def settings(shim, softhsm, tmp_path_factory, trusted):
    directory = tmp_path_factory.mktemp("profile")
    return played(shim, directory, softhsm, f"only-{trusted}", trusted=trusted)


@pytest.fixture(scope="module")
def backend(settings, shim):
    with nothing_left(shim), registry.open_backend("pkcs11", settings) as opened:
        opened.capabilities()
        yield opened


# --- what is served -------------------------------------------------------------------------------


def test_sm2pke_is_served_in_the_hsm_and_aes_is_missing_and_why(backend):
    report = backend.capabilities()
    (row,) = report.wrapping
    assert (row.algorithm, row.exposure, row.custody) == (SM2PKE, Exposure.IN_HSM, SEALED)
    (key,) = report.keys
    assert (key.key_spec, key.usable, key.custody) == (SM4, True, SEALED)
    assert {each.algorithm for each in report.missing} == set(RSA_ALGORITHMS)
    assert "C_GenerateKeyPair(CKM_RSA_PKCS_KEY_PAIR_GEN)" in report.missing[0].reason
    assert "no AES: Aliyun_AES_256 keys are not imported" in told(report)
    assert "make an AES key: No key is sealed by AES keys" in told(report)
    assert "not enforced" not in told(report)


def test_a_backend_without_aes_refuses_its_keys(backend):
    with pytest.raises(UnsupportedOperation):
        bring(backend, issue(backend), MATERIAL[AES], AES)


def test_what_is_proved_of_protections_is_so_without_rsa(backend, trusted):
    proved = {each.name: each.outcome for each in backend.capabilities().protections}
    assert proved["CKA_UNWRAP_TEMPLATE"] is Outcome.HONOURED
    assert proved["CKA_TRUSTED"] is (Outcome.HONOURED if trusted else Outcome.NOT_PROVABLE)


def test_key_sets_say_whose_keys_seal(settings, trusted):
    (listed,) = Pkcs11Backend.list_keys(settings)
    kind = "trusted" if trusted else "NOT trusted"
    assert f"key-encryption keys of SM4 {kind}" in listed.detail
    with registry.open_backend("pkcs11", settings) as opened:
        number = HasKeySets.of(opened).current_key_set()
        keys = opened.ability(Pkcs11Backend)._keys
        (found,) = opened.ability(Pkcs11Backend)._connection.run(
            lambda pooled: keys.list(pooled.session)
        )
    assert (number, Role.MATERIAL_AES in found.roles) == ("1", False)
    assert {Role.MATERIAL_SM4, Role.WRAPPING_SM2_UNWRAP, Role.MAC} <= set(found.roles)
    assert found.movable == trusted


@pytest.mark.parametrize("custody", Custody)
def test_a_key_is_used_inside_the_hsm_and_not_read(settings, shim, custody):
    before = shim.counters()
    with registry.open_backend("pkcs11", {**settings, "material_custody": custody}) as opened:
        material = secrets.token_bytes(16)
        opened.capabilities()
        calls = shim.counters()
        imported = bring(opened, issue(opened), material)
        assert "C_CreateObject" not in shim.counters().calls_since(calls)
        assert (imported.exposure, imported.key.custody) == (Exposure.IN_HSM, custody)
        message = opened.encrypt(imported.key, b"message", b"context")
        assert decrypt_message(SM4, material, message, b"context") == b"message"
        theirs = encrypt_message(SM4, material, b"theirs", b"", version=message[0])
        assert opened.decrypt(imported.key, theirs) == b"theirs"
        assert Holder(opened).reads(imported.key) is None
        opened.destroy_key(imported.key)
    assert shim.counters().held == before.held


def test_check_values_are_by_sm4(backend):
    key, material = issue(backend), secrets.token_bytes(16)
    imported = bring(backend, key, material)
    assert imported.check_value == check_value(material, METHOD_SM4_ECB)
    assert imported.check_value[0] == 2
    again = {"expected_check_value": imported.check_value}
    assert bring(backend, key, material, **again).check_value == imported.check_value
    for other in ({"material": MATERIAL[SM4], **again}, {"expected_check_value": bytes(17)}):
        with pytest.raises(InvalidKeyMaterial):
            bring(backend, key, **other)
    with pytest.raises(InvalidKeyMaterial):
        bring(backend, key, material, expected_check_value=check_value(material))


def test_a_key_of_another_length_is_refused(backend):
    key = issue(backend)
    for length in (8, 15, 17, 24, 32):
        with pytest.raises(InvalidKeyMaterial):
            bring(backend, key, secrets.token_bytes(length))


# --- what the module that is played does ----------------------------------------------------------


def wrapping_key(session, value=None, more=None):
    """A key that wraps and unwraps: the holder's own."""
    template = secret_key(SM4_TYPE, Attribute.WRAP, Attribute.UNWRAP, Attribute.ENCRYPT)
    template |= more or {}
    if value is not None:
        return force(session.create_object({**template, Attribute.VALUE: value}))
    made = session.generate_key(
        SM4_TYPE, 128, mechanism=GENERATE, capabilities=MechanismFlag(0), template=template
    )
    return force(made)


def known_key(session, value):
    template = secret_key(SM4_TYPE, Attribute.ENCRYPT, extractable=True)
    return session.create_object({**template, Attribute.VALUE: value})


def test_unwrapping_over_any_cipher_is_that_of_aes():
    """The reading of RFC 5649 that the next test relies on."""
    key = secrets.token_bytes(16)
    for length in (1, 8, 16, 31, 138):
        data = secrets.token_bytes(length)
        blob = aes_key_wrap_with_padding(key, data)
        assert sm4_key_wrap.unwrapped(key, blob, algorithms.AES) == data
        with pytest.raises(InvalidUnwrap):
            sm4_key_wrap.unwrapped(key, flip(blob, 3), algorithms.AES)


def test_key_wrap_is_rfc_5649_by_sm4(session):
    kek_value, value = secrets.token_bytes(16), secrets.token_bytes(16)
    kek = wrapping_key(session, kek_value)
    blob = kek.wrap_key(known_key(session, value), mechanism=WRAP)
    assert sm4_key_wrap.unwrapped(kek_value, blob) == value
    becomes = for_unwrap(secret_key(SM4_TYPE) | READABLE)
    opened = kek.unwrap_key(key_data=blob, mechanism=WRAP, **becomes)
    assert opened[Attribute.VALUE] == value
    for bad in (flip(blob, 0), flip(blob, 8 * len(blob) - 1), blob[:-8], blob + bytes(8), b""):
        with pytest.raises(ck.PKCS11Error):
            kek.unwrap_key(key_data=bad, mechanism=WRAP, **becomes)


def test_a_key_that_wraps_is_an_sm4_key_and_no_aes_key(session):
    kek = wrapping_key(session)
    assert (kek[Attribute.KEY_TYPE], kek[Attribute.LOCAL]) == (SM4_TYPE, True)
    assert kek[Attribute.KEY_GEN_MECHANISM] == GENERATE
    ecb = by_number(Mechanism, MODES["ecb"])
    assert len(kek.encrypt(bytes(16), mechanism=ecb)) == 16
    for mechanism in (Mechanism.AES_ECB, Mechanism.AES_KEY_WRAP_PAD):
        with pytest.raises(ck.MechanismInvalid):
            kek.encrypt(bytes(16), mechanism=mechanism)
    with pytest.raises(ck.MechanismInvalid):
        kek.wrap_key(known_key(session, bytes(16)), mechanism=Mechanism.AES_KEY_WRAP_PAD)
    with pytest.raises(ck.PKCS11Error):
        session.generate_key(KeyType.AES, 128)


def test_mechanisms_that_a_key_allows_are_read_as_they_were_given(session):
    allowed = Attribute.ALLOWED_MECHANISMS
    key = known_key(session, bytes(16))
    for given in ((WRAP,), (WRAP, Mechanism.AES_ECB), (Mechanism.AES_ECB,)):
        kek = wrapping_key(session, more={allowed: given})
        assert set(kek[allowed]) == set(given)
        if WRAP in given:
            assert kek.wrap_key(key, mechanism=WRAP)
        else:
            with pytest.raises(ck.PKCS11Error):
                kek.wrap_key(key, mechanism=WRAP)
    free = wrapping_key(session)
    assert not free.get_attributes([allowed]).get(allowed)
    assert free.wrap_key(key, mechanism=WRAP)


# --- attacks with the PIN -------------------------------------------------------------------------


@pytest.fixture
def sealed(backend, session):
    """A key-encryption key, a blob of its, and what it unwraps into."""
    own = backend.ability(Pkcs11Backend)
    imported = bring(backend, issue(backend))
    number, blob = parse_key_ref(imported.key)
    (kek,) = session.get_objects({Attribute.LABEL: own._keys.label(Role.MATERIAL_SM4, number)})
    return force(kek), blob, own._keys.material_template(Role.MATERIAL_SM4, number)


def test_a_blob_unwraps_as_it_should_and_in_no_other_way(sealed, session, trusted):
    kek, blob, becomes = sealed
    attacks = {
        "readable": READABLE,
        "generic": {Attribute.KEY_TYPE: KeyType.GENERIC_SECRET},
        "wraps": {Attribute.WRAP: True},
        "derives": {Attribute.DERIVE: True},
        "unmarked" if trusted else "extractable": (
            {Attribute.WRAP_WITH_TRUSTED: False} if trusted else {Attribute.EXTRACTABLE: True}
        ),
    }

    def succeed(by, wrapped):
        done = set()
        for name, deviation in attacks.items():
            template = for_unwrap({**becomes, **deviation})
            try:
                by.unwrap_key(key_data=wrapped, mechanism=WRAP, **template)
            except ck.TemplateInconsistent:
                continue
            done.add(name)
        return done

    naive = wrapping_key(session)
    control = naive.wrap_key(known_key(session, MATERIAL[SM4]), mechanism=WRAP)
    assert succeed(naive, control) == set(attacks)
    assert kek.unwrap_key(key_data=blob, mechanism=WRAP, **for_unwrap(becomes))
    assert succeed(kek, blob) == set()


def test_a_key_encryption_key_wraps_and_unwraps_and_does_nothing_else(sealed, session, trusted):
    kek, naive = sealed[0], wrapping_key(session)
    for name in ("ecb", "cbc", "gcm"):
        mechanism = by_number(Mechanism, MODES[name])
        parameter = None if name == "ecb" else bytes(16)
        if name != "gcm":
            assert naive.encrypt(bytes(16), mechanism=mechanism, mechanism_param=parameter)
        with pytest.raises(ck.PKCS11Error, match=NOT_PERMITTED):
            kek.decrypt(bytes(16), mechanism=mechanism, mechanism_param=parameter)
    with pytest.raises(ck.AttributeSensitive):
        kek[Attribute.VALUE]
    refusal = ck.KeyNotWrappable if trusted else ck.KeyUnextractable
    assert naive.wrap_key(known_key(session, bytes(16)), mechanism=WRAP)
    with pytest.raises(refusal):
        naive.wrap_key(kek, mechanism=WRAP)


def test_a_resident_key_unwraps_into_what_the_backend_makes_only(settings, session, trusted):
    """Its unwrap template; the control is the key that the backend itself makes for a moment."""
    vendor = vendor_of(settings)

    def unwrapped(private, ciphertext, template):
        return force(private).unwrap_key(
            key_data=ciphertext.write(vendor.unwrap_layout),
            mechanism=vendor.unwrap,
            **for_unwrap(template),
        )

    with registry.open_backend("pkcs11", {**settings, "wrapping_custody": RESIDENT}) as opened:
        key = issue(opened)
        public = decode_spki(key.public_key)
        ciphertext = open_engine("libcrypto").encrypt(public, MATERIAL[SM4])
        named = {Attribute.ID: parse_ref(plugin_ref(key.private_key))[2]}
        (private,) = session.get_objects(named)
        (cipher,) = Pkcs11Settings.from_mapping(settings).sm4.ciphers
        becomes = intermediate(trusted=trusted, cipher=cipher)
        for deviation in (READABLE, {Attribute.WRAP: True}, {Attribute.KEY_TYPE: KeyType.AES}):
            with pytest.raises(ck.PKCS11Error):
                unwrapped(private, ciphertext, {**becomes, **deviation})
        meanwhile = unwrapped(private, ciphertext, becomes)
        with pytest.raises(ck.AttributeSensitive):
            meanwhile[Attribute.VALUE]
        own = wrapping_key(session)
        if trusted:
            with pytest.raises(ck.KeyNotWrappable):
                own.wrap_key(meanwhile, mechanism=WRAP)
        else:
            assert own.wrap_key(meanwhile, mechanism=WRAP)
        assert bring(opened, key).exposure is Exposure.IN_HSM
        opened.discard_wrapping_key(key.private_key)
