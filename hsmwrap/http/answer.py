"""Answers in the API's two formats, JSON and XML. Each API answer carries its RequestId."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from xml.sax.saxutils import escape

from werkzeug.wrappers import Response

from hsmwrap.errors import HsmwrapError
from hsmwrap.kms.recommend import ELSE

# alibabacloud-tea-openapi compares the XML type with this very text (field note 69).
_CONTENT_TYPE = {"JSON": "application/json;charset=utf-8", "XML": "text/xml;charset=utf-8"}
_RETRY = frozenset({429, 503})
_RETRY_AFTER = "2"
"""In seconds; an HSM that is lost may come back later."""

# XML 1.0, section 2.2: a character that is not a Char is not allowed, not even as a reference.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_XML_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*", re.ASCII)


def success(fields: Mapping[str, Any], request_id: str, format_: str) -> Response:
    """The answer of a successful operation: its fields and the RequestId, status 200."""
    return _response("KMS", {**fields, "RequestId": request_id}, 200, format_)


def failure(
    error: HsmwrapError, request_id: str, host: str, format_: str, recommend: str = ELSE
) -> Response:
    """The answer for an error, with its code, message and status."""
    fields = {
        "RequestId": request_id,
        "HostId": host,
        "Code": error.code,
        "Message": error.api_message,
        "Recommend": recommend,
    }
    return _response("Error", fields, error.http_status, format_)


def page(fields: Mapping[str, Any], status: int) -> Response:
    """A page outside the API, as JSON; with a RequestId only if the fields have one."""
    return _response("Page", fields, status, "JSON")


def _response(root: str, fields: Mapping[str, Any], status: int, format_: str) -> Response:
    text = to_xml(root, fields) if format_ == "XML" else json.dumps(fields)
    response = Response(text.encode(), status, content_type=_CONTENT_TYPE[format_])
    if "RequestId" in fields:
        response.headers["x-acs-request-id"] = fields["RequestId"]
    if status in _RETRY:
        response.headers["Retry-After"] = _RETRY_AFTER
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


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
