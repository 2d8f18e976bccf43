"""gunicorn's threaded worker, with the API's error answers and with deadlines.

gunicorn itself answers a malformed request in HTML, without a RequestId, and logs the request's
text, which may hold a signature or an import token. It also waits without limit for the rest of a
request and for clients that do not read an answer; here both have a deadline
(:mod:`hsmwrap.http.deadline`).

A request holds a thread from its first byte, up to its deadline. If untrusted clients can connect,
put a proxy in front that buffers whole requests and limits connections by address. TLS, whose
handshake has no deadline here, belongs there too.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from typing import Any

from gunicorn.http import errors as parsing
from gunicorn.http import message, parser
from gunicorn.workers import gthread
from gunicorn.workers.gthread import TConn, ThreadWorker
from werkzeug.http import HTTP_STATUS_CODES

from hsmwrap.errors import HsmwrapError
from hsmwrap.http import answer, deadline, logs
from hsmwrap.http.deadline import TimedUnreader
from hsmwrap.http.errors import (
    HeadersTooLarge,
    MalformedRequest,
    RequestLineTooLong,
    RequestTimeout,
)
from hsmwrap.imports import new_request_id

MAX_REQUEST_LINE = 128 * 1024
"""Limit of a request line in bytes. SDKs send all parameters in the query: a plaintext of 6 KiB may
take 24 KiB there, and an EncryptionContext of 8192 characters four times that."""

_log = logging.getLogger(__name__)


class KmsWorker(ThreadWorker):
    """A ``gthread`` worker with deadlines, longer request lines and the API's error answers."""

    def init_process(self) -> None:
        """Set what gunicorn's configuration cannot set; ``limit_request_line`` is overridden.

        By configuration gunicorn can lower its limit of the request line or disable it, not raise
        it.
        """
        message.MAX_REQUEST_LINE = MAX_REQUEST_LINE  # type: ignore[misc]  # a constant to gunicorn
        self.cfg.set("limit_request_line", MAX_REQUEST_LINE)
        gthread.DEFAULT_WORKER_DATA_TIMEOUT = deadline.SILENT_SECONDS  # type: ignore[misc]  # as above
        parser.SocketUnreader = TimedUnreader  # type: ignore[attr-defined]  # its own import
        super().init_process()

    def handle(self, conn: TConn) -> bool:
        """Serve one request of a connection; True keeps the connection."""
        reader = _reader(conn)
        if reader is not None:
            reader.await_head()
        keep = super().handle(conn)
        if not keep:
            # gunicorn waits up to two seconds for the client to close, in the thread that accepts
            # connections. After this it reads what has arrived, then finds the end at once.
            with contextlib.suppress(OSError):
                conn.sock.shutdown(socket.SHUT_RD)
        return keep

    def handle_request(self, req: message.Request, conn: TConn) -> bool:
        """Answer a request whose head was read; True keeps the connection."""
        reader = _reader(conn)
        if reader is None:
            return super().handle_request(req, conn)
        reader.await_body(close=req.force_close)
        conn.sock.settimeout(deadline.ANSWER_SECONDS)
        keep = super().handle_request(req, conn)
        reader.await_rest()
        return keep

    def handle_error(
        self, _req: Any, client: socket.socket, _addr: Any, exc: BaseException
    ) -> None:
        """Answer and log a malformed request, or a failure while answering."""
        error = _translate(exc)
        request_id = new_request_id()
        level = logging.ERROR if type(error) is HsmwrapError else logging.INFO
        facts = {"request_id": request_id, "code": error.code, "http_status": error.http_status}
        _log.log(level, "request", extra={**facts, **logs.describe(exc)})
        with contextlib.suppress(OSError):
            client.settimeout(deadline.ANSWER_SECONDS)
            client.sendall(_raw(error, request_id))


def _reader(conn: TConn) -> TimedUnreader | None:
    reader = getattr(conn.parser, "unreader", None)
    return reader if isinstance(reader, TimedUnreader) else None


def _translate(exc: BaseException) -> HsmwrapError:
    if isinstance(exc, RequestTimeout):
        return exc
    if isinstance(exc, parsing.LimitRequestLine):
        return RequestLineTooLong("the request line is too long")
    if isinstance(exc, parsing.LimitRequestHeaders):
        return HeadersTooLarge("the header fields are too many or too long")
    if isinstance(exc, parsing.ParseException):
        return MalformedRequest("the request is malformed")
    return HsmwrapError("unexpected")


def _raw(error: HsmwrapError, request_id: str) -> bytes:
    response = answer.failure(error, request_id, "", "JSON")
    response.headers["Connection"] = "close"
    head = f"HTTP/1.1 {error.http_status} {HTTP_STATUS_CODES[error.http_status]}\r\n"
    return head.encode("ascii") + str(response.headers).encode("ascii") + response.get_data()
