"""Calls a WSGI application with a request that is complete, and takes its whole answer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from hsmwrap.errors import HsmwrapError
from hsmwrap.http import answer, logs
from hsmwrap.http.answer import Answer
from hsmwrap.http.parsing import Request
from hsmwrap.imports import new_request_id

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

_log = logging.getLogger(__name__)
_BARE = {"content-type": "CONTENT_TYPE", "content-length": "CONTENT_LENGTH"}


@dataclass(frozen=True, slots=True)
class Peers:
    """Both ends of a connection; addresses are empty where there is none (a Unix socket)."""

    client: str
    client_port: int
    server: str
    server_port: int
    scheme: str = "http"


def failure(error: BaseException) -> Answer:
    """The API's answer of an error that no application answered; it is logged here."""
    known = error if isinstance(error, HsmwrapError) else HsmwrapError("unexpected")
    request_id = new_request_id()
    level = logging.ERROR if type(known) is HsmwrapError else logging.INFO
    facts = {"request_id": request_id, "code": known.code, "http_status": known.http_status}
    _log.log(level, "request", extra={**facts, **logs.describe(error)})
    return answer.failure(known, request_id, "", "JSON")


def call(app: WSGIApplication, environ: WSGIEnvironment) -> Answer:
    """Ask the application; what it raises is answered as InternalFailure."""
    started: list[Any] = []

    def start_response(status: str, headers: list[tuple[str, str]], _exc: Any = None) -> Any:
        started[:] = [status, headers]
        return written.append

    written: list[bytes] = []
    try:
        chunks = app(environ, start_response)
        try:
            written.extend(chunks)
        finally:
            close: Callable[[], None] = getattr(chunks, "close", lambda: None)
            close()
        status, headers = started
    except Exception as error:  # noqa: BLE001 (the border: the client gets InternalFailure)
        return failure(error)
    body = b"".join(written)
    if not any(name.lower() == "content-length" for name, _ in headers):
        headers = [*headers, ("Content-Length", str(len(body)))]
    return Answer(status, headers, b"" if environ["REQUEST_METHOD"] == "HEAD" else body)


def environ(request: Request, peers: Peers) -> WSGIEnvironment:
    """What WSGI calls the environment.

    Only the request itself counts: no header field says where the application is mounted, who the
    client is or how it connected. Fields whose name has an underscore are left out, for WSGI
    cannot tell them from those with a hyphen.
    """
    found: WSGIEnvironment = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(request.path).decode("latin-1"),
        "QUERY_STRING": request.query.decode("latin-1"),
        "SERVER_PROTOCOL": f"HTTP/{request.version}",
        "SERVER_NAME": peers.server,
        "SERVER_PORT": str(peers.server_port),
        "REMOTE_ADDR": peers.client,
        "REMOTE_PORT": str(peers.client_port),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": peers.scheme,
        "wsgi.input": BytesIO(request.body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    for name, value in request.headers:
        if "_" in name:
            continue
        key = _BARE.get(name) or "HTTP_" + name.upper().replace("-", "_")
        found[key] = f"{found[key]},{value}" if key in found else value
    # The framing is gone, and with it what described it.
    found.pop("HTTP_TRANSFER_ENCODING", None)
    if request.body:
        found["CONTENT_LENGTH"] = str(len(request.body))
    return found
