"""One session's log as its holder sees it: the folded conversation, and appends that keep it exact.

Each append is folded with its position in the log; events of others that came in between are read
first. So the conversation never differs from what another worker would fold.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

from cowhand.errors import LogIncompatible, StoreUnavailable, Suspended
from cowhand.harness import status as st
from cowhand.harness.fold import Conversation
from cowhand.session.events import SESSION_ERROR, Event, NewEvent
from cowhand.session.log import Lease, SessionLog, WorkerLog

log = logging.getLogger(__name__)

T = TypeVar("T")

PAGE: Final = 100
"""Events read at a time."""

RETRY_CAP_S: Final = 2.0


async def steadily(what: str, call: Callable[[], Awaitable[T]]) -> T:
    """Repeat a call of the log until the store answers; it is safe to repeat, the log deduplicates."""
    failures = 0
    while True:
        try:
            return await call()
        except StoreUnavailable as err:
            failures += 1
            log.warning("%s: the store does not answer (%d): %s", what, failures, err)
            top = min(RETRY_CAP_S, 0.05 * 2**failures)
            await asyncio.sleep(err.after or random.uniform(top / 2, top))  # noqa: S311


class Journal:
    """See the module.

    Args:
        worker: the worker's side of the log.
        reader: reads events.
        lease: the claimed session.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        worker: WorkerLog,
        reader: SessionLog,
        lease: Lease,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._newest_ms = 0
        self._ahead_ms = 0.0
        self.lease = lease
        self.conversation = Conversation(lease.session_id)
        self._worker = worker
        self.reader = reader
        self._lock = asyncio.Lock()
        self._running: set[asyncio.Task[None]] = set()

    async def load(self) -> None:
        """Fold everything up to the claim. Raises LogIncompatible."""
        claimed = self._clock()
        async with self._lock:
            await self._read(self.lease.next_seq - 1)
        # The newest event is our own session.wake: the store's clock at about this moment.
        self._ahead_ms = self._newest_ms - claimed * 1000 if self._newest_ms else 0.0

    def now_ms(self) -> int:
        """The time by the store's clock, milliseconds; our own events are folded with it."""
        return round(self._clock() * 1000 + self._ahead_ms)

    async def sync(self) -> None:
        """Fold what others have appended since."""
        await self._exclusively(self._sync())

    async def append(self, events: Sequence[NewEvent], *, barrier: bool = False) -> None:
        """Append and fold; with `barrier` return only when it is as durable as the profile promises.

        A cancelled caller leaves the append running: the store may have it already.

        Raises:
            Suspended: an event that begins work came after the suspension; that is folded then, nothing was
                appended.
            Fenced, SessionClosed.
        """
        try:
            await self._exclusively(self._append(tuple(events)))
        except Suspended:
            await self.sync()
            raise
        if barrier:
            await steadily("barrier", self._worker.barrier)

    async def refuse(self, reason: LogIncompatible) -> int:
        """Say in the log that this release cannot read it; answers the position that follows."""
        data = {
            "error": {
                "type": "needs_upgrade",
                "message": str(reason),
                "retry_status": {"type": "terminal"},
            }
        }
        event = NewEvent(SESSION_ERROR, data)
        return 1 + await steadily("append", lambda: self._worker.append(self.lease, [event]))

    async def close(self) -> None:
        """Stop appends that still wait for the store."""
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _exclusively(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._finished)
        await asyncio.shield(task)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # seen: whoever appends next meets it again

    async def _sync(self) -> None:
        async with self._lock:
            await self._read(None)

    async def _append(self, events: tuple[NewEvent, ...]) -> None:
        async with self._lock:
            conversation = self.conversation
            new = [(event.type, event.data) for event in events]
            status = st.after(conversation.status, new)
            written = status if status != conversation.status else None
            first = await steadily(
                "append", lambda: self._worker.append(self.lease, events, status=written)
            )
            if first > conversation.last_seq + 1:
                await self._read(first - 1)
            for offset, event in enumerate(events):
                conversation.apply(
                    Event(
                        seq=first + offset,
                        type=event.type,
                        id="",
                        ts=self.now_ms(),
                        lease=self.lease.value,
                        payload=event.payload(),
                    )
                )

    async def _read(self, end: int | None) -> None:
        conversation = self.conversation
        while end is None or conversation.last_seq < end:
            start = conversation.last_seq + 1
            page = await steadily(
                "read",
                lambda: self.reader.get_events(
                    self.lease.session_id,
                    start,  # noqa: B023  called before the next round
                    end,
                    limit=PAGE,
                ),
            )
            for event in page:
                conversation.apply(event)
                self._newest_ms = event.ts
            if len(page) < PAGE:
                if end is not None and conversation.last_seq < end:
                    raise RuntimeError(
                        f"the log of {self.lease.session_id} ends at {conversation.last_seq}, {end} was acknowledged"
                    )
                return
