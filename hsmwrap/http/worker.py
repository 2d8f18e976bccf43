"""gunicorn's threaded worker, answering in the API's terms what never reaches the application.

Out of the box gunicorn answers a request that it cannot parse in HTML, without a RequestId, and
logs the request's text, which may hold a signature or an import token.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import uuid
from typing import Any

from gunicorn.http import errors as parsing
from gunicorn.http import message
from gunicorn.workers.gthread import ThreadWorker
from werkzeug.http import HTTP_STATUS_CODES

from hsmwrap.errors import HsmwrapError
from hsmwrap.http import answer, logs
from hsmwrap.http.errors import HeadersTooLarge, MalformedRequest, RequestLineTooLong

MAX_REQUEST_LINE = 16 * 1024
"""Longest request line in bytes. Encrypt takes 6 KiB of plaintext: 8 KiB and more in a query."""

_log = logging.getLogger(__name__)


class KmsWorker(ThreadWorker):
    """A ``gthread`` worker with longer request lines and the API's error answers."""

    def init_process(self) -> None:
        """Lift gunicorn's limit, which its configuration can lower or switch off but not raise."""
        message.MAX_REQUEST_LINE = MAX_REQUEST_LINE  # type: ignore[misc]  # a constant to gunicorn
        super().init_process()

    def handle_error(
        self, _req: Any, client: socket.socket, _addr: Any, exc: BaseException
    ) -> None:
        """Answer and log a request that could not be parsed, or a failure while answering."""
        error = _translate(exc)
        request_id = str(uuid.uuid4()).upper()
        level = logging.ERROR if type(error) is HsmwrapError else logging.INFO
        facts = {"request_id": request_id, "code": error.code, "http_status": error.http_status}
        _log.log(level, "request", extra={**facts, **logs.describe(exc)})
        with contextlib.suppress(OSError):
            client.sendall(_raw(error, request_id))


def _translate(exc: BaseException) -> HsmwrapError:
    if isinstance(exc, parsing.LimitRequestLine):
        return RequestLineTooLong("the request line is too long")
    if isinstance(exc, parsing.LimitRequestHeaders):
        return HeadersTooLarge("the header fields are too many or too long")
    if isinstance(exc, parsing.ParseException):
        return MalformedRequest("the request does not parse")
    return HsmwrapError("unexpected")


def _raw(error: HsmwrapError, request_id: str) -> bytes:
    response = answer.failure(error, request_id, "", "JSON")
    response.headers["Connection"] = "close"
    head = f"HTTP/1.1 {error.http_status} {HTTP_STATUS_CODES[error.http_status]}\r\n"
    return head.encode("ascii") + str(response.headers).encode("ascii") + response.get_data()
