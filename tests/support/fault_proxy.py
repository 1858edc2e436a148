"""A TCP proxy on loopback that breaks one connection at a chosen moment: when bytes of a chosen kind pass.

Stands between a process under test and one that it talks to. What happens is decided by what passes, not by time,
so that a case means the same on a slow machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Moment = Literal["request", "sent", "reply", "torn", "stream"]
"""Where a connection breaks: `request` before the bytes arrive, `sent` when they have gone out, `reply` when the
answer comes (the other side has acted), `torn` after half of the answer's first piece, `stream` before the piece of
the answer that holds the pattern."""

How = Literal["cut", "reset", "stall", "delay", "hold"]
"""`cut` closes the connection, `reset` sends RST, `stall` swallows everything for `stall_s` and then resets (a half
open connection), `delay` holds what comes for `stall_s` and lets it pass, `hold` does so until `release` is called."""

KEEP = 200
"""Bytes of the last piece in which the beginning of a pattern may stand."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, once.

    Attributes:
        pattern: bytes that are waited for.
        moment, how: see above.
        nth: at the n-th time that the pattern passes.
        stall_s: for `stall` and `delay`, seconds.
        strike: called when it happens, before anything else: to kill or stop a process at this very point.
    """

    pattern: bytes
    moment: Moment
    how: How
    nth: int = 1
    stall_s: float = 1.0
    strike: Callable[[], None] = lambda: None


class FaultProxy:
    """See the module. One target; `arm` sets the next fault.

    Attributes:
        fired: set when the fault has happened.
        replies: how many pieces of answers came.
        fenced: how many answers of the store said that a lease is gone.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._target = (host, port)
        self._fault: Fault | None = None
        self._seen = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: dict[asyncio.Task[None], _Connection] = {}
        self.fired = asyncio.Event()
        self.passes = asyncio.Event()
        self.replies = self.fenced = 0
        self.port = 0

    async def start(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def arm(self, fault: Fault) -> None:
        """Wait for this fault; replaces one that has not happened."""
        self._fault, self._seen = fault, 0
        self.fired, self.passes = asyncio.Event(), asyncio.Event()

    def release(self) -> None:
        """Let pass what a `hold` keeps."""
        self.passes.set()

    def cut_others(self) -> None:
        """Close every connection but the one on which a `hold` keeps something back."""
        for task, connection in self._connections.items():
            if not connection.holds:
                task.cancel()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            out_reader, out_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()
            return
        finally:
            self._tasks.discard(task)
        self._tasks.add(task)
        connection = _Connection(self, (reader, writer), (out_reader, out_writer))
        self._connections[task] = connection
        # asyncio.start_server logs a task of its own that was cancelled; we alone do that.
        with contextlib.suppress(asyncio.CancelledError):
            await connection.run()
        self._tasks.discard(task)
        del self._connections[task]

    def due(self, data: bytes, *, reply: bool) -> Fault | None:
        """The fault, if this piece brings it: it has then happened."""
        fault = self._fault
        if fault is None or reply != (fault.moment == "stream") or fault.pattern not in data:
            return None
        self._seen += 1
        if self._seen < fault.nth:
            return None
        self._fault = None
        return fault


class _Broken(Exception):
    """The connection was broken on purpose."""


Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Connection:
    def __init__(self, proxy: FaultProxy, client: Pair, server: Pair) -> None:
        self._proxy = proxy
        self._client, self._server = client, server
        self._reply: Fault | None = None
        self.holds = False

    async def run(self) -> None:
        there = asyncio.create_task(self._there())
        back = asyncio.create_task(self._back())
        try:
            await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (there, back):
                task.cancel()
            await asyncio.gather(there, back, return_exceptions=True)
            for _, writer in (self._client, self._server):
                writer.close()

    async def _there(self) -> None:
        tail = b""
        while data := await self._client[0].read(65536):
            fault = self._proxy.due(tail + data, reply=False)
            tail = b"" if fault else (tail + data)[-KEEP:]
            if fault is not None and fault.moment == "request":
                await self._break(fault)
            if fault is not None and fault.moment in ("reply", "torn"):
                self._reply = fault
            await _send(self._server[1], data)
            if fault is not None and fault.moment == "sent":
                await self._break(fault)

    async def _back(self) -> None:
        tail = b""
        while data := await self._server[0].read(65536):
            self._proxy.replies += 1
            self._proxy.fenced += data.count(b"$6\r\nFENCED")
            fault, self._reply = self._reply, None
            if fault is None:
                fault = self._proxy.due(tail + data, reply=True)
            tail = b"" if fault else (tail + data)[-KEEP:]
            if fault is not None:
                if fault.moment == "torn":
                    await _send(self._client[1], data[: len(data) // 2])
                    data = data[len(data) // 2 :]
                await self._break(fault)
            await _send(self._client[1], data)

    async def _break(self, fault: Fault) -> None:
        """Do it; returns only for `delay` and `hold`."""
        fault.strike()
        passes = self._proxy.passes
        self._proxy.fired.set()
        if fault.how == "hold":
            self.holds = True
            await passes.wait()
            return
        if fault.how == "delay":
            await asyncio.sleep(fault.stall_s)
            return
        if fault.how == "stall":
            self._client[1].transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(fault.stall_s)
        if fault.how in ("reset", "stall"):
            for _, writer in (self._client, self._server):
                raw = writer.get_extra_info("socket")
                with contextlib.suppress(OSError):
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
        raise _Broken


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()
