"""From what the probe found and what the configuration wants to the capability report."""

from __future__ import annotations

from collections.abc import Iterator

from hsmwrap.backend import (
    Capabilities,
    Custody,
    Exposure,
    KeyCapability,
    WrappingCapability,
)
from hsmwrap.catalog import KeySpec, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.pkcs11.binding.profiles import VendorSm2
from hsmwrap.pkcs11.settings import Pkcs11Settings, WrappingCustody
from hsmwrap.pkcs11.wrapping import rsa
from hsmwrap.pkcs11.wrapping.probe import MECHANISMS, TokenFeatures


def capabilities(
    settings: Pkcs11Settings,
    features: TokenFeatures,
    vendor: VendorSm2 | None,
    *,
    trusted: bool,
    origin_told: bool,
) -> Capabilities:
    """The report."""
    custody = material_custody(settings, features)
    return Capabilities(
        backend=settings.name,
        protection_levels=frozenset({ProtectionLevel.HSM}),
        wrapping=tuple(_wrapping(settings, features, vendor)),
        keys=(
            KeyCapability(KeySpec.ALIYUN_AES_256, usable=features.gcm, custody=custody),
            KeyCapability(KeySpec.ALIYUN_SM4, usable=False, custody=custody),
        ),
        notes=tuple(_notes(settings, features, trusted=trusted, origin_told=origin_told)),
        protections=features.protections,
    )


def material_custody(settings: Pkcs11Settings, features: TokenFeatures) -> Custody:
    """How imported keys are kept: as configured, or as objects where nothing can be wrapped."""
    return settings.material_custody if features.wraps_secret_keys else Custody.HSM_INTERNAL


def _wrapping(
    settings: Pkcs11Settings, features: TokenFeatures, vendor: VendorSm2 | None
) -> Iterator[WrappingCapability]:
    for algorithm in MECHANISMS:
        if _refused(settings, features, algorithm):
            continue
        path = rsa.path_of(algorithm, features)
        custody = _wrapping_custody(settings, can_seal=features.wraps_rsa)
        if path and custody:
            in_hsm = path.exposure is Exposure.IN_HSM
            yield WrappingCapability(
                *(WrappingKeySpec.RSA_2048, algorithm, path.exposure, custody, path.description),
                reason="" if in_hsm else f"The HSM token does not unwrap by {algorithm}.",
            )
    custody = _wrapping_custody(settings, can_seal=features.wraps_sm2)
    if features.sm2 and custody:
        by_vendor = vendor is not None and vendor.decrypt is not None
        yield WrappingCapability(
            WrappingKeySpec.EC_SM2,
            WrappingAlgorithm.SM2PKE,
            Exposure.HOST,
            custody,
            "vendor mechanism" if by_vendor else "CKM_ECDH1_DERIVE, KDF and C3 in the host",
            reason="PKCS#11 has no unwrapping by SM2PKE: its decryption ends in the host.",
        )


def _refused(
    settings: Pkcs11Settings, features: TokenFeatures, algorithm: WrappingAlgorithm
) -> bool:
    """Whether the configuration refuses what the token could do, as it has no safe answer."""
    return (
        settings.require_implicit_rejection
        and algorithm is WrappingAlgorithm.RSAES_PKCS1_V1_5
        and not features.implicit_rejection
    )


def _wrapping_custody(settings: Pkcs11Settings, *, can_seal: bool) -> Custody | None:
    """Sealed, resident, or None where the configuration asks for what the token cannot do."""
    wanted = settings.wrapping_custody
    if wanted is WrappingCustody.HSM_INTERNAL:
        return Custody.HSM_INTERNAL
    if can_seal:
        return Custody.HSM_ENCRYPTED_DATABASE
    return None if wanted is WrappingCustody.HSM_ENCRYPTED_DATABASE else Custody.HSM_INTERNAL


def _notes(
    settings: Pkcs11Settings, features: TokenFeatures, *, trusted: bool, origin_told: bool
) -> Iterator[str]:
    for each in features.protections:
        if each.consequence and (trusted or each.name != "CKA_TRUSTED"):  # said below
            said = f"{each.name} is {each.outcome} on this HSM token"
            yield f"{said}. {each.control} {each.consequence}"
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
    if not features.wraps_secret_keys:
        yield "The HSM token has no working AES key wrap: imported keys are token objects."
    if not features.gcm:
        yield "The HSM token has no working AES-GCM: imported keys can be kept but not used."
    if not features.sm2:
        yield "The HSM token serves no SM2: no key pairs on its curve, or no ECDH with them."
    yield "Aliyun_SM4 keys are kept as generic secrets and cannot encrypt on this HSM token."
    if (
        settings.wrapping_custody is WrappingCustody.HSM_ENCRYPTED_DATABASE
        and not features.wraps_sm2
    ):
        yield "The HSM token cannot seal SM2 keys and the configuration forbids resident ones."


def _pkcs1_note(settings: Pkcs11Settings, features: TokenFeatures) -> str:
    algorithm = WrappingAlgorithm.RSAES_PKCS1_V1_5
    if rsa.path_of(algorithm, features) is None:
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
