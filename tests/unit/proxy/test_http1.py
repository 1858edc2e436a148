"""The raw head check as a table: each row is a message with two readings, or over a limit."""

from __future__ import annotations

import asyncio
import contextlib

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowhand.proxy.http1 import BadMessage, Limits, Wire, end_to_end, scan_request, scan_response

LIMITS = Limits()
GOOD = b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"

BAD: dict[str, tuple[bytes, int]] = {
    "C1 length and chunked": (b"Content-Length: 2\r\nTransfer-Encoding: chunked", 400),
    "C1 chunked, identity": (b"Transfer-Encoding: chunked, identity", 501),
    "C1 gzip, chunked": (b"Transfer-Encoding: gzip, chunked", 501),
    "C1 space before colon": (b"Transfer-Encoding : chunked", 400),
    "C1 vertical tab": (b"Transfer-Encoding: \x0bchunked", 400),
    "C1 twice": (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", 400),
    "C2 equal twice": (b"Content-Length: 2\r\nContent-Length: 2", 400),
    "C2 different": (b"Content-Length: 2\r\nContent-Length: 3", 400),
    "C2 plus": (b"Content-Length: +2", 400),
    "C2 list": (b"Content-Length: 2, 2", 400),
    "C2 negative": (b"Content-Length: -2", 400),
    "C2 hex": (b"Content-Length: 0x2", 400),
    "C2 huge": (b"Content-Length: 99999999999999999999", 400),
    "C2 empty": (b"Content-Length:", 400),
    "C3 folded": (b"X-A: 1\r\n b", 400),
    "C3 folded first": (b" X-A: 1", 400),
    "C3 NUL": (b"X-A: a\0b", 400),
    "C3 name with space": (b"X A: 1", 400),
    "C3 name with slash": (b"X/A: 1", 400),
    "C3 no colon": (b"X-A", 400),
    "C3 empty name": (b": 1", 400),
    "C5 two hosts": (b"Host: y", 400),
    "C10 many": (b"\r\n".join(b"X-%d: 1" % i for i in range(200)), 431),
}


def head(fields: bytes, line: bytes = b"POST / HTTP/1.1", host: bytes = b"Host: x\r\n") -> bytes:
    return line + b"\r\n" + host + fields + b"\r\n\r\n"


@pytest.mark.parametrize(("fields", "status"), BAD.values(), ids=BAD.keys())
def test_headers_with_two_readings(fields: bytes, status: int) -> None:
    with pytest.raises(BadMessage) as caught:
        scan_request(head(fields), LIMITS)
    assert caught.value.status == status


LINES: dict[str, tuple[bytes, int]] = {
    "B5 absolute form": (b"GET https://evil/ HTTP/1.1", 400),
    "B6 authority form": (b"CONNECT evil:443 HTTP/1.1", 400),
    "asterisk": (b"OPTIONS * HTTP/1.1", 400),
    "fragment": (b"GET /a#b HTTP/1.1", 400),
    "space in target": (b"GET /a b HTTP/1.1", 400),
    "non-ASCII": (b"GET /\xc3\xa9 HTTP/1.1", 400),
    "C5 1.0": (b"GET / HTTP/1.0", 505),
    "C5 1.2": (b"GET / HTTP/1.2", 505),
    "C5 2.0": (b"GET / HTTP/2.0", 505),
    "C5 HTTP/0.9": (b"GET /", 400),
    "C6 preface": (b"PRI * HTTP/2.0", 505),
    "lower-case version": (b"GET / http/1.1", 400),
    "two spaces": (b"GET  / HTTP/1.1", 400),
    "method": (b"G\xffT / HTTP/1.1", 400),
    "C10 long": (b"GET /" + b"a" * 20000 + b" HTTP/1.1", 414),
}


@pytest.mark.parametrize(("line", "status"), LINES.values(), ids=LINES.keys())
def test_request_lines(line: bytes, status: int) -> None:
    with pytest.raises(BadMessage) as caught:
        scan_request(head(b"X: 1", line), LIMITS)
    assert caught.value.status == status


def test_host_is_needed_once_and_not_empty() -> None:
    for host in (b"", b"Host:\r\n", b"Host: \r\n"):
        with pytest.raises(BadMessage):
            scan_request(head(b"X: 1", host=host), LIMITS)
    scan_request(GOOD, LIMITS)


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: 1\r\n b\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
    ],
)
def test_answers_with_two_readings(raw: bytes) -> None:
    with pytest.raises(BadMessage):
        scan_response(raw, LIMITS)
    scan_response(b"HTTP/1.1 200\r\n\r\n", LIMITS)


def wire(*pieces: bytes, limits: Limits = LIMITS) -> Wire:
    reader = asyncio.StreamReader()
    for piece in pieces:
        reader.feed_data(piece)
    reader.feed_eof()
    return Wire(reader, None, h11.SERVER, bytearray(), limits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET / HTTP/1.1\nHost: x\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\nX: 1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: a\rb\r\n\r\n", 400),
        (b"\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"\0" * 10, 400),
        (b"GET / HTTP/1.1\r\nHost", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 70000, 431),
    ],
    ids=str,
)
async def test_raw_heads(raw: bytes, status: int) -> None:
    with pytest.raises(BadMessage) as caught:
        await wire(raw).head(1)
    assert caught.value.status == status


async def test_a_slow_head_is_given_up() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(b"GET /")
    slow = Wire(reader, None, h11.SERVER, bytearray(), Limits(head_s=0.01))  # type: ignore[arg-type]
    with pytest.raises(BadMessage) as caught:
        await slow.head(10)
    assert caught.value.status == 408


async def test_the_next_request_stays_in_the_buffer() -> None:
    raw = GOOD + b"ok" + b"GET / HTTP/1.1\nHost: smuggled\n\n"
    first = wire(raw)
    got = await first.head(1)
    assert got == GOOD
    first.parse(got)
    assert [piece async for piece in first.body(1)] == [b"ok"]
    assert bytes(first.buffer).startswith(b"GET / HTTP/1.1\n")
    second = Wire(first.reader, None, h11.SERVER, first.buffer, LIMITS)  # type: ignore[arg-type]
    with pytest.raises(BadMessage):
        await second.head(1)


@given(st.binary(max_size=300))
def test_no_bytes_make_the_scan_fail_otherwise(raw: bytes) -> None:
    for scan in (scan_request, scan_response):
        with contextlib.suppress(BadMessage):
            scan(raw + b"\r\n\r\n", LIMITS)


@given(st.lists(st.sampled_from([b"Content-Length: 3", b"Transfer-Encoding: chunked", b"X: y"])))
def test_what_passes_has_one_length(fields: list[bytes]) -> None:
    raw = head(b"\r\n".join([b"X: 1", *fields]))
    stated = [f for f in fields if not f.startswith(b"X")]
    try:
        scan_request(raw, LIMITS)
    except BadMessage:
        assert len(stated) > 1 or len(fields) > 100
    else:
        assert len(stated) <= 1


def test_headers_of_the_hop_and_those_it_names_are_dropped() -> None:
    headers = [
        (b"connection", b"close, X-Secret, Content_Type"),
        (b"x-secret", b"1"),
        (b"content-type", b"a"),
        (b"te", b"trailers"),
        (b"proxy_connection", b"x"),
        (b"accept", b"b"),
    ]
    assert end_to_end(headers) == [(b"accept", b"b")]
