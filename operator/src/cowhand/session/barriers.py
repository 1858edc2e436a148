"""Barriers: a process waits until what it wrote is as durable as the profile promises.

What is asked of the server for that is in `durability`. Called by `store`, for the session log and for workers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Final

from cowhand.errors import StoreUnavailable, Terminal
from cowhand.session.cluster import SlotPipes
from cowhand.session.durability import barrier, confirmed
from cowhand.session.link import Pipe
from cowhand.session.log import StoreConfig
from cowhand.telemetry.metrics import STORE_BARRIER_SECONDS

LOG = logging.getLogger(__name__)

WAIT_MS = 1000
"""How long a barrier waits for replicas before it is asked again."""

DISK_WAIT_MS = 3000
"""The same where it waits for disks: with `appendfsync everysec` they take up to two seconds."""

WEAK_WAIT_MS: Final = 20
"""The same while `allow_weaker` lets barriers pass that nobody confirms."""

MARK_MS: Final = 60_000
"""Life of the key that a barrier writes."""


@dataclass
class _Turn:
    """Barriers of one connection: one at a time, and one for all who ask before its mark is written."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    next: asyncio.Task[tuple[int, bool]] | None = None


class Barriers:
    """Of one process."""

    def __init__(self, config: StoreConfig, writes: Pipe | SlotPipes) -> None:
        """`writes` is what everything goes over that a barrier speaks of."""
        self.config = config
        self._writes = writes
        self._weak = False
        self._turns: dict[Pipe, _Turn] = {}

    async def wait(self, base: str) -> int:
        """Barrier: wait until all that we wrote on this connection is as durable as the profile promises.

        Answers the generation of the connection that it speaks of.

        A WAIT speaks of what its own connection has written, and one that has written nothing passes at once: a
        repeated append that had run on an older connection writes nothing. So a mark is written first, behind
        everything that was answered on this connection.

        Args:
            base: of the partition that was written to; the tenant's login may write the mark there.

        Raises:
            StoreUnavailable: not confirmed in time; what was written is not lost, ask again.
        """
        began, outcome = time.monotonic(), "unavailable"
        try:
            generation, done = await self._shared(base)
            if not done and not self.config.allow_weaker:
                raise StoreUnavailable(
                    f"the append is not confirmed as profile {self.config.profile} demands"
                    f" ({self.config.replicas} replicas): it may be lost or not, ask again",
                    after=0.5,
                )
            if self._weak == done:
                self._weak = not done
                LOG.warning("barriers are %s", "confirmed again" if done else "not confirmed now")
            outcome = "ok" if done else "weaker"
        finally:
            STORE_BARRIER_SECONDS.labels(outcome).observe(time.monotonic() - began)
        return generation

    async def _shared(self, base: str) -> tuple[int, bool]:
        """One barrier for all who ask before its mark is written: a second mark would wait for the replicas again."""
        pipe = self._writes.at(base)
        turn = self._turns.setdefault(pipe, _Turn())
        if turn.next is None or turn.next.done():
            task = asyncio.get_running_loop().create_task(self._take(turn, pipe, base))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            turn.next = task
        return await asyncio.shield(turn.next)

    async def _take(self, turn: _Turn, pipe: Pipe, base: str) -> tuple[int, bool]:
        async with turn.lock:
            turn.next = None  # Whoever asks from now on may have written behind this mark.
            return await self._barrier(pipe, base)

    async def _barrier(self, pipe: Pipe, base: str) -> tuple[int, bool]:
        """The generation of the connection, and whether enough have confirmed."""
        profile, replicas = self.config.profile, self.config.replicas
        patience = DISK_WAIT_MS if profile == "strict" else WAIT_MS
        command = barrier(profile, replicas, WEAK_WAIT_MS if self._weak else patience)
        assert command is not None, "no barrier in this profile"
        mark = ("SET", f"{base}bar", "1", "PX", MARK_MS)
        # Both are queued before either is sent, so they go over one connection in this order, or the
        # generations tell.
        found = await asyncio.gather(
            pipe.call_on(*mark), pipe.call_on(*command), return_exceptions=True
        )
        for one in found:
            if isinstance(one, Terminal):
                # WAITAOF of a server that writes no file, for instance: nothing is promised, nothing is lost.
                LOG.warning("the store refuses the barrier: %s", one)
                return pipe.link.generation, False
            if isinstance(one, BaseException):
                raise one
        (_, marked), (reply, generation) = (one for one in found if isinstance(one, tuple))
        return generation, marked == generation and confirmed(profile, replicas, reply)
