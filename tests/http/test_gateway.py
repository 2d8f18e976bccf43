"""The gateway over sockets: limits of connections, what runs where, and how connections go on."""

from __future__ import annotations

import asyncio
import errno
import json
import re
import socket
import ssl
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from support.http.gateway_runner import DEADLINE, ends, get, is_silent, read_answer, serving

from hsmwrap.http import deadline
from hsmwrap.http.gateway import (
    _RESERVED_CALLS,
    WAITING_PER_THREAD,
    Gateway,
    Limits,
    Place,
    Site,
    address_key,
)
from hsmwrap.http.parsing import Phase

HALF = b"GET / HTTP/1.1\r\nHost: h\r\nX-Half:"
HALF_BODY = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nA="


class Application:
    """Answers /big with a megabyte, /wait when it is told to, and others with their environment."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.release_more = threading.Event()
        self.started = threading.Semaphore(0)

    def __call__(self, environ, start_response):
        path = environ["PATH_INFO"]
        if path in {"/wait", "/wait-more"}:
            self.started.release()
            (self.release if path == "/wait" else self.release_more).wait(DEADLINE)
        if path == "/exit":
            raise SystemExit
        if path == "/raise":
            raise RuntimeError(environ["QUERY_STRING"])
        told = {n: v for n, v in environ.items() if isinstance(v, str)}
        told["body"] = environ["wsgi.input"].read().decode()
        body = b"x" * 1_000_000 if path == "/big" else json.dumps(told).encode()
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [body]


@pytest.fixture
def app():
    app = Application()
    yield app
    app.release.set()
    app.release_more.set()


def answered(running, sent=None, **options) -> dict:
    status, body = read_answer(running.connect(sent or get(), **options))
    assert status == 200
    return json.loads(body)


def until(condition) -> None:
    give_up = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def until_arriving(running) -> None:
    until(lambda: any(c._parser.phase is not Phase.IDLE for c in running.gateway.connections))


# --- limits


def test_at_the_limit_of_an_address_its_longest_waiting_connection_makes_room(app):
    with serving(app, limits=Limits(connections_per_address=3)) as running:
        clients = [running.connect() for _ in range(3)]
        answered(running)
        assert ends(clients[0]) == b""
        assert [is_silent(client) for client in clients[1:]] == [True, True]


@pytest.mark.parametrize("half", [HALF, HALF_BODY])
def test_a_request_that_was_arriving_is_told_why_it_ends(app, half):
    with serving(app, limits=Limits(connections_per_address=1)) as running:
        client = running.connect(half)
        until_arriving(running)
        answered(running)
        received = ends(client)
    assert b" 429 " in received.split(b"\r\n")[0]
    assert json.loads(received.partition(b"\r\n\r\n")[2])["Code"] == "Throttling.Connections"


def test_a_connection_that_is_used_is_not_the_longest_waiting(app):
    with serving(app, limits=Limits(connections_per_address=2)) as running:
        used, idle = running.connect(), running.connect()
        used.sendall(get())
        read_answer(used)
        answered(running)
        assert ends(idle) == b""
        assert is_silent(used)


def test_requests_that_are_served_make_no_room(app):
    with serving(app, limits=Limits(connections_per_address=2)) as running:
        served = [running.connect(get("/wait")) for _ in range(2)]
        for _ in served:
            assert app.started.acquire(timeout=DEADLINE)
        assert ends(running.connect()) == b""
        app.release.set()
        assert [read_answer(client)[0] for client in served] == [200, 200]


def test_addresses_are_counted_apart(app):
    with serving(app, limits=Limits(connections_per_address=1)) as running:
        client = running.connect()
        answered(running, source="127.0.0.2")
        assert is_silent(client)


def test_the_limit_of_all_addresses(app):
    with serving(app, limits=Limits(connections=2, connections_per_address=0)) as running:
        first, second = running.connect(source="127.0.0.2"), running.connect(source="127.0.0.3")
        answered(running)
        assert ends(first) == b""
        assert is_silent(second)


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
    ],
)
def test_what_is_one_address(one, other, together):
    assert (address_key(one) == address_key(other)) is together


def test_a_unix_socket_has_no_address_to_count_by():
    assert address_key("") == ""


def test_without_file_descriptors_a_waiting_connection_makes_room(app, monkeypatch):
    monkeypatch.setattr(deadline, "IDLE_SECONDS", 3600.0)  # that does not end it
    with serving(app) as running:
        client = running.connect(get())
        read_answer(client)
        until(lambda: running.gateway.is_idle)  # no thread has the connection any more
        accept, failures = socket.socket.accept, [OSError(errno.EMFILE, "")]

        def failing(listener):
            if failures:
                raise failures.pop()
            return accept(listener)

        monkeypatch.setattr(socket.socket, "accept", failing)
        answered(running)
        assert ends(client) == b""


# --- where requests run


def test_requests_beyond_what_may_wait_are_refused(app):
    with serving(app, threads=1) as running:
        clients = [running.connect(get("/wait")) for _ in range(1 + WAITING_PER_THREAD)]
        assert app.started.acquire(timeout=DEADLINE)
        until(lambda: running.gateway.served == len(clients))
        status, body = read_answer(running.connect(get()))
        assert (status, json.loads(body)["Code"]) == (503, "ServiceUnavailableTemporary")
        app.release.set()
        assert {read_answer(client)[0] for client in clients} == {200}
        answered(running)


@pytest.mark.parametrize("place", [Place.LOOP, Place.RESERVED])
def test_pages_need_no_thread_of_the_requests(app, place):
    with serving(app, threads=1, places={b"/page": place}) as running:
        busy = running.connect(get("/wait"))
        assert app.started.acquire(timeout=DEADLINE)
        answered(running, get("/page"))
        assert is_silent(busy)
        app.release.set()


def test_only_requests_of_the_threads_count(app):
    """For max_requests: probes, and what no thread takes, replace no worker."""
    places = {b"/loop": Place.LOOP, b"/reserved": Place.RESERVED}
    with serving(app, threads=1, places=places) as running:
        for page in ("/loop", "/reserved"):
            answered(running, get(page))
        assert running.gateway.served == 0
        waiting = [running.connect(get("/wait")) for _ in range(1 + WAITING_PER_THREAD)]
        until(lambda: running.gateway.served == len(waiting))
        assert read_answer(running.connect(get()))[0] == 503
        assert running.gateway.served == len(waiting)
        app.release.set()


def test_a_call_that_ends_its_thread_is_answered_and_the_thread_goes_on(app):
    with serving(app, threads=1) as running:
        client = running.connect(get("/exit"))
        assert read_answer(client)[0] == 500
        client.sendall(get())
        assert read_answer(client)[0] == 200


def test_answers_after_one_that_cannot_be_sent_are_sent(app, monkeypatch):
    with serving(app, threads=2) as running:
        threads = running.gateway._threads
        answered = threading.Event()

        def fail(_answer):
            raise RuntimeError

        running.loop.call_soon_threadsafe(
            lambda: threads._ended.extend([(fail, None), (lambda _: answered.set(), None)])
        )
        running.loop.call_soon_threadsafe(threads._take)
        assert answered.wait(DEADLINE)


def test_a_page_that_does_not_come_is_answered(app, monkeypatch):
    monkeypatch.setattr(deadline, "PAGE_SECONDS", 0.1)
    with serving(app, places={b"/wait": Place.RESERVED}) as running:
        client = running.connect(get("/wait"))
        status, body = read_answer(client)
        assert (status, json.loads(body)["Code"]) == (503, "ServiceUnavailableTemporary")
        client.sendall(get("/wait-more"))
        for _ in range(2):
            assert app.started.acquire(timeout=DEADLINE)
        app.release.set()  # the late answer is dropped
        until(lambda: running.gateway._reserved.free == _RESERVED_CALLS)
        app.release_more.set()
        assert json.loads(read_answer(client)[1])["PATH_INFO"] == "/wait-more"


def test_an_application_that_raises(app, caplog):
    with serving(app) as running:
        status, body = read_answer(running.connect(get("/raise?SECRET")))
    assert (status, json.loads(body)["Code"]) == (500, "InternalFailure")
    (record,) = caplog.records
    assert record.exception == "builtins.RuntimeError"
    assert "SECRET" not in str(vars(record))


# --- connections


def test_requests_of_one_connection_are_answered_in_turn(app):
    with serving(app) as running:
        client = running.connect(b"".join(get(f"/{n}") for n in range(3)))
        answers = [json.loads(read_answer(client)[1])["PATH_INFO"] for _ in range(3)]
    assert answers == ["/0", "/1", "/2"]


def test_what_comes_during_an_answer_is_served_after_it(app):
    with serving(app) as running:
        client = running.connect(get("/wait"))
        assert app.started.acquire(timeout=DEADLINE)
        client.sendall(get("/next"))
        app.release.set()
        assert [json.loads(read_answer(client)[1])["PATH_INFO"] for _ in range(2)] == [
            "/wait",
            "/next",
        ]


def test_what_precedes_a_broken_request_is_answered(app):
    with serving(app) as running:
        client = running.connect(get() + b"SECRET\r\n\r\n")
        assert read_answer(client)[0] == 200
        assert b" 400 " in ends(client).split(b"\r\n")[0]


@pytest.mark.parametrize("alone", [True, False])
def test_a_client_that_closed_its_side_is_answered(app, alone):
    """Alone, it has a thread; else the event loop sees the end while the request runs."""
    with serving(app) as running:
        if not alone:
            running.connect(get("/wait"))
            assert app.started.acquire(timeout=DEADLINE)
        client = running.connect(get("/wait"))
        assert app.started.acquire(timeout=DEADLINE)
        client.shutdown(socket.SHUT_WR)
        until(lambda: alone or any(c._at_end for c in running.gateway.connections))
        app.release.set()
        assert b" 200 " in ends(client).split(b"\r\n")[0]


def test_continue_is_said_before_a_body_that_is_read(app):
    head = b"POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    with serving(app, max_body=10) as running:
        client = running.connect(head % 5)
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"hello")
        assert json.loads(read_answer(client)[1])["body"] == "hello"
        assert read_answer(running.connect(head % 11))[0] == 413


def test_head_has_no_body(app):
    with serving(app) as running:
        client = running.connect(get().replace(b"GET", b"HEAD") + get("/next"))
        received = b""
        while received.count(b"\r\n\r\n") < 2:
            received += client.recv(65536)
    first, _, second = received.partition(b"\r\n\r\n")
    assert b"Content-Length" in first
    assert second.startswith(b"HTTP/1.1 200 OK\r\n")


def test_head_has_no_body_if_the_gateway_answers(app, monkeypatch):
    monkeypatch.setattr(deadline, "PAGE_SECONDS", 0.1)
    with serving(app, places={b"/wait": Place.RESERVED}) as running:
        client = running.connect(get("/wait").replace(b"GET", b"HEAD"))
        received = b""
        while b"\r\n\r\n" not in received:
            received += client.recv(65536)
        app.release.set()
        client.sendall(get("/next"))
        while received.count(b"\r\n\r\n") < 2:
            received += client.recv(65536)
    first, _, second = received.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 503 ")
    assert second.startswith(b"HTTP/1.1 200 OK\r\n")


def test_an_old_client(app):
    with serving(app) as running:
        received = ends(running.connect(b"GET / HTTP/1.0\r\n\r\n"))
    assert b"\r\nConnection: close\r\n" in received


def test_header_fields_say_nothing_about_path_and_client(app):
    fields = ["SCRIPT_NAME: /x", "Script-Name: /x", "PATH_INFO: /y", "X-Forwarded-For: 1.2.3.4"]
    fields += ["X-Forwarded-Proto: https", "X-Forwarded-Prefix: /x", "REMOTE_ADDR: 1.2.3.4"]
    with serving(app) as running:
        told = answered(running, get("/x/page", *fields))
    assert (told["SCRIPT_NAME"], told["PATH_INFO"]) == ("", "/x/page")
    assert (told["REMOTE_ADDR"], told["wsgi.url_scheme"]) == ("127.0.0.1", "http")
    assert "HTTP_REMOTE_ADDR" not in told


def test_an_answer_that_is_not_taken_has_a_deadline(app, monkeypatch):
    monkeypatch.setattr(deadline, "ANSWER_SECONDS", 0.2)
    with serving(app) as running:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with client:
            client.connect(("127.0.0.1", running.port))
            # More than all buffers of the kernel take.
            client.sendall(get("/big") * 10)
            until(lambda: running.gateway.served and not running.gateway.connections._open)


def test_a_big_answer_arrives(app):
    with serving(app) as running:
        assert read_answer(running.connect(get("/big"))) == (200, b"x" * 1_000_000)


def test_closing_waits_for_no_client(app, monkeypatch):
    """One that was refused and goes on sending loses its connection, and holds up no other."""
    monkeypatch.setattr(deadline, "REST_SECONDS", 0.3)
    with serving(app) as running:
        client = running.connect(b"SECRET\r\n\r\n")
        assert b" 400 " in ends(client).split(b"\r\n")[0]
        answered(running)
        with suppress(OSError):
            until(lambda: not client.sendall(b"0" * 1000) and False)
        until(lambda: len(list(running.gateway.connections)) == 1)


# --- TLS


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """Contexts of a server and of a client that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file = tmp_path_factory.mktemp("tls") / "pem"
    file.write_bytes(secret + certificate)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(file)
    return server, ssl.create_default_context(cadata=certificate.decode())


def over_tls(tls, client):
    return tls[1].wrap_socket(client, server_hostname="localhost")


def test_requests_over_tls(app, tls):
    with serving(app, tls=tls[0]) as running, over_tls(tls, running.connect()) as client:
        received = b""
        for path in ("/one", "/big", "/two"):
            client.sendall(get(path))
            while b"HTTP/1.1 200 OK" not in received:
                received += client.recv(65536)
            length = int(received.partition(b"Content-Length: ")[2].split(b"\r\n")[0])
            body = received.partition(b"\r\n\r\n")[2]
            while len(body) < length:
                body += client.recv(65536)
            assert path == "/big" or json.loads(body)["wsgi.url_scheme"] == "https"
            received = b""
        client.sendall(get("/three", "Connection: close"))
        assert b"/three" in ends(client)
        with over_tls(tls, running.connect(source="127.0.0.2")) as refused:
            refused.sendall(b"SECRET\r\n\r\n")
            assert b" 400 " in ends(refused).split(b"\r\n")[0]


def test_a_tls_handshake_has_a_deadline(app, tls, monkeypatch):
    monkeypatch.setattr(deadline, "HEAD_SECONDS", 0.2)
    with serving(app, tls=tls[0]) as running:
        assert ends(running.connect()) == b""
        assert ends(running.connect(get())) == b""


def test_a_tls_handshake_makes_room(app, tls):
    with serving(app, tls=tls[0], limits=Limits(connections_per_address=1)) as running:
        silent = running.connect()
        until(lambda: list(running.gateway.connections))
        with over_tls(tls, running.connect()) as client:
            client.sendall(get("/", "Connection: close"))
            assert b" 200 " in ends(client).split(b"\r\n")[0]
        assert ends(silent) == b""


# --- the end


def test_at_the_end_idle_connections_are_closed_and_running_requests_are_answered(app):
    with serving(app) as running:
        idle, served = running.connect(get()), running.connect(get("/wait"))
        read_answer(idle)
        assert app.started.acquire(timeout=DEADLINE)
        stopping = running.stop()
        assert ends(idle) == b""
        app.release.set()
        received = ends(served)
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\nConnection: close\r\n" in received
        stopping.result(DEADLINE)


def test_at_the_end_an_idle_connection_may_have_a_last_request(app):
    with serving(app) as running:
        client = running.connect(get())
        read_answer(client)
        stopping = running.stop(idle_seconds=10 * DEADLINE)
        until(lambda: running.gateway.last_requests)
        client.sendall(get())
        assert b"\r\nConnection: close\r\n" in ends(client)
        stopping.result(DEADLINE)


def test_at_the_end_an_arriving_request_may_still_come(app):
    with serving(app) as running:
        client = running.connect(HALF)
        until_arriving(running)
        stopping = running.stop()
        client.sendall(b" x\r\n\r\n")
        assert ends(client).startswith(b"HTTP/1.1 200 OK\r\n")
        stopping.result(DEADLINE)


@pytest.mark.parametrize("more", [b"", b"\r\nContent-Length: 1000\r\n\r\n"])
def test_at_the_end_an_arriving_request_has_little_time(app, monkeypatch, more):
    monkeypatch.setattr(deadline, "REST_SECONDS", 0.2)
    monkeypatch.setattr(deadline, "BODY_SECONDS", 10 * DEADLINE)
    with serving(app) as running:
        client = running.connect(HALF.replace(b"GET", b"POST"))
        until_arriving(running)
        stopping = running.stop()
        client.sendall(more)
        with suppress(OSError):  # it is closed
            while not stopping.done():
                client.sendall(b"0")
                time.sleep(0.01)
        stopping.result(DEADLINE)
        assert not running.gateway.connections._open


def test_an_answer_has_the_date_of_now(app):
    before = datetime.now(UTC).replace(microsecond=0)
    with serving(app) as running:
        head = ends(running.connect(get("/", "Connection: close"))).partition(b"\r\n\r\n")[0]
    date = re.search(rb"\r\nDate: ([^\r]+)", head)[1].decode()
    assert date.endswith(" GMT")
    assert before <= parsedate_to_datetime(date) <= datetime.now(UTC)


def test_processes_share_connections_that_come_together(app):
    listener = socket.create_server(("127.0.0.1", 0))
    gateways = [Gateway(threads=1, limits=Limits(), loop=asyncio.new_event_loop()) for _ in "12"]
    clients = [socket.create_connection(listener.getsockname()) for _ in range(4)]
    for gateway in gateways:
        gateway.listen(listener, Site(app, 0))
    for gateway in gateways * 2:  # each loop goes round twice, in turns
        gateway.loop.call_soon(gateway.loop.stop)
        gateway.loop.run_forever()
    try:
        assert [len(list(gateway.connections)) for gateway in gateways] == [2, 2]
    finally:
        for client in clients:
            client.close()
        for gateway in gateways:
            gateway.loop.run_until_complete(gateway.stop(DEADLINE))
            gateway.close()
            gateway.loop.close()
        listener.close()
