"""Errors of the HTTP protocol, for requests that do not reach the KMS.

Codes and statuses are those of Alibaba Cloud's RPC gateway. Texts never repeat parameter values.
"""

from __future__ import annotations

from hsmwrap.errors import HsmwrapError


class IncompleteSignature(HsmwrapError):
    """The request is not signed, or a part that has to be signed is not."""

    code = "IncompleteSignature"
    http_status = 400

    def __init__(self, detail: str) -> None:
        """Take which part is missing or malformed; sent to the client."""
        super().__init__(detail)
        self._api_text = f"The request signature does not conform to the standards: {detail}."

    @property
    def api_message(self) -> str:
        """The API's message, with the part that is missing or malformed."""
        return self._api_text


class IllegalTimestamp(HsmwrapError):
    """The request's timestamp is not in UTC form, or too far from the server's time."""

    code = "IllegalTimestamp"
    http_status = 400
    _api_message = (
        "The timestamp has to be UTC, as YYYY-MM-DDThh:mm:ssZ, and within 15 minutes of the "
        "server's time."
    )


class SignatureDoesNotMatch(HsmwrapError):
    """The signature is wrong for this request and access key."""

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
    """An authentic request was repeated."""

    code = "SignatureNonceUsed"
    http_status = 400
    _api_message = "The signature nonce was used before."


class PathNotFound(HsmwrapError):
    """The API has only the path ``/``."""

    code = "InvalidPath.NotFound"
    http_status = 404
    _api_message = "The API is served at the path / only."


class PageNotFound(PathNotFound):
    """At the address of the metrics is the page ``/metrics`` and nothing else."""

    _api_message = "The metrics are at the path /metrics; the API is served at another address."


class MethodNotAllowed(HsmwrapError):
    """The method is neither GET nor POST."""

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
    """The library that renders metrics is not installed."""

    code = "MetricsUnavailable"
    http_status = 404
    _api_message = 'prometheus_client is not installed; install the extra "metrics" to have this.'


class MalformedRequest(HsmwrapError):
    """The request does not conform to RFC 9112."""

    code = "MalformedRequest"
    http_status = 400
    _api_message = "The request is not well-formed HTTP."


class RequestLineTooLong(HsmwrapError):
    """The request line is too long; large values belong into a form body."""

    code = "RequestLineTooLong"
    http_status = 414
    _api_message = "The request line is too long; send large values in a form body."


class HeadersTooLarge(HsmwrapError):
    """The header fields are too many or too long."""

    code = "HeadersTooLarge"
    http_status = 431
    _api_message = "The request has too many header fields, or too long ones."


class TooManyConnections(HsmwrapError):
    """The server or this client's address has too many connections, and this one waited longest."""

    code = "Throttling.Connections"
    http_status = 429
    retryable = True
    _api_message = "There are too many connections; send the request again."
