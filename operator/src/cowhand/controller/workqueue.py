"""A keyed work queue: each key at most once in line and at most once in work.

kopf's `on.event` handlers are never retried, so retrying, delays and backoff live here. `Schedule` holds the
decisions and takes the time as an argument; `WorkQueue` is the loop around it.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from cowhand.errors import Retryable
from cowhand.telemetry.logging import bound

K = TypeVar("K", bound=Hashable)

FIRST_DELAY_S: Final = 0.2
LAST_DELAY_S: Final = 30.0

log = logging.getLogger(__name__)


@dataclass
class Schedule(Generic[K]):
    """Which key is due when.

    Attributes:
        jitter: answers a factor, 0.5 to 1.5 by default, for each backoff.
    """

    jitter: Callable[[], float] = lambda: random.uniform(0.5, 1.5)  # noqa: S311 - not a secret
    _due: dict[K, float] = field(default_factory=dict)
    _heap: list[tuple[float, int, K]] = field(default_factory=list)
    _busy: set[K] = field(default_factory=set)
    _failures: dict[K, int] = field(default_factory=dict)
    _order: itertools.count[int] = field(default_factory=itertools.count)

    def add(self, key: K, now: float, after: float = 0.0) -> None:
        """Ask for a key, `after` seconds from now; the earlier of two requests wins."""
        due = now + after
        if key in self._due and self._due[key] <= due:
            return
        self._due[key] = due
        heapq.heappush(self._heap, (due, next(self._order), key))

    def pop(self, now: float) -> K | None:
        """A key that is due and not in work, now in work; None if there is none."""
        held: list[tuple[float, int, K]] = []
        found: K | None = None
        while self._heap and self._heap[0][0] <= now:
            entry = heapq.heappop(self._heap)
            due, _, key = entry
            if self._due.get(key) != due:
                continue  # an earlier request replaced this one, or it was served
            if key in self._busy:
                held.append(entry)
                continue
            del self._due[key]
            self._busy.add(key)
            found = key
            break
        for entry in held:
            heapq.heappush(self._heap, entry)
        return found

    def done(self, key: K, now: float, requeue_after: float | None = None) -> None:
        """The work on a key ended well."""
        self._busy.discard(key)
        self._failures.pop(key, None)
        if requeue_after is not None:
            self.add(key, now, requeue_after)

    def failed(self, key: K, now: float, after: float | None = None) -> float:
        """The work on a key failed: it comes again after `after`, or after a growing delay (answered)."""
        self._busy.discard(key)
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay = after
        if delay is None:
            delay = min(LAST_DELAY_S, FIRST_DELAY_S * 2 ** min(failures, 16)) * self.jitter()
        self.add(key, now, delay)
        return delay

    def next_due(self) -> float | None:
        """When something not in work is due, None for nothing."""
        times = [due for key, due in self._due.items() if key not in self._busy]
        return min(times, default=None)

    def __len__(self) -> int:
        return len(self._due) + len(self._busy)


class WorkQueue(Generic[K]):
    """Workers that hand due keys to a function.

    The function answers the seconds after which it wants the key again, or None. `Retryable` comes again
    after its `after`; any other error is logged and comes again with backoff, because a level-based
    function may find another world next time.
    """

    def __init__(
        self, name: str, handle: Callable[[K], Awaitable[float | None]], *, workers: int = 8
    ) -> None:
        self._name = name
        self._handle = handle
        self._workers = workers
        self._schedule: Schedule[K] = Schedule()
        self._changed = asyncio.Event()

    def add(self, key: K, after: float = 0.0) -> None:
        """Ask for a key."""
        self._schedule.add(key, asyncio.get_running_loop().time(), after)
        self._changed.set()

    def __len__(self) -> int:
        return len(self._schedule)

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._workers):
                group.create_task(self._work())

    async def run_until_idle(self, *, horizon_s: float = 0.0) -> None:
        """Work on everything that is due within `horizon_s` from now, without waiting for it (tests)."""
        loop = asyncio.get_running_loop()
        while (key := self._schedule.pop(loop.time() + horizon_s)) is not None:
            await self._one(key)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            key = self._schedule.pop(loop.time())
            if key is not None:
                await self._one(key)
                continue
            self._changed.clear()
            due = self._schedule.next_due()
            timeout = None if due is None else max(0.0, due - loop.time())
            try:
                await asyncio.wait_for(self._changed.wait(), timeout)
            except TimeoutError:
                continue

    async def _one(self, key: K) -> None:
        loop = asyncio.get_running_loop()
        logger = bound(log, queue=self._name, key=str(key))
        try:
            after = await self._handle(key)
        except Retryable as err:
            delay = self._schedule.failed(key, loop.time(), err.after)
            logger.info("again in %.1f s: %s", delay, err)
        except Exception:
            delay = self._schedule.failed(key, loop.time())
            logger.exception("failed, again in %.1f s", delay)
        except asyncio.CancelledError:
            self._schedule.failed(key, loop.time(), 0.0)
            raise
        else:
            self._schedule.done(key, loop.time(), after)
        self._changed.set()
