"""Authentication: verifies the signature of a request.

The order of the checks matters. Checks that need no secret come first (form, time), then the access
key, then the signature. Only an authentic request marks its nonce as used, so that an attacker
cannot use up nonces of others.
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
"""How far a request's timestamp may differ from the server's time."""

_CLOCK_SKEW = timedelta(minutes=1)
_NONCE = re.compile(r"[!-~]{1,128}", re.ASCII)


def identify(claim: Claim, access_keys: AccessKeys, now: datetime) -> AccessKey:
    """Look up the access key that a claim names; the signature is not verified here.

    Raises:
        InvalidParameter: The nonce is not 1 to 128 printable ASCII characters.
        IllegalTimestamp: The timestamp is malformed or outside the window.
        AccessKeyNotFound: The access key does not exist.
    """
    if not _NONCE.fullmatch(claim.nonce):
        raise InvalidParameter("SignatureNonce", "has to be 1 to 128 printable ASCII characters")
    if abs(_time(claim) - now) > WINDOW:
        raise IllegalTimestamp("the timestamp is outside the window")
    key = access_keys.lookup(claim.access_key_id)
    if key is None:
        raise AccessKeyNotFound("the access key does not exist")
    return key


def verify(claim: Claim, key: AccessKey, nonces: NonceStore) -> None:
    """Verify the signature with the access key's secret, and mark the nonce as used.

    Raises:
        SignatureDoesNotMatch: Signed with another secret, or changed after signing.
        SignatureNonceUsed: The signature is right, but the nonce was used before.
        HsmwrapError: The store of nonces failed.
    """
    if not claim.is_signed_with(key.signing):
        raise SignatureDoesNotMatch(claim.disclosed())
    # Longer than the window, since the clocks of other processes may be behind.
    if not nonces.use(key.access_key_id, claim.nonce, _time(claim) + WINDOW + _CLOCK_SKEW):
        raise SignatureNonceUsed("an authentic request was repeated")


def _time(claim: Claim) -> datetime:
    try:
        time = datetime.fromisoformat(claim.timestamp)
    except ValueError:
        raise IllegalTimestamp("the timestamp is malformed") from None
    # fromisoformat accepts many forms of ISO 8601; the API allows one.
    if f"{time.replace(tzinfo=None).isoformat()}Z" != claim.timestamp:
        raise IllegalTimestamp("the timestamp is malformed")
    return time
