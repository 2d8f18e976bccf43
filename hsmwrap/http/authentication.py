"""Who sent this request: the claim of its signature, verified.

The order is part of the design. What needs no secret comes first (form, time), then the access
key, then the signature; a nonce is used up by an authentic request only, so that nobody else can
burn one.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from hsmwrap.errors import InvalidParameter
from hsmwrap.http.errors import IllegalTimestamp, SignatureDoesNotMatch, SignatureNonceUsed
from hsmwrap.http.ports import AccessKeys, NonceStore
from hsmwrap.http.signature import Claim
from hsmwrap.kms.access import AccessKey
from hsmwrap.kms.errors import AccessKeyNotFound

WINDOW = timedelta(minutes=15)
"""How far a request's time may be from the server's, either way."""

_CLOCK_SKEW = timedelta(minutes=1)
_NONCE = re.compile(r"[!-~]{1,128}", re.ASCII)


def identify(claim: Claim, access_keys: AccessKeys, now: datetime) -> AccessKey:
    """The access key that a claim names. Nothing is known yet of who sent it.

    Raises:
        InvalidParameter: The nonce is no printable ASCII of at most 128 characters.
        IllegalTimestamp: The time is malformed or out of the window.
        AccessKeyNotFound: No such access key.
    """
    if not _NONCE.fullmatch(claim.nonce):
        raise InvalidParameter("SignatureNonce", "has to be 1 to 128 printable ASCII characters")
    if abs(_time(claim) - now) > WINDOW:
        raise IllegalTimestamp("the timestamp is out of the window")
    key = access_keys.lookup(claim.access_key_id)
    if key is None:
        raise AccessKeyNotFound("no such access key")
    return key


def verify(claim: Claim, key: AccessKey, nonces: NonceStore) -> None:
    """Verify an identified claim, and use up its nonce.

    Raises:
        SignatureDoesNotMatch: Signed with another secret, or changed since.
        SignatureNonceUsed: Authentic, but not for the first time.
        HsmwrapError: The nonces cannot be asked.
    """
    if not claim.is_signed_with(key.secret):
        raise SignatureDoesNotMatch(claim.disclosed())
    # Longer than the window, for other processes whose clocks are behind.
    if not nonces.use(key.access_key_id, claim.nonce, _time(claim) + WINDOW + _CLOCK_SKEW):
        raise SignatureNonceUsed("an authentic request came again")


def _time(claim: Claim) -> datetime:
    try:
        time = datetime.fromisoformat(claim.timestamp)
    except ValueError:
        raise IllegalTimestamp("the timestamp is malformed") from None
    # ISO 8601 has many forms, the API has one.
    if f"{time.replace(tzinfo=None).isoformat()}Z" != claim.timestamp:
        raise IllegalTimestamp("the timestamp is malformed")
    return time
