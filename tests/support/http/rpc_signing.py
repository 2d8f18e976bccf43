"""Requests signed as Alibaba's documents say, written apart from the server's own canonical forms.

SM3 comes from gmssl, which is another implementation than the server's.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
from datetime import datetime
from urllib.parse import quote_from_bytes

from support.http.fakes import NOW

_nonces = itertools.count()
VERSION = "2016-01-20"


def encode(text: str) -> str:
    return quote_from_bytes(text.encode(), safe="-_.~")


def encode_all(parameters: dict[str, str]) -> str:
    return "&".join(f"{encode(n)}={encode(parameters[n])}" for n in sorted(parameters))


def stamp(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def fresh_nonce() -> str:
    return f"nonce-{next(_nonces)}"


def v1_parameters(action: str = "DescribeKey", at: datetime = NOW, **own: str) -> dict[str, str]:
    return {
        "Action": action,
        "Version": VERSION,
        "Format": "JSON",
        "AccessKeyId": "testid",
        "SignatureMethod": "HMAC-SHA1",
        "SignatureVersion": "1.0",
        "SignatureType": "",
        "SignatureNonce": fresh_nonce(),
        "Timestamp": stamp(at),
        **own,
    }


def v1_signature(method: str, parameters: dict[str, str], secret: str = "testsecret") -> str:
    text = "&".join([method, "%2F", encode(encode_all(parameters))])
    mac = hmac.new(f"{secret}&".encode(), text.encode(), hashlib.sha1)
    return base64.b64encode(mac.digest()).decode()


def v1_query(method: str = "GET", **parameters: str) -> str:
    parameters = v1_parameters(**parameters)
    return encode_all({**parameters, "Signature": v1_signature(method, parameters)})


def sm3(data: bytes) -> bytes:
    from gmssl import sm3 as implementation

    return bytes.fromhex(implementation.sm3_hash(list(data)))


def hmac_by(digest, block: int, key: bytes, data: bytes) -> bytes:
    """HMAC as written in RFC 2104."""
    key = (digest(key) if len(key) > block else key).ljust(block, b"\0")
    inner = digest(bytes(b ^ 0x36 for b in key) + data)
    return digest(bytes(b ^ 0x5C for b in key) + inner)


DIGESTS = {
    "ACS3-HMAC-SHA256": lambda data: hashlib.sha256(data).digest(),
    "ACS3-HMAC-SM3": sm3,
}


def acs3_headers(
    method: str = "POST",
    query: dict[str, str] | None = None,
    body: bytes = b"",
    *,
    action: str = "DescribeKey",
    at: datetime = NOW,
    algorithm: str = "ACS3-HMAC-SHA256",
    secret: str = "testsecret",
    drop: tuple[str, ...] = (),
    **more: str,
) -> dict[str, str]:
    """Headers of a signed request; ``drop`` names headers that are sent but left unsigned."""
    digest = DIGESTS[algorithm]
    headers = {
        "host": "localhost",
        "x-acs-action": action,
        "x-acs-version": VERSION,
        "x-acs-date": stamp(at),
        "x-acs-signature-nonce": fresh_nonce(),
        "x-acs-content-sha256": digest(body).hex(),
        **{name.replace("_", "-"): value for name, value in more.items()},
    }
    if body:
        headers["content-type"] = "application/x-www-form-urlencoded"
    signed = sorted(set(headers) - set(drop))
    request = "\n".join(
        [
            method,
            "/",
            encode_all(query or {}),
            *(f"{name}:{headers[name].strip()}" for name in signed),
            "",
            ";".join(signed),
            digest(body).hex(),
        ]
    )
    text = f"{algorithm}\n{digest(request.encode()).hex()}"
    signature = hmac_by(digest, 64, secret.encode(), text.encode()).hex()
    names = ";".join(signed)
    headers["Authorization"] = (
        f"{algorithm} Credential=testid,SignedHeaders={names},Signature={signature}"
    )
    return headers
