"""SM2 inside the HSM, through python-pkcs11 and the shipped profiles, with a vendor that is played.

The known answer is the example of GM/T 0003.5; every attack has a control on a key that the
attacker made.
"""

import json
import secrets
import subprocess
import sys
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pkcs11 import exceptions as ck
from pkcs11.constants import Attribute, ObjectClass
from pkcs11.mechanisms import KDF, KeyType, Mechanism
from support.faults.shim import nothing_left
from support.importing import AES, MATERIAL, RSA_ALGORITHMS, SM2PKE, SM4, flip
from support.pkcs11.attacker import force
from support.pkcs11.holder import Holder
from support.pkcs11.vendors import POOR, PROTECTING, SIMULATED, vendor_of, with_keys

from hsmwrap import registry
from hsmwrap.backend import Custody, DescribesHsm, Exposure
from hsmwrap.catalog import WrappingKeySpec
from hsmwrap.checkvalue import check_value
from hsmwrap.ckr import CKR
from hsmwrap.errors import InvalidImportToken, InvalidKeyMaterial
from hsmwrap.guard import plugin_ref
from hsmwrap.pkcs11 import Pkcs11Backend, inspection
from hsmwrap.pkcs11.binding import profiles
from hsmwrap.pkcs11.binding.templates import for_unwrap, private_key, secret_key
from hsmwrap.pkcs11.keysets import admin
from hsmwrap.pkcs11.keysets.keys import Role
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.wrapping import probe as probe_module
from hsmwrap.pkcs11.wrapping import sm2
from hsmwrap.pkcs11.wrapping.custody import intermediate, parse_ref
from hsmwrap.sm2 import OID_DER, Layout, Sm2Ciphertext, decode_spki, known_answer, open_engine
from hsmwrap.testing._conformance.base import tomorrow
from hsmwrap.testing.faults import Restriction

SEALED, RESIDENT = Custody.HSM_ENCRYPTED_DATABASE, Custody.HSM_INTERNAL
READABLE = {Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}
NOT_PERMITTED = "0x68"


@pytest.fixture(scope="module", params=SIMULATED, ids=str)
def simulated(request):
    return request.param


@pytest.fixture(scope="module")
def settings(simulated, shim, softhsm, tmp_path_factory):
    directory = tmp_path_factory.mktemp("profile")
    played = simulated.play(shim, directory, softhsm, key_prefix=f"sim-{simulated}")
    return with_keys(played, softhsm, trusted=simulated.trusts)


@pytest.fixture(scope="module")
def backend(settings, shim):
    with nothing_left(shim), registry.open_backend("pkcs11", settings) as opened:
        opened.capabilities()
        yield opened


def row_of(report, algorithm=SM2PKE):
    return next((w for w in report.wrapping if w.algorithm is algorithm), None)


def issue(backend):
    return backend.generate_wrapping_key(WrappingKeySpec.EC_SM2, SM2PKE, expires_at=tomorrow())


def encrypted(key, material):
    return open_engine("libcrypto").encrypt(decode_spki(key.public_key), material)


def bring(backend, key, ciphertext, key_spec=AES, **more):
    if isinstance(ciphertext, Sm2Ciphertext):
        ciphertext = ciphertext.to_c1c3c2()
    return backend.unwrap_material(key.private_key, SM2PKE, ciphertext, key_spec=key_spec, **more)


# --- what the profiles make of it -----------------------------------------------------------------


def test_sm2pke_ends_inside_the_hsm(backend):
    row = row_of(backend.capabilities())
    assert (row.exposure, row.custody) == (Exposure.IN_HSM, SEALED)
    assert (row.reason, row.tried) == ("", ())
    assert {row_of(backend.capabilities(), each) is None for each in RSA_ALGORITHMS} == {False}


@pytest.mark.parametrize("layout", [Layout.C1C3C2, Layout.C1C3C2_BARE, Layout.DER])
@pytest.mark.parametrize("key_spec", [AES, SM4])
def test_a_client_s_layout_becomes_the_hsm_s(backend, shim, key_spec, layout):
    key, material = issue(backend), MATERIAL[key_spec]
    before = shim.counters()
    imported = bring(backend, key, encrypted(key, material).write(layout), key_spec)
    calls = shim.counters().calls_since(before)
    assert imported.exposure is Exposure.IN_HSM
    assert imported.check_value == check_value(material)
    assert not calls.keys() & {"C_Decrypt", "C_DeriveKey", "C_CreateObject"}
    assert calls["C_UnwrapKey"] == 2  # of the wrapping key, and of the material
    if key_spec is AES:
        sealed = backend.encrypt(imported.key, b"message", b"aad")
        assert AESGCM(material).decrypt(sealed[1:13], sealed[13:], b"aad") == b"message"


def test_the_same_material_again_and_no_other(backend):
    key = issue(backend)
    first = bring(backend, key, encrypted(key, MATERIAL[AES]))
    again = {"expected_check_value": first.check_value}
    assert bring(backend, key, encrypted(key, MATERIAL[AES]), **again).check_value
    with pytest.raises(InvalidKeyMaterial):
        bring(backend, key, encrypted(key, secrets.token_bytes(32)), **again)


def test_every_fault_is_one_error_and_the_same_work(backend, shim):
    key = issue(backend)
    good = encrypted(key, MATERIAL[AES])
    raw = good.to_c1c3c2()

    def calls(ciphertext, **more):
        before = shim.counters()
        with pytest.raises(InvalidKeyMaterial):
            bring(backend, key, ciphertext, **more)
        assert shim.counters().held == before.held
        return shim.counters().calls_since(before)

    changed = [calls(flip(raw, 8 * at)) for at in (65, 96, 97, len(raw) - 1)]  # C3 and C2
    assert all(each == changed[0] for each in changed)
    of_another = calls(encrypted(issue(backend), MATERIAL[AES]))
    assert of_another == changed[0]
    other = calls(good, expected_check_value=bytes(17))
    assert changed[0] == {**other, "C_CreateObject": 2}  # the stand-ins, as for RSA
    for unparsed in (flip(raw, 8 * 33), raw[:-1], raw + b"\0", bytes(len(raw))):
        assert calls(unparsed).get("C_UnwrapKey") == 2  # C1 is looked at before the HSM sees it


def test_nothing_reaches_the_hsm_that_is_not_on_the_curve(backend, monkeypatch):
    seen = []
    unwrap = sm2.objects.unwrap
    monkeypatch.setattr(
        sm2.objects,
        "unwrap",
        lambda key, blob, *a, **m: (seen.append(blob), unwrap(key, blob, *a, **m))[1],
    )
    key = issue(backend)
    raw = encrypted(key, MATERIAL[AES]).to_c1c3c2()
    bring(backend, key, raw)
    assert any(raw[1:65] in each for each in seen)
    seen.clear()
    with pytest.raises(InvalidKeyMaterial):
        bring(backend, key, flip(raw, 8 * 33))
    assert not any(raw[1:32] in each for each in seen)


def test_wrapping_keys_can_stay_in_the_hsm(settings, shim):
    before = shim.counters().held
    resident = {**settings, "wrapping_custody": RESIDENT, "material_custody": RESIDENT}
    with registry.open_backend("pkcs11", resident) as opened:
        row = row_of(opened.capabilities())
        assert (row.exposure, row.custody) == (Exposure.IN_HSM, RESIDENT)
        key = issue(opened)
        imported = bring(opened, key, encrypted(key, MATERIAL[AES]))
        assert imported.exposure is Exposure.IN_HSM
        opened.destroy_key(imported.key)
        opened.discard_wrapping_key(key.private_key)
        with pytest.raises(InvalidImportToken):
            bring(opened, key, encrypted(key, MATERIAL[AES]))
    assert shim.counters().held == before


# --- what a profile gets wrong is told ------------------------------------------------------------


def report_with(settings, profile_file):
    own = {name: value for name, value in settings.items() if name != "profile"}
    with registry.open_backend("pkcs11", {**own, "profile_file": profile_file}) as opened:
        return opened.capabilities()


def takes(simulated):
    return simulated.layout or Layout.C1C3C2


@pytest.mark.parametrize("layout", Layout)
def test_a_profile_of_the_same_numbers_for_another_layout_serves_nothing(
    settings, simulated, tmp_path, shim, layout
):
    before = shim.counters().held
    report = report_with(settings, simulated.profile_file(tmp_path, ciphertext=layout))
    assert shim.counters().held == before
    if layout is takes(simulated):
        assert row_of(report).exposure is Exposure.IN_HSM
        return
    assert row_of(report) is None
    (missing,) = (each for each in report.missing if each.algorithm is SM2PKE)
    for answer in ("C_UnwrapKey(CKM_VENDOR_0x80008200)", "C_Decrypt(CKM_VENDOR_0x80008200)"):
        assert missing.reason.count(answer) == 1
    assert missing.reason.count(f"With {takes(simulated)} it works: ciphertext") == 1
    forms = [each.step.partition(" (")[2] for each in missing.tried]
    assert forms == [f"{custody}, ciphertext as {layout})" for custody in (SEALED, RESIDENT)] * 2
    assert "serves no SM2 as the profile has it" in " ".join(report.notes)


def test_what_is_tried_with_other_layouts_leaves_nothing(settings, simulated, tmp_path, shim):
    """Also where every key is a token object."""
    wrong = simulated.profile_file(tmp_path, ciphertext=Layout.C1C3C2_BARE)
    own = {**settings, "key_prefix": f"token-objects-{simulated}"}
    shim.restrict(simulated.restrictions | Restriction.NO_SESSION_OBJECTS)
    try:
        Pkcs11Backend.initialise_keys(own)
        before = shim.counters().held
        report = report_with(own, wrong)
        assert shim.counters().held == before
    finally:
        admin.destroy_all(Pkcs11Settings.from_mapping(own))
        shim.restrict(simulated.restrictions)
    assert f"With {takes(simulated)} it works" in str(report.missing)


@pytest.mark.parametrize(
    ("change", "answer", "helps"),
    [
        ({"unwrap_ciphertext": "DER"}, "CKR_WRAPPED_KEY_INVALID", True),
        ({"unwrap_parameter": "00"}, "CKR_MECHANISM_PARAM_INVALID", False),
    ],
)
def test_where_unwrapping_does_not_work_the_host_decrypts(
    settings, simulated, tmp_path, change, answer, *, helps
):
    change = {**({"ciphertext": simulated.layout} if simulated.layout else {}), **change}
    report = report_with(settings, simulated.profile_file(tmp_path, **change))
    row = row_of(report)
    assert (row.exposure, row.custody) == (Exposure.HOST, SEALED)
    assert row.reason.count(f"C_UnwrapKey(CKM_VENDOR_0x80008200) answered {answer}") == 1
    assert (f"With {takes(simulated)} it works: ciphertext (unwrap" in row.reason) == helps


def by_number(mechanisms):
    return {each["mechanism"]: each for each in mechanisms}


IDENTIFY = """
import json, sys
from hsmwrap.pkcs11 import inspection
from hsmwrap.pkcs11.settings import Pkcs11Settings
settings = Pkcs11Settings.from_mapping(json.loads(sys.argv[1]))
print(json.dumps(inspection.identify(settings).mechanisms))
"""
"""In a process of its own, as a module has one profile in a process."""


def test_the_vendor_s_mechanisms_are_listed_beside_those_of_the_profile(settings, simulated):
    told = by_number(inspection.identify(Pkcs11Settings.from_mapping(settings)).mechanisms)
    assert told["0x80008200"] == {
        "mechanism": "0x80008200",
        "listed": True,
        "for": ["DECRYPT", "UNWRAP"],
        "profile": ["sm2.decrypt", "sm2.unwrap"],
    }
    assert all(each["listed"] for each in told.values())
    assert told.get("0x80008201", {"profile": None})["profile"] == (
        [] if simulated is POOR else None
    )


def test_a_published_report_says_by_which_profile(backend, simulated, settings):
    """And no path of a file of one's own: its summary."""
    summary = profiles.load(simulated.profile).summary
    assert DescribesHsm.of(backend).describe_hsm().profile == f"file: {summary}"
    own = {name: value for name, value in settings.items() if not name.startswith("profile")}
    named = Pkcs11Settings.from_mapping({**own, "profile": simulated.profile})
    assert named.profile_told == simulated.profile
    assert not Pkcs11Settings.from_mapping(own).profile_told


def test_a_number_that_the_module_does_not_list_is_seen(settings, tmp_path, shim):
    """And neither one that is never asked for, nor a module that says no more, stops anything."""
    text = profiles.text_of("tass").replace("0x80008200", "0x80008210")
    (file := tmp_path / "wrong.toml").write_text(f"{text}[never]\nmechanisms = [0x80008200]\n")
    before = shim.counters()
    own = {name: value for name, value in settings.items() if not name.startswith("profile")}
    command = [sys.executable, "-c", IDENTIFY, json.dumps({**own, "profile_file": str(file)})]
    told = by_number(json.loads(subprocess.check_output(command)))
    asked = shim.counters().calls_since(before)["C_GetMechanismInfo"]
    assert asked == len([each for each in told.values() if each["listed"]]) - 1
    assert not told["0x80008210"]["listed"]
    assert told["0x80008210"]["profile"] == ["sm2.decrypt", "sm2.unwrap"]
    assert (told["0x80008200"]["listed"], told["0x80008200"]["for"]) == (True, [])
    shim.fail("C_GetMechanismInfo", CKR.FUNCTION_NOT_SUPPORTED, always=True)
    try:
        told = inspection.identify(Pkcs11Settings.from_mapping(settings)).mechanisms
        assert [each["for"] for each in told] == [[]] * len(told)
    finally:
        shim.clear()


def test_an_hsm_that_does_not_compare_c3_is_not_used(settings, monkeypatch):
    """Played by a control that changes nothing: what should be refused passes."""
    monkeypatch.setattr(probe_module, "_with_another_c3", lambda trial: trial)
    with registry.open_backend("pkcs11", settings) as opened:
        (missing,) = (m for m in opened.capabilities().missing if m.algorithm is SM2PKE)
    assert "a ciphertext passes whose C3 was changed" in missing.reason


def test_what_is_not_enforced_is_said(backend, simulated):
    told = " ".join(backend.capabilities().notes)
    assert ("'use but not read' is not enforced" in told) == (not simulated.trusts)


@pytest.mark.parametrize("custody", Custody)
def test_what_the_holder_of_the_pin_reads(settings, simulated, custody):
    """A sealed key where nothing protects blobs, and nothing else."""
    with registry.open_backend("pkcs11", {**settings, "material_custody": custody}) as opened:
        key = issue(opened)
        imported = bring(opened, key, encrypted(key, MATERIAL[AES]))
        readable = custody is SEALED and not simulated.trusts
        assert Holder(opened).reads(imported.key) == (MATERIAL[AES] if readable else None)
        opened.destroy_key(imported.key)


# --- known answers: GM/T 0003.5 -------------------------------------------------------------------


def known_private(session, vendor, *uses, **more):
    template = private_key(vendor.key_type, *uses) | {
        Attribute.EC_PARAMS: OID_DER,
        Attribute.VALUE: known_answer.PRIVATE,
        **more,
    }
    del template[Attribute.COPYABLE], template[Attribute.MODIFIABLE]
    return force(session.create_object(template))


def readable_secret(key_type=KeyType.GENERIC_SECRET):
    return secret_key(key_type) | READABLE


def test_the_standard_s_message_decrypts(session, settings):
    vendor = vendor_of(settings)
    private = known_private(session, vendor, Attribute.DECRYPT)
    assert private.key_type == vendor.key_type
    assert sm2.decrypt(private, known_answer.CIPHERTEXT, vendor) == known_answer.MESSAGE


def test_the_standard_s_message_unwraps(session, settings):
    """Into an object that is readable, to see it; the control is its last bit."""
    vendor = vendor_of(settings)
    private = known_private(session, vendor, Attribute.UNWRAP)

    def unwrapped(ciphertext):
        source = sm2.wrapped_material(vendor, private, lambda: ciphertext, sm2.Way.AS_ASKED)
        return source.make_object(session, readable_secret())[Attribute.VALUE]

    assert unwrapped(known_answer.CIPHERTEXT) == known_answer.MESSAGE
    for part in ("c2", "c3"):
        last = flip(getattr(known_answer.CIPHERTEXT, part), 0)
        with pytest.raises(InvalidKeyMaterial):
            unwrapped(replace(known_answer.CIPHERTEXT, **{part: last}))


# --- attacks with the PIN -------------------------------------------------------------------------


def vendor_decrypt(vendor, key, ciphertext):
    return force(key).decrypt(ciphertext.write(vendor.ciphertext), mechanism=vendor.decrypt)


def vendor_unwrap(vendor, key, ciphertext, template):
    return force(key).unwrap_key(
        key_data=ciphertext.write(vendor.unwrap_layout),
        mechanism=vendor.unwrap,
        **for_unwrap(template),
    )


@pytest.fixture
def opened(backend, session):
    """A sealed SM2 wrapping key: its key-encryption key, its blob, and the key as it unwraps."""
    own = backend.ability(Pkcs11Backend)
    key = issue(backend)
    role, number, blob = parse_ref(plugin_ref(key.private_key))
    assert role is Role.WRAPPING_SM2_UNWRAP
    (kek,) = session.get_objects({Attribute.LABEL: own._keys.label(role, number)})
    becomes = own._token().features.fit(own._keys.unwrapped_template(role))
    private = kek.unwrap_key(
        key_data=blob, mechanism=Mechanism.AES_KEY_WRAP_PAD, **for_unwrap(becomes)
    )
    return key, kek, blob, becomes, private


def test_an_unsealed_wrapping_key_unwraps_and_does_nothing_else(opened, session, settings):
    key, *_, private = opened
    vendor, ciphertext = vendor_of(settings), encrypted(opened[0], MATERIAL[AES])
    naive = known_private(session, vendor, Attribute.DECRYPT)
    assert vendor_decrypt(vendor, naive, known_answer.CIPHERTEXT) == known_answer.MESSAGE
    with pytest.raises(ck.PKCS11Error, match=NOT_PERMITTED):
        vendor_decrypt(vendor, private, ciphertext)
    for each in (private, naive):
        with pytest.raises(ck.KeyTypeInconsistent):
            force(each).derive_key(
                KeyType.GENERIC_SECRET,
                256,
                mechanism=Mechanism.ECDH1_DERIVE,
                mechanism_param=(KDF.NULL, None, decode_spki(key.public_key)),
            )
    for attribute in (Attribute.VALUE,):
        with pytest.raises(ck.AttributeSensitive):
            private[attribute]


def test_a_blob_unwraps_as_it_should_and_in_no_other_way(opened, simulated, session, settings):
    _, kek, blob, becomes, _ = opened
    vendor = vendor_of(settings)
    attacks = {
        "readable": READABLE,
        "decrypts": {Attribute.DECRYPT: True},
        "standard": {Attribute.KEY_TYPE: KeyType.EC, Attribute.DERIVE: True},
    }

    def succeed(by, wrapped):
        done = set()
        for name, deviation in attacks.items():
            template = for_unwrap({**becomes, **deviation})
            try:
                by.unwrap_key(key_data=wrapped, mechanism=Mechanism.AES_KEY_WRAP_PAD, **template)
            except ck.TemplateInconsistent:
                continue
            done.add(name)
        return done

    naive = session.generate_key(KeyType.AES, 256, template={Attribute.WRAP: True})
    pair = sm2.generate(
        session, {**becomes, Attribute.EXTRACTABLE: True, Attribute.DERIVE: False}, vendor
    )
    control = naive.wrap_key(pair[1], mechanism=Mechanism.AES_KEY_WRAP_PAD)
    assert succeed(naive, control) == set(attacks)
    assert succeed(kek, blob) == (set() if simulated.trusts else set(attacks))


def test_a_resident_key_unwraps_into_what_the_backend_makes_only(
    settings, simulated, session, shim
):
    """Its unwrap template; an unsealed key has none (SECURITY.md), which is the control."""
    vendor = vendor_of(settings)
    with registry.open_backend("pkcs11", {**settings, "wrapping_custody": RESIDENT}) as opened:
        key = issue(opened)
        ciphertext = encrypted(key, MATERIAL[AES])
        _, _, object_id = parse_ref(plugin_ref(key.private_key))
        named = {Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.ID: object_id}
        (private,) = session.get_objects(named)
        if simulated.trusts:
            with pytest.raises(ck.TemplateInconsistent):
                vendor_unwrap(vendor, private, ciphertext, readable_secret(KeyType.AES))
            own = session.generate_key(KeyType.AES, 256, template={Attribute.WRAP: True})
            becomes = intermediate(trusted=True)
            meanwhile = vendor_unwrap(vendor, private, ciphertext, becomes)
            with pytest.raises(ck.KeyNotWrappable):
                own.wrap_key(meanwhile, mechanism=Mechanism.AES_KEY_WRAP_PAD)
        else:
            read = vendor_unwrap(vendor, private, ciphertext, readable_secret(KeyType.AES))
            assert read[Attribute.VALUE] == MATERIAL[AES]
        assert bring(opened, key, ciphertext).exposure is Exposure.IN_HSM
        opened.discard_wrapping_key(key.private_key)


def test_an_unsealed_key_without_an_unwrap_template_is_the_known_limit(opened, settings):
    """As of an RSA wrapping key (SECURITY.md: sealed wrapping keys and readable objects)."""
    key, *_, private = opened
    read = vendor_unwrap(
        vendor_of(settings), private, encrypted(key, MATERIAL[AES]), readable_secret(KeyType.AES)
    )
    assert read[Attribute.VALUE] == MATERIAL[AES]


def test_the_two_vendors_differ_where_their_profiles_do():
    assert (POOR.layout, PROTECTING.layout) == (None, Layout.C1C2C3)
    assert POOR.restrictions != PROTECTING.restrictions
