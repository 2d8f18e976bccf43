"""One connection of a client, on the event loop: requests one after another, each with deadlines.

What is still arriving holds no thread: only a complete request is handed on.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING, cast

from hsmwrap.errors import HsmwrapError
from hsmwrap.http import deadline
from hsmwrap.http.answer import Answer
from hsmwrap.http.errors import RequestTimeout, TooManyConnections
from hsmwrap.http.parsing import Phase, Request, RequestParser
from hsmwrap.http.turn import Turn
from hsmwrap.http.wsgi import Peers, call, environ, failure

if TYPE_CHECKING:
    from hsmwrap.http.gateway import Gateway, Site

Opening = asyncio.Task[tuple[asyncio.Transport, asyncio.BaseProtocol]]
"""What :meth:`asyncio.loop.connect_accepted_socket` does, TLS handshake included."""

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class _State(Enum):
    WAITING = auto()
    """Idle, or a request is arriving; within a deadline."""
    SERVING = auto()
    """A complete request waits for a thread or has one."""
    LENT = auto()
    """A thread has the whole connection; nothing is read or written here."""
    ANSWERING = auto()
    """The client takes an answer; within a deadline."""
    ENDING = auto()
    """What the client still sends is dropped; within a deadline. Closing at once would reset the
    connection, and the client could lose the answer."""


class Connection(asyncio.Protocol):
    """Reads requests, hands complete ones to the gateway, and writes the answers.

    Attributes:
        address_key: What the limit per address counts by; empty: nothing.
        opening: Ends when the connection is open.
    """

    opening: Opening

    def __init__(
        self,
        gateway: Gateway,
        site: Site,
        client: tuple[str, int],
        address_key: str,
        own: socket.socket | None = None,
    ) -> None:
        """Take what is known of a client before it sends anything.

        Args:
            gateway: Runs the requests, and knows all connections.
            site: What is served here.
            client: Address and port.
            address_key: See the class.
            own: The connection itself, where a thread may read and write it; None: with TLS.
        """
        self.address_key = address_key
        self._gateway = gateway
        self._site = site
        self._client = client
        self._own = own
        self._parser = RequestParser(site.max_body, site.read_body)
        self._state = _State.WAITING
        self._timer: asyncio.TimerHandle | None = None
        self._phase: Phase | None = None  # the one that has a deadline now
        self._keep_alive = True
        self._at_end = self._stopping = False
        self._early = b""

    # --- called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open."""
        self._transport = cast("asyncio.Transport", transport)
        # pause_writing then means: the client has not taken the whole answer yet.
        # (asyncio's TLS would say so of each answer at a limit of 0.)
        tls = transport.get_extra_info("ssl_object") is not None
        self._transport.set_write_buffer_limits(high=1 if tls else 0, low=0)
        server = transport.get_extra_info("sockname")
        host, port = server[:2] if isinstance(server, tuple) else ("", 0)
        self._peers = Peers(*self._client, host, port, "https" if tls else "http")
        self._phase = Phase.IDLE
        self._set_timer(deadline.IDLE_SECONDS, self._close)

    def data_received(self, data: bytes) -> None:
        """The client sent something."""
        if self._state is _State.WAITING:
            self._parser.feed(data)
            self._advance()
        elif self._state is not _State.ENDING:
            self._early += data
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        """The client sends nothing more, but may still read. True keeps the connection."""
        self._at_end = True
        if self._state is _State.WAITING:
            self._advance()
        return self._state is not _State.ENDING and self._peers.scheme == "http"

    def pause_writing(self) -> None:
        """Some of an answer waits for the client to take it."""
        self._state = _State.ANSWERING
        self._set_timer(deadline.ANSWER_SECONDS, self._transport.abort)

    def resume_writing(self) -> None:
        """The client took all of it."""
        self._answered()

    def connection_lost(self, _exc: Exception | None) -> None:
        """The connection is closed."""
        self._end_timer()
        self._state = _State.ENDING
        self._gateway.connections.remove(self)

    # --- called by the gateway

    def stop(self) -> None:
        """Serve no further request; one that is arriving may still come, if it is quick."""
        self._stopping = True
        if not self.opening.done():
            self.opening.cancel()
        elif self._state is _State.WAITING:
            if self._parser.phase is Phase.IDLE:
                self._close()
            else:
                self._set_timer(deadline.REST_SECONDS, self._too_late)

    def evict(self) -> None:
        """Make room for another connection. Not while a request is being served."""
        if not self.opening.done():
            self.opening.cancel()
            return
        if self._state is _State.WAITING and self._parser.phase is not Phase.IDLE:
            self._state = _State.ENDING
            error = TooManyConnections("too many connections")
            self._transport.write(failure(error).encoded(keep_alive=False))
        if self._transport.is_closing() or self._transport.get_write_buffer_size():
            self._transport.abort()
        else:
            self._transport.close()

    # ---

    def _advance(self) -> None:
        """Do what the bytes ask for that have arrived."""
        parser = self._parser
        if self._at_end and not parser.requests:
            parser.end()
        if parser.requests:
            self._serve()
        elif parser.refusal is not None:
            self._refuse(parser.refusal)
        elif self._at_end:
            self._close()
        else:
            self._await_request()

    def _await_request(self) -> None:
        if self._parser.phase is self._phase or (self._stopping and self._phase):
            return
        self._phase = self._parser.phase
        self._gateway.connections.wait(self)
        if self._phase is Phase.IDLE:
            self._set_timer(deadline.IDLE_SECONDS, self._close)
        elif self._phase is Phase.HEAD:
            self._set_timer(deadline.HEAD_SECONDS, self._too_late)
        else:
            self._set_timer(deadline.BODY_SECONDS, self._too_late)
            if self._parser.wants_continue:
                self._transport.write(_CONTINUE)

    def _too_late(self) -> None:
        self._refuse(RequestTimeout("the request did not arrive in time"))

    def _serve(self) -> None:
        self._end_timer()
        self._state = _State.SERVING
        request = self._parser.requests.popleft()
        self._keep_alive = request.keep_alive
        self._gateway.connections.serve(self)
        alone = self._gateway.is_idle and not self._parser.requests
        if self._own is not None and alone and self._may_lend(request):
            self._lend(self._own, request)
        else:
            self._gateway.call(self._site, request, self._peers, self._done)

    # --- lent to a thread

    def _may_lend(self, request: Request) -> bool:
        """Whether a thread may answer this request and go on with the connection."""
        return self._gateway.runs_in_thread(self._site, request)

    def _lend(self, own: socket.socket, request: Request) -> None:
        self._transport.pause_reading()
        self._state = _State.LENT
        turn = Turn(
            own,
            self._parser,
            lambda request: call(self._site.app, environ(request, self._peers)),
            self._may_lend,
            lambda: not (self._stopping or self._gateway.last_requests),
        )
        self._gateway.lend(
            lambda is_alone: turn.run(request, is_alone), lambda error: self._take_back(turn, error)
        )

    def _take_back(self, turn: Turn, error: Answer | None) -> None:
        """The thread is done with the connection; ``error``: it failed."""
        self._gateway.served += turn.served - 1  # the first was counted when it was handed over
        self._keep_alive = turn.keep_alive and (error is None or turn.answering)
        if self._state is not _State.LENT:
            return
        if error is not None and turn.answering:
            self._send(error)
        else:
            self._write(turn.unsent)

    def _done(self, answer: Answer) -> None:
        if self._state is _State.SERVING:
            self._send(answer)

    def _refuse(self, error: HsmwrapError) -> None:
        self._keep_alive = False
        self._parser.unread = True
        self._send(failure(error))

    def _send(self, answer: Answer) -> None:
        self._end_timer()
        self._keep_alive &= not (self._stopping or self._gateway.last_requests)
        self._write(answer.encoded(keep_alive=self._keep_alive))

    def _write(self, answer: bytes) -> None:
        self._gateway.connections.wait(self)
        self._state = _State.SERVING
        if answer:
            self._transport.write(answer)
        if self._state is _State.SERVING:  # write() may have called pause_writing
            self._answered()

    def _answered(self) -> None:
        """The client has the answer; go on with the connection, or end it."""
        self._end_timer()
        if not self._keep_alive:
            self._close()
            return
        self._state = _State.WAITING
        if self._early:
            early, self._early = self._early, b""
            self._parser.feed(early)
        self._advance()
        if self._state is _State.WAITING and self._stopping:  # said while a thread had it
            self.stop()
        if self._state is not _State.LENT and not self._transport.is_closing():
            self._transport.resume_reading()

    def _close(self) -> None:
        self._state = _State.ENDING
        if self._transport.is_closing():
            return
        if self._at_end or not self._parser.unread or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._transport.write_eof()
        self._transport.resume_reading()
        self._set_timer(deadline.REST_SECONDS, self._transport.abort)

    def _set_timer(self, seconds: float, then: Callable[[], object]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._gateway.loop.call_later(seconds, then)

    def _end_timer(self) -> None:
        self._phase = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
