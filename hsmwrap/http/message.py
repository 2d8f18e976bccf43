"""An RPC message: the parameters and headers of one HTTP request, parsed strictly.

The signed content has to be unambiguous: repeated parameters, undecodable text, and bodies that are
not forms are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from hsmwrap.catalog import loggable
from hsmwrap.errors import InvalidParameter
from hsmwrap.http.errors import RequestTooLarge

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

MAX_PARAMETERS = 64
"""Limit of the parameters of a query or a form; operations have fewer than 20."""

_BARE = frozenset({"CONTENT_TYPE", "CONTENT_LENGTH"})
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


def read_message(environ: WSGIEnvironment, max_body: int) -> RpcMessage:
    """Read a request whose body has at most ``max_body`` bytes.

    Raises:
        InvalidParameter: A parameter is repeated, the query or the form does not decode, or the
            body is not a form.
        RequestTooLarge: The body is longer than ``max_body``.
    """
    body = _read_body(environ, max_body)
    query = _parse(environ.get("QUERY_STRING", "").encode("latin-1"), "QueryString")
    form = _parse(body, "FormBody")
    twice = sorted(query.keys() & form.keys())
    if twice:
        raise InvalidParameter(loggable(twice[0]), "is in the query and in the form")
    headers = {
        name.removeprefix("HTTP_").replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_") or name in _BARE
    }
    return RpcMessage(environ["REQUEST_METHOD"], query, form, headers, body)


def _read_body(environ: WSGIEnvironment, max_body: int) -> bytes:
    said = None if environ.get("HTTP_TRANSFER_ENCODING") else environ.get("CONTENT_LENGTH")
    if said and not (said.isascii() and said.isdecimal()):
        raise InvalidParameter("Content-Length", "is not a number")
    length = int(said) if said else None
    if length is not None and length > max_body:
        raise _too_large(max_body)
    # A server that ends the input itself knows chunked bodies: one byte more shows a longer one.
    most = max_body + 1 if environ.get("wsgi.input_terminated") else length or 0
    try:
        body: bytes = environ["wsgi.input"].read(most)
    except Exception:  # noqa: BLE001 (each server raises its own errors for a broken body)
        raise _ended_early() from None
    if len(body) > max_body:
        raise _too_large(max_body)
    if length not in {None, len(body)}:
        raise _ended_early()
    if body and environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() != _FORM:
        raise InvalidParameter("Content-Type", f"a body has to be {_FORM}")
    return body


def _too_large(max_body: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body is longer than {max_body} bytes")


def _ended_early() -> InvalidParameter:
    return InvalidParameter("Content-Length", "the body ended early")


def _parse(raw: bytes, part: str) -> dict[str, str]:
    """As :func:`urllib.parse.parse_qsl`, strict, in a third of its time."""
    if not raw:
        return {}
    pairs = [pair for pair in raw.split(b"&") if pair]
    parameters = {}
    try:
        if raw.count(b"&") >= MAX_PARAMETERS:
            raise ValueError  # noqa: TRY301 (as for what does not decode)
        for pair in pairs:
            name, _, value = pair.partition(b"=")
            parameters[_decode(name)] = _decode(value)
    except ValueError:
        raise InvalidParameter(part, "does not decode, or has too many parameters") from None
    if len(parameters) != len(pairs):
        raise InvalidParameter(part, "a parameter is there twice")
    return parameters


def _decode(raw: bytes) -> str:
    text = raw.decode("ascii")
    if "%" not in text and "+" not in text:
        return text
    return unquote_to_bytes(text.replace("+", " ")).decode()
