"""Deadlines for what a client sends and takes, so that none keeps a thread for as long as it likes.

A timeout of the socket starts anew with each byte; a deadline does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from gunicorn.http.unreader import SocketUnreader

from hsmwrap.http.errors import RequestTimeout

SILENT_SECONDS = 0.1
"""How long a new connection that sends nothing keeps a thread; then it waits without one."""

HEAD_SECONDS = 10.0
"""How long request line and header fields may take, from the first byte on."""

BODY_SECONDS = 30.0
"""How long a body may take, from the end of the head on."""

ANSWER_SECONDS = 30.0
"""How long a client may take to accept an answer."""

REST_SECONDS = 5.0
"""How long the rest of a body may take that was answered without being read."""


class TimedUnreader(SocketUnreader):
    """gunicorn's reader of a connection, with a deadline for each head and each body."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Take what gunicorn gives its own reader; a head is awaited."""
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # gunicorn's business
        self.await_head()

    def await_head(self) -> None:
        """Give the next head :data:`HEAD_SECONDS` from now."""
        self._await(HEAD_SECONDS, _too_late)

    def await_body(self, close: Callable[[], None]) -> None:
        """Give a body :data:`BODY_SECONDS` from now; ``close`` is called when they are over."""

        def too_late() -> Exception:
            close()
            return _too_late()

        self._await(BODY_SECONDS, too_late)

    def await_rest(self) -> None:
        """Give what is left of an answered request :data:`REST_SECONDS` from now."""
        self._await(REST_SECONDS, TimeoutError)

    def chunk(self, _size_hint: int | None = None) -> bytes:
        """The next bytes; none at the end of the connection.

        Raises:
            RequestTimeout: They did not come in time.
            TimeoutError: The same, where the request is answered already.
        """
        timeout = self.sock.gettimeout()
        try:
            return self._receive(self._deadline - time.monotonic())
        except TimeoutError:
            raise self._late() from None
        finally:
            self.sock.settimeout(timeout)

    def _await(self, seconds: float, late: Callable[[], Exception]) -> None:
        self._deadline, self._late = time.monotonic() + seconds, late

    def _receive(self, seconds: float) -> bytes:
        if seconds <= 0:
            raise TimeoutError
        self.sock.settimeout(seconds)
        return self.sock.recv(self.mxchunk)


def _too_late() -> Exception:
    return RequestTimeout("the request did not arrive in time")
