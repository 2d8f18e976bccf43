"""The report on protections that SoftHSM2 ignores or does not have, behind the fault shim.

Usage: python -m support.pkcs11.protection_scenarios SCENARIO SHIM_DIRECTORY SETTINGS
"""

import secrets
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from hsmwrap.backend import Exposure, Outcome
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.customer import encrypt_key_material
from hsmwrap.errors import ProtectionNotKept
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding.objects import Way
from hsmwrap.pkcs11.keysets import origin
from hsmwrap.testing.faults import CKR, Restriction
from support.pkcs11 import scenarios

HONOURED, NOT_HONOURED, NOT_PROVABLE = Outcome
OAEP1 = WrappingAlgorithm.RSAES_OAEP_SHA_1


def opened(settings, prefix=None):
    """An open backend, with keys that are made behind the shim where there is a prefix."""
    if prefix:
        settings = settings | {"key_prefix": f"{prefix}-{secrets.token_hex(4)}"}
        Pkcs11Backend.initialise_keys(settings)
    return Pkcs11Backend.from_settings(settings)


def outcomes(backend):
    report = backend.capabilities()
    for each in report.protections:
        assert (each.outcome is HONOURED) == (not each.consequence), each
        if each.consequence and each.name != "CKA_TRUSTED":
            assert any(each.name in note and each.control in note for note in report.notes), each
    return {each.name.removeprefix("CKA_"): each.outcome for each in report.protections}


def new_key(backend, algorithm=OAEP1):
    expires = datetime.now(UTC) + timedelta(hours=1)
    return backend.generate_wrapping_key(WrappingKeySpec.RSA_2048, algorithm, expires_at=expires)


def bring_in(backend, key, ciphertext=None):
    if ciphertext is None:
        ciphertext = encrypt_key_material(key.algorithm, key.public_key, bytes(range(32)))
    return backend.unwrap_material(
        key.private_key, key.algorithm, ciphertext, key_spec=KeySpec.ALIYUN_AES_256
    )


def softhsm_itself_honours_all(shim, settings):
    assert set(outcomes(opened(settings)).values()) == {HONOURED}


def making_a_trusted_key_is_tried_once(shim, settings):
    """When the key set is looked for; the report says what came of it."""
    tries = []  # each has a label of its own
    origin.secrets = SimpleNamespace(
        token_hex=lambda length: tries.append(length) or secrets.token_hex(length),
        token_bytes=secrets.token_bytes,
    )
    assert outcomes(opened(settings))["TRUSTED"] is HONOURED
    assert len(tries) == 1


def an_ignored_attribute_is_not_honoured_and_the_others_are(shim, settings):
    for restriction in (
        Restriction.UNWRAP_TEMPLATE_IGNORED,
        Restriction.ALLOWED_MECHANISMS_IGNORED,
        Restriction.COPYABLE_IGNORED,
        Restriction.MODIFIABLE_IGNORED,
        Restriction.WRAP_WITH_TRUSTED_IGNORED,
    ):
        shim.restrict(restriction)
        backend = opened(settings, "ignored")
        found = outcomes(backend)
        assert found.pop("TRUSTED") is NOT_PROVABLE  # its keys are not trusted
        name = restriction.name.removesuffix("_IGNORED")
        assert found.pop(name) is NOT_HONOURED, restriction
        assert set(found.values()) == {HONOURED}, (restriction, found)
        backend.close()


def a_token_without_hardening_attributes(shim, settings):
    shim.restrict(Restriction.NO_HARDENING)
    found = outcomes(opened(settings, "plain"))
    for name in ("UNWRAP_TEMPLATE", "ALLOWED_MECHANISMS", "COPYABLE", "MODIFIABLE"):
        assert found[name] is NOT_HONOURED, name


def a_token_that_refuses_readable_keys_proves_by_another_attack(shim, settings):
    """As NSS in FIPS mode; its refusal passed for CKA_UNWRAP_TEMPLATE."""
    refuses = Restriction.NO_READABLE_KEYS
    for restrictions, outcome in (
        ((refuses,), HONOURED),
        ((refuses, Restriction.UNWRAP_TEMPLATE_IGNORED), NOT_HONOURED),
    ):
        shim.restrict(*restrictions)
        backend = opened(settings, "fips")
        found = outcomes(backend)
        assert found["UNWRAP_TEMPLATE"] is outcome
        assert found["SENSITIVE"] is NOT_PROVABLE
        backend.close()


def a_key_that_does_not_even_do_what_it_is_for_proves_nothing(shim, settings):
    """Its refusals would pass for protections."""
    settings = settings | {"key_prefix": f"useless-{secrets.token_hex(4)}"}
    Pkcs11Backend.initialise_keys(settings)
    before = outcomes(opened(settings))
    assert before["UNWRAP_TEMPLATE"] is before["ALLOWED_MECHANISMS"] is HONOURED
    shim.fail("C_WrapKey", CKR.KEY_NOT_WRAPPABLE, always=True)
    after = outcomes(opened(settings))
    assert after["UNWRAP_TEMPLATE"] is after["ALLOWED_MECHANISMS"] is NOT_PROVABLE


def a_failure_of_the_moment_is_not_taken_for_a_protection(shim, settings):
    shim.restrict(Restriction.UNWRAP_TEMPLATE_IGNORED)
    settings = settings | {"key_prefix": "moment"}
    Pkcs11Backend.initialise_keys(settings)
    for nth in range(1, 12):
        shim.fail("C_UnwrapKey", CKR.GENERAL_ERROR, nth=nth)
        backend = opened(settings)
        assert outcomes(backend)["UNWRAP_TEMPLATE"] is NOT_HONOURED, nth
        backend.close()
        shim.clear()


def keys_that_unwrapping_leaves_readable_are_copied(shim, settings):
    """As opencryptoki; without the copy such a token would not unwrap material at all."""
    shim.restrict(Restriction.UNWRAP_IGNORES_PROTECTION)
    backend = opened(settings, "ignores")
    assert backend.capabilities().wrapping_for(WrappingKeySpec.RSA_2048, OAEP1)
    assert backend._probed.features.ways.material is not Way.AS_ASKED
    imported = bring_in(backend, new_key(backend))
    assert imported.exposure is Exposure.IN_HSM
    before = shim.counters()
    backend.encrypt(imported.key, b"message")
    assert shim.counters().held == before.held


def keys_that_cannot_be_copied_are_changed_and_the_report_says_what_that_leaves(shim, settings):
    shim.restrict(Restriction.UNWRAP_IGNORES_PROTECTION, Restriction.UNWRAP_TEMPLATE_IGNORED)
    shim.fail("C_CopyObject", CKR.FUNCTION_NOT_SUPPORTED, always=True)
    backend = opened(settings, "uncopied")
    assert backend.capabilities().wrapping_for(WrappingKeySpec.RSA_2048, OAEP1)
    assert backend._probed.features.ways.material is Way.CHANGED
    assert any("C_CopyObject does not help" in note for note in backend.capabilities().notes)
    assert bring_in(backend, new_key(backend)).exposure is Exposure.IN_HSM


def an_import_that_would_leave_a_readable_key_is_refused(shim, settings):
    """What the probe found is not relied on: each key is read back."""
    plain = Restriction.UNWRAP_TEMPLATE_IGNORED  # it would refuse what the other ignores
    shim.restrict(plain)
    for more in ({}, {"wrapping_custody": "HsmInternal", "material_custody": "HsmInternal"}):
        backend = opened(settings | more, "changing")
        key = new_key(backend)
        ciphertext = encrypt_key_material(OAEP1, key.public_key, bytes(range(32)))
        bring_in(backend, key, ciphertext)
        before = shim.counters()
        shim.restrict(plain, Restriction.UNWRAP_IGNORES_PROTECTION)
        with pytest.raises(ProtectionNotKept, match="CKA_SENSITIVE"):
            bring_in(backend, key, ciphertext)
        assert shim.counters().held[1:] == before.held[1:]  # the session is closed, too
        shim.restrict(plain)
        bring_in(backend, key, ciphertext)
        backend.close()


def what_cannot_be_repaired_is_not_offered(shim, settings):
    shim.restrict(Restriction.UNWRAP_IGNORES_PROTECTION)
    for function in ("C_CopyObject", "C_SetAttributeValue"):
        shim.fail(function, CKR.FUNCTION_NOT_SUPPORTED, always=True)
    backend = opened(settings, "unrepaired")
    served = backend.capabilities().wrapping
    assert {w.exposure for w in served} <= {Exposure.HOST}
    key = new_key(backend, served[0].algorithm)
    assert bring_in(backend, key).exposure is Exposure.HOST


if __name__ == "__main__":
    scenarios.main(globals())
