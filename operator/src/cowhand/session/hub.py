"""Nudges: one pub/sub connection of a process, shared by everybody who waits for a channel.

Pub/sub delivers at most once, so a nudge never carries data that matters: it says "look again". After each
reconnect every subscriber is told to look again (`RESYNC`). Called by `store`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

from redis import exceptions as redis_errors

from cowhand.errors import CowhandError
from cowhand.session.link import Link, translate

LOG = logging.getLogger(__name__)

Message = tuple[str, bytes]

RESYNC: Final[Message] = ("", b"")
"""Messages may have been lost: look at the data."""

PING_SECONDS: Final = 5.0
SILENCE_SECONDS: Final = 15.0
BUFFER: Final = 4096


class Subscription:
    """What has arrived on some channels and was not yet taken."""

    def __init__(self, channels: frozenset[str]) -> None:
        self.channels = channels
        self._messages: deque[Message] = deque()
        self._arrived = asyncio.Event()
        self._error: Exception | None = None

    def offer(self, message: Message) -> None:
        """Called by the hub; a subscriber that does not take its messages loses them and is told to resync."""
        if len(self._messages) >= BUFFER:
            self._messages.clear()
            message = RESYNC
        self._messages.append(message)
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        """Called by the hub when waiting further is of no use."""
        self._error = error
        self._arrived.set()

    async def get(self, timeout: float | None = None) -> Message | None:
        """The next message; None after `timeout` seconds. Raises StoreMismatch, Denied."""
        if not self._messages:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._arrived.wait()
            except TimeoutError:
                return None
            if not self._messages and self._error is not None:
                raise self._error
        return self._messages.popleft()


class Hub:
    """The pub/sub connection; started with the first subscription."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._subscriptions: dict[str, set[Subscription]] = {}
        self._confirmed: dict[str, asyncio.Event] = {}
        self._sending = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._heard = 0.0
        self._connected = False
        self._error: Exception | None = None

    @contextlib.asynccontextmanager
    async def subscribe(self, channels: Iterable[str]) -> AsyncIterator[Subscription]:
        """Subscribe for the length of the block; entered when the server has confirmed each channel.

        While the store does not answer it is entered after PING_SECONDS all the same: the caller polls. Raises
        StoreMismatch, Denied; the next subscriber tries anew, for the right store may be back by then.
        """
        self._forget_refusal()
        subscription = Subscription(frozenset(channels))
        new = [channel for channel in subscription.channels if channel not in self._subscriptions]
        for channel in new:
            self._confirmed[channel] = asyncio.Event()
        for channel in subscription.channels:
            self._subscriptions.setdefault(channel, set()).add(subscription)
        waiting = [self._confirmed[channel] for channel in subscription.channels]
        try:
            self._start()
            if self._connected and new:
                await self._send(("SUBSCRIBE", *new))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PING_SECONDS):
                    for event in waiting:
                        await event.wait()
            if self._error is not None:
                raise self._error
            yield subscription
        finally:
            await self._leave(subscription)

    async def _leave(self, subscription: Subscription) -> None:
        gone = []
        for channel in subscription.channels:
            others = self._subscriptions[channel]
            others.discard(subscription)
            if not others:
                del self._subscriptions[channel]
                self._confirmed.pop(channel, None)
                gone.append(channel)
        if gone and self._connected:
            await self._send(("UNSUBSCRIBE", *gone))

    def _start(self) -> None:
        if not self._tasks:
            loop = asyncio.get_running_loop()
            self._tasks = [loop.create_task(self._read()), loop.create_task(self._ping())]

    def _forget_refusal(self) -> None:
        """Let a reader that was refused connect once more; those that it has failed are on their way out."""
        if self._error is None:
            return
        self._error = None
        self._confirmed = {channel: asyncio.Event() for channel in self._subscriptions}
        for task in self._tasks:
            task.cancel()
        self._tasks = []

    async def _send(self, command: tuple[str, ...]) -> None:
        """Send without reading; a failure is noticed by the reader, which subscribes anew."""
        async with self._sending:
            if not self._connected:
                return
            try:
                connection = await self._link.open()
                await connection.send_packed_command(
                    connection.pack_commands([command]), check_health=False
                )
            except (OSError, redis_errors.RedisError, CowhandError) as err:
                LOG.debug("pub/sub send failed: %s", err)
                await self._link.close()

    async def _read(self) -> None:
        pause = 0.05
        first = True
        while True:
            try:
                connection = await self._link.open()
                self._heard = asyncio.get_running_loop().time()
                async with self._sending:
                    self._connected = True
                    if self._subscriptions:
                        command = ("SUBSCRIBE", *self._subscriptions)
                        await connection.send_packed_command(
                            connection.pack_commands([command]), check_health=False
                        )
                if not first:
                    self._resync()
                first = False
                pause = 0.05
                while True:
                    reply = await connection.read_response(
                        timeout=math.inf, disconnect_on_error=False
                    )
                    self._heard = asyncio.get_running_loop().time()
                    self._dispatch(reply)
            except (OSError, redis_errors.RedisError, CowhandError) as err:
                self._connected = False
                await self._link.close()
                error = translate(err)
                if not getattr(error, "after", None):
                    self._fail(error)
                    return
                LOG.info("pub/sub connection lost, trying again: %s", err)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)

    def _dispatch(self, reply: Any) -> None:
        if not isinstance(reply, list):
            return
        kind, channel = reply[0], reply[1].decode() if reply[1] else ""
        if kind == b"message":
            for subscription in self._subscriptions.get(channel, ()):
                subscription.offer((channel, reply[2]))
        elif kind == b"subscribe" and channel in self._confirmed:
            self._confirmed[channel].set()

    def _everybody(self) -> set[Subscription]:
        return {one for group in self._subscriptions.values() for one in group}

    def _resync(self) -> None:
        for subscription in self._everybody():
            subscription.offer(RESYNC)

    def _fail(self, error: Exception) -> None:
        self._error = error
        for event in self._confirmed.values():
            event.set()
        for subscription in self._everybody():
            subscription.fail(error)

    async def _ping(self) -> None:
        """Notice a connection that is dead without a word."""
        while True:
            await asyncio.sleep(PING_SECONDS)
            if not self._connected:
                continue
            if asyncio.get_running_loop().time() - self._heard > SILENCE_SECONDS:
                await self._link.close()
            else:
                await self._send(("PING",))

    async def close(self) -> None:
        """Stop; subscribers wait for ever unless they have a timeout."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._link.close()
