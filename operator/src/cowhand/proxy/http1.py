"""Strict HTTP/1.1 on h11: the raw head is judged before h11 sees it, bodies stream with backpressure.

h11 is lenient where a proxy must not be: it accepts bare LF, folded lines, equal Content-Length twice
and Content-Length beside Transfer-Encoding. Two parsers that read one message differently are how
requests are smuggled, so every head that has two readings is refused here, in both directions.
`server.py` and `client.py` are the two sides.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Final

import h11

Headers = list[tuple[bytes, bytes]]
"""Header lines in order, names in lower case."""

READ_SIZE: Final = 64 * 1024

HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""Headers of one hop; never forwarded."""


@dataclass(frozen=True)
class Limits:
    """Limits of one side of the proxy.

    Attributes:
        head_bytes: longest head, request or status line included.
        headers: most header lines.
        target_bytes: longest request target.
        informational: most 1xx answers before the real one.
        handshake_s: TLS handshake and TCP connect.
        head_s: from the first byte of a head to its end.
        idle_s: between two requests on a kept connection.
        body_idle_s: silence inside a request body.
        answer_idle_s: silence before and inside an answer; long, for event streams and tools.
        write_s: a peer that does not read.
        connections: open connections of a server.
    """

    head_bytes: int = 64 * 1024
    headers: int = 128
    target_bytes: int = 16 * 1024
    informational: int = 8
    handshake_s: float = 10.0
    head_s: float = 15.0
    idle_s: float = 300.0
    body_idle_s: float = 300.0
    answer_idle_s: float = 600.0
    write_s: float = 300.0
    connections: int = 256


class BadMessage(Exception):
    """A message that we do not accept.

    Attributes:
        status: HTTP status for the client that sent it.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


_BARE_LF: Final = re.compile(rb"(?<!\r)\n")
_BARE_CR: Final = re.compile(rb"\r(?!\n)")
_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE: Final = re.compile(rb"(" + _TOKEN + rb") ([!-~]+) HTTP/(\d+\.\d+)")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.1 [1-5][0-9][0-9](?: [\t -~\x80-\xff]*)?")
_FIELD: Final = re.compile(
    rb"(" + _TOKEN + rb"):[ \t]*((?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?)[ \t]*"
)
_LENGTH: Final = re.compile(rb"[0-9]{1,15}")


def scan_request(head: bytes, limits: Limits) -> None:
    """Judge the raw head of a request (everything up to and including the empty line).

    Raises:
        BadMessage: it could be read in two ways, or breaks a limit.
    """
    line, _, rest = head[:-4].partition(b"\r\n")
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise BadMessage("The request line is not 'METHOD target HTTP/1.1'.")
    if match[3] != b"1.1":
        raise BadMessage("Only HTTP/1.1 is spoken here.", 505)
    if len(match[2]) > limits.target_bytes:
        raise BadMessage("The request target is too long.", 414)
    if not match[2].startswith(b"/") or b"#" in match[2]:
        raise BadMessage("The request target must be a path, not a URL or an authority.")
    hosts = [value for name, value in _scan_fields(rest, limits) if name == b"host"]
    if len(hosts) != 1 or not hosts[0]:
        raise BadMessage("A request needs exactly one Host header.")


def scan_response(head: bytes, limits: Limits) -> None:
    """Judge the raw head of an answer.

    Raises:
        BadMessage: it could be read in two ways, or breaks a limit.
    """
    line, _, rest = head[:-4].partition(b"\r\n")
    if _STATUS_LINE.fullmatch(line) is None:
        raise BadMessage("The status line is not 'HTTP/1.1 code reason'.", 502)
    _scan_fields(rest, limits)


def _scan_fields(block: bytes, limits: Limits) -> Headers:
    lines = block.split(b"\r\n") if block else []
    if len(lines) > limits.headers:
        raise BadMessage("Too many headers.", 431)
    fields: Headers = []
    for line in lines:
        match = _FIELD.fullmatch(line)
        if match is None:
            raise BadMessage("A header line is folded or not 'name: value'.")
        fields.append((match[1].lower(), match[2]))
    lengths = [value for name, value in fields if name == b"content-length"]
    codings = [value for name, value in fields if name == b"transfer-encoding"]
    if len(lengths) + len(codings) > 1:
        raise BadMessage("A message may state its length only once.")
    if lengths and _LENGTH.fullmatch(lengths[0]) is None:
        raise BadMessage("Content-Length is not a number.")
    if codings and codings[0].lower() != b"chunked":
        raise BadMessage("The only transfer coding here is chunked.", 501)
    return fields


def fold(name: bytes) -> bytes:
    """A header name as a lenient reader behind us might see it: lower case, `_` as `-`."""
    return name.lower().replace(b"_", b"-")


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Headers without those of the hop and without those that `Connection` names."""
    listed = list(headers)
    named = {
        fold(word.strip())
        for name, value in listed
        if fold(name) == b"connection"
        for word in value.split(b",")
    }
    return [(n, v) for n, v in listed if fold(n) not in HOP_BY_HOP and fold(n) not in named]


class Wire:
    """One message exchange on one connection: the raw head check, h11's state, timeouts.

    A new Wire is made for each exchange; `buffer` is the connection's and outlives it, so that bytes
    that came too early are scanned again as the head that they claim to be.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        role: type[h11.CLIENT] | type[h11.SERVER],
        buffer: bytearray,
        limits: Limits,
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.buffer = buffer
        self.limits = limits
        self.conn = h11.Connection(role, max_incomplete_event_size=limits.head_bytes + 1024)
        self.body_done = asyncio.Event()

    async def read(self, timeout_s: float) -> bytes:
        """Some bytes, or none at the end of the stream; raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            return await self.reader.read(READ_SIZE)

    async def head(self, wait_s: float) -> bytes | None:
        """The raw bytes of the next head; None if the peer closed before its first byte.

        Args:
            wait_s: how long the first byte may take, in seconds.

        Raises:
            BadMessage: bare CR or LF, too long, too slow, or cut off.
            TimeoutError: no byte came in `wait_s`.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.limits.head_s if self.buffer else None
        while True:
            end = self.buffer.find(b"\r\n\r\n")
            head = bytes(self.buffer[: end + 4] if end >= 0 else self.buffer)
            if _BARE_LF.search(head) or head[:1] in (b"\r", b"\0"):
                raise BadMessage("Lines must end in CR LF.")
            if len(head) > self.limits.head_bytes:
                raise BadMessage("The head of the message is too long.", 431)
            if end >= 0:
                if _BARE_CR.search(head):
                    raise BadMessage("Lines must end in CR LF.")
                del self.buffer[: end + 4]
                return head
            try:
                data = await self.read(wait_s if deadline is None else deadline - loop.time())
            except TimeoutError:
                if deadline is None:
                    raise
                raise BadMessage("The head of the message came too slowly.", 408) from None
            if deadline is None:
                deadline = loop.time() + self.limits.head_s
            if not data:
                if self.buffer:
                    raise BadMessage("The connection ended inside a head.")
                return None
            self.buffer += data

    def parse(self, head: bytes) -> h11.Event:
        """Hand a scanned head to h11; raises BadMessage where h11 is the stricter one."""
        try:
            self.conn.receive_data(head)
            event = self.conn.next_event()
        except h11.RemoteProtocolError as err:
            raise BadMessage(f"The message is not valid HTTP: {err}.") from err
        if not isinstance(event, h11.Request | h11.Response | h11.InformationalResponse):
            raise BadMessage("The message is not valid HTTP.")
        return event

    async def body(self, idle_s: float) -> AsyncIterator[bytes]:
        """The pieces of the body as they come; trailers are dropped.

        Raises:
            BadMessage: bad chunks, or the connection ended too early.
            TimeoutError: silence for `idle_s` seconds.
        """
        if self.body_done.is_set():
            return
        if self.buffer:
            self.conn.receive_data(bytes(self.buffer))
            self.buffer.clear()
        try:
            while True:
                event = self.conn.next_event()
                if event is h11.NEED_DATA:
                    if self.conn.they_are_waiting_for_100_continue:
                        await self.send(h11.InformationalResponse(status_code=100, headers=[]))
                    self.conn.receive_data(await self.read(idle_s))
                elif isinstance(event, h11.Data):
                    if event.data:
                        yield bytes(event.data)
                else:
                    break
        except h11.RemoteProtocolError as err:
            raise BadMessage(f"The body is not valid HTTP: {err}.") from err
        self.buffer += self.conn.trailing_data[0]
        self.body_done.set()

    async def send(self, event: h11.Event) -> None:
        """Write an event and wait until the peer has room.

        Raises:
            ConnectionError: the peer is gone.
            TimeoutError: the peer does not read.
        """
        data = self.conn.send(event)
        if data:
            self.writer.write(data)
            async with asyncio.timeout(self.limits.write_s):
                await self.writer.drain()

    def abort(self) -> None:
        """Cut the connection: the peer must see that the message is not complete."""
        self.writer.transport.abort()
