"""What a profile says takes effect: behind the fault shim, each in a process of its own.

Usage: python -m support.pkcs11.profile_scenarios SCENARIO SHIM_DIRECTORY SETTINGS
"""

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hsmwrap.backend import Mac
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import (
    ConfigurationError,
    HsmError,
    HsmResourceExhausted,
    HsmUnavailable,
    InvalidKeyMaterial,
    PinError,
)
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding import profiles
from hsmwrap.pkcs11.token.pin import PIN_PAD
from hsmwrap.sm2 import decode_spki, open_engine
from hsmwrap.testing.faults import Restriction, Vendor
from support.pkcs11 import scenarios
from support.pkcs11.engine_scenarios import bring_in, outcome, wait_for, wrapped
from support.pkcs11.pins import low_counts
from support.services.spy import find_spy

OAEP_1 = WrappingAlgorithm.RSAES_OAEP_SHA_1
VENDOR = 0x80000384
SPY = find_spy()
HEAD = 'summary = "ours"\ntried = "in this test"\n'


def by_profile(shim, settings, text):
    """Settings with a profile of this text."""
    file = shim.path.with_name(f"profile-{time.monotonic_ns()}.toml")
    file.write_text(HEAD + text)
    return settings | {"profile_file": str(file)}


# --- return codes --------------------------------------------------------------------------------

MENDED = {
    "new session": ("C_OpenSession", Mac),
    "log in": ("C_Login", Mac),
    "find again": ("C_FindObjectsInit", Mac),
    "fewer sessions": (None, Mac),
    "restart": ("C_Initialize", Mac),
    "reap": (None, HsmResourceExhausted),
    "stop": (None, PinError),
}
"""For each remedy what is called for it, and what the caller gets."""


def mac(backend):
    return outcome(backend.mac, b"data")


def a_return_code_of_the_vendor(shim, settings):
    with Pkcs11Backend.from_settings(settings) as backend:
        assert isinstance(mac(backend), Mac)
        shim.fail("C_SignInit", VENDOR)
        assert type(mac(backend)) is HsmError
        assert isinstance(mac(backend), Mac)
    for remedy, (called, comes) in MENDED.items():
        profile = by_profile(shim, settings, f"[return_codes]\n{VENDOR:#x} = '{remedy}'\n")
        with Pkcs11Backend.from_settings(profile) as backend:
            assert isinstance(mac(backend), Mac)
            before = shim.counters()
            shim.fail("C_SignInit", VENDOR)
            assert isinstance(mac(backend), comes), remedy
            since = shim.counters().calls_since(before)
            assert called is None or called in since, (remedy, since)
            for other, (not_called, _) in MENDED.items():
                if not_called == "C_Initialize" and other != remedy:
                    assert not_called not in since, (remedy, since)
            assert isinstance(mac(backend), PinError if remedy == "stop" else Mac), remedy


def a_client_is_not_blamed_for_it(shim, settings):
    """On the way of a client's ciphertext any other code says that the ciphertext is bad."""
    for remedies, answer in (
        ("", InvalidKeyMaterial),
        (f"{VENDOR:#x} = 'restart'", HsmUnavailable),
    ):
        profile = by_profile(shim, settings, f"[return_codes]\n{remedies}\n")
        with Pkcs11Backend.from_settings(profile) as backend:
            reference, ciphertext = wrapped(backend, OAEP_1)
            shim.fail("C_UnwrapKey", VENDOR, every=2)  # each first one opens the wrapping key
            assert type(outcome(bring_in, backend, reference, OAEP_1, ciphertext)) is answer
            shim.clear()
            wait_for(lambda backend=backend: backend.health().ready)
            assert bring_in(backend, reference, OAEP_1, ciphertext)


def two_profiles_for_one_module(shim, settings):
    """What a number means there would depend on who asks."""
    profile = by_profile(shim, settings, f"[return_codes]\n{VENDOR:#x} = 'restart'\n")
    with Pkcs11Backend.from_settings(profile):
        refused = outcome(Pkcs11Backend.from_settings, settings)
        assert isinstance(refused, ConfigurationError)
        assert "another profile" in str(refused)
        Pkcs11Backend.from_settings(profile).close()
    Pkcs11Backend.from_settings(settings).close()


def a_wrapping_key_outlives_its_profile(shim, settings):
    """An error that says so, and no other's answer to a number of the vendor's."""
    shim.play(Vendor.SANSEC)
    kept = {**settings, "wrapping_custody": "HsmInternal", "key_prefix": "outlived"}
    profile = {**kept, "profile": "sansec"}
    Pkcs11Backend.initialise_keys(profile)
    with Pkcs11Backend.from_settings(profile) as backend:
        expires_at = datetime.now(UTC) + timedelta(hours=1)
        key = backend.generate_wrapping_key(
            WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE, expires_at=expires_at
        )
        public = decode_spki(key.public_key)
        ciphertext = open_engine("libcrypto").encrypt(public, bytes(32)).to_c1c3c2()
    with Pkcs11Backend.from_settings(kept) as backend:
        arguments = (backend, key.private_key, WrappingAlgorithm.SM2PKE, ciphertext)
        refused = outcome(bring_in, *arguments)
        assert isinstance(refused, ConfigurationError), refused
        assert "names none" in str(refused)
    shim.play(None)


# --- logins --------------------------------------------------------------------------------------


def the_user_type_of_the_login(shim, settings):
    """SoftHSM has no vendor's user type: that it refuses this one shows that it was sent."""
    profile = by_profile(shim, settings, "[login]\nuser_type = 0x80000001\n")
    refused = outcome(Pkcs11Backend.from_settings, profile)
    assert "CKR_USER_TYPE_INVALID" in str(refused)
    assert shim.counters().calls["C_Login"] > 0
    officer = by_profile(shim, settings, "[login]\nofficer_type = 0x80000002\n")
    so_pin_file = os.environ["HSMWRAP_SO_PIN_FILE"]
    refused = outcome(
        Pkcs11Backend.initialise_keys, officer | {"key_prefix": "more"}, so_pin_file=so_pin_file
    )
    assert "CKR_USER_TYPE_INVALID" in str(refused)
    made = Pkcs11Backend.initialise_keys(
        by_profile(shim, settings, "[login]\nuser_type = 1\nofficer_type = 0\n")
        | {"key_prefix": "more"},
        so_pin_file=so_pin_file,
    )
    assert "trusted" in made.detail


def a_login_for_each_session(shim, settings):
    for per_session in (False, True):
        text = f"[login]\nper_session = {str(per_session).lower()}\n"
        before = shim.counters()
        with Pkcs11Backend.from_settings(by_profile(shim, settings, text)) as backend:
            assert isinstance(mac(backend), Mac)
            since = shim.counters().calls_since(before)
            assert since["C_OpenSession"] > 1
            assert since["C_Login"] == (since["C_OpenSession"] if per_session else 1)


def a_wrong_pin_is_told(shim, settings):
    """As the profile of SoftHSM2 says."""
    assert low_counts(settings) == [False, True, False]
    assert profiles.load("softhsm2").login.tells_wrong_pins


def the_officer_s_pin_at_a_pin_pad(shim, settings):
    """Both PINs are the same on this token, as the shim has one to type."""
    more = settings | {"key_prefix": "typed"}
    pin_file = more.pop("pin_file")
    refused = outcome(Pkcs11Backend.initialise_keys, settings | more, so_pin_file=PIN_PAD)
    assert "has no PIN pad" in str(refused)
    shim.restrict(Restriction.PIN_PAD, pin=Path(pin_file).read_text("ascii").strip())
    refused = outcome(Pkcs11Backend.initialise_keys, more, so_pin_file=pin_file)
    assert "CKR_ARGUMENTS_BAD" in str(refused)  # it takes none from here
    made = Pkcs11Backend.initialise_keys(more, so_pin_file=PIN_PAD)
    assert "key-encryption keys trusted" in made.detail
    with Pkcs11Backend.from_settings(more | {"require_trusted_keys": True}) as backend:
        assert isinstance(mac(backend), Mac)
    shim.restrict()


# --- what is asked for ---------------------------------------------------------------------------


def the_key_wrap_that_is_asked_for(shim, settings):
    """Without one nothing is sealed; an unknown number is tried, and then the next."""
    with Pkcs11Backend.from_settings(by_profile(shim, settings, "[asked]\nkey_wraps = []\n")) as b:
        report = b.capabilities()
        assert {each.custody for each in report.wrapping} == {"HsmInternal"}
    text = "[asked]\nkey_wraps = [0x80000170, 0x210A]\n"
    with Pkcs11Backend.from_settings(by_profile(shim, settings, text)) as b:
        assert "HsmEncryptedDatabase" in {each.custody for each in b.capabilities().wrapping}


FORBIDDEN = {
    "CKM_AES_GCM": "pMechanism->type = CKM_AES_GCM",
    "CKM_AES_KEY_WRAP_KWP": "pMechanism->type = 0x0000210B",
    "CKA_UNWRAP_TEMPLATE": "CKA_UNWRAP_TEMPLATE",
    "CKA_ALLOWED_MECHANISMS": "CKA_ALLOWED_MECHANISMS",
}
"""How pkcs11-spy writes them."""


def what_the_profile_forbids(shim, settings):
    """pkcs11-spy shows what the module is asked for; without the profile it is."""
    mechanisms, attributes = list(FORBIDDEN)[:2], list(FORBIDDEN)[2:]
    never = f"[never]\nmechanisms = {mechanisms}\nattributes = {attributes}\n"
    first = "[asked]\nkey_wraps = [0x210B, 0x210A]\n"
    log = shim.path.with_name("spy.log")  # which the spy opens once
    os.environ |= {"PKCS11SPY": settings["module"], "PKCS11SPY_OUTPUT": str(log)}
    read = 0
    for profile, expected in ((first, set(FORBIDDEN)), (first + never, set())):
        prefix = f"spy-{len(expected)}"
        spied = by_profile(shim, settings, profile) | {"module": SPY, "key_prefix": prefix}
        Pkcs11Backend.initialise_keys(spied)
        with Pkcs11Backend.from_settings(spied) as backend:
            report = backend.capabilities()
            reference, ciphertext = wrapped(backend, OAEP_1)
            assert bring_in(backend, reference, OAEP_1, ciphertext)
        spoken = log.read_text("utf-8", "replace")[read:]
        read += len(spoken)
        assert "CKM_RSA_PKCS_OAEP" in spoken
        assert {each for each, words in FORBIDDEN.items() if words in spoken} == expected
        told = [each.answer for each in report.failed]
        assert ("the profile forbids CKM_AES_GCM" in told) is not bool(expected), told
        usable = {key.key_spec: key.usable for key in report.keys}
        assert usable[KeySpec.ALIYUN_AES_256] is bool(expected)


if __name__ == "__main__":
    scenarios.main(globals())
