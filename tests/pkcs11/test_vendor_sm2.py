"""The vendors' own SM2, as far as it can be shown without their hardware."""

import dataclasses
import secrets
from datetime import UTC, datetime, timedelta

import pytest
from pkcs11.constants import Attribute, ObjectClass
from pkcs11.exceptions import TemplateInconsistent
from pkcs11.mechanisms import KeyType
from support.pkcs11.vendor_token import VendorToken, packed

from hsmwrap.backend import Custody
from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.errors import HsmError, InvalidImportToken, InvalidKeyMaterial
from hsmwrap.pkcs11.binding import profiles
from hsmwrap.pkcs11.binding.templates import USES
from hsmwrap.pkcs11.keysets.keys import UNWRAPPED, KeySets, Role, unwrapped_template
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.wrapping import probe, sm2
from hsmwrap.pkcs11.wrapping.custody import WrappingKeyStore, new_object_id
from hsmwrap.pkcs11.wrapping.features import TokenFeatures
from hsmwrap.sm2 import Layout, decode_spki, open_engine

VENDORS = {
    name: vendor for name in profiles.names() if (vendor := profiles.load(name).sm2) is not None
}
DECRYPTING = {name: vendor for name, vendor in VENDORS.items() if vendor.decrypt is not None}
DECRYPTING |= {
    f"sansec, {layout}": dataclasses.replace(VENDORS["sansec"], ciphertext=layout)
    for layout in Layout
    if layout is not Layout.C1C3C2
}
EVERYTHING = TokenFeatures()
"""A token that refuses no attribute."""
SETTINGS = Pkcs11Settings(module="/m")
SEALED, RESIDENT = "sealed", "resident"
DERIVE = Role.WRAPPING_DERIVE


@pytest.fixture(params=DECRYPTING.values(), ids=DECRYPTING)
def vendor(request):
    return request.param


def with_keys(vendor, configured):
    """A token with a key set that was made with this profile configured."""
    token, keys = VendorToken(vendor), KeySets("p", vendor=configured)
    for role in Role:
        keys.create(token, role, 1, "test", trusted=False)
    return token, WrappingKeyStore(keys, "p", EVERYTHING)


@pytest.fixture
def token_and_store(vendor):
    return with_keys(vendor, vendor)


def make(token, store, vendor, custody):
    """A wrapping key pair as the backend makes it: public key and reference."""
    role, object_id = Role.WRAPPING_DERIVE, new_object_id()
    if custody == SEALED:
        template = store.sealing_template(role, trusted=False)
    else:
        expires = datetime.now(UTC) + timedelta(hours=1)
        template = store.resident_template(
            role, WrappingAlgorithm.SM2PKE, object_id, expires, trusted=False
        )
    public, private = sm2.generate(token, template, vendor)
    der = sm2.public_key_der(public)
    if custody == SEALED:
        ref = store.seal(token.pooled(), role, private, 1)
        private.destroy()
    else:
        ref = store.resident(role, object_id)
    public.destroy()
    return decode_spki(der), ref


def decrypted(token, store, vendor, ref, ciphertext):
    with store.fetched(token.pooled(), ref) as (_role, private):
        return sm2.decrypt(private, ciphertext, vendor)


@pytest.mark.parametrize("custody", [SEALED, RESIDENT])
def test_material_arrives_by_the_vendor_s_mechanisms(token_and_store, vendor, custody):
    token, store = token_and_store
    public, ref = make(token, store, vendor, custody)
    material = secrets.token_bytes(32)
    ciphertext = open_engine("libcrypto").encrypt(public, material)
    assert decrypted(token, store, vendor, ref, ciphertext) == material
    used = [(name, int(mechanism)) for name, mechanism in token.calls if name != "wrap"]
    ours = [call for call in used if call[0] != "unwrap"]
    assert ours == [("generate", int(vendor.generate)), ("decrypt", int(vendor.decrypt))]
    assert [name for name, _ in token.calls].count("unwrap") == (custody == SEALED)


@pytest.mark.parametrize("custody", [SEALED, RESIDENT])
def test_a_bad_ciphertext_is_the_client_s_fault(token_and_store, vendor, custody):
    """Before, the vendor's key type made python-pkcs11 raise ValueError."""
    token, store = token_and_store
    public, ref = make(token, store, vendor, custody)
    good = open_engine("libcrypto").encrypt(public, bytes(32))
    bad = dataclasses.replace(good, c3=bytes(32))
    with pytest.raises(InvalidKeyMaterial):
        decrypted(token, store, vendor, ref, bad)


def test_the_private_key_decrypts_and_does_nothing_else(token_and_store, vendor):
    token, store = token_and_store
    _, ref = make(token, store, vendor, RESIDENT)
    with store.fetched(token.pooled(), ref) as (_role, private):
        assert private.key_type == vendor.key_type
        uses = private.get_attributes(USES)
    assert [use for use in uses if uses[use]] == [Attribute.DECRYPT]


def test_a_key_set_made_without_the_profile_opens_no_vendor_key(vendor):
    """Its key-encryption key is pinned to CKK_EC and CKA_DERIVE: rotate with the profile set."""
    token, _ = with_keys(vendor, None)
    store = WrappingKeyStore(KeySets("p", vendor=vendor), "p", EVERYTHING)
    public, ref = make(token, store, vendor, SEALED)
    ciphertext = open_engine("libcrypto").encrypt(public, bytes(32))
    with pytest.raises((InvalidImportToken, TemplateInconsistent)):
        decrypted(token, store, vendor, ref, ciphertext)


def test_a_vendor_without_decryption_derives_with_keys_of_its_type():
    template = unwrapped_template(Role.WRAPPING_DERIVE, VENDORS["luna"])
    assert template[Attribute.KEY_TYPE] == VENDORS["luna"].key_type
    assert (template[Attribute.DERIVE], template[Attribute.DECRYPT]) == (True, False)


def test_the_profile_changes_sm2_keys_only(vendor):
    changed = {role for role in UNWRAPPED if unwrapped_template(role, vendor) != UNWRAPPED[role]}
    assert changed == {Role.WRAPPING_DERIVE, Role.WRAPPING_SM2_UNWRAP}
    assert all(unwrapped_template(role) == UNWRAPPED[role] for role in UNWRAPPED)
    assert UNWRAPPED[Role.WRAPPING_DERIVE][Attribute.KEY_TYPE] is KeyType.EC


def test_a_vendor_s_symmetric_key_in_the_partition_stops_nothing(token_and_store):
    token, store = token_and_store
    theirs = {
        Attribute.CLASS: ObjectClass.SECRET_KEY,
        Attribute.KEY_TYPE: VENDORS["sansec"].key_type,
    }
    for use in (Attribute.WRAP, Attribute.SIGN):
        token.keep(packed({**theirs, Attribute.TOKEN: True, use: True, Attribute.LABEL: "sm4"}))
    assert [(each.number, each.current) for each in store.keys.list(token)] == [(1, True)]
    assert store.keys.current(token.pooled()) == 1


def imported(token, store, vendor, custody):
    """Whether what the probe encrypts is decrypted with a private key in this custody."""
    trials = probe.Probe(token.pooled(), store.keys, SETTINGS, None, vendor)
    trials._number = 1
    material = secrets.token_bytes(32)
    with trials._sm2_key(DERIVE, custody) as (der, private):
        ciphertext = probe._encrypt_sm2(decode_spki(der), material)
        return sm2.decrypt(private, ciphertext, vendor) == material


@pytest.mark.parametrize("custody", Custody)
def test_the_probe_tries_the_vendor_s_own_mechanisms(vendor, custody):
    assert imported(*with_keys(vendor, vendor), vendor, custody)


@pytest.mark.parametrize("custody", Custody)
def test_the_probe_finds_out_that_the_vendor_takes_another_form(vendor, custody):
    layout = Layout.DER if vendor.ciphertext is not Layout.DER else Layout.C1C3C2
    other = dataclasses.replace(vendor, ciphertext=layout)
    with pytest.raises(InvalidKeyMaterial):
        imported(*with_keys(vendor, vendor), other, custody)


def test_the_probe_finds_out_that_a_key_set_was_made_without_the_profile(vendor):
    token, _ = with_keys(vendor, None)
    store = WrappingKeyStore(KeySets("p", vendor=vendor), "p", TokenFeatures())
    with pytest.raises((InvalidImportToken, TemplateInconsistent)):
        imported(token, store, vendor, Custody.HSM_ENCRYPTED_DATABASE)


def test_a_point_of_an_unknown_form_is_told():
    class Compressed:
        def __getitem__(self, attribute):
            return b"\x04\x21\x02" + bytes(32)

    with pytest.raises(HsmError, match=r"it has 35 bytes, 04 21 02 00 …; read are x and y by"):
        sm2.public_key_der(Compressed())
