"""Stalled clients: none holds a thread for longer than its deadline."""

from __future__ import annotations

import re
import select
import socket
import time
from contextlib import ExitStack, suppress

import pytest
from support.http.gunicorn_fake import THREADS
from support.http.gunicorn_runner import DEADLINE, running
from test_gunicorn import FAKE, get, parse, post, signed, wait_for

SECONDS = "0.3"
HEALTHZ = get("", "/healthz")


def kept(raw: bytes) -> bytes:
    return raw.replace(b"Connection: close", b"Connection: keep-alive", 1)


STALLS = {
    "request line": b"GET /",
    "head": b"GET / HTTP/1.1\r\nHost: h\r\nX-Half:",
    "second head": kept(HEALTHZ) + b"GET /",
    "body": kept(post(b"A=", "Content-Length: 10000")),
    "chunk size": kept(post(b"1;", "Transfer-Encoding: chunked")),
    "chunk": kept(post(b"2710\r\nA=", "Transfer-Encoding: chunked")),
}


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fake")
    with running([*FAKE, "1", str(directory), SECONDS], directory / "log") as process:
        yield process


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """A server whose deadlines are longer than a test."""
    directory = tmp_path_factory.mktemp("patient")
    with running([*FAKE, "1", str(directory), str(2 * DEADLINE)], directory / "log") as process:
        yield process


@pytest.fixture
def connect(request):
    with ExitStack() as connections:

        def connect(first: bytes, port: int = 0) -> socket.socket:
            port = port or request.getfixturevalue("fake").port
            connection = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
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


@pytest.mark.parametrize("many", [16, 64, 200])
@pytest.mark.parametrize("first", STALLS.values(), ids=STALLS)
def test_stalled_requests_delay_no_other(patient, connect, first, many):
    """What else is asked is answered while they are still arriving, long before their deadline."""
    stalled = [connect(first, patient.port) for _ in range(many)]
    if first.startswith(kept(HEALTHZ)):
        for connection in stalled:
            read_page(connection)
    assert parse(patient.exchange(HEALTHZ))[0] == 200
    assert parse(patient.exchange(get(signed("Encrypt", Plaintext="text"))))[1]["Length"] == 4
    assert select.select(stalled, [], [], 0)[0] == []


def test_pages_are_answered_while_all_threads_are_busy(tmp_path, connect):
    with running([*FAKE, "1", str(tmp_path)], tmp_path / "log") as process, ExitStack() as end:
        end.callback((tmp_path / "release").touch)
        busy = [connect(get(signed("Wait")), process.port) for _ in range(2 * THREADS)]
        wait_for(tmp_path / "started")
        for _ in range(3):
            assert parse(process.exchange(HEALTHZ))[0] == 200
            # The application's own answer: this KMS cannot say how it is.
            assert parse(process.exchange(get("", "/readyz")))[0] == 500
            assert b"200 OK" in process.exchange(get("", "/metrics"), process.metrics_port)
        assert select.select(busy, [], [], 0)[0] == []
        end.close()
        assert {parse(read_all(connection))[0] for connection in busy} == {200}
