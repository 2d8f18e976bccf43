"""The server in one process: connections on an event loop, complete requests in threads.

* What is idle or arriving holds a file descriptor and its bytes, and no thread
  (:mod:`hsmwrap.http.connection`).
* Complete requests wait for one of the threads; where too many wait, the next is refused.
* The pages for machines do not wait for these threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import resource
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING

from hsmwrap.errors import ServiceUnavailable
from hsmwrap.http import deadline
from hsmwrap.http.answer import Answer
from hsmwrap.http.connection import Connection, Opening
from hsmwrap.http.parsing import Request
from hsmwrap.http.threads import Threads
from hsmwrap.http.wsgi import Peers, call, environ, failure

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

Tls = Callable[[], ssl.SSLContext]

WAITING_PER_THREAD = 16
"""How many complete requests may wait for each thread."""

_RESERVED_THREADS = 2
_RESERVED_CALLS = 32
_NO_DESCRIPTORS_SECONDS = 0.1

_log = logging.getLogger(__name__)


class Place(Enum):
    """Where a request runs."""

    THREAD = auto()
    """In one of the threads."""
    RESERVED = auto()
    """In a thread for the pages of machines, within :data:`hsmwrap.http.deadline.PAGE_SECONDS`."""
    LOOP = auto()
    """On the event loop: it takes no time and waits for nothing."""


@dataclass(frozen=True)
class Site:
    """What is served at an address.

    Attributes:
        app: The WSGI application.
        max_body: Longest body in bytes.
        read_body: Methods and paths whose body is read before the application is called; with
            others the application sees none, and the connection ends.
        places: Where the requests of some paths run; the others in a thread.
        otherwise: Where the others run.
    """

    app: WSGIApplication
    max_body: int
    read_body: frozenset[tuple[str, bytes]] = frozenset()
    places: Mapping[bytes, Place] = field(default_factory=dict)
    otherwise: Place = Place.THREAD


@dataclass(frozen=True, slots=True)
class Limits:
    """How many connections one process keeps open.

    Attributes:
        connections: In all; never more than half of the file descriptors that the process may have.
        connections_per_address: From one client address; 0: as many as in all. An IPv6 address
            counts by its first 64 bits, which is what one client gets.
    """

    connections: int = 1000
    connections_per_address: int = 500


class Connections:
    """The open connections of this process, and the limits for them.

    Where a limit is reached, the connection that has waited longest makes room: one that is idle,
    or whose request has not arrived. So a client that opens connections and sends no whole
    request cannot keep others out, not even others behind the same address.
    """

    def __init__(self, limits: Limits) -> None:
        """Take the limits."""
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = min(limits.connections, descriptors // 2)
        self._most_per_address = limits.connections_per_address or self._most
        self._open: set[Connection] = set()
        self._empty = asyncio.Event()
        self._count: Counter[str] = Counter()
        # Dictionaries, for they keep the order: the longest waiting is first.
        self._waiting: dict[Connection, None] = {}
        self._waiting_by_address: dict[str, dict[Connection, None]] = {}

    async def none_left(self) -> None:
        """Return when the last connection has ended."""
        while self._open:
            self._empty.clear()
            await self._empty.wait()

    def __iter__(self) -> Iterator[Connection]:
        return iter(tuple(self._open))

    def make_room(self, address_key: str) -> bool:
        """Make room for one more connection; False if all are being served."""
        if address_key and self._count[address_key] >= self._most_per_address:
            return self._evict_first(self._waiting_by_address.get(address_key, {}))
        return len(self._open) < self._most or self._evict_first(self._waiting)

    def add(self, connection: Connection) -> None:
        """A new connection, which waits for its client."""
        self._open.add(connection)
        self._count[connection.address_key] += 1
        self.wait(connection)

    def wait(self, connection: Connection) -> None:
        """The connection waits for its client, from now on."""
        if connection in self._open:
            self.serve(connection)
            self._waiting[connection] = None
            self._waiting_by_address.setdefault(connection.address_key, {})[connection] = None

    def serve(self, connection: Connection) -> None:
        """The connection does not wait: a request of it is being served."""
        self._waiting.pop(connection, None)
        of_address = self._waiting_by_address.get(connection.address_key, {})
        of_address.pop(connection, None)
        if not of_address:
            self._waiting_by_address.pop(connection.address_key, None)

    def remove(self, connection: Connection) -> None:
        """The connection is closed, or will be at once. Safe to call again."""
        if connection in self._open:
            self.serve(connection)
            self._open.remove(connection)
            self._count[connection.address_key] -= 1
            self._count += Counter()  # drops what counts nothing
            if not self._open:
                self._empty.set()

    def evict_longest_waiting(self) -> bool:
        """End the connection that has waited longest; False if none waits."""
        return self._evict_first(self._waiting)

    def _evict_first(self, waiting: Mapping[Connection, None]) -> bool:
        connection = next(iter(waiting), None)
        if connection is None:
            return False
        self.remove(connection)
        connection.evict()
        return True


class Gateway:
    """Accepts connections and runs their requests. Only for the thread of the event loop.

    Attributes:
        loop: The event loop.
        connections: Those that are open.
        served: How many requests a thread took or will take; pages and what is refused before do
            not count.
        last_requests: True: each answer ends its connection.
    """

    def __init__(self, *, threads: int, limits: Limits, loop: asyncio.AbstractEventLoop) -> None:
        """Start nothing yet.

        Args:
            threads: How many requests run at a time, at most.
            limits: For the connections.
            loop: The event loop.
        """
        self.loop = loop
        self.connections = Connections(limits)
        self.served = 0
        self.last_requests = False
        self._threads = Threads(threads, threads * (1 + WAITING_PER_THREAD), "request", loop)
        self._reserved = Threads(_RESERVED_THREADS, _RESERVED_CALLS, "page", loop)
        self._listeners: list[socket.socket] = []
        self._stopped = False

    def listen(self, listener: socket.socket, site: Site, tls: Tls | None = None) -> None:
        """Accept the connections of a listening socket, which the caller closes.

        ``tls`` makes what the next connection is encrypted with; None: nothing is encrypted.
        """
        listener.settimeout(0)
        self._listeners.append(listener)
        self.loop.add_reader(listener, self._accept, listener, site, tls)

    async def stop(self, seconds: float, idle_seconds: float = 0) -> None:
        """Accept no more connections, and finish what runs, for at most ``seconds``.

        Idle connections end after ``idle_seconds``: a client that sends just then would get no
        answer. Until then their next answer ends them.
        """
        self._stopped = self.last_requests = True
        for listener in self._listeners:
            self.loop.remove_reader(listener)
        if idle_seconds:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.connections.none_left(), idle_seconds)
        for connection in self.connections:
            connection.stop()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.connections.none_left(), seconds)

    def close(self) -> None:
        """Drop the calls that no thread has taken yet."""
        for threads in (self._threads, self._reserved):
            threads.close()

    def call(
        self, site: Site, request: Request, peers: Peers, done: Callable[[Answer], None]
    ) -> None:
        """Run a complete request; ``done`` gets the answer, once."""
        if request.method == "HEAD":
            answered = done

            def done(answer: Answer) -> None:
                answered(replace(answer, body=b""))

        place = _place(site, request)
        if place is Place.LOOP:
            done(call(site.app, environ(request, peers)))
            return
        reserved = place is Place.RESERVED
        threads = self._reserved if reserved else self._threads
        if not threads.free:
            done(failure(ServiceUnavailable("too many requests wait for a thread")))
            return
        self.served += not reserved
        late: asyncio.TimerHandle | None = None

        def expire() -> None:
            nonlocal done
            done(failure(ServiceUnavailable("the answer did not come in time")))
            done = _ignore

        def finish(answer: Answer) -> None:
            if late is not None:
                late.cancel()
            done(answer)

        if reserved:
            late = self.loop.call_later(deadline.PAGE_SECONDS, expire)
        threads.run(partial(call, site.app, environ(request, peers)), finish if reserved else done)

    @property
    def is_idle(self) -> bool:
        """Whether no thread has a request, and none waits for one."""
        return self._threads.running == 0

    @staticmethod
    def runs_in_thread(site: Site, request: Request) -> bool:
        """Whether this is a request for one of the threads, and its answer goes out as it is."""
        return _place(site, request) is Place.THREAD and request.method != "HEAD"

    def lend(
        self, work: Callable[[Callable[[], bool]], None], done: Callable[[Answer | None], None]
    ) -> None:
        """Have a thread do this for a connection, while :attr:`is_idle`.

        ``work`` gets what tells whether it is still the only one; ``done`` gets the answer of an
        error.
        """
        self.served += 1
        self._threads.run(partial(work, lambda: self._threads.running == 1), done)

    # --- accepting

    def _accept(self, listener: socket.socket, site: Site, tls: Tls | None) -> None:
        # One at a time: a process that takes all that wait leaves none to the others. Of 16 that
        # came together one of two processes took 15 or 16, and now takes 8 to 12.
        try:
            client, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return
        except OSError as error:
            _log.warning("no connection accepted", extra={"errno": error.errno})
            self.connections.evict_longest_waiting()
            self._pause(listener, site, tls)
            return
        self._open(client, address, site, tls)

    def _pause(self, listener: socket.socket, site: Site, tls: Tls | None) -> None:
        """Accept nothing for a moment, for the socket stays readable."""
        self.loop.remove_reader(listener)

        def resume() -> None:
            if not self._stopped:
                self.loop.add_reader(listener, self._accept, listener, site, tls)

        self.loop.call_later(_NO_DESCRIPTORS_SECONDS, resume)

    def _open(self, client: socket.socket, address: object, site: Site, tls: Tls | None) -> None:
        host, port = address[:2] if isinstance(address, tuple) else ("", 0)
        own = client if tls is None else None
        connection = Connection(self, site, (host, port), address_key(host), own)
        if not self.connections.make_room(connection.address_key):
            client.close()
            return
        client.settimeout(0)
        opening = self.loop.create_task(
            self.loop.connect_accepted_socket(
                lambda: connection,
                client,
                ssl=None if tls is None else tls(),
                ssl_handshake_timeout=None if tls is None else deadline.HEAD_SECONDS,
                ssl_shutdown_timeout=None if tls is None else deadline.REST_SECONDS,
            )
        )
        opening.add_done_callback(partial(self._opened, client, connection))
        connection.opening = opening
        self.connections.add(connection)

    def _opened(self, client: socket.socket, connection: Connection, opening: Opening) -> None:
        if opening.cancelled() or opening.exception():  # evicted; gone, or no TLS
            self.connections.remove(connection)
            client.close()


def address_key(host: str) -> str:
    """What the limit per address counts by: the address, or the first 64 bits of IPv6."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def _place(site: Site, request: Request) -> Place:
    return site.places.get(request.path, site.otherwise)


def _ignore(_answer: Answer) -> None:
    pass
