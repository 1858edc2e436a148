"""One worker: many sessions in one event loop, none of its own.

It beats, takes nominated sessions as long as it has room, pokes those with news, sweeps for sessions
whose worker died, and fences itself when its heartbeat no longer reaches the store. What a session
needs is in `loop`; what survives is in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from cowhand.errors import (
    CowhandError,
    Denied,
    Fenced,
    SessionClosed,
    SessionNotFound,
    StoreMismatch,
    StoreUnavailable,
)
from cowhand.harness.journal import Journal
from cowhand.harness.loop import LoopSettings, SessionLoop, Surroundings
from cowhand.session.log import Held, Lease, SessionLog, WorkerLog
from cowhand.telemetry.metrics import SESSIONS_HELD

log = logging.getLogger(__name__)

BEAT_S: Final = 2.0
"""Time between heartbeats."""

HOLD_S: Final = 8.0
"""Without a heartbeat for so long nothing new starts."""

DROP_S: Final = 10.0
"""Without a heartbeat for so long every session is dropped: others may hold them by now."""

SWEEP_S: Final = 1.0


@dataclass(frozen=True)
class WorkerSettings:
    """Limits of a worker.

    Attributes:
        namespace: the tenant.
        max_sessions: sessions in work at the same time.
        drain_s: how long streams may go on in a drain.
        loop: limits of each session.
    """

    namespace: str
    max_sessions: int = 200
    drain_s: float = 20.0
    loop: LoopSettings = field(default_factory=LoopSettings)


@dataclass
class _Held:
    """A session in work: its loop, once it is claimed, and the task that runs it."""

    task: asyncio.Task[None]
    loop: SessionLoop | None = None


class Worker:
    """See the module.

    Args:
        worker: the worker's side of the log.
        reader: reads events.
        around: model, hands and hooks for the sessions; `admit` is this worker's.
        settings: limits.
        on_ready: called once, after the first heartbeat.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        worker: WorkerLog,
        reader: SessionLog,
        around: Surroundings,
        settings: WorkerSettings,
        *,
        on_ready: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = worker
        self._reader = reader
        self._around = replace(around, admit=self.admitted)
        self._settings = settings
        self._on_ready = on_ready
        self._clock = clock
        self._sessions: dict[str, _Held] = {}
        self._again: set[str] = set()
        self._orphans: dict[str, tuple[Lease, float]] = {}
        self._failures: dict[str, int] = {}
        self._beaten_at = float("-inf")
        self._healthy = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._drain = asyncio.Event()

    @property
    def sessions(self) -> frozenset[str]:
        """Sessions in work."""
        return frozenset(self._sessions)

    async def admitted(self) -> None:
        """Return when new work may start: the last heartbeat is younger than 8 s."""
        while self._clock() - self._beaten_at >= HOLD_S:
            self._healthy.clear()
            await self._healthy.wait()

    def drain(self) -> None:
        """Begin to stop: `run` returns when every session is handed over."""
        self._drain.set()

    async def run(self) -> None:
        """Work until `drain` is called.

        Raises:
            StoreMismatch, Denied: the store is not ours; the process must stop.
        """
        try:
            await self._until_drained()
        finally:
            await self._cancel(list(self._sessions))

    async def _until_drained(self) -> None:
        upkeep = [asyncio.create_task(self._beats()), asyncio.create_task(self._guard())]
        intake = [
            asyncio.create_task(work())
            for work in (self._takes, self._nudged, self._sweeps)  # all endless
        ]
        drained = asyncio.create_task(self._drain.wait())
        try:
            await asyncio.wait({*upkeep, *intake, drained}, return_when=asyncio.FIRST_COMPLETED)
            _raise_first([*upkeep, *intake])
            await _stop(intake)
            await self._hand_everything_over(upkeep)
        finally:
            await _stop([*upkeep, *intake, drained])
        with contextlib.suppress(StoreUnavailable):
            await self._log.retire()

    # Heartbeat and self-fencing.

    async def _beats(self) -> None:
        ready = False
        while True:
            asked = self._clock()
            try:
                dirty = await self._log.beat()
            except StoreUnavailable as err:
                log.warning("no heartbeat: %s", err)
                await asyncio.sleep(min(BEAT_S, 0.5))
                continue
            # The deadline counts from before the question: the store may have answered late.
            self._beaten_at = asked
            if self._clock() - asked < HOLD_S:
                self._healthy.set()
            if not ready:
                ready = True
                self._on_ready()
            for session_id in dirty:
                self._poke(session_id)
            await self._release_orphans()
            await asyncio.sleep(max(0.0, BEAT_S - (self._clock() - asked)))

    async def _guard(self) -> None:
        """Drop everything when the heartbeat is too old: the leases are no longer ours."""
        while True:
            age = self._clock() - self._beaten_at
            if age >= DROP_S and self._beaten_at > float("-inf") and self._sessions:
                log.error("no heartbeat for %.1f s: dropping %d sessions", age, len(self._sessions))
                await self._cancel(list(self._sessions))
            await asyncio.sleep(0.25)

    async def _release_orphans(self, *, all_of_them: bool = False) -> None:
        """Leases of sessions that were dropped: if they are still ours, nobody else would work on them."""
        for session_id, (lease, not_before) in list(self._orphans.items()):
            if session_id in self._sessions and not all_of_them:
                continue  # still at work: its lease is no orphan yet
            if self._clock() < not_before and not all_of_them:
                continue
            try:
                await self._log.handover(lease)
            except StoreUnavailable:
                return
            except (Fenced, SessionClosed, SessionNotFound):
                pass
            self._orphans.pop(session_id, None)

    # Sessions.

    async def _takes(self) -> None:
        nominated = self._log.work()
        try:
            while True:
                await self.admitted()
                await self._room.wait()
                self._take(await anext(nominated))
        finally:
            if isinstance(nominated, AsyncGenerator):
                await nominated.aclose()

    def _take(self, session_id: str) -> None:
        if session_id in self._sessions:
            # Nominated while we still give it back: look again when that is done.
            self._again.add(session_id)
            self._poke(session_id)
            return
        task = asyncio.create_task(self.wake(session_id), name=session_id)
        self._sessions[session_id] = _Held(task)
        SESSIONS_HELD.set(len(self._sessions))
        task.add_done_callback(lambda _: self._ended(session_id))
        if len(self._sessions) >= self._settings.max_sessions:
            self._room.clear()

    def _ended(self, session_id: str) -> None:
        held = self._sessions.pop(session_id, None)
        SESSIONS_HELD.set(len(self._sessions))
        self._room.set()
        if session_id in self._again:
            self._again.discard(session_id)
            cancelled = held is not None and held.task.cancelled()
            if not self._drain.is_set() and not cancelled:
                self._take(session_id)

    async def wake(self, session_id: str) -> None:
        """Claim a session and work on it until there is nothing to do. Never raises but when cancelled."""
        try:
            lease = await self._log.claim(session_id)
        except StoreUnavailable as err:
            log.info("session %s not claimed: %s", session_id, err)
            return
        except CowhandError as err:
            log.warning("session %s not claimed: %s", session_id, err)
            return
        if isinstance(lease, Held):
            log.debug("session %s not claimed: %s", session_id, lease.why)
            return
        self._around.probe("claimed")
        not_before = 0.0
        try:
            if await self._work(lease):
                self._failures.pop(session_id, None)
                return
            # Not at once: the same failure would come again as fast as the store allows.
            failures = self._failures.get(session_id, 0) + 1
            self._failures[session_id] = failures
            not_before = self._clock() + min(60.0, 2.0**failures)
        except asyncio.CancelledError:
            self._orphans[session_id] = lease, not_before
            raise
        # A lease that is still ours must not lie about with nobody at it.
        self._orphans[session_id] = lease, not_before

    async def _work(self, lease: Lease) -> bool:
        """True if the lease was given back, or is not ours any more."""
        session_id = lease.session_id
        journal = Journal(self._log, self._reader, lease, clock=self._clock)
        loop = SessionLoop(
            self._settings.namespace, self._log, journal, self._around, self._settings.loop
        )
        held = self._sessions.get(session_id)
        if held is not None:
            held.loop = loop
        if self._drain.is_set():
            loop.drain()
        try:
            end = await loop.run()
        except (Fenced, SessionClosed, SessionNotFound) as err:
            log.info("session %s dropped: %s", session_id, err)
            return True
        except (StoreMismatch, Denied) as err:
            log.error("session %s dropped: %s", session_id, err)
            return True
        except Exception:
            log.exception("session %s failed; another worker will try", session_id)
            return False
        log.info("session %s %s", session_id, end.value)
        return True

    def _poke(self, session_id: str) -> None:
        held = self._sessions.get(session_id)
        if held is not None and held.loop is not None:
            held.loop.poke()

    async def _nudged(self) -> None:
        async for session_id in self._log.nudges():
            self._poke(session_id)

    async def _sweeps(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S * random.uniform(0.5, 1.5))  # noqa: S311
            try:
                await self._log.sweep()
            except StoreUnavailable as err:
                log.info("no sweep: %s", err)

    # The end.

    async def _hand_everything_over(self, upkeep: list[asyncio.Task[None]]) -> None:
        """Sessions without a stream go at once, the others when their stream ends, at the latest in time."""
        for held in self._sessions.values():
            if held.loop is not None:
                held.loop.drain()
        tasks = [held.task for held in self._sessions.values()]
        log.info("draining %d sessions", len(tasks))
        if tasks:
            await asyncio.wait(tasks, timeout=self._settings.drain_s)
        _raise_first(upkeep)
        await self._cancel(list(self._sessions))
        await self._release_orphans(all_of_them=True)

    async def _cancel(self, session_ids: list[str]) -> None:
        tasks = [held.task for sid in session_ids if (held := self._sessions.get(sid)) is not None]
        await _stop(tasks)


def _raise_first(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done() and not task.cancelled():
            task.result()


async def _stop(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
