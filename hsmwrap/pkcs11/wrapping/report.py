"""From what the probe found and what the configuration wants to the capability report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pkcs11.constants import Attribute
from pkcs11.mechanisms import KeyType

from hsmwrap.backend import (
    MESSAGE_VERSION_CCM,
    Capabilities,
    Exposure,
    FailedTrial,
    KeyCapability,
    MissingCapability,
    Outcome,
    WrappingCapability,
)
from hsmwrap.catalog import KeySpec, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.ckr import answered
from hsmwrap.pkcs11.binding.objects import Way
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.wrapping.features import RSA_ALGORITHMS, ImportPath, TokenFeatures
from hsmwrap.pkcs11.wrapping.material import material_custody

LEVELS = frozenset({ProtectionLevel.HSM})
"""The protection levels that the backend may serve."""


def capabilities(
    settings: Pkcs11Settings,
    features: TokenFeatures,
    *,
    trusted: bool,
    origin_told: bool,
) -> Capabilities:
    """The report."""
    custody = material_custody(settings, features)
    return Capabilities(
        backend=settings.name,
        protection_levels=LEVELS,
        wrapping=tuple(_wrapping(settings, features)),
        keys=tuple(
            KeyCapability(spec, bool(features.ciphers.get(spec)), custody)
            for spec in KeySpec
            if spec in features.key_specs
        ),
        notes=tuple(_notes(settings, features, trusted=trusted, origin_told=origin_told)),
        missing=tuple(_missing(settings, features)),
        failed=features.failed,
        protections=features.protections,
    )


_PAIRS = (
    *((WrappingKeySpec.RSA_2048, algorithm) for algorithm in RSA_ALGORITHMS),
    (WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE),
)


def _wrapping(settings: Pkcs11Settings, features: TokenFeatures) -> Iterator[WrappingCapability]:
    for spec, algorithm in _PAIRS:
        row = features.rows.get(algorithm)
        if row is None or _refused(settings, features, algorithm):
            continue
        tried = features.tried.get(algorithm, ())
        yield WrappingCapability(
            *(spec, algorithm, row.path.exposure, row.custody, row.path.description),
            reason="" if row.path.exposure is Exposure.IN_HSM else _why_host(algorithm, tried),
            tried=tried,
        )


def _why_host(algorithm: WrappingAlgorithm, tried: tuple[FailedTrial, ...]) -> str:
    steps = [t for t in tried if ImportPath.UNWRAP.description in t.step]
    if algorithm is WrappingAlgorithm.SM2PKE and not steps:
        return "PKCS#11 has no unwrapping by SM2PKE: its decryption ends in the host."
    return f"The HSM token does not unwrap by {algorithm}: {_answers(steps) or 'it was not tried.'}"


def _missing(settings: Pkcs11Settings, features: TokenFeatures) -> Iterator[MissingCapability]:
    for spec, algorithm in _PAIRS:
        tried = features.tried.get(algorithm, ())
        if algorithm not in features.rows:
            steps = _answers(tried)
            reason = f"Every way failed: {steps}" if steps else "The HSM token has no way to do it."
            yield MissingCapability(spec, algorithm, reason, tried)
        elif _refused(settings, features, algorithm):
            reason = "require_implicit_rejection: the HSM token answers an error (tried)."
            yield MissingCapability(spec, algorithm, reason, tried)


def _answers(trials: Sequence[FailedTrial]) -> str:
    """Sentences: what the HSM token answered, and what helps."""
    answers = "; ".join(dict.fromkeys(map(_what, trials)))
    remedies = dict.fromkeys(filter(None, (each.consequence for each in trials)))
    return " ".join([f"{answers}.", *remedies]) if answers else ""


def _what(trial: FailedTrial) -> str:
    if trial.code is None:
        return trial.wrong
    return answered(trial.code, trial.function, trial.mechanism)


def _refused(
    settings: Pkcs11Settings, features: TokenFeatures, algorithm: WrappingAlgorithm
) -> bool:
    """Whether the configuration refuses what the token could do, as it has no safe answer."""
    return (
        settings.require_implicit_rejection
        and algorithm is WrappingAlgorithm.RSAES_PKCS1_V1_5
        and not features.implicit_rejection
    )


_USE_BUT_NOT_READ = frozenset(
    f"CKA_{each.name}"
    for each in (Attribute.SENSITIVE, Attribute.EXTRACTABLE, Attribute.UNWRAP_TEMPLATE)
)
"""Without one of these the holder of the PIN reads keys at any time."""


def _notes(
    settings: Pkcs11Settings, features: TokenFeatures, *, trusted: bool, origin_told: bool
) -> Iterator[str]:
    for each in features.protections:
        if each.consequence and (trusted or each.name != "CKA_TRUSTED"):  # said below
            said = f"{each.name} is {each.outcome} on this HSM token"
            yield f"{said}. {each.control} {each.consequence}"
    unkept = [
        each.name
        for each in features.protections
        if each.name in _USE_BUT_NOT_READ and each.outcome is not Outcome.HONOURED
    ]
    if unkept:
        yield (
            "The promise 'use but not read' is not enforced by this HSM token, which lacks "
            f"{', '.join(unkept)}: the holder of the PIN can read what is imported. What stays: "
            "without the PIN there are ciphertexts only, sealed keys and import tokens are of no "
            "use without the HSM, and the key objects that hsmwrap makes are sensitive and not "
            "extractable. Guard the PIN like the keys."
        )
    if not trusted:
        yield (
            "The key-encryption keys are not CKA_TRUSTED: the holder of the PIN can wrap key "
            "material with a key of their own while it is being imported. `hsmwrap keys rotate` "
            "with the SO PIN makes trusted ones, where the HSM token lets its officer do that."
        )
    if not (trusted or origin_told):
        yield (
            "The HSM token does not tell keys that it generated from derived ones (CKA_LOCAL): the "
            "holder of the PIN can plant a key set whose values are known, and read from outside "
            "what is sealed under it."
        )
    yield _pkcs1_note(settings, features)
    if Way.CHANGED in {
        features.ways.material,
        features.ways.sm2_material,
        features.ways.sealed_secret,
    }:
        yield (
            "The HSM token ignores the template of C_UnwrapKey, and C_CopyObject does not help: "
            "imported keys can be read for the moment until they are changed, and be given other "
            "uses later, by the holder of the PIN."
        )
    yield from _cipher_notes(features)
    if WrappingAlgorithm.SM2PKE not in features.rows:
        yield (
            "The HSM token serves no SM2: no key pairs on its curve, or no ECDH with them."
            if settings.vendor is None
            else "The HSM token serves no SM2 as the profile has it under [sm2]."
        )
    yield from _sm4_notes(settings, features)


def _cipher_notes(features: TokenFeatures) -> Iterator[str]:
    if not features.wraps_secret_keys:
        yield (
            f"The HSM token has no working {features.cipher.name} key wrap: imported keys are "
            "token objects."
        )
    if features.cipher.key_type != KeyType.AES:
        yield (
            "The HSM token has no AES: Aliyun_AES_256 keys are not imported. Keys are sealed by "
            "SM4 keys, which have 128 bits. The check values of Aliyun_SM4 keys are by SM4, so "
            "they differ from those of an HSM with AES. Key sets go into no backup, whose key is "
            "one of AES."
        )
    elif not features.ciphers.get(KeySpec.ALIYUN_AES_256):
        yield "The HSM token has no working AES-GCM: imported AES keys can be kept but not used."


def _sm4_notes(settings: Pkcs11Settings, features: TokenFeatures) -> Iterator[str]:
    ciphers = features.ciphers.get(KeySpec.ALIYUN_SM4)
    if settings.sm4 is None:
        yield (
            "Aliyun_SM4 keys are kept as generic secrets and cannot encrypt on this HSM token: "
            "PKCS#11 has no SM4, and the profile, if there is one, names none of the vendor's."
        )
    elif not features.sm4:
        yield (
            "Aliyun_SM4 keys are kept as generic secrets and cannot encrypt: the vendor's SM4 of "
            "the profile does not work, or the current key set was made without it, in which case "
            "`hsmwrap keys rotate` helps."
        )
    elif not ciphers:
        yield "Aliyun_SM4 keys are kept and cannot encrypt: no SM4 of the profile works."
    elif ciphers[0].version == MESSAGE_VERSION_CCM:
        yield (
            "Aliyun_SM4 keys encrypt by SM4-CCM (RFC 8998), as the HSM token has no SM4-GCM: two "
            "calls of the HSM for each message. This process sees the key stream of the messages "
            "that it encrypts and decrypts, and nothing of the key."
        )


def _pkcs1_note(settings: Pkcs11Settings, features: TokenFeatures) -> str:
    algorithm = WrappingAlgorithm.RSAES_PKCS1_V1_5
    if algorithm not in features.rows:
        return "The HSM token does not serve RSAES_PKCS1_V1_5."
    if features.implicit_rejection:
        return (
            "RSAES_PKCS1_V1_5: the HSM token rejects implicitly (tried): a wrong ciphertext "
            "becomes random bytes, of which about 1 in 200 pass for a key. Prefer "
            "RSAES_OAEP_SHA_256."
        )
    if _refused(settings, features, algorithm):
        return (
            "RSAES_PKCS1_V1_5 is refused by require_implicit_rejection: the HSM token answers "
            "wrong padding with an error (tried)."
        )
    return (
        "RSAES_PKCS1_V1_5: the HSM token DOES NOT REJECT IMPLICITLY (tried): wrong padding is an "
        "error, which the holder of the PIN sees, and a client does not, but for what time may "
        "tell (Bleichenbacher 1998). Refuse it by require_implicit_rejection or "
        "refused_algorithms, or use RSAES_OAEP_SHA_256."
    )
