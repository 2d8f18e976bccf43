"""Requests from bytes: the same however the bytes are cut, and refused where two could read them
differently."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given

from hsmwrap.http.parsing import (
    MAX_HEADER,
    MAX_HEADERS,
    MAX_HEADERS_LENGTH,
    MAX_REQUEST_LINE,
    Phase,
    Request,
    RequestParser,
)

READ = frozenset({("GET", b"/"), ("POST", b"/")})
MAX_BODY = 1000


def parse(*parts: bytes) -> RequestParser:
    parser = RequestParser(MAX_BODY, READ)
    for part in parts:
        parser.feed(part)
    return parser


def outcome(parser: RequestParser) -> tuple[list[Request], str | None, Phase]:
    code = parser.refusal.code if parser.refusal else None
    return list(parser.requests), code, parser.phase


def code(raw: bytes) -> str:
    parser = parse(raw)
    assert not parser.requests
    return parser.refusal.code


GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: h\r\n"
UPGRADE = POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
STREAMS = [
    b"GET /?a=b HTTP/1.1\r\nHost: h\r\n\r\n" + POST + b"Content-Length: 3\r\n\r\nabc",
    CHUNKED + b"2\r\nab\r\n1;x\r\nc\r\n0\r\nT: t\r\n\r\nGET / HTTP/1.0\r\n\r\n",
    GET + b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n" + GET,
    b"POST /none HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc" + GET,
    GET + b"SECRET\r\n\r\n",
    POST + b"Content-Length: 2000\r\n\r\nabc",
    CHUNKED + b"2\r\nabc",
    b"GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + GET,
    UPGRADE + b"Content-Length: 3\r\n\r\nabc" + GET,
    UPGRADE + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + GET,
    b"CONNECT h:1 HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + GET,
    b"GET / HTTP/1.1\r\nHost: h\r\nX-Half",
]


@given(st.sampled_from(STREAMS), st.lists(st.integers(0, 200), max_size=8))
def test_cuts_change_nothing(stream, cuts):
    ends = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    parts = [stream[begin:end] for begin, end in pairwise(ends)]
    assert outcome(parse(*parts)) == outcome(parse(stream))


def test_a_request():
    (request,) = parse(
        b"POST /?a=%2F?b HTTP/1.1\r\nHost: h\r\nX-A: \xff\r\nContent-Length: 3\r\n\r\nabc"
    ).requests
    headers = [("host", "h"), ("x-a", "\xff"), ("content-length", "3")]
    assert request == Request("POST", b"/", b"a=%2F?b", headers, "1.1", b"abc", keep_alive=True)


@pytest.mark.parametrize(
    "framed",
    [
        b"Content-Length: 3\r\n\r\nabc",
        b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    ],
)
def test_a_request_that_asks_for_an_upgrade_keeps_its_body(framed):
    """As Java's HttpClient sends it; RFC 9110, section 7.8."""
    plain = (UPGRADE + framed).replace(b"Upgrade: h2c\r\n", b"")
    assert outcome(parse(UPGRADE + framed + GET)) == outcome(parse(plain + GET))
    first, second = parse(UPGRADE + framed + GET).requests
    assert (first.body, first.keep_alive, second.method) == (b"abc", True, "GET")


def test_upgrades_have_the_limits_of_other_requests():
    assert code(UPGRADE + b"Content-Length: %d\r\n\r\n" % (MAX_BODY + 1)) == "RequestTooLarge"
    assert code(UPGRADE + b"Content-Length: 1\r\nHost: h\r\n\r\na") == "MalformedRequest"
    many = parse(GET.replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: a\r\n\r\n") * 1000)
    assert len(many.requests) < 20
    assert many.refusal.code == "MalformedRequest"
    unread = parse((UPGRADE.replace(b"/", b"/none", 1) + b"Content-Length: 1\r\n\r\na") * 2)
    assert (len(unread.requests), unread.unread) == (1, True)


def test_nothing_follows_connect():
    parser = parse(b"CONNECT h:1 HTTP/1.1\r\nHost: h\r\n\r\n" + GET)
    (request,) = parser.requests
    assert (request.method, request.keep_alive) == ("CONNECT", False)


def test_trailers_are_left_out():
    (request,) = parse(CHUNKED + b"1\r\na\r\n0\r\nHost: evil\r\n\r\n").requests
    assert request.headers == [("host", "h"), ("transfer-encoding", "chunked")]
    assert request.body == b"a"


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"http://h/x?y", b"/x", b"y"),
        (b"HTTPS://h:1?y", b"/", b"y"),
        (b"//metrics", b"//metrics", b""),
        (b"/http://h/", b"/http://h/", b""),
    ],
)
def test_targets(target, path, query):
    (request,) = parse(b"GET " + target + b" HTTP/1.1\r\nHost: h\r\n\r\n").requests
    assert (request.path, request.query) == (path, query)


@pytest.mark.parametrize(
    "head",
    [
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: +1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length : 1\r\n\r\n",
        b"POST / HTTP/1.1\nContent-Length: 1\n\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nA: b\r\n c\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nA: b\x00\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
        b"GET / HTTP/2.0\r\n\r\n",
        b"GET / HTTP/0.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_ambiguous_heads(head):
    assert code(head) == "MalformedRequest"


def test_a_request_of_http_1_0_needs_no_host():
    assert len(parse(b"GET / HTTP/1.0\r\n\r\n").requests) == 1


@pytest.mark.parametrize(
    "framing", [b"gzip", b"chunked, gzip", b"chunked\r\nTransfer-Encoding: gzip", b"xchunked"]
)
def test_bodies_without_a_known_end(framing):
    raw = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: " + framing + b"\r\n\r\n0\r\n\r\n"
    assert code(raw) in {"MalformedRequest", "InvalidParameter"}


@pytest.mark.parametrize(
    ("version", "coding"),
    [
        (b"1.0", b"chunked"),
        (b"1.1", b"gzip, chunked"),
        (b"1.1", b"gzip\r\nTransfer-Encoding: chunked"),
    ],
)
def test_codings_that_others_may_read_in_another_way(version, coding):
    """RFC 9112, section 6.1."""
    head = b"POST / HTTP/%s\r\nHost: h\r\nTransfer-Encoding: %s\r\n\r\n" % (version, coding)
    assert code(head + b"0\r\n\r\n") == "MalformedRequest"


@pytest.mark.parametrize("endless", [b"0\r\nX: ", b"0\r\n", b"1;"])
def test_the_framing_of_a_body_ends(endless):
    """A trailer, its name or an extension of a chunk that goes on and on."""
    parser = parse(CHUNKED + endless)
    fed = 0
    while parser.refusal is None and fed < 10 * MAX_HEADERS_LENGTH:
        parser.feed(b"a" * 1000)
        fed += 1000
    assert parser.refusal is not None
    assert fed <= MAX_HEADERS_LENGTH + 2000


def test_a_body_of_small_chunks_has_no_other_limit():
    parser = parse(CHUNKED)
    for _ in range(MAX_BODY // 100):
        parser.feed(b"1\r\na\r\n" * 100)
    parser.feed(b"0\r\n\r\n")
    assert [len(request.body) for request in parser.requests] == [MAX_BODY // 100 * 100]


def line(length: int) -> bytes:
    return b"GET /" + b"a" * (length - 1) + b" HTTP/1.1\r\nHost: h\r\n\r\n"


def header(length: int) -> bytes:
    return b"A:" + b"a" * (length - 1) + b"\r\n"


def test_the_longest_request_line():
    assert len(parse(line(MAX_REQUEST_LINE)).requests) == 1
    assert code(line(MAX_REQUEST_LINE + 1)) == "RequestLineTooLong"


def test_the_longest_header_field():
    head = b"GET / HTTP/1.0\r\n%s\r\n"
    assert len(parse(head % header(MAX_HEADER)).requests) == 1
    assert code(head % header(MAX_HEADER + 1)) == "HeadersTooLarge"


def test_the_most_header_fields():
    head = b"GET / HTTP/1.0\r\n%s\r\n"
    assert len(parse(head % (b"A:\r\n" * MAX_HEADERS)).requests) == 1
    assert code(head % (b"A:\r\n" * (MAX_HEADERS + 1))) == "HeadersTooLarge"


def test_the_most_bytes_of_header_fields():
    head = b"GET / HTTP/1.0\r\n%s\r\n"
    longest = head % (header(MAX_HEADERS_LENGTH // 16) * 16)
    for size in (len(longest), 7):
        parts = [longest[at : at + size] for at in range(0, len(longest), size)]
        assert len(parse(*parts).requests) == 1
    assert code(head % (header(MAX_HEADERS_LENGTH // 16) * 17)) == "HeadersTooLarge"


def test_a_header_field_without_an_end_is_not_kept_for_ever():
    parser = parse(b"GET / HTTP/1.1\r\nHost: h\r\nA:")
    for _ in range(MAX_HEADERS_LENGTH // 1000 + 1):
        parser.feed(b"a" * 1000)
    assert parser.refusal.code == "HeadersTooLarge"


def test_long_heads_after_long_bodies_are_no_larger_for_it():
    """What precedes a request in the same bytes is not counted as its own."""
    body = b"a" * MAX_BODY
    post = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%s" % (MAX_BODY, body)
    parser = parse(post * 10 + b"GET / HTTP/1.1\r\nHost: h\r\nA:", b"b", b"\r\n\r\n")
    assert parser.refusal is None
    assert len(parser.requests) == 11


@pytest.mark.parametrize("framed", [True, False])
def test_the_longest_body(framed):
    def post(length: int) -> bytes:
        if framed:
            return b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%s" % (
                length,
                b"a" * length,
            )
        chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (length, b"a" * length)
        return CHUNKED + chunk

    assert len(parse(post(MAX_BODY)).requests[0].body) == MAX_BODY
    assert code(post(MAX_BODY + 1)) == "RequestTooLarge"


@pytest.mark.parametrize("start", [b"PUT /", b"POST /none", b"GET /healthz"])
def test_bodies_that_nothing_reads_are_not_kept(start):
    parser = parse(start + b" HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n")
    (request,) = parser.requests
    assert not request.keep_alive
    assert parser.unread
    parser.feed(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    assert len(parser.requests) == 1


def test_many_requests_at_once():
    parser = parse(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n" * 1000)
    assert len(parser.requests) < 20
    assert parser.refusal.code == "MalformedRequest"


@pytest.mark.parametrize(
    ("raw", "refused"),
    [
        (b"", None),
        (b"GET / HTTP/1.1\r\nHost: h\r\n", None),
        (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nab", "InvalidParameter"),
        (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc", None),
    ],
)
def test_the_end_of_the_connection(raw, refused):
    parser = parse(raw)
    parser.end()
    assert (parser.refusal.code if parser.refusal else None) == refused
