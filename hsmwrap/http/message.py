"""An RPC message: the parameters and headers of one HTTP request, parsed strictly.

The signed content has to be unambiguous: repeated parameters, undecodable text, and bodies that are
not forms are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.wrappers import Request

from hsmwrap.catalog import loggable
from hsmwrap.errors import InvalidParameter
from hsmwrap.http.errors import RequestTooLarge

MAX_PARAMETERS = 64
"""Limit of the parameters of a query or a form; operations have fewer than 20."""

_FORM = "application/x-www-form-urlencoded"
_COMMON = frozenset(
    {
        "AccessKeyId",
        "Action",
        "Format",
        "RegionId",
        "SecurityToken",
        "Signature",
        "SignatureMethod",
        "SignatureNonce",
        "SignatureType",
        "SignatureVersion",
        "Timestamp",
        "Version",
    }
)


@dataclass(frozen=True, slots=True)
class RpcMessage:
    """One request, parsed but not authenticated.

    Attributes:
        method: ``GET`` or ``POST``.
        query: Parameters of the query.
        form: Parameters of the form body; no name is in both.
        headers: Header values as received (latin-1), by lower-case name.
        body: The raw body.
    """

    method: str
    query: Mapping[str, str] = field(repr=False)
    form: Mapping[str, str] = field(default_factory=dict, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)

    @property
    def parameters(self) -> dict[str, str]:
        """The parameters of query and form."""
        return {**self.query, **self.form}

    @property
    def own_parameters(self) -> dict[str, str]:
        """The parameters of the operation, without the protocol's common ones."""
        return {n: v for n, v in self.parameters.items() if n not in _COMMON}


def read_message(request: Request, max_body: int) -> RpcMessage:
    """Read a request whose body has at most ``max_body`` bytes.

    Raises:
        InvalidParameter: A parameter is repeated, the query or the form does not decode, or the
            body is not a form.
        RequestTooLarge: The body is longer than ``max_body``.
    """
    body = _read_body(request, max_body)
    query = _parse(request.query_string, "QueryString")
    form = _parse(body, "FormBody")
    twice = sorted(query.keys() & form.keys())
    if twice:
        raise InvalidParameter(loggable(twice[0]), "is in the query and in the form")
    headers = {name.lower(): value for name, value in request.headers.items()}
    return RpcMessage(request.method, query, form, headers, body)


def _read_body(request: Request, max_body: int) -> bytes:
    # Werkzeug silently cuts a longer chunked body at the limit, so the limit is one byte more.
    request.max_content_length = max_body + 1
    try:
        body = request.get_data(cache=False)
    except RequestEntityTooLarge:
        raise _too_large(max_body) from None
    except Exception:  # noqa: BLE001 (each server raises its own errors for a broken body)
        raise InvalidParameter("Content-Length", "the body ended early") from None
    if len(body) > max_body:
        raise _too_large(max_body)
    if request.content_length not in {None, len(body)}:
        raise InvalidParameter("Content-Length", "the body ended early")
    if body and request.mimetype != _FORM:
        raise InvalidParameter("Content-Type", f"a body has to be {_FORM}")
    return body


def _too_large(max_body: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body is longer than {max_body} bytes")


def _parse(raw: bytes, part: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(
            raw.decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=MAX_PARAMETERS,
        )
    except ValueError:
        raise InvalidParameter(part, "does not decode, or has too many parameters") from None
    parameters = dict(pairs)
    if len(parameters) != len(pairs):
        raise InvalidParameter(part, "a parameter is there twice")
    return parameters
