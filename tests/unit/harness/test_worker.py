"""The worker: heartbeat, self-fencing, room, drain; on a log in memory and a clock of the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from cowhand.errors import StoreMismatch, StoreUnavailable
from cowhand.harness.model import Response
from cowhand.harness.worker import DROP_S, HOLD_S, Worker, WorkerSettings
from cowhand.session import events as ev
from cowhand.session.log import Lease
from support.harness_rig import (
    LIMITS,
    NAMESPACE,
    SID,
    FakeCredentials,
    FakeLog,
    FakeTransport,
    World,
    message,
    text,
    world,
)

from cowhand.harness.run import surroundings  # isort: skip


class Log(FakeLog):
    """A log whose heartbeat and queue the test holds in its hand."""

    def __init__(self, made: World) -> None:
        super().__init__(made, "w1")
        self.queue: asyncio.Queue[str] = asyncio.Queue()
        self.beats = 0
        self.beat_error: Exception | None = None
        self.dirty: set[str] = set()
        self.handed_over: list[str] = []
        self.claims: list[str] = []
        self.retired = False

    async def beat(self) -> set[str]:
        if self.beat_error is not None:
            raise self.beat_error
        self.beats += 1
        dirty, self.dirty = self.dirty, set()
        return dirty

    async def work(self) -> AsyncIterator[str]:
        while True:
            yield await self.queue.get()

    async def claim(self, session_id: str) -> Any:
        self.claims.append(session_id)
        return await super().claim(SID)

    async def handover(self, lease: Lease) -> None:
        self.handed_over.append(lease.value)
        await super().handover(lease)

    async def retire(self) -> None:
        self.retired = True


class Gate:
    """A model that waits until the test lets it answer."""

    def __init__(self) -> None:
        self.waiting = asyncio.Event()
        self.open = asyncio.Event()
        self.error: Exception | None = None

    async def stream(
        self, body: bytes, *, session_id: str, lease: str, on_text: Callable[[str], None], **_: Any
    ) -> Response:
        self.waiting.set()
        await self.open.wait()
        if self.error is not None:
            raise self.error
        return Response(message(text("hi")), "r", 1, 1)


class Bench:
    """A running worker."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        monkeypatch.setattr("cowhand.harness.worker.BEAT_S", 0.001)
        self.now = 100.0
        self.world = world()
        self.log = Log(self.world)
        self.model = Gate()
        self.ready = 0
        transport = FakeTransport(self.world, self.log)
        around = surroundings(self.model, transport, FakeCredentials(), LIMITS)
        self.worker = Worker(
            self.log, self.log, around, WorkerSettings(NAMESPACE, **settings),
            on_ready=self._ready, clock=lambda: self.now,
        )  # fmt: skip
        self.task = asyncio.create_task(self.worker.run())

    def _ready(self) -> None:
        self.ready += 1

    async def beats(self, more: int = 3) -> None:
        target = self.log.beats + more
        while self.log.beats < target:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    async def until(self, check: Callable[[], Any]) -> None:
        async with asyncio.timeout(10):
            while not check():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def test_a_held_session_is_kept_over_many_beats_and_then_parked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch)
    bench.log.queue.put_nowait(SID)
    await bench.model.waiting.wait()
    await bench.beats(20)
    assert bench.log.handed_over == []
    assert bench.worker.sessions == {SID}
    assert bench.ready == 1
    bench.model.open.set()
    await bench.until(lambda: not bench.worker.sessions)
    assert bench.world.lease == ""
    assert bench.world.types()[-1] == ev.STATUS_IDLE
    await bench.close()


async def test_without_a_heartbeat_nothing_starts_and_then_everything_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch)
    bench.log.queue.put_nowait(SID)
    await bench.model.waiting.wait()
    bench.log.beat_error = StoreUnavailable("gone")
    bench.now += HOLD_S
    admitted = asyncio.create_task(bench.worker.admitted())
    await asyncio.sleep(0.02)
    assert not admitted.done()
    assert bench.worker.sessions == {SID}, "still held between 8 and 10 seconds"
    bench.now += DROP_S - HOLD_S
    await bench.until(lambda: not bench.worker.sessions)
    types = bench.world.types()
    bench.log.beat_error = None
    await admitted
    # The store is back and still thinks we hold it: somebody must be able to take it.
    await bench.until(lambda: bench.log.handed_over)
    assert bench.world.lease == ""
    assert bench.world.types() == types, "nothing was appended after the drop"
    await bench.close()


async def test_only_as_many_sessions_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, max_sessions=1)
    for session_id in (SID, "other"):
        bench.log.queue.put_nowait(session_id)
    await bench.model.waiting.wait()
    await bench.beats()
    assert bench.log.claims == [SID]
    bench.model.open.set()
    await bench.until(lambda: len(bench.log.claims) == 2)
    await bench.close()


async def test_a_drain_waits_for_a_stream_and_hands_the_session_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch)
    bench.log.queue.put_nowait(SID)
    await bench.model.waiting.wait()
    bench.worker.drain()
    await bench.beats()
    assert not bench.task.done()
    bench.model.open.set()
    await bench.task
    assert bench.log.retired
    assert ev.MODEL_RESPONSE in bench.world.types()
    assert len(bench.log.handed_over) == 1
    assert bench.world.types()[-1] == ev.MODEL_REQUEST_END


async def test_a_drain_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, drain_s=0.05)
    bench.log.queue.put_nowait(SID)
    await bench.model.waiting.wait()
    bench.worker.drain()
    await bench.task
    assert len(bench.log.handed_over) == 1
    assert bench.world.lease == ""


async def test_another_store_stops_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.log.beat_error = StoreMismatch("another store")
    with pytest.raises(StoreMismatch):
        await bench.task


async def test_a_session_that_breaks_our_code_is_given_back_later_not_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch)
    bench.model.error = RuntimeError("a bug")
    bench.model.open.set()
    bench.log.queue.put_nowait(SID)
    await bench.until(lambda: bench.log.claims and not bench.worker.sessions)
    await bench.beats()
    assert bench.log.handed_over == []
    bench.now += 3
    await bench.until(lambda: bench.log.handed_over)
    assert not bench.task.done(), "the worker itself goes on"
    await bench.close()


async def test_news_of_the_beat_reach_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.log.queue.put_nowait(SID)
    await bench.model.waiting.wait()
    from cowhand.session.events import NewEvent

    bench.world.on_news = lambda: None  # the nudge is lost
    bench.world.emit(NewEvent(ev.USER_INTERRUPT, {"actor": {"user": "u"}}, id="i"))
    bench.log.dirty = {SID}
    await bench.until(lambda: not bench.worker.sessions)
    assert bench.world.data(ev.STATUS_IDLE)[-1]["stop_reason"] == {"type": "interrupted"}
    await bench.close()
