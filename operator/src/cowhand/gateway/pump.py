"""Carries a followed log to one slow or fast client: keep-alive, back-pressure, an end.

The next event is taken from the log only when the client has taken the last one (beyond the socket's own
buffer), so a client that stops reading costs one event of memory, and after a while its connection.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from cowhand.gateway.iteration import leave, upcoming
from cowhand.session.events import SESSION_DELETED, STATUS_TERMINATED, Event

PING_S: Final = 10.0
"""Silence after which a keep-alive is sent."""

CHECK_S: Final = 60.0
"""How often the right to follow is checked again."""

STALLED_S: Final = 60.0
"""How long a client may take nothing before its connection is closed."""

LAST: Final = frozenset({SESSION_DELETED, STATUS_TERMINATED})
"""Types after which a followed log says nothing more."""


@dataclass
class Follower:
    """One client that follows one log.

    Attributes:
        response: prepared response.
        transport: its connection, to cut it when the client stalls.
        render: bytes to send for an event (or what else the source yields), empty for none.
        ping: bytes of a keep-alive.
        check: raises when the caller may no longer follow.
        stopping: set when the gateway goes down: the client reconnects elsewhere.
        last: types that end the stream after they are sent.
    """

    response: web.StreamResponse
    transport: asyncio.BaseTransport | None
    render: Callable[[Any], bytes]
    ping: bytes
    check: Callable[[], Awaitable[None]]
    stopping: asyncio.Event
    last: frozenset[str] = LAST

    async def run(self, source: AsyncIterator[Any]) -> None:
        """Send events as they come, until the log ends, the client leaves or the gateway stops.

        Raises:
            Denied, Retryable: whatever the log or `check` raises; headers are already sent.
        """
        loop = asyncio.get_running_loop()
        checked = loop.time()
        stop: asyncio.Future[Any] = asyncio.ensure_future(self.stopping.wait())
        pending: asyncio.Future[Any] | None = None
        try:
            while not self.stopping.is_set():
                if pending is None:
                    pending = upcoming(source)
                both: set[asyncio.Future[Any]] = {pending, stop}
                await asyncio.wait(both, timeout=PING_S, return_when=asyncio.FIRST_COMPLETED)
                if loop.time() - checked >= CHECK_S:
                    await self.check()
                    checked = loop.time()
                if not pending.done():
                    if not stop.done():
                        await self._write(self.ping)
                    continue
                try:
                    event = pending.result()
                except StopAsyncIteration:
                    return
                pending = None
                await self._write(self.render(event))
                if isinstance(event, Event) and event.type in self.last:
                    return
        except (ConnectionError, TimeoutError):
            # The client left or takes nothing: there is nobody to tell.
            self.response.force_close()
            if isinstance(self.transport, asyncio.Transport):
                # asyncio: a TLS transport whose connection is lost has no protocol left to abort.
                with contextlib.suppress(AttributeError):
                    self.transport.abort()
        finally:
            await leave((stop, pending), source)

    async def _write(self, data: bytes) -> None:
        if data:
            await asyncio.wait_for(self.response.write(data), STALLED_S)
