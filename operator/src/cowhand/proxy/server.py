"""The serving side: connections, keep-alive, refusals, and noticing that a client has gone.

Used by both modes of the proxy, with TLS (sandbox) and without (harness).
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

import h11

from cowhand.proxy.http1 import READ_SIZE, BadMessage, Headers, Limits, Wire, scan_request

log = logging.getLogger(__name__)


class Refusal(Exception):
    """An answer of our own instead of the one that was asked for.

    Attributes:
        status: HTTP status.
        kind: value of `error.type`.
        headers: further headers of the answer, for example `retry-after`.
    """

    def __init__(
        self, status: int, kind: str, message: str, headers: Headers | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.headers: Headers = headers or []


class Exchange:
    """One request and its answer.

    Attributes:
        method: request method.
        target: request target as sent, always beginning with `/`.
        headers: request headers, names in lower case.
    """

    def __init__(self, wire: Wire, request: h11.Request) -> None:
        self._wire = wire
        self.method = request.method.decode("ascii")
        self.target = request.target.decode("ascii")
        self.headers: Headers = list(request.headers)
        self.started = False

    def get(self, name: str) -> str:
        """The value of a header, empty if it is missing.

        Raises:
            Refusal: the header stands twice.
        """
        values = [v for n, v in self.headers if n == name.encode("ascii")]
        if len(values) > 1:
            raise Refusal(400, "invalid_request_error", f"The header {name} stands twice.")
        return values[0].decode("latin-1") if values else ""

    def body(self) -> AsyncIterator[bytes]:
        """The request body, in pieces."""
        return self._wire.body(self._wire.limits.body_idle_s)

    async def read_body(self, limit: int) -> bytes:
        """The whole request body; raises Refusal 413 beyond `limit` bytes."""
        body = bytearray()
        async for piece in self.body():
            body += piece
            if len(body) > limit:
                raise Refusal(413, "request_too_large", f"The body is longer than {limit} bytes.")
        return bytes(body)

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head of the answer; without content-length the body is sent in chunks."""
        if not self._wire.body_done.is_set():
            headers = [*headers, (b"connection", b"close")]
        self.started = True
        await self._wire.send(h11.Response(status_code=status, headers=headers))

    async def send(self, data: bytes) -> None:
        """Send a piece of the answer's body at once."""
        await self._wire.send(h11.Data(data=data))

    async def finish(self) -> None:
        """End the answer."""
        await self._wire.send(h11.EndOfMessage())

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a complete answer."""
        length = (b"content-length", str(len(body)).encode())
        await self.start(status, [*headers, length])
        if body:
            await self.send(body)
        await self.finish()


App = Callable[[Exchange], Awaitable[None]]
Render = Callable[[int, str, str], tuple[Headers, bytes]]
"""Body of a refusal from status, type and message, in the form that this mode's clients read."""


class Server:
    """An HTTP/1.1 server in front of one `App`."""

    def __init__(
        self,
        app: App,
        render: Render,
        *,
        limits: Limits | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._app = app
        self._render = render
        self._limits = limits or Limits()
        self._tls = tls
        self._connections: set[asyncio.Task[None]] = set()
        self._idle: set[asyncio.Task[None]] = set()
        self._draining = False
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 takes any free one."""
        tls_options = (
            {"ssl_handshake_timeout": self._limits.handshake_s, "ssl_shutdown_timeout": 5.0}
            if self._tls
            else {}
        )
        self._server = await asyncio.start_server(
            self._accept, host, port, ssl=self._tls, limit=READ_SIZE, backlog=128, **tls_options
        )

    async def close(self, grace_s: float = 0.0) -> None:
        """Stop listening, give running exchanges `grace_s` seconds, then cut what is left."""
        self._draining = True
        if self._server is not None:
            self._server.close()
        for task in list(self._idle):
            task.cancel()
        if self._connections and grace_s > 0:
            await asyncio.wait(set(self._connections), timeout=grace_s)
        left = list(self._connections)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._draining or len(self._connections) >= self._limits.connections:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        buffer = bytearray()
        try:
            while not self._draining:
                wire = Wire(reader, writer, h11.SERVER, buffer, self._limits)
                if not await self._one(wire, task):
                    break
        except (OSError, h11.LocalProtocolError):
            writer.transport.abort()
        except asyncio.CancelledError:
            # Only `close` cancels a connection; asyncio's own callback would log the cancellation.
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            writer.close()

    async def _one(self, wire: Wire, task: asyncio.Task[None]) -> bool:
        """Serve one request; answers whether the connection can be kept."""
        self._idle.add(task)
        try:
            head = await wire.head(self._limits.idle_s)
            if head is None:
                return False
            scan_request(head, self._limits)
            request = wire.parse(head)
        except BadMessage as err:
            await self._refuse_raw(wire, err)
            return False
        finally:
            self._idle.discard(task)
        assert isinstance(request, h11.Request)
        exchange = Exchange(wire, request)
        if not any(n in (b"content-length", b"transfer-encoding") for n, _ in request.headers):
            async for _ in exchange.body():
                pass
        await self._handle(wire, exchange)
        kept = wire.conn.our_state is h11.DONE and wire.conn.their_state is h11.DONE
        return kept and wire.body_done.is_set()

    async def _handle(self, wire: Wire, exchange: Exchange) -> None:
        handler = asyncio.create_task(self._answer(wire, exchange))
        gone = asyncio.create_task(_gone(wire))
        try:
            await asyncio.wait({handler, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            handler.cancel()
            await asyncio.gather(handler, gone, return_exceptions=True)
        if handler.cancelled():
            raise ConnectionAbortedError("The client has gone.")
        handler.result()

    async def _answer(self, wire: Wire, exchange: Exchange) -> None:
        try:
            await self._app(exchange)
        except Refusal as err:
            await self._refuse(wire, exchange, err)
        except BadMessage as err:
            await self._refuse(
                wire, exchange, Refusal(err.status, "invalid_request_error", str(err))
            )
        except OSError:
            raise
        except Exception as err:
            # The text of an unknown error may quote what must not leave; its type is enough.
            log.error("request failed", extra={"error": type(err).__name__})
            await self._refuse(
                wire, exchange, Refusal(500, "api_error", "The proxy failed; see its log.")
            )

    async def _refuse(self, wire: Wire, exchange: Exchange, refusal: Refusal) -> None:
        if exchange.started:
            wire.abort()
            raise ConnectionError("The answer had begun.")
        headers, body = self._render(refusal.status, refusal.kind, str(refusal))
        log.info(
            "refused",
            extra={"status": refusal.status, "type": refusal.kind, "reason": str(refusal)},
        )
        await exchange.respond(refusal.status, [*headers, *refusal.headers], body)

    async def _refuse_raw(self, wire: Wire, err: BadMessage) -> None:
        headers, body = self._render(err.status, "invalid_request_error", str(err))
        lines = [
            b"HTTP/1.1 %d Refused" % err.status,
            *(b"%s: %s" % header for header in headers),
            b"content-length: %d" % len(body),
            b"connection: close",
        ]
        wire.writer.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        async with asyncio.timeout(self._limits.head_s):
            await wire.writer.drain()


async def _gone(wire: Wire) -> None:
    """Return when the client closes after its request: the upstream call must end with it.

    Bytes that come meanwhile are the next request; they stay in the connection's buffer.
    """
    await wire.body_done.wait()
    while len(wire.buffer) < READ_SIZE:
        data = await wire.reader.read(READ_SIZE)
        if not data:
            return
        wire.buffer += data
    await asyncio.Event().wait()
