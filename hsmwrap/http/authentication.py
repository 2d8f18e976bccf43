"""Who sent this request: the claim of its signature, verified.

The order is part of the design. What needs no secret comes first (form, time), then the access
key, then the signature; a nonce is used up by an authentic request only, so that nobody else can
burn one.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from hsmwrap.errors import InvalidParameter
from hsmwrap.http.errors import IllegalTimestamp, SignatureDoesNotMatch, SignatureNonceUsed
from hsmwrap.http.ports import AccessKeys, NonceStore
from hsmwrap.http.signature import Claim
from hsmwrap.kms.access import AccessKey
from hsmwrap.kms.errors import AccessKeyNotFound

WINDOW = timedelta(minutes=15)
"""How far a request's time may be from the server's, either way."""

_CLOCK_SKEW = timedelta(minutes=1)
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
_NONCE = re.compile(r"[!-~]{1,128}", re.ASCII)


def authenticate(
    claim: Claim, access_keys: AccessKeys, nonces: NonceStore, now: datetime
) -> AccessKey:
    """Verify a claim and return the access key that it is made with.

    Raises:
        InvalidParameter: The nonce is no printable ASCII of at most 128 characters.
        IllegalTimestamp: The time is malformed or out of the window.
        AccessKeyNotFound: No such access key.
        SignatureDoesNotMatch: Signed with another secret, or changed since.
        SignatureNonceUsed: Authentic, but not for the first time.
    """
    if not _NONCE.fullmatch(claim.nonce):
        raise InvalidParameter("SignatureNonce", "has to be 1 to 128 printable ASCII characters")
    timestamp = _fresh(claim.timestamp, now)
    key = access_keys.lookup(claim.access_key_id)
    if key is None:
        raise AccessKeyNotFound("no such access key")
    if not claim.is_signed_with(key.secret):
        raise SignatureDoesNotMatch(claim.disclosed)
    # Longer than the window, for other processes whose clocks are behind.
    if not nonces.use(key.access_key_id, claim.nonce, timestamp + WINDOW + _CLOCK_SKEW):
        raise SignatureNonceUsed("an authentic request came again")
    return key


def _fresh(text: str, now: datetime) -> datetime:
    try:
        timestamp = datetime.strptime(text, _TIME_FORMAT).replace(tzinfo=UTC)
    except ValueError:
        raise IllegalTimestamp("the timestamp is malformed") from None
    if timestamp.strftime(_TIME_FORMAT) != text or abs(timestamp - now) > WINDOW:
        raise IllegalTimestamp("the timestamp is malformed or out of the window")
    return timestamp
