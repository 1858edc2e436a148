"""The lines of a harness proxy: order, what is told to the broker, and that nobody waits for one that is away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from cowhand.errors import BrokerUnavailable
from cowhand.proxy import slots as module
from cowhand.proxy.slots import Key, Line, Slots

POOL = "ab" * 32


def key(number: int) -> Key:
    return f"session-{number}", "lease"


class Broker:
    """Grants `free` slots in the order that it is asked for them."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.asked: list[dict[str, Any]] = []
        self.held: set[str] = set()
        self.error: Exception | None = None
        self.answer: Mapping[str, Any] | None = None
        self.heard = asyncio.Event()

    async def __call__(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        self.asked.append(dict(body))
        self.heard.set()
        if self.error is not None:
            raise self.error
        if self.answer is not None:
            return self.answer
        self.free += len(self.held & set(body["done"]))
        self.held -= set(body["done"])
        granted = body["wanted"][: self.free]
        self.free -= len(granted)
        self.held |= set(granted)
        return {"granted": granted, "pause_ms": 0}

    async def told(self, test: Any) -> None:
        """Wait until a question after now is so."""
        at = len(self.asked)
        async with asyncio.timeout(60):
            while not any(test(body) for body in self.asked[at:]):
                self.heard.clear()
                await self.heard.wait()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.005)
    monkeypatch.setattr(module, "RENEW_S", 0.005)


async def hold(line: Line, number: int, began: list[int], end: asyncio.Event) -> None:
    async with line.slot(key(number)):
        began.append(number)
        await end.wait()


async def soon(so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while True:
            if so():
                return
            await asyncio.sleep(0.001)


async def test_requests_go_in_the_order_in_which_they_came() -> None:
    broker, began = Broker(2), list[int]()
    line = Slots(broker).line(POOL)
    ends = [asyncio.Event() for _ in range(5)]
    tasks = [asyncio.create_task(hold(line, n, began, ends[n])) for n in range(5)]
    await broker.told(lambda body: body["waiting"] == 3 and len(body["held"]) == 2)
    await soon(lambda: began == [0, 1])
    for n, expected in ((1, [0, 1, 2]), (0, [0, 1, 2, 3]), (3, [0, 1, 2, 3, 4])):
        ends[n].set()
        await soon(lambda expected=expected: began == expected)  # type: ignore[misc]
    for end in ends:
        end.set()
    await asyncio.gather(*tasks)
    await soon(lambda: line.idle)
    assert broker.held == set(), "nothing is kept when nothing runs"
    assert broker.asked[-1]["held"] == []


async def test_a_place_is_kept_while_it_is_asked_for_and_its_slot_is_used() -> None:
    broker, began = Broker(0), list[int]()
    line = Slots(broker).line(POOL)
    assert not await line.wait(key(1), 0.02)
    end = asyncio.Event()
    second = asyncio.create_task(hold(line, 2, began, end))
    await broker.told(lambda body: body["waiting"] == 2)
    assert not await line.wait(key(1), 0.02)
    broker.free = 1
    assert await line.wait(key(1), 60), "it came before the other"
    first = asyncio.create_task(hold(line, 1, began, end))
    await broker.told(lambda body: len(body["held"]) == 1)
    await soon(lambda: began == [1])
    assert len(broker.held) == 1, "the slot that was waited for, no second one"
    end.set()
    await asyncio.gather(first, second)


async def test_what_is_not_used_is_given_back() -> None:
    clock, broker = Clock(), Broker(1)
    line = Slots(broker, clock=clock).line(POOL)
    assert await line.wait(key(1), 60)
    assert not await line.wait(key(2), 0.02)
    clock.now = module.UNUSED_S + 1
    assert await line.wait(key(3), 60), "neither the slot of 1 nor the place of 2 is kept"
    assert len(broker.held) == 1


async def test_who_leaves_the_line_is_forgotten() -> None:
    broker, began = Broker(0), list[int]()
    line = Slots(broker).line(POOL)
    tasks = [asyncio.create_task(hold(line, n, began, asyncio.Event())) for n in (1, 2)]
    await broker.told(lambda body: body["waiting"] == 2)
    tasks[0].cancel()
    await broker.told(lambda body: body["waiting"] == 1 and len(body["done"]) == 1)
    broker.free = 1
    await soon(lambda: began == [2])
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(
    "error", [BrokerUnavailable("away", after=2), TimeoutError(), RuntimeError("bug")]
)
async def test_while_the_broker_is_away_everybody_passes(error: Exception) -> None:
    clock, broker, began = Clock(), Broker(0), list[int]()
    broker.error = error
    line = Slots(broker, clock=clock).line(POOL)
    end = asyncio.Event()
    tasks = [asyncio.create_task(hold(line, n, began, end)) for n in range(3)]
    await soon(lambda: len(began) == 3)
    assert await line.wait(key(9), 0), "not even asked"
    broker.error = None
    clock.now = module.AWAY_S + 1
    tasks.append(asyncio.create_task(hold(line, 4, began, end)))
    await broker.told(lambda body: body["waiting"] == 1 and len(body["held"]) >= 3)
    assert 4 not in began, "when it is back it hears of those that passed, and turns count again"
    broker.free = 1
    end.set()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("answer", [{}, {"granted": 1, "pause_ms": 0}, {"granted": []}])
async def test_an_answer_of_another_shape_is_none(answer: Any) -> None:
    broker = Broker(0)
    broker.answer = answer
    assert await Slots(broker).line(POOL).wait(key(1), 60)


async def test_what_the_endpoint_said_is_passed_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_S", 60)
    broker = Broker(1)
    line = Slots(broker).line(POOL)
    async with line.slot(key(1)):
        line.paused(0)
        line.paused(7.5)
        line.paused(2)
        await broker.told(lambda body: body["pause_ms"] == 7500)


async def test_lines_that_nobody_uses_are_dropped() -> None:
    slots = Slots(Broker(10))
    busy = slots.line(POOL)
    async with busy.slot(key(1)):
        for n in range(100):
            slots.line(f"{n:064x}")
        assert slots.line(POOL) is busy
        assert len(slots._lines) <= 3
    slots.close()
