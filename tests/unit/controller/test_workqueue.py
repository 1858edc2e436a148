"""The keyed queue: decisions with a clock by hand, the loop with events."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowhand.controller.workqueue import FIRST_DELAY_S, LAST_DELAY_S, Schedule, WorkQueue
from cowhand.errors import StoreUnavailable


def schedule() -> Schedule[str]:
    return Schedule(jitter=lambda: 1.0)


def test_a_key_waits_once() -> None:
    line = schedule()
    for _ in range(3):
        line.add("a", now=0.0)
    assert line.pop(0.0) == "a"
    assert line.pop(0.0) is None


def test_a_key_in_work_is_not_given_out_again_but_comes_after() -> None:
    line = schedule()
    line.add("a", 0.0)
    assert line.pop(0.0) == "a"
    line.add("a", 1.0)
    line.add("b", 1.0)
    assert line.pop(2.0) == "b"
    assert line.pop(2.0) is None
    line.done("a", 3.0)
    assert line.pop(3.0) == "a"


def test_the_earlier_of_two_requests_wins() -> None:
    line = schedule()
    line.add("a", 0.0, after=10.0)
    line.add("a", 0.0, after=1.0)
    line.add("a", 0.0, after=5.0)
    assert line.pop(0.9) is None
    assert line.pop(1.0) == "a"
    line.done("a", 1.0)
    assert line.pop(100.0) is None


def test_delays_grow_to_a_limit_and_start_anew_after_success() -> None:
    line = schedule()
    delays = []
    now = 0.0
    line.add("a", now)
    for _ in range(12):
        assert line.pop(now) == "a"
        delays.append(line.failed("a", now))
        now += delays[-1]
    assert delays[:3] == [FIRST_DELAY_S, FIRST_DELAY_S * 2, FIRST_DELAY_S * 4]
    assert delays[-1] == LAST_DELAY_S
    assert line.pop(now) == "a"
    line.done("a", now)
    line.add("a", now)
    line.pop(now)
    assert line.failed("a", now) == FIRST_DELAY_S


def test_an_error_that_names_its_time_is_believed() -> None:
    line = schedule()
    line.add("a", 0.0)
    line.pop(0.0)
    assert line.failed("a", 0.0, after=7.0) == 7.0
    assert line.pop(6.9) is None
    assert line.pop(7.0) == "a"


def test_an_event_brings_a_failed_key_back_at_once() -> None:
    line = schedule()
    line.add("a", 0.0)
    line.pop(0.0)
    line.failed("a", 0.0, after=30.0)
    line.add("a", 1.0)
    assert line.pop(1.0) == "a"


@given(st.lists(st.tuples(st.sampled_from(["add", "pop", "done", "fail"]), st.sampled_from("abc"))))
def test_never_two_at_once_and_nothing_is_lost(steps: list[tuple[str, str]]) -> None:
    line = schedule()
    busy: set[str] = set()
    owed: set[str] = set()
    for now, (what, key) in enumerate(steps):
        if what == "add":
            line.add(key, float(now))
            owed.add(key)
        elif what == "pop":
            got = line.pop(now + 1000.0)
            if got is not None:
                assert got not in busy
                busy.add(got)
                owed.discard(got)
        elif key in busy:
            busy.discard(key)
            if what == "done":
                line.done(key, float(now))
            else:
                line.failed(key, float(now))
                owed.add(key)
    rest = set()
    while (got := line.pop(1e9)) is not None:
        rest.add(got)
    assert rest == owed - busy


async def test_the_loop_retries_errors_and_honours_requeue() -> None:
    seen: list[str] = []
    enough = asyncio.Event()

    async def handle(key: str) -> float | None:
        seen.append(key)
        if len(seen) == 1:
            raise StoreUnavailable("down", after=0.0)
        if len(seen) == 2:
            raise ValueError("a bug")
        if len(seen) == 3:
            return 0.0
        enough.set()
        return None

    queue = WorkQueue("test", handle, workers=2)
    task = asyncio.create_task(queue.run())
    queue.add("a")
    await asyncio.wait_for(enough.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["a"] * 4


async def test_one_stuck_key_does_not_hold_up_the_others() -> None:
    block, done = asyncio.Event(), asyncio.Event()

    async def handle(key: str) -> float | None:
        if key == "stuck":
            await block.wait()
        else:
            done.set()
        return None

    queue = WorkQueue("test", handle, workers=2)
    task = asyncio.create_task(queue.run())
    queue.add("stuck")
    queue.add("free")
    await asyncio.wait_for(done.wait(), 10)
    assert len(queue) == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
