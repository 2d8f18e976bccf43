"""Answers in the API's two formats, JSON and XML. Each API answer carries its RequestId."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from hsmwrap.errors import HsmwrapError
from hsmwrap.kms.recommend import ELSE

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

# alibabacloud-tea-openapi compares the XML type with this very text (field note 69).
_CONTENT_TYPE = {"JSON": "application/json;charset=utf-8", "XML": "text/xml;charset=utf-8"}
_RETRY = frozenset({429, 503})
_RETRY_AFTER = "2"
"""In seconds; an HSM that is lost may come back later."""

# XML 1.0, section 2.2: a character that is not a Char is not allowed, not even as a reference.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_XML_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back: status line's text, header fields, body. A WSGI application of its own."""

    status: str
    headers: list[tuple[str, str]]
    body: bytes

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        """Answer a request with this."""
        start_response(self.status, self.headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [self.body]

    def encoded(self, *, keep_alive: bool) -> bytes:
        """The bytes of an HTTP/1.1 response."""
        lines = [f"HTTP/1.1 {self.status}", *(f"{name}: {value}" for name, value in self.headers)]
        lines.append(f"Date: {_date(int(time.time()))}")
        lines.append(f"Connection: {'keep-alive' if keep_alive else 'close'}\r\n\r\n")
        return "\r\n".join(lines).encode("latin-1") + self.body


@functools.lru_cache(1)
def _date(now: int) -> str:
    """HTTP's form of a time, in seconds (RFC 9110, section 5.6.7)."""
    return formatdate(now, usegmt=True)


def success(fields: Mapping[str, Any], request_id: str, format_: str) -> Answer:
    """The answer of a successful operation: its fields and the RequestId, status 200."""
    return _response("KMS", {**fields, "RequestId": request_id}, 200, format_)


def failure(
    error: HsmwrapError, request_id: str, host: str, format_: str, recommend: str = ELSE
) -> Answer:
    """The answer for an error, with its code, message and status."""
    fields = {
        "RequestId": request_id,
        "HostId": host,
        "Code": error.code,
        "Message": error.api_message,
        "Recommend": recommend,
    }
    return _response("Error", fields, error.http_status, format_)


def page(fields: Mapping[str, Any], status: int) -> Answer:
    """A page outside the API, as JSON; with a RequestId only if the fields have one."""
    return _response("Page", fields, status, "JSON")


def plain(status: int, content_type: str, body: bytes, *more: tuple[str, str]) -> Answer:
    """An answer of these bytes, with more header fields."""
    length = ("Content-Length", str(len(body)))
    reason = HTTPStatus(status).phrase
    return Answer(f"{status} {reason}", [("Content-Type", content_type), length, *more], body)


def _response(root: str, fields: Mapping[str, Any], status: int, format_: str) -> Answer:
    text = to_xml(root, fields) if format_ == "XML" else json.dumps(fields)
    more = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")]
    if "RequestId" in fields:
        more.append(("x-acs-request-id", fields["RequestId"]))
    if status in _RETRY:
        more.append(("Retry-After", _RETRY_AFTER))
    return plain(status, _CONTENT_TYPE[format_], text.encode(), *more)


def to_xml(root: str, fields: Mapping[str, Any]) -> str:
    """An XML document: mappings nest, lists repeat their element, None is left out."""
    return '<?xml version="1.0" encoding="UTF-8"?>' + "".join(_element(root, fields))


def _element(name: str, value: Any) -> Iterator[str]:
    if not _XML_NAME.fullmatch(name):
        raise ValueError("the name of a field is not an XML name")
    if value is None:
        return
    if isinstance(value, list | tuple):
        for item in value:
            yield from _element(name, item)
        return
    yield f"<{name}>"
    if isinstance(value, Mapping):
        for child, content in value.items():
            yield from _element(child, content)
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        yield escape(_NOT_XML.sub("\ufffd", text), {"\r": "&#13;"})
    yield f"</{name}>"
