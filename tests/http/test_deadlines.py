"""Stalled clients: none holds a thread for longer than its deadline."""

from __future__ import annotations

import re
import select
import socket
import time
from contextlib import ExitStack, suppress
from unittest import mock

import pytest
from support.http.gunicorn_fake import THREADS
from support.http.gunicorn_runner import DEADLINE, running
from test_gunicorn import FAKE, get, parse, post

from hsmwrap.http import deadline
from hsmwrap.http.deadline import TimedUnreader
from hsmwrap.http.worker import KmsWorker, ThreadWorker

SECONDS = "0.3"
HEALTHZ = get("", "/healthz")


def kept(raw: bytes) -> bytes:
    return raw.replace(b"Connection: close", b"Connection: keep-alive", 1)


STALLS = {
    "request line": b"GET / HT",
    "head": b"GET / HTTP/1.1\r\nHost: h\r\nX-Half:",
    "second head": kept(HEALTHZ) + b"GET / HT",
    "body": kept(post(b"A=", "Content-Length: 10000")),
    "chunk size": kept(post(b"1", "Transfer-Encoding: chunked")),
    "chunk": kept(post(b"2710\r\nA=", "Transfer-Encoding: chunked")),
}


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fake")
    with running([*FAKE, "1", str(directory), SECONDS], directory / "log") as process:
        yield process


@pytest.fixture
def connect(fake):
    with ExitStack() as connections:

        def connect(first: bytes) -> socket.socket:
            connection = socket.create_connection(("127.0.0.1", fake.port), timeout=DEADLINE)
            connections.enter_context(connection).sendall(first)
            return connection

        yield connect


def read_all(connection: socket.socket) -> bytes:
    answer = b""
    # A client that sends after the server's end is reset, after all that the server sent.
    with suppress(ConnectionResetError):
        while received := connection.recv(65536):
            answer += received
    return answer


def read_page(connection: socket.socket) -> None:
    """Read the answer of /healthz."""
    answer = b""
    while not answer.endswith(b"}"):
        answer += connection.recv(65536)
    assert b"200 OK" in answer


def assert_late(process, answers: bytes) -> None:
    """The last answer on the connection, which is closed after it."""
    last = b"HTTP/1.1 " + answers.split(b"HTTP/1.1 ")[-1]
    status, fields = parse(last)
    assert (status, fields["Code"]) == (408, "RequestTimeout")
    assert re.search(rb"(?i)\r\nconnection: close\r\n", last)
    assert f'"request_id": "{fields["RequestId"]}"' in process.log_text()


@pytest.mark.parametrize("first", STALLS.values(), ids=STALLS)
def test_stalled_requests_end(fake, connect, first):
    stalled = [connect(first) for _ in range(2 * THREADS)]
    assert parse(fake.exchange(HEALTHZ))[0] == 200
    for connection in stalled:
        assert_late(fake, read_all(connection))


@pytest.mark.parametrize("first", STALLS.values(), ids=STALLS)
def test_dripping_requests_end(fake, connect, first):
    """A byte now and then does not extend the deadline."""
    connection = connect(first)
    if first.startswith(kept(HEALTHZ)):
        read_page(connection)
    give_up = time.monotonic() + DEADLINE
    while not select.select([connection], [], [], 0.02)[0]:
        assert time.monotonic() < give_up
        connection.sendall(b"0")
    assert_late(fake, read_all(connection))


def test_a_body_that_nobody_waits_for(fake, connect):
    """It is answered before its body has arrived; a second answer would be wrong."""
    raw = post(b"", "Content-Length: 100").replace(b"/ ", b"/none ", 1)
    assert parse(read_all(connect(kept(raw))))[0] == 404


def test_silent_connections_hold_no_thread(fake, connect):
    silent = [connect(b"") for _ in range(100)]
    assert parse(fake.exchange(HEALTHZ))[0] == 200
    silent[0].sendall(HEALTHZ)
    assert parse(read_all(silent[0]))[0] == 200


def test_idle_connections_hold_no_thread(fake, connect):
    for connection in [connect(kept(HEALTHZ)) for _ in range(2 * THREADS)]:
        read_page(connection)
    assert parse(fake.exchange(HEALTHZ))[0] == 200


def test_answers_have_a_deadline():
    """Python's sendall ends at the socket's timeout, even if the client reads slowly."""
    server, client = socket.socketpair()
    seen = []

    def answer(_self, _request, connection):
        seen.append(connection.sock.gettimeout())

    with server, client, mock.patch.object(ThreadWorker, "handle_request", answer):
        connection = mock.Mock(sock=server, parser=mock.Mock(unreader=TimedUnreader(server)))
        KmsWorker.__new__(KmsWorker).handle_request(mock.Mock(), connection)
    assert seen == [deadline.ANSWER_SECONDS]


def test_closing_waits_for_no_client():
    """gunicorn would wait for its end of the connection, in the thread that accepts all others."""
    server, client = socket.socketpair()
    with server, client, mock.patch.object(ThreadWorker, "handle", return_value=False):
        assert not KmsWorker.__new__(KmsWorker).handle(mock.Mock(sock=server))
        assert server.recv(1, socket.MSG_DONTWAIT) == b""
