"""Turns: a thread answers the requests of one connection in a row."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

import pytest
from support.http.gateway_runner import DEADLINE, ends, get, read_answer, serving

from hsmwrap.http import deadline, turn
from hsmwrap.http.answer import plain
from hsmwrap.http.connection import _State
from hsmwrap.http.gateway import Place
from hsmwrap.http.parsing import RequestParser
from hsmwrap.http.turn import Turn

HALF = b"GET / HTTP/1.1\r\nHost: h\r\nX-Half:"
REST = b" 1\r\n\r\n"


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """What is sent next always comes in time."""
    monkeypatch.setattr(turn, "PAUSE_MILLISECONDS", DEADLINE * 1000)


class Played:
    """A turn in this thread, over a pair of sockets; the client sends all that follows at once."""

    def __init__(self, *follows: bytes) -> None:
        self.client, self.server = socket.socketpair()
        self.client.settimeout(DEADLINE)
        self.server.settimeout(0)
        self.parser = RequestParser(1000, frozenset())
        self.follows = list(follows)
        self.asked: list[bytes] = []
        self.body = b"."
        self.goes_on = True
        self.turn = Turn(
            self.server, self.parser, self.serve, lambda r: r.path != b"/page", lambda: self.goes_on
        )

    def serve(self, request):
        self.asked.append(request.path)
        return plain(200, "text/plain", self.body)

    def is_alone(self) -> bool:
        """After each answer the next is sent; at the end the client's side is closed."""
        if self.follows:
            self.client.sendall(self.follows.pop(0))
        else:
            self.client.shutdown(socket.SHUT_WR)
        return True

    def run(self, first: bytes = b"", is_alone=None) -> Turn:
        self.parser.feed(first or get("/1"))
        self.turn.run(self.parser.requests.popleft(), is_alone or self.is_alone)
        return self.turn


@pytest.fixture
def played():
    made = []

    def make(*follows: bytes) -> Played:
        made.append(Played(*follows))
        return made[-1]

    yield make
    for each in made:
        each.client.close()
        each.server.close()


def test_requests_that_follow_are_answered_in_one_turn(played):
    playing = played(get("/2"), get("/3"))
    ended = playing.run()
    assert playing.asked == [b"/1", b"/2", b"/3"]
    assert (ended.served, ended.keep_alive, ended.answering) == (3, True, False)
    assert [read_answer(playing.client)[0] for _ in playing.asked] == [200, 200, 200]


def test_a_turn_ends_where_other_requests_wait(played):
    playing = played()
    assert playing.run(is_alone=lambda: False).served == 1
    assert playing.asked == [b"/1"]


def test_a_turn_ends_after_so_many_requests(played, monkeypatch):
    monkeypatch.setattr(turn, "MOST_REQUESTS", 2)
    playing = played(get("/2"), get("/3"))
    assert playing.run().served == 2


@pytest.mark.parametrize(
    ("follows", "served", "left", "is_refused"),
    [
        (HALF, 1, 0, False),
        (get("/page"), 1, 1, False),
        (get("/2") + get("/3"), 1, 2, False),
        (get("/2") + HALF, 2, 0, False),
        (b"broken\r\n\r\n", 1, 0, True),
    ],
)
def test_what_a_turn_does_not_know_is_left_to_the_event_loop(
    played, follows, served, left, is_refused
):
    playing = played(follows)
    assert playing.run().served == served
    assert len(playing.parser.requests) == left
    assert (playing.parser.refusal is not None) is is_refused


def test_what_a_client_does_not_take_at_once_is_left_to_the_event_loop(played):
    playing = played()
    playing.body = b"x" * 10_000_000
    ended = playing.run()
    playing.server.settimeout(DEADLINE)
    sending = threading.Thread(target=playing.server.sendall, args=(ended.unsent,))
    sending.start()
    assert read_answer(playing.client) == (200, playing.body)
    sending.join(DEADLINE)


def test_an_answer_of_which_nothing_can_be_sent_is_left_whole(played):
    playing = played()
    with suppress(BlockingIOError):
        while True:
            playing.server.send(bytes(65536))
    ended = playing.run()
    assert ended.unsent.startswith(b"HTTP/1.1 200 ")
    assert ended.unsent.endswith(b"\r\n\r\n.")


def test_the_last_answer_of_a_connection_says_so(played):
    playing = played()
    playing.goes_on = False
    assert not playing.run().keep_alive
    assert b"Connection: close\r\n" in playing.client.recv(65536)


def test_a_client_that_asks_for_the_end_of_the_connection_gets_it(played):
    playing = played()
    assert not playing.run(get("/", "Connection: close")).keep_alive


def test_a_client_that_is_gone_ends_the_turn(played):
    playing = played()
    playing.client.close()
    assert not playing.run().keep_alive


def test_an_error_is_told_with_what_was_not_answered(played):
    playing = played()
    playing.serve = None
    playing.turn._serve = lambda _: 1 // 0
    with pytest.raises(ZeroDivisionError):
        playing.run()
    assert playing.turn.answering


# --- at the gateway


def application(environ, start_response):
    if environ["PATH_INFO"] == "/exit":
        raise SystemExit
    start_response("200 OK", [("X-Thread", threading.current_thread().name)])
    return [threading.current_thread().name.encode()]


def until(condition) -> None:
    give_up = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def ask(client: socket.socket, sent: bytes) -> bytes:
    client.sendall(sent)
    status, body = read_answer(client)
    assert status == 200
    return body


def test_the_event_loop_goes_on_with_what_a_turn_leaves():
    with serving(application, places={b"/page": Place.LOOP}) as running:
        client = running.connect()
        assert ask(client, get()).startswith(b"request_")
        client.sendall(HALF)
        assert ask(client, REST).startswith(b"request_")
        assert not ask(client, get("/page")).startswith(b"request_")
        client.sendall(get() + get("/page") + get())
        assert [read_answer(client)[0] for _ in range(3)] == [200, 200, 200]
        assert ask(client, get()).startswith(b"request_")


def test_another_client_does_not_wait_for_the_end_of_a_turn():
    with serving(application) as running:
        one, other = running.connect(), running.connect()
        ask(one, get())
        assert {ask(one, get()) for _ in range(3)} != {ask(other, get())}


def test_the_event_loop_reads_nothing_in_a_turn():
    with serving(application) as running:
        client = running.connect(get() + get() + get())
        for _ in range(3):
            read_answer(client)
        (connection,) = running.gateway.connections
        until(lambda: connection._state is _State.LENT)
        assert not connection._transport.is_reading()


def test_a_request_beside_others_begins_no_turn(monkeypatch):
    waiting, release = threading.Event(), threading.Event()

    def app(environ, start_response):
        if environ["PATH_INFO"] == "/wait":
            waiting.set()
            release.wait(DEADLINE)
        return application(environ, start_response)

    with serving(app) as running:
        one, other = running.connect(get("/wait")), running.connect()
        waiting.wait(DEADLINE)
        monkeypatch.setattr(running.gateway, "lend", None)
        ask(other, get())
        release.set()
        read_answer(one)


def test_a_big_answer_of_a_turn_arrives():
    def app(_environ, start_response):
        start_response("200 OK", [])
        return [b"x" * 10_000_000]

    with serving(app) as running:
        client = running.connect()
        assert len(ask(client, get())) == 10_000_000
        assert len(ask(client, get())) == 10_000_000


def test_the_requests_of_a_turn_count():
    with serving(application) as running:
        client = running.connect()
        for _ in range(3):
            ask(client, get())
        ask(client, get("/", "Connection: close"))
        assert ends(client) == b""
        assert running.gateway.served == 4


def test_a_half_request_after_a_turn_has_a_deadline(monkeypatch):
    monkeypatch.setattr(deadline, "HEAD_SECONDS", 0.1)
    with serving(application) as running:
        client = running.connect()
        ask(client, get())
        client.sendall(HALF)
        assert b" 408 " in ends(client).split(b"\r\n")[0]


def test_a_client_that_closes_its_side_during_a_turn_is_closed():
    with serving(application) as running:
        client = running.connect()
        ask(client, get())
        client.shutdown(socket.SHUT_WR)
        assert ends(client) == b""


def test_the_end_of_the_server_ends_a_connection_in_a_turn(monkeypatch):
    monkeypatch.setattr(turn, "PAUSE_MILLISECONDS", 500)
    with serving(application) as running:
        client = running.connect()
        ask(client, get())
        stopped = running.stop()
        assert ends(client) == b""
        stopped.result(DEADLINE)


def test_an_idle_connection_is_the_event_loops_again(monkeypatch):
    monkeypatch.setattr(turn, "PAUSE_MILLISECONDS", 1)
    monkeypatch.setattr(deadline, "IDLE_SECONDS", 0.1)
    with serving(application) as running:
        client = running.connect()
        ask(client, get())
        assert ends(client) == b""


def test_what_ends_a_thread_in_a_turn_is_answered_and_the_connection_goes_on():
    with serving(application, threads=1) as running:
        client = running.connect()
        ask(client, get())
        client.sendall(get("/exit"))
        assert read_answer(client)[0] == 500
        ask(client, get())


def test_an_error_after_an_answer_ends_the_connection(monkeypatch):
    monkeypatch.setattr(Turn, "_next", lambda _: 1 // 0)
    with serving(application) as running:
        client = running.connect()
        ask(client, get())
        client.sendall(get())
        assert ends(client) == b""
