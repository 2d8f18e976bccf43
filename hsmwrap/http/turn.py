"""A turn: a thread answers the requests of one connection in a row, without the event loop between.

To hand a request to a thread and its answer back takes two wake-ups, as long as the request itself
takes where the key is open. So a request that is the only one is answered by its thread, which then
waits a moment for the next request of this client. Where others come, they take the way over the
event loop.

The connection belongs to the turn meanwhile: the event loop neither reads it nor writes to it. All
that a turn does not know goes back to the event loop: a request that is not whole, a page for
machines, an answer that the client does not take at once, the end of the connection.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable

from hsmwrap.http.answer import Answer
from hsmwrap.http.parsing import Request, RequestParser

PAUSE_MILLISECONDS = 1
"""How long a turn waits for the next request."""

MOST_REQUESTS = 100
"""How many requests a turn answers: the event loop counts them at its end."""

_LARGEST_READ = 65_536


class Turn:
    """The turn of one connection, in a thread.

    Attributes:
        served: How many requests were answered, or are being answered.
        unsent: What the client did not take at once.
        keep_alive: Whether the connection may be kept after the last answer.
        answering: Whether a request is without an answer.
    """

    def __init__(
        self,
        client: socket.socket,
        parser: RequestParser,
        serve: Callable[[Request], Answer],
        is_ours: Callable[[Request], bool],
        goes_on: Callable[[], bool],
    ) -> None:
        """Begin nothing yet.

        Args:
            client: The connection, which does not block.
            parser: Of its requests.
            serve: Runs a request.
            is_ours: Whether a request may be answered here.
            goes_on: Whether an answer may keep the connection.
        """
        self._client = client
        self._parser = parser
        self._serve = serve
        self._is_ours = is_ours
        self._goes_on = goes_on
        self.served = 0
        self.unsent = b""
        self.keep_alive = True
        self.answering = False

    def run(self, request: Request, is_alone: Callable[[], bool]) -> None:
        """Answer this request, and those that follow it at once while it is the only one."""
        ready = select.poll()
        ready.register(self._client, select.POLLIN)
        try:
            while True:
                self._answer(request)
                del request  # what waits keeps no request
                if self.unsent or not self.keep_alive or self.served >= MOST_REQUESTS:
                    return
                if not (is_alone() and ready.poll(PAUSE_MILLISECONDS)):
                    return
                found = self._next()
                if found is None:
                    return
                request = found
        except OSError:  # the client is gone
            self.keep_alive = False

    def _answer(self, request: Request) -> None:
        self.served += 1
        self.keep_alive = request.keep_alive
        self.answering = True
        answer = self._serve(request)
        self.answering = False
        self.keep_alive &= self._goes_on()
        encoded = answer.encoded(keep_alive=self.keep_alive)
        try:
            sent = self._client.send(encoded)
        except BlockingIOError:
            sent = 0
        self.unsent = encoded[sent:]

    def _next(self) -> Request | None:
        """The next request if it is whole, the only one, and to be answered here."""
        received = self._client.recv(_LARGEST_READ)
        if not received:  # the event loop sees it again
            return None
        parser = self._parser
        parser.feed(received)
        if len(parser.requests) != 1 or not self._is_ours(parser.requests[0]):
            return None
        return parser.requests.popleft()
