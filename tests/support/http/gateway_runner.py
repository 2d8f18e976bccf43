"""A gateway on an event loop of its own thread, around any WSGI application."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hsmwrap.http.gateway import Gateway, Limits, Site

DEADLINE = 30
EVERY_BODY = frozenset((method, path) for method in ("GET", "POST") for path in (b"/", b"/big"))


class Running:
    def __init__(self, site: Site, threads: int, limits: Limits, tls) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.listener.getsockname()[1]
        self.loop = asyncio.new_event_loop()
        self.gateway = Gateway(threads=threads, limits=limits, loop=self.loop)
        self.gateway.listen(self.listener, site, tls and (lambda: tls))
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self._clients = contextlib.ExitStack()

    def connect(self, sent: bytes = b"", source: str = "127.0.0.1", **options) -> socket.socket:
        """A client that has sent something, closed at the end of the test."""
        client = self._clients.enter_context(socket.socket(**options))
        client.settimeout(DEADLINE)
        client.bind((source, 0))
        client.connect(("127.0.0.1", self.port))
        client.sendall(sent)
        return client

    def stop(self, seconds: float = DEADLINE, idle_seconds: float = 0):
        stopping = self.gateway.stop(seconds, idle_seconds)
        return asyncio.run_coroutine_threadsafe(stopping, self.loop)

    def close(self) -> None:
        self._clients.close()
        self.stop().result(DEADLINE)
        self.gateway.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(DEADLINE)
        self.loop.close()
        self.listener.close()


@contextmanager
def serving(
    app, *, threads=2, limits=None, max_body=1000, places=None, tls=None
) -> Iterator[Running]:
    site = Site(app, max_body, EVERY_BODY, places or {})
    running = Running(site, threads, limits or Limits(), tls)
    try:
        yield running
    finally:
        running.close()


def get(path: str = "/", *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: h", *headers, "", ""]).encode()


def read_answer(client: socket.socket) -> tuple[int, bytes]:
    """One answer of a connection, and nothing of what follows it: status and body."""
    head = _read(client, lambda seen: seen.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in seen else 0)
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    body = b""
    while len(body) < int(fields[b"content-length"]):
        body += client.recv(int(fields[b"content-length"]) - len(body))
    return int(head.split()[1]), body


def _read(client: socket.socket, length) -> bytes:
    seen = b""
    while not length(seen):
        before, seen = seen, client.recv(65536, socket.MSG_PEEK)
        assert seen, "closed"
        if seen == before:
            time.sleep(0.001)
    return client.recv(length(seen))


def is_silent(client: socket.socket) -> bool:
    """Whether the server has neither sent anything more nor closed."""
    client.settimeout(0)
    try:
        client.recv(1)
    except BlockingIOError:
        return True
    finally:
        client.settimeout(DEADLINE)
    return False


def ends(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := client.recv(65536):
            received += chunk
    return received
