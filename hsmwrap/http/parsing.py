"""HTTP/1.x requests from the bytes of a connection, with limits. No input or output here.

httptools (llhttp) does the parsing, in its strict mode. Two lengths of a body, two hosts, a space
before the colon of a header field, a bare line feed: each is refused, so that a proxy and this
server cannot see different requests in the same bytes.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from hsmwrap.errors import HsmwrapError, InvalidParameter
from hsmwrap.http.errors import (
    HeadersTooLarge,
    MalformedRequest,
    RequestLineTooLong,
    RequestTooLarge,
)

MAX_REQUEST_LINE = 128 * 1024
"""Longest request target in bytes. SDKs send everything in the query, percent-encoded: a plaintext
of 6 KiB may take 24 KiB there, and an EncryptionContext or a Description of 8192 characters up to
96 KiB."""

MAX_HEADERS = 100
MAX_HEADER = 8190
"""Longest header field in bytes, name and value together."""

MAX_HEADERS_LENGTH = 64 * 1024
"""Most bytes of all header fields of a request."""

_MAX_PIPELINED = 16
_VERSIONS = {"1.0", "1.1"}
_FRAMING_OF_A_BYTE = len("1\r\n" + "\r\n")
# RFC 9112, section 3.2.2: a server has to accept the absolute form as well.
_AUTHORITY = re.compile(rb"\Ahttps?://[^/?#]*", re.IGNORECASE)


@dataclass(slots=True)
class Request:
    """One request, as received.

    Attributes:
        method: As sent.
        path: As sent, percent-encoded.
        query: As sent; what follows the first question mark.
        headers: Name in lower case and value, both decoded as latin-1, in the order received;
            without ``Upgrade`` where it asked for an upgrade.
        version: ``1.0`` or ``1.1``.
        body: The whole body, without its framing.
        keep_alive: Whether the connection may be kept after the answer.
    """

    method: str
    path: bytes
    query: bytes
    headers: list[tuple[str, str]]
    version: str
    body: bytes = b""
    keep_alive: bool = False


class Phase(Enum):
    """What the next byte would belong to."""

    IDLE = auto()
    HEAD = auto()
    BODY = auto()


class RequestParser:
    """Makes the requests of one connection from its bytes.

    Attributes:
        requests: Complete requests, to be taken from the left.
        refusal: What is wrong with the bytes after ``requests``; nothing more is parsed then.
        wants_continue: True if the client waits for ``100 Continue`` before it sends the body.
        unread: True if a request in ``requests`` was complete without its body being read.
    """

    def __init__(self, max_body: int, read_body: frozenset[tuple[str, bytes]]) -> None:
        """Take limits.

        Args:
            max_body: Longest body in bytes.
            read_body: Methods and paths whose body is read. Another request is complete with its
                head, and the last of its connection if it has a body.
        """
        self.requests: deque[Request] = deque()
        self._phase = Phase.IDLE
        self.refusal: HsmwrapError | None = None
        self.wants_continue = False
        self.unread = False
        self._max_body = max_body
        self._read_body = read_body
        self._last = False
        self._http = HttpRequestParser(self)

    @property
    def phase(self) -> Phase:
        """What the next byte would belong to; after the last request nothing counts any more."""
        return Phase.IDLE if self._last else self._phase

    def feed(self, data: bytes) -> None:
        """Take the next bytes, and make ``requests`` or a ``refusal`` of them."""
        if self._last:
            return
        if self._phase is Phase.HEAD:
            self._unfinished += len(data)
        elif self._phase is Phase.BODY:
            self._framing += len(data)
        try:
            while data and not self._last:
                data = self._feed_until_upgrade(data)
        except HttpParserError:
            if not self._last:
                self._refuse(self._refused or self._unparsable())
        else:
            self._refuse_what_does_not_end()

    def end(self) -> None:
        """Take the end of the stream; in the middle of a body that is a ``refusal``."""
        if self.phase is Phase.BODY:
            self._refuse(_body_ended())

    # --- what httptools calls

    def on_message_begin(self) -> None:
        """A request begins."""
        self._phase = Phase.HEAD
        self._refused: HsmwrapError | None = None
        self._target = bytearray()
        self._headers: list[tuple[str, str]] = []
        self._headers_length = self._unfinished = self._framing = 0
        self._body = bytearray()

    def on_url(self, part: bytes) -> None:
        """The next piece of the request target."""
        self._unfinished = 0
        self._target += part
        if len(self._target) > MAX_REQUEST_LINE:
            self._stop(RequestLineTooLong("the request line is too long"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A complete header field, or a trailer, which is left out."""
        if self._phase is Phase.BODY:
            return
        self._unfinished = 0
        length = len(name) + len(value)
        self._headers_length += length
        self._headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))
        if (
            length > MAX_HEADER
            or len(self._headers) > MAX_HEADERS
            or self._headers_length > MAX_HEADERS_LENGTH
        ):
            self._stop(_headers_too_large())

    def on_headers_complete(self) -> None:
        """The head is complete. What asks for an upgrade is read again, without that."""
        version = self._http.get_http_version()
        if version not in _VERSIONS:
            self._stop(MalformedRequest("HTTP 1.0 and 1.1 are served"))
        hosts = [name for name, _ in self._headers].count("host")
        if hosts > 1 or (version == "1.1" and not hosts):  # RFC 9112, section 3.2
            self._stop(MalformedRequest("HTTP 1.1 needs one Host, and takes one"))
        codings = [value.lower() for name, value in self._headers if name == "transfer-encoding"]
        if codings and (version == "1.0" or codings != ["chunked"]):  # RFC 9112, section 6.1
            self._stop(MalformedRequest("Transfer-Encoding is chunked, and of HTTP 1.1"))
        if self._asks_for_upgrade():
            return
        path, _, query = _AUTHORITY.sub(b"", self._target, count=1).partition(b"?")
        self._request = Request(
            self._http.get_method().decode("ascii"),
            bytes(path) or b"/",
            bytes(query),
            self._headers,
            version,
        )
        self._phase = Phase.BODY
        headers = dict(self._headers)
        length = int(headers.get("content-length", 0))
        if not length and "transfer-encoding" not in headers:
            return
        if (self._request.method, self._request.path) not in self._read_body:
            self.requests.append(self._request)
            self.unread = self._last = True
        elif length > self._max_body:
            self._stop(self._body_too_large())
        else:
            self.wants_continue = headers.get("expect", "").lower() == "100-continue"

    def on_body(self, part: bytes) -> None:
        """The next piece of the body."""
        if self._last:
            return
        self._framing -= len(part)
        self._body += part
        if len(self._body) > self._max_body:
            self._stop(self._body_too_large())

    def on_message_complete(self) -> None:
        """The request is complete."""
        self._phase = Phase.IDLE
        self.wants_continue = False
        if self._last or self._asks_for_upgrade():
            return
        request = self._request
        request.body = bytes(self._body)
        request.keep_alive = self._http.should_keep_alive()
        self._last = not request.keep_alive
        self.requests.append(request)
        if len(self.requests) > _MAX_PIPELINED:
            self._stop(MalformedRequest("too many requests at once"))

    # ---

    def _refuse_what_does_not_end(self) -> None:
        # Framing: sizes of chunks, their extensions and trailers; llhttp keeps a trailer until
        # it is whole. Chunks of one byte have the most that a client needs.
        if self._phase is Phase.HEAD and self._unfinished > MAX_HEADERS_LENGTH:
            self._refuse(_headers_too_large())
        elif self._phase is Phase.BODY:
            framing = MAX_HEADERS_LENGTH + _FRAMING_OF_A_BYTE * len(self._body)
            if self._framing > framing:
                self._refuse(HeadersTooLarge("the framing of the body is too long"))

    def _feed_until_upgrade(self, data: bytes) -> bytes:
        """Returns what is to be fed next: nothing, unless a request asked for an upgrade.

        No upgrade is served: such a request is answered as if it had not asked (RFC 9110, section
        7.8). httptools ends it with its head, so a new parser gets the head without the fields
        that ask, and then its body. Java's HttpClient asks for h2c in every first request.
        """
        try:
            self._http.feed_data(data)
        except HttpParserUpgrade as upgrade:
            if not self._asks_for_upgrade():  # CONNECT: what follows is not HTTP
                self.requests[-1].keep_alive = False
                self._last = True
                return b""
            version = self._http.get_http_version().encode()
            head = b"%s %s HTTP/%s\r\n" % (self._http.get_method(), self._target, version)
            for name, value in self._headers:
                if name != "upgrade":
                    head += f"{name}: {value}\r\n".encode("latin-1")
            self._http = HttpRequestParser(self)
            return head + b"\r\n" + data[upgrade.args[0] :]
        return b""

    def _asks_for_upgrade(self) -> bool:
        return self._http.should_upgrade() and self._http.get_method() != b"CONNECT"

    def _stop(self, refusal: HsmwrapError) -> None:
        """Make httptools give up, which reports any exception of a callback as its own."""
        self._refused = refusal
        raise refusal

    def _refuse(self, refusal: HsmwrapError) -> None:
        self.refusal = refusal
        self._last = True

    def _unparsable(self) -> HsmwrapError:
        if self._phase is Phase.BODY:
            return _body_ended()
        return MalformedRequest("the request does not parse")

    def _body_too_large(self) -> HsmwrapError:
        return RequestTooLarge(f"the body is longer than {self._max_body} bytes")


def _headers_too_large() -> HsmwrapError:
    return HeadersTooLarge("the header fields are too many or too long")


def _body_ended() -> HsmwrapError:
    return InvalidParameter("Content-Length", "the body ended early")
