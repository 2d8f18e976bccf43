"""The load generator: prepared requests over persistent connections, from a process of its own.

One thread waits for all connections together and does little for an answer, so that the server and
not its clients is what is measured. The processor time that it took is part of the result.
"""

from __future__ import annotations

import re
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

_DEADLINE = 60
_LENGTH = re.compile(rb"\r\nContent-Length: *(\d+)\r\n", re.IGNORECASE)


class Failed(Exception):
    """A request was not answered with 200, or a wait timed out."""


@dataclass(frozen=True, slots=True)
class Burst:
    """Seconds of each call of a burst, of the whole burst, and of the clients' processor time."""

    seconds: list[float]
    elapsed: float
    client_cpu: float = 0.0

    @property
    def rate(self) -> float:
        """Calls per second."""
        return len(self.seconds) / self.elapsed


Send = Callable[[int, Sequence[Sequence[bytes]]], Burst]
"""Sends requests to a port, each sequence over one connection, one after another."""


@contextmanager
def generator() -> Iterator[Send]:
    """Start the process of the clients."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        yield lambda port, requests: process.submit(_send, port, requests).result()


class _Client:
    """One connection, and what it still has to send."""

    def __init__(self, port: int, requests: Sequence[bytes]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=_DEADLINE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._waiting = iter(requests)
        self._answer = b""
        self._sent = 0.0
        self.seconds: list[float] = []

    def send(self) -> bool:
        """Send the next request; False if there is none."""
        request = next(self._waiting, None)
        if request is None:
            return False
        self._sent = time.perf_counter()
        self.socket.sendall(request)
        return True

    def receive(self) -> bool:
        """Take what came of an answer; True if it is whole."""
        received = self.socket.recv(65_536)
        if not received:
            raise Failed("the server ended a connection")
        self._answer += received
        head, found, body = self._answer.partition(b"\r\n\r\n")
        length = _LENGTH.search(head + b"\r\n")
        if not found or length is None or len(body) < int(length[1]):
            return False
        self.seconds.append(time.perf_counter() - self._sent)
        if not head.startswith(b"HTTP/1.1 200 "):
            raise Failed(f"{head.splitlines()[0]!r}: {body!r}")
        self._answer = b""
        return True


def _send(port: int, requests: Sequence[Sequence[bytes]]) -> Burst:
    clients: Mapping[int, _Client] = {
        each.socket.fileno(): each for each in (_Client(port, mine) for mine in requests)
    }
    try:
        with selectors.EpollSelector() as selector:
            for descriptor in clients:
                selector.register(descriptor, selectors.EVENT_READ)
            started, cpu = time.perf_counter(), time.process_time()
            sending = sum(client.send() for client in clients.values())
            while sending:
                ready = selector.select(_DEADLINE)
                if not ready:
                    raise Failed("no answer came")
                for key, _ in ready:
                    client = clients[key.fd]
                    if client.receive() and not client.send():
                        selector.unregister(key.fd)
                        sending -= 1
            elapsed = time.perf_counter() - started
    finally:
        for client in clients.values():
            client.socket.close()
    seconds = [each for client in clients.values() for each in client.seconds]
    return Burst(seconds, elapsed, time.process_time() - cpu)
