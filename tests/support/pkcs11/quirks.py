"""Other HSM tokens, played by SoftHSM2 behind the fault shim: quirk, expected report, behaviour."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from hsmwrap.backend import Custody, Exposure
from hsmwrap.testing.faults import Restriction
from support.importing import OAEP1, OAEP256, PKCS1, SM2PKE

R = Restriction
_HOST, _IN_HSM = Exposure.HOST, Exposure.IN_HSM
_SEALED, _RESIDENT = Custody.HSM_ENCRYPTED_DATABASE, Custody.HSM_INTERNAL

SOFTHSM = {
    PKCS1: (_IN_HSM, _SEALED),
    OAEP1: (_IN_HSM, _SEALED),
    OAEP256: (_HOST, _SEALED),
    SM2PKE: (_HOST, _RESIDENT),
}
"""What SoftHSM2 serves by itself: exposure, and custody of the wrapping key."""
RESIDENT_HOST = dict.fromkeys(SOFTHSM, (_HOST, _RESIDENT))


def without(rows, *algorithms):
    return {each: row for each, row in rows.items() if each not in algorithms}


def refused(function, mechanism=None, code="CKR_MECHANISM_INVALID (0x70)"):
    by = f"({mechanism})" if mechanism else ""
    return f"{function}{by} answered {code}"


@dataclass(frozen=True)
class Quirk:
    """A token: what it cannot do, what the report has to say, how many own keys it needs."""

    restrictions: Restriction
    rows: dict = field(default_factory=lambda: SOFTHSM)
    says: tuple[str, ...] = ()
    own_keys: int = 6
    usable: bool = True

    def __str__(self):
        return "+".join(each.name for each in self.restrictions)

    def play(self, shim, token, **more):
        """Make the shim play the token; returns settings for it."""
        settings = token.bare_settings(module=str(shim.path), **more)
        pin = None
        if R.PIN_PAD in self.restrictions:
            pin = Path(settings.pop("pin_file")).read_text("ascii").strip()
        if R.BLANK_LABEL in self.restrictions:
            del settings["token_label"]
        shim.restrict(self.restrictions, pin=pin)
        return settings


_BAD_VALUE = "CKR_ATTRIBUTE_VALUE_INVALID (0x13)"
QUIRKS = (
    Quirk(
        R.NO_SESSION_OBJECTS,
        without(RESIDENT_HOST, SM2PKE),
        (
            refused("C_GenerateKey", "CKM_AES_KEY_GEN", _BAD_VALUE),
            "no key is sealed",
            refused("C_DeriveKey", "CKM_ECDH1_DERIVE", _BAD_VALUE),
        ),
        own_keys=1,
    ),
    Quirk(
        R.NO_EXTRACTABLE_PRIVATE_KEYS,
        {algorithm: (exposure, _RESIDENT) for algorithm, (exposure, _) in SOFTHSM.items()},
        (refused("C_GenerateKeyPair", "CKM_RSA_PKCS_KEY_PAIR_GEN", _BAD_VALUE), "not sealed"),
        own_keys=3,
    ),
    Quirk(
        R.NO_READABLE_KEYS,
        without(SOFTHSM, SM2PKE),
        (refused("C_DeriveKey", "CKM_ECDH1_DERIVE", _BAD_VALUE),),
    ),
    Quirk(
        R.NO_SECRET_KEY_CREATION,
        without(SOFTHSM, OAEP256, SM2PKE),
        (refused("C_CreateObject", None, _BAD_VALUE), "pairs that are not unwrapped inside"),
    ),
    Quirk(R.NO_HARDENING),
    Quirk(R.NO_AES_ECB, says=(refused("C_EncryptInit", "CKM_AES_ECB"), "computed by CKM_AES_CBC")),
    Quirk(R.NO_AES_ECB | R.NO_AES_CBC, says=("computed by CKM_AES_CTR",)),
    Quirk(
        R.NO_AES_ECB | R.NO_AES_CBC | R.NO_AES_CTR,
        {algorithm: (_HOST, custody) for algorithm, (_, custody) in SOFTHSM.items()},
        (refused("C_EncryptInit", "CKM_AES_CTR"), "computed in the host", "cannot be told without"),
    ),
    Quirk(R.NO_AES_GCM, says=(refused("C_EncryptInit", "CKM_AES_GCM"),), usable=False),
    Quirk(
        R.NO_AES_KEY_WRAP,
        RESIDENT_HOST,
        (
            refused("C_WrapKey", "CKM_AES_KEY_WRAP_PAD"),
            refused("C_WrapKey", "CKM_AES_KEY_WRAP_KWP"),
        ),
        own_keys=1,
    ),
    Quirk(R.KEY_WRAP_PAD_ONLY),
    Quirk(R.KEY_WRAP_KWP_ONLY),
    Quirk(
        R.NO_RSA_UNWRAP,
        {algorithm: (_HOST, custody) for algorithm, (_, custody) in SOFTHSM.items()},
        (refused("C_UnwrapKey", "CKM_RSA_PKCS"), refused("C_UnwrapKey", "CKM_RSA_PKCS_OAEP")),
    ),
    Quirk(
        R.NO_RSA_UNWRAP | R.NO_RSA_DECRYPT,
        {OAEP1: (_HOST, _SEALED), OAEP256: (_HOST, _SEALED), SM2PKE: (_HOST, _RESIDENT)},
        (refused("C_DecryptInit", "CKM_RSA_PKCS"),),
    ),
    Quirk(
        R.NO_RSA,
        without(SOFTHSM, OAEP1, OAEP256, PKCS1),
        (refused("C_GenerateKeyPair", "CKM_RSA_PKCS_KEY_PAIR_GEN"), "not sealed"),
    ),
    Quirk(R.NO_RAW_RSA, without(SOFTHSM, OAEP256), (refused("C_DecryptInit", "CKM_RSA_X_509"),)),
    Quirk(R.NO_ECDH, without(SOFTHSM, SM2PKE), (refused("C_DeriveKey", "CKM_ECDH1_DERIVE"),)),
    Quirk(
        R.OAEP_SOURCE_ZERO,
        says=tuple(
            refused("C_UnwrapKey", "CKM_RSA_PKCS_OAEP", code)
            for code in ("CKR_MECHANISM_PARAM_INVALID (0x71)", "CKR_ARGUMENTS_BAD (0x7)")
        ),
    ),
    Quirk(R.HMAC_KEYS_ONLY),
    Quirk(R.ONE_SESSION),
    Quirk(R.LOGIN_PER_SESSION),
    Quirk(R.ONE_SESSION | R.LOGIN_PER_SESSION),
    Quirk(R.BLANK_LABEL),
    Quirk(R.PIN_PAD),
    Quirk(R.EC_POINT_RAW),
    Quirk(R.EC_POINT_XY),
    Quirk(R.EC_POINT_BIT_STRING),
    Quirk(R.UNWRAP_IGNORES_PROTECTION),
    Quirk(R.UNWRAP_TEMPLATE_IGNORED, says=("CKA_UNWRAP_TEMPLATE is not honoured",)),
    Quirk(R.ALLOWED_MECHANISMS_IGNORED),
    Quirk(R.COPYABLE_IGNORED),
    Quirk(R.MODIFIABLE_IGNORED),
    Quirk(R.WRAP_WITH_TRUSTED_IGNORED),
    Quirk(R.NO_TRUST, says=("CKA_ALLOWED_MECHANISMS is not honoured",)),
    Quirk(R.TRUSTED_ASKS_FOR_LOGIN),
)

NETWORK_HSM = Quirk(
    R.NO_AES_ECB
    | R.KEY_WRAP_KWP_ONLY
    | R.OAEP_SOURCE_ZERO
    | R.HMAC_KEYS_ONLY
    | R.EC_POINT_BIT_STRING
    | R.LOGIN_PER_SESSION
    | R.BLANK_LABEL
)
CARD = Quirk(
    R.NO_SESSION_OBJECTS | R.NO_EXTRACTABLE_PRIVATE_KEYS | R.PIN_PAD | R.NO_HARDENING,
    without(RESIDENT_HOST, SM2PKE),
    own_keys=1,
)
"""Many quirks at once: these two are under the whole conformance kit, which
opens several backends at once."""
ONE_SESSION_CARD = replace(CARD, restrictions=CARD.restrictions | R.ONE_SESSION)
