"""The dialling side: connections to the broker, to sandboxd and to the model's endpoint, kept alive in pools.

A name is resolved here, every address is judged before it is dialled, and the certificate is
checked against that same name: nothing that a client sends has a say in where a request goes.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Final, SupportsIndex
from urllib.parse import urlsplit

import h11

from cowhand.errors import UserError
from cowhand.proxy.http1 import READ_SIZE, BadMessage, Headers, Limits, Wire, scan_response
from cowhand.proxy.rules import METADATA_V4, METADATA_V6

_FORBIDDEN: Final = tuple(ipaddress.ip_network(net) for net in (*METADATA_V4, *METADATA_V6))


class UpstreamError(Exception):
    """The other side could not be reached, or broke off.

    Attributes:
        stale: a kept connection died before the first byte of the answer: a new one may work.
    """

    def __init__(self, message: str, *, stale: bool = False) -> None:
        super().__init__(message)
        self.stale = stale


@dataclass(frozen=True)
class Origin:
    """Where connections go: scheme, host name, port, and the path that is put before each target."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, url: str) -> Origin:
        """The origin of a base URL; raises UserError for anything but http(s) with a plain host."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as err:
            raise UserError(f"The URL {url!r} is not valid: {err}.") from err
        host = parts.hostname or ""
        plain = not (parts.username or parts.password or parts.query or parts.fragment)
        if parts.scheme not in ("http", "https") or not plain or not _is_host(host):
            raise UserError(f"The URL {url!r} is not http(s)://host[:port][/path].")
        default = 443 if parts.scheme == "https" else 80
        return cls(parts.scheme, host, port or default, parts.path.rstrip("/"))

    @property
    def authority(self) -> str:
        """Value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if self.scheme == "https" else 80
        return host if self.port == default else f"{host}:{self.port}"


def _is_host(host: str) -> bool:
    if ":" in host or host.replace(".", "").isdigit():
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True
    labels = host.split(".")
    return (
        0 < len(host) <= 253
        and host.isascii()
        and all(0 < len(part) <= 63 and part.replace("-", "").isalnum() for part in labels)
    )


def check_address(address: str) -> None:
    """Refuse link-local and cloud metadata addresses, also as IPv4 in IPv6.

    Raises:
        UpstreamError: the address must not be dialled.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour
        if embedded is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            ip = embedded
    if ip.is_multicast or ip.is_unspecified or any(ip in net for net in _FORBIDDEN):
        raise UpstreamError(f"The name resolves to {address}, which is never dialled.")


class _Reader(asyncio.StreamReader):
    """Counts what came in, so that bytes nobody asked for are noticed before a connection is reused."""

    def __init__(self) -> None:
        super().__init__(limit=READ_SIZE)
        self.unread = 0
        self.ended = False

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        self.unread += len(bytes(data))
        super().feed_data(data)

    def feed_eof(self) -> None:
        self.ended = True
        super().feed_eof()

    async def read(self, n: int = -1) -> bytes:
        data = await super().read(n)
        self.unread -= len(data)
        return data


class Connection:
    """One connection; serves one exchange at a time."""

    def __init__(self, reader: _Reader, writer: asyncio.StreamWriter, limits: Limits) -> None:
        self._reader = reader
        self._writer = writer
        self._limits = limits
        self._buffer = bytearray()
        self._wire = self._new_wire()
        self.used = 0
        self.expiry: asyncio.TimerHandle | None = None

    @classmethod
    async def dial(cls, origin: Origin, tls: ssl.SSLContext | None, limits: Limits) -> Connection:
        """Resolve, judge, connect, verify; raises UpstreamError."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limits.handshake_s):
                found = await loop.getaddrinfo(
                    origin.host, origin.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
                )
                addresses = [str(entry[4][0]) for entry in found]
                for address in addresses:
                    check_address(address)
                reader, writer = await _connect(origin, addresses, tls)
        except TimeoutError as err:
            raise UpstreamError(f"{origin.host}:{origin.port} did not answer in time.") from err
        except ssl.SSLCertVerificationError as err:
            text = f"The certificate of {origin.host} is not trusted: {err.verify_message}."
            raise UpstreamError(text) from err
        except OSError as err:
            text = f"{origin.host}:{origin.port} cannot be reached: {err.strerror or err}."
            raise UpstreamError(text) from err
        return cls(reader, writer, limits)

    def _new_wire(self) -> Wire:
        return Wire(self._reader, self._writer, h11.CLIENT, self._buffer, self._limits)

    @property
    def clean(self) -> bool:
        """Open, with no byte that nobody asked for."""
        waiting = self._reader.unread or self._buffer or self._reader.ended
        return not waiting and not self._writer.transport.is_closing()

    @property
    def reusable(self) -> bool:
        """The exchange is over on both sides and the connection may serve another."""
        states = (self._wire.conn.our_state, self._wire.conn.their_state)
        return self._wire.body_done.is_set() and states == (h11.DONE, h11.DONE) and self.clean

    async def start(self, method: str, target: str, headers: Headers) -> None:
        """Send the head of a request; raises UpstreamError."""
        self._wire = self._new_wire()
        self.used += 1
        await self._send(h11.Request(method=method, target=target, headers=headers))

    async def send(self, data: bytes) -> None:
        """Send a piece of the body; raises UpstreamError."""
        await self._send(h11.Data(data=data))

    async def finish(self) -> None:
        """End the request; raises UpstreamError."""
        await self._send(h11.EndOfMessage())

    async def _send(self, event: h11.Event) -> None:
        try:
            await self._wire.send(event)
        except (OSError, h11.LocalProtocolError) as err:
            raise UpstreamError(f"The request broke off: {err}.", stale=self.used > 1) from err

    async def response(self, idle_s: float) -> h11.Response:
        """The head of the answer, interim ones skipped; raises UpstreamError."""
        stale = self.used > 1
        try:
            for _ in range(self._limits.informational + 1):
                head = await self._wire.head(idle_s)
                if head is None:
                    raise UpstreamError("The connection ended before the answer.", stale=stale)
                scan_response(head, self._limits)
                event = self._wire.parse(head)
                if isinstance(event, h11.Response):
                    return event
                if getattr(event, "status_code", 0) == 101:
                    raise UpstreamError("The other side wants to change the protocol.")
        except (OSError, BadMessage) as err:
            lost = isinstance(err, ConnectionError) and stale
            raise UpstreamError(
                f"No valid answer: {err or 'it took too long'}.", stale=lost
            ) from err
        raise UpstreamError("Too many interim answers.")

    async def body(self, idle_s: float) -> AsyncIterator[bytes]:
        """The pieces of the answer's body; raises UpstreamError if it breaks off."""
        try:
            async for piece in self._wire.body(idle_s):
                yield piece
        except (OSError, BadMessage) as err:
            raise UpstreamError(f"The answer broke off: {err or 'silence'}.") from err

    def close(self) -> None:
        """Close at once."""
        if self.expiry is not None:
            self.expiry.cancel()
        self._writer.transport.abort()


async def _connect(
    origin: Origin, addresses: list[str], tls: ssl.SSLContext | None
) -> tuple[_Reader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    name = origin.host if tls else None
    for index, address in enumerate(addresses):
        reader = _Reader()
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)

        def made(protocol: asyncio.StreamReaderProtocol = protocol) -> asyncio.StreamReaderProtocol:
            return protocol

        try:
            transport, _ = await loop.create_connection(
                made, address, origin.port, ssl=tls, server_hostname=name
            )
        except ssl.SSLError:
            raise
        except OSError:
            if index == len(addresses) - 1:
                raise
            continue
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
    raise OSError("the name has no address")


class Pool:
    """Kept connections to one origin."""

    def __init__(
        self,
        origin: Origin,
        tls: ssl.SSLContext | None,
        *,
        limits: Limits | None = None,
        idle_s: float = 50.0,
        max_idle: int = 32,
    ) -> None:
        self.origin = origin
        self._tls = tls
        self._limits = limits or Limits()
        self._idle_s = idle_s
        self._max_idle = max_idle
        self._idle: list[Connection] = []
        self._closed = False

    async def acquire(self, *, fresh: bool = False) -> Connection:
        """A kept connection that is still clean, or a new one; raises UpstreamError."""
        while self._idle and not fresh:
            kept = self._idle.pop()
            if kept.expiry is not None:
                kept.expiry.cancel()
            if kept.clean:
                return kept
            kept.close()
        return await Connection.dial(self.origin, self._tls, self._limits)

    def release(self, connection: Connection) -> None:
        """Give a connection back; it is kept only if its exchange ended well."""
        if self._closed or not connection.reusable or len(self._idle) >= self._max_idle:
            connection.close()
            return
        loop = asyncio.get_running_loop()
        connection.expiry = loop.call_later(self._idle_s, self._expire, connection)
        self._idle.append(connection)

    def _expire(self, connection: Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)
            connection.close()

    def close(self) -> None:
        """Close the kept connections; those in use close when they come back."""
        self._closed = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()


def trusted_pool(url: str, ca_file: str, setting: str) -> Pool:
    """Connections to a server of Cowhand's own.

    Args:
        url: `https://host[:port]`.
        ca_file: PEM file with the CA of its certificate.
        setting: name of the setting that holds `url`, without `COWHAND_`.

    Raises:
        UserError: one of them is wrong.
    """
    origin = Origin.parse(url)
    if origin.scheme != "https":
        raise UserError(f"COWHAND_{setting} must begin with https://.", field=setting)
    try:
        tls = client_tls(ca_file)
    except OSError as err:
        text = f"The CA file {ca_file} cannot be read: {err.strerror or err}."
        raise UserError(text, field="CA_FILE") from err
    return Pool(origin, tls, limits=Limits(handshake_s=5.0))


def client_tls(ca_file: str = "") -> ssl.SSLContext:
    """A context that verifies chain and name: against `ca_file`, or the system's roots if empty."""
    context = ssl.create_default_context(cafile=ca_file or None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context
