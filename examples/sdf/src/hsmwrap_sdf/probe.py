"""What the device does, tried when the backend is opened, on a key that is not a secret.

Each trial has a control: SM4 against pyca's under a known key, a good envelope beside a wrong one.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from hsmwrap.backend import FailedTrial, Outcome, Protection
from hsmwrap.errors import InvalidKeyMaterial, SelfTestFailed
from hsmwrap.sm2 import Sm2Ciphertext, decrypt_with_point
from hsmwrap_sdf.binding import BLOCK, FIELD, SDR_NOTSUPPORT, Point, SdfError
from hsmwrap_sdf.device import UNAVAILABLE, Session

EXCHANGE = "SDF_ExchangeDigitEnvelopeBaseOnECC"

# The generator (GB/T 32918.5): as a public key it is the one of the private key 1.
_G = Point(
    bytes.fromhex("32c4ae2c1f1981195f9904466a39c9948fe30bbff2660be1715a4589334c74c7"),
    bytes.fromhex("bc3736a2f4f6779c59bdcee36b692153d0a9877cc62a474002df32e52139f0a0"),
)
_BLOCKS = bytes(range(3 * BLOCK))


@dataclass(frozen=True, slots=True)
class Findings:
    """What the trials said.

    Attributes:
        refusal: The code by which the device refuses to exchange a wrong envelope; None where it
            has no exchange.
        failed: The trials that failed.
        protection: Whether the holder of the password can read a sealed key.
    """

    refusal: int | None
    failed: tuple[FailedTrial, ...]
    protection: Protection


def probe(session: Session, storage_index: int) -> Findings:
    """Try what the backend needs.

    Raises:
        SelfTestFailed: The device computes something wrong, or takes a wrong envelope.
        SdfError: A function failed that has to work.
    """
    storage, known = session.public_key(storage_index), secrets.token_bytes(BLOCK)
    envelope = session.encrypt_for(storage, known)
    _require_sm4(session, storage_index, envelope, known)
    try:
        exchanged = session.exchange(storage_index, storage, envelope)
    except SdfError as error:
        if error.code != SDR_NOTSUPPORT:
            raise
        trial = FailedTrial(
            "encrypt an imported key for the storage pair",
            function=EXCHANGE,
            code=error.code,
            consequence="nothing is imported: the interface has no other way to keep a key",
        )
        return Findings(None, (trial,), _without_exchange())
    _require_sm4(session, storage_index, exchanged, known)
    wrong = replace(envelope, c3=bytes(each ^ 1 for each in envelope.c3))
    return Findings(
        _refusal(session, storage_index, storage, wrong),
        (),
        _who_reads(session, storage_index, envelope, known),
    )


def _require_sm4(session: Session, index: int, envelope: Sm2Ciphertext, known: bytes) -> None:
    with session.opened(index, envelope) as key:
        computed = key.ecb(_BLOCKS), key.cbc(_BLOCKS)
    both = (modes.ECB(), modes.CBC(bytes(BLOCK)))  # noqa: S305  # what the device is compared with
    right = tuple(Cipher(algorithms.SM4(known), m).encryptor().update(_BLOCKS) for m in both)
    if computed != right:
        raise SelfTestFailed(
            f"the device's SM4 under a key that it imported by the pair under index {index} is not "
            "SM4 under that key"
        )


def _refusal(session: Session, index: int, to: Point, wrong: Sm2Ciphertext) -> int:
    try:
        session.exchange(index, to, wrong)
    except SdfError as error:
        if error.code in UNAVAILABLE:
            raise SelfTestFailed(
                f"{error} for an envelope with a wrong hash: a failure of the device cannot be "
                "told from a wrong ciphertext of a client"
            ) from None
        return error.code
    raise SelfTestFailed(f"{EXCHANGE} takes an envelope with a wrong hash (C3)")


def _who_reads(session: Session, index: int, envelope: Sm2Ciphertext, known: bytes) -> Protection:
    with suppress(SdfError, InvalidKeyMaterial):
        out = session.exchange(index, _G, envelope)
        # The shared point of the private key 1 is C1 itself.
        if decrypt_with_point(out, out.x.to_bytes(FIELD), out.y.to_bytes(FIELD)) == known:
            return Protection(
                "sealed keys are used, not read",
                Outcome.NOT_HONOURED,
                f"{EXCHANGE} encrypted a known key for a public key from outside, and the host "
                "decrypted it.",
                "A program with the password of the storage pair reads imported keys.",
            )
    return Protection(
        "sealed keys are used, not read",
        Outcome.NOT_PROVABLE,
        f"{EXCHANGE} for a public key from outside gave nothing that the host could read.",
        "It may do so for another public key: a program with the password of the storage pair may "
        "read imported keys.",
    )


def _without_exchange() -> Protection:
    return Protection(
        "sealed keys are used, not read",
        Outcome.NOT_PROVABLE,
        f"The device has no {EXCHANGE}, so no key is sealed.",
        "Nothing is imported.",
    )
