"""Deadlines for reading requests and sending answers, so that slow clients cannot hold threads.

A socket timeout restarts with each byte; a deadline does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from gunicorn.http.unreader import SocketUnreader

from hsmwrap.http.errors import RequestTimeout

SILENT_SECONDS = 0.1
"""How long a new, silent connection holds a thread; after that it waits without one."""

HEAD_SECONDS = 10.0
"""Limit for request line and header fields, from the first byte."""

BODY_SECONDS = 30.0
"""Limit for a body, from the end of the head."""

ANSWER_SECONDS = 30.0
"""Limit for the client to accept an answer."""

REST_SECONDS = 5.0
"""Limit for the rest of a body, if the request was answered without reading it."""


class TimedUnreader(SocketUnreader):
    """gunicorn's reader of a connection, with a deadline for each head and each body."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Take the arguments of gunicorn's reader; starts with the deadline of a head."""
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # passed through to gunicorn
        self.await_head()

    def await_head(self) -> None:
        """Set the deadline of the next head: :data:`HEAD_SECONDS` from now."""
        self._await(HEAD_SECONDS, _too_late)

    def await_body(self, close: Callable[[], None]) -> None:
        """Set the deadline of a body: :data:`BODY_SECONDS` from now; if missed, calls ``close``."""

        def too_late() -> Exception:
            close()
            return _too_late()

        self._await(BODY_SECONDS, too_late)

    def await_rest(self) -> None:
        """Set the deadline of the rest of an answered request: :data:`REST_SECONDS` from now."""
        self._await(REST_SECONDS, TimeoutError)

    def chunk(self, _size_hint: int | None = None) -> bytes:
        """The next bytes; empty at the end of the connection.

        Raises:
            RequestTimeout: No bytes arrived before the deadline.
            TimeoutError: The same, if the request was answered already.
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
