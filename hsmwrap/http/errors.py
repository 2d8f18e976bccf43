"""Errors of the HTTP protocol: what a request can get wrong before it reaches the KMS.

Codes and statuses are those of Alibaba Cloud's RPC gateway. No text repeats a parameter's value.
"""

from __future__ import annotations

from hsmwrap.errors import HsmwrapError


class IncompleteSignature(HsmwrapError):
    """The request is not signed, or not with everything that has to be signed."""

    code = "IncompleteSignature"
    http_status = 400

    def __init__(self, detail: str) -> None:
        """Say which piece is missing or malformed; goes to the client."""
        super().__init__(detail)
        self._api_text = f"The request signature does not conform to the standards: {detail}."

    @property
    def api_message(self) -> str:
        """The API's message, with the piece that is missing or malformed."""
        return self._api_text


class IllegalTimestamp(HsmwrapError):
    """The request's time is no UTC time, or too far from the server's."""

    code = "IllegalTimestamp"
    http_status = 400
    _api_message = (
        "The timestamp has to be UTC, as YYYY-MM-DDThh:mm:ssZ, and within 15 minutes of the "
        "server's time."
    )


class SignatureDoesNotMatch(HsmwrapError):
    """The signature is not the one that this access key makes for this request."""

    code = "SignatureDoesNotMatch"
    http_status = 400

    def __init__(self, string_to_sign: str) -> None:
        """Take the server's string to sign, for the client to compare with its own."""
        super().__init__("the signature does not match")
        self._string_to_sign = string_to_sign

    @property
    def api_message(self) -> str:
        """The API's message. aliyun-python-sdk-core splits it at ``:`` (field note 68)."""
        return (
            "Specified signature is not matched with our calculation. "
            f"server string to sign is:{self._string_to_sign}"
        )


class SignatureNonceUsed(HsmwrapError):
    """An authentic request came a second time."""

    code = "SignatureNonceUsed"
    http_status = 400
    _api_message = "The signature nonce was used before."


class PathNotFound(HsmwrapError):
    """The API has one path, ``/``."""

    code = "InvalidPath.NotFound"
    http_status = 404
    _api_message = "The API is served at the path / only."


class MethodNotAllowed(HsmwrapError):
    """Another method than GET or POST."""

    code = "UnsupportedHTTPMethod"
    http_status = 405
    _api_message = "The HTTP method is not supported here."


class RequestTimeout(HsmwrapError):
    """The client did not send its whole request in time."""

    code = "RequestTimeout"
    http_status = 408
    _api_message = "The request did not arrive in time."


class RequestTooLarge(HsmwrapError):
    """The body is longer than any request of this API."""

    code = "RequestTooLarge"
    http_status = 413
    _api_message = "The request body is too large."


class MetricsUnavailable(HsmwrapError):
    """The process was installed without the library that renders metrics."""

    code = "MetricsUnavailable"
    http_status = 404
    _api_message = 'prometheus_client is not installed; install the extra "metrics" to have this.'


class MalformedRequest(HsmwrapError):
    """Not HTTP as RFC 9112 wants it."""

    code = "MalformedRequest"
    http_status = 400
    _api_message = "The request is no well-formed HTTP request."


class RequestLineTooLong(HsmwrapError):
    """The request line is longer than any of this API; large values belong into a form body."""

    code = "RequestLineTooLong"
    http_status = 414
    _api_message = "The request line is too long; send large values in a form body."


class HeadersTooLarge(HsmwrapError):
    """Too many header fields, or too long ones."""

    code = "HeadersTooLarge"
    http_status = 431
    _api_message = "The request has too many header fields, or too long ones."
