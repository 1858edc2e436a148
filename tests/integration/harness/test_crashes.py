"""A worker dies at every await, the store fails at every await, input arrives at every await."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
from typing import Any

import pytest

from cowhand.errors import Fenced
from cowhand.harness.fold import Conversation, fold
from cowhand.harness.loop import End
from cowhand.harness.request import prefix_sha
from cowhand.session import events as ev
from cowhand.session.events import NewEvent
from support.harness_rig import (
    SID,
    FakeTransport,
    Killed,
    Paused,
    Rig,
    World,
    fail,
    message,
    text,
    tool_use,
    user,
    world,
)


def script(request: dict[str, Any]) -> dict[str, Any]:
    """Three rounds of tools: one effect, two effects, three pure ones; then an answer."""
    rounds = sum(entry["role"] == "assistant" for entry in request["messages"])
    thinking = {"type": "thinking", "thinking": "", "signature": f"sig-{rounds}"}
    match rounds:
        case 0:
            return message(thinking, tool_use("t1"), stop_reason="tool_use")
        case 1:
            return message(
                text("both"), tool_use("t2"), tool_use("t3", "write"), stop_reason="tool_use"
            )
        case 2:
            uses = [tool_use(f"t{n}", "read", file_path=f"f{n}") for n in (4, 5, 6)]
            return message(thinking, *uses, stop_reason="tool_use")
    last = request["messages"][-1]["content"][-1]
    return message(text(f"done after {last.get('content') or last.get('text')}"))


def stripped(body: bytes) -> dict[str, Any]:
    """A request without cache breakpoints."""

    def strip(value: Any) -> Any:
        if isinstance(value, list):
            return [strip(item) for item in value]
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key != "cache_control"}
        return value

    loaded: dict[str, Any] = strip(json.loads(body))
    return loaded


def check(made: World) -> Conversation:
    """The invariants that hold after any run that came to its end."""
    requests = [stripped(body) for body in made.requests]
    for earlier, later in itertools.pairwise(requests):
        count = len(earlier["messages"])
        assert json.dumps(later["messages"][:count]) == json.dumps(earlier["messages"])
        assert {**earlier, "messages": 0} == {**later, "messages": 0}
    uses = [
        block["id"]
        for data in made.data(ev.MODEL_RESPONSE)
        for block in data["message"]["content"]
        if block["type"] == "tool_use"
    ]
    assert sorted(data["tool_use_id"] for data in made.data(ev.TOOL_RESULT)) == sorted(uses)
    ran = made.effects()
    assert len(ran) == len(set(ran)), f"ran twice: {ran}"
    rebuilt(made)
    conversation = fold(SID, made.events)
    assert conversation.status == made.status, "the status document is not the fold's"
    assert made.lease == "", "the session was not parked"
    return conversation


def rebuilt(made: World) -> None:
    """Each request, rebuilt from the log alone, has the hash that was logged."""
    conversation = Conversation(SID)
    for event in made.events:
        conversation.apply(event)
        if event.type == ev.MODEL_REQUEST_START:
            request = conversation.request
            assert request is not None
            messages = conversation.messages[: request.n_messages]
            assert request.prefix_sha == prefix_sha(
                conversation.base, SID, request.max_tokens, messages
            )


async def quiet() -> World:
    made = world()
    assert await Rig(made, script).run() is End.PARKED
    return made


async def test_without_faults_every_tool_runs_once_and_in_order() -> None:
    made = await quiet()
    check(made)
    assert made.effects() == [f"{SID}/t{n}" for n in range(1, 7)]
    assert made.types()[-1] == ev.STATUS_IDLE
    assert made.data(ev.STATUS_IDLE)[-1]["stop_reason"] == {"type": "end_turn"}
    contents = [data["content"] for data in made.data(ev.TOOL_RESULT)]
    assert contents[0] == 'bash {"command": "t1"}', "the result is what the sandbox answered"
    answer = made.data(ev.MODEL_RESPONSE)[-1]["message"]["content"][0]["text"]
    assert answer == 'done after read {"file_path": "f6"}'
    assert made.status["tool_calls"] == 6
    assert made.status["usage"]["input_tokens"] == 40


async def kill_at(made: World, *numbers: int) -> None:
    """Run to the end, with the worker killed at these points; the next one takes over."""
    deaths = list(numbers)

    def on_point(number: int, _name: str) -> None:
        if number in deaths:
            deaths.remove(number)
            raise Killed

    made.on_point = on_point
    for attempt in range(len(numbers) + 1):
        if await Rig(made, script, name=f"w{attempt}").run() is End.PARKED:
            return
    raise AssertionError("no worker came to the end")


async def test_killed_at_every_await() -> None:
    total = (await quiet()).points
    assert total > 50
    for number in range(1, total + 1):
        made = world()
        await kill_at(made, number)
        conversation = check(made)
        assert conversation.idle == {"type": "end_turn"}, f"killed at {number}"
        assert made.effects() == [f"{SID}/t{n}" for n in range(1, 7)], f"killed at {number}"


@pytest.mark.parametrize("seed", range(40))
async def test_killed_three_times(seed: int) -> None:
    rng = random.Random(seed)
    total = (await quiet()).points
    made = world()
    await kill_at(made, *sorted(rng.sample(range(1, total), 3)))
    assert check(made).idle == {"type": "end_turn"}
    assert made.effects() == [f"{SID}/t{n}" for n in range(1, 7)]


async def test_control_without_the_journal_a_killed_worker_doubles_an_effect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeTransport, "use_journal", False)
    monkeypatch.setattr("cowhand.hands.sandbox.SandboxHand.attach", _execute_again)
    doubled = 0
    for number in range(1, (await quiet()).points + 1):
        made = world()
        await kill_at(made, number)
        doubled += len(made.effects()) != len(set(made.effects()))
    assert doubled, "the check for doubled effects cannot fail"


async def _execute_again(hand: Any, call: Any) -> Any:
    return await hand.execute(call)


async def test_the_store_fails_at_every_await_before_and_after_the_write() -> None:
    total = (await quiet()).points
    for number in range(1, total + 1):
        made = world()

        def on_point(at: int, name: str, number: int = number) -> None:
            kind = name.split(":")[1]
            if at == number and kind in {
                "append", "appended", "barrier", "park", "get_events", "get_hand",
            }:  # fmt: skip
                fail(at, name)

        made.on_point = on_point
        assert await Rig(made, script).run() is End.PARKED
        check(made)
        assert made.effects() == [f"{SID}/t{n}" for n in range(1, 7)], f"failed at {number}"


async def test_an_interrupt_at_every_await_then_a_message() -> None:
    total = (await quiet()).points
    for number in range(1, total + 1):
        made = world()

        def on_point(at: int, _name: str, number: int = number, made: World = made) -> None:
            if at == number:
                made.emit(NewEvent(ev.USER_INTERRUPT, {"actor": {"user": "u"}}, id="i"))

        made.on_point = on_point
        assert await Rig(made, script).run() is End.PARKED, f"interrupted at {number}"
        idle = check(made).idle
        interrupted = {"type": "interrupted"}
        # At the very end the turn may be over before the interrupt is read: then it changes nothing.
        assert idle == interrupted or set(made.types()[-2:]) == {ev.STATUS_IDLE, ev.USER_INTERRUPT}
        made.emit(user("again", "m2"))
        assert await Rig(made, script, name="w2").run() is End.PARKED
        conversation = check(made)
        assert conversation.idle == {"type": "end_turn"}
        last = stripped(made.requests[-1])["messages"]
        said = [b["text"] for m in last if m["role"] == "user" for b in m["content"] if "text" in b]
        assert said.count("again") == 1


async def test_a_message_at_every_await_is_seen_exactly_once() -> None:
    total = (await quiet()).points
    for number in range(1, total + 1):
        made = world()

        def on_point(at: int, _name: str, number: int = number, made: World = made) -> None:
            if at == number:
                made.emit(user("by the way", "m2"))

        made.on_point = on_point
        assert await Rig(made, script).run() is End.PARKED, f"message at {number}"
        assert check(made).idle == {"type": "end_turn"}
        last = stripped(made.requests[-1])["messages"]
        said = [b["text"] for m in last if m["role"] == "user" for b in m["content"] if "text" in b]
        assert said == ["go", "by the way"], f"message at {number}"


async def test_suspended_at_every_await_then_resumed() -> None:
    total = (await quiet()).points
    for number in range(1, total + 1):
        made = world()

        def on_point(at: int, _name: str, number: int = number, made: World = made) -> None:
            if at == number:
                made.emit(NewEvent(ev.SESSION_SUSPENDED, {"actor": {"user": "u"}}, id="s"))

        made.on_point = on_point
        assert await Rig(made, script).run() is End.PARKED
        idle = fold(SID, made.events).idle
        assert idle in ({"type": "suspended"}, {"type": "end_turn"}), f"suspended at {number}"
        requests = len(made.requests)
        made.emit(NewEvent(ev.SESSION_RESUMED, {"actor": {"user": "u"}}, id="r"))
        assert await Rig(made, script, name="w2").run() is End.PARKED
        assert check(made).idle == {"type": "end_turn"}
        assert made.effects() == [f"{SID}/t{n}" for n in range(1, 7)]
        assert len(made.requests) >= requests


async def test_the_sandbox_dies_at_every_await() -> None:
    total = (await quiet()).points
    lost = 0
    for number in range(1, total + 1):
        made = world()

        def on_point(at: int, _name: str, number: int = number, made: World = made) -> None:
            if at == number and ("main", 1) in made.records:
                made.lose()

        made.on_point = on_point
        assert await Rig(made, script).run() is End.PARKED, f"lost at {number}"
        assert check(made).idle == {"type": "end_turn"}
        results = made.data(ev.TOOL_RESULT)
        failed = [data for data in results if data["is_error"]]
        if made.data(ev.HAND_LOST):
            lost += 1
            assert [data["instance"] for data in made.data(ev.HAND_LOST)] == [1]
            assert failed
            assert all("the sandbox was lost" in data["content"] for data in failed)
    assert lost > 10


async def test_worker_and_sandbox_die_together_and_claude_learns_that_the_call_may_have_run() -> (
    None
):
    made = world()

    def on_point(_number: int, name: str) -> None:
        if name == "w1:POST ran":
            raise Killed

    made.on_point = on_point
    assert await Rig(made, script).run() is None
    made.lose()
    assert await Rig(made, script, name="w2").run() is End.PARKED
    check(made)
    first = made.data(ev.TOOL_RESULT)[0]
    assert (first["tool_use_id"], first["is_error"]) == ("t1", True)
    assert "may have partly executed" in first["content"]


async def paused_and_taken_over(number: int, *, fenced: bool = True) -> World:
    """A worker stands still, another finishes its session, then the first one goes on."""
    made = world()

    def on_point(at: int, _name: str) -> None:
        if at == number:
            raise Paused

    made.on_point = on_point
    zombie = Rig(made, script, name="w1")
    zombie.transport.check_epoch = fenced
    running = asyncio.create_task(zombie.run())
    await asyncio.wait(
        {running, asyncio.ensure_future(zombie.log.paused.wait())},
        return_when=asyncio.FIRST_COMPLETED,
    )
    if not running.done():
        assert await Rig(made, script, name="w2").run() is End.PARKED
    before = len(made.events)
    zombie.log.resume.set()
    with contextlib.suppress(Fenced):
        await running
    assert len(made.events) == before, f"a zombie wrote, paused at {number}"
    return made


async def test_a_worker_that_comes_back_after_a_takeover_does_nothing() -> None:
    for number in range(1, (await quiet()).points):
        made = await paused_and_taken_over(number)
        # A zombie may still repeat a request: that costs tokens, and the proxy refuses its lease.
        made.requests.sort(key=lambda raw: len(json.loads(raw)["messages"]))
        check(made)
        assert sorted(made.effects()) == [f"{SID}/t{n}" for n in range(1, 7)], f"paused at {number}"


async def test_control_without_the_hands_fence_and_journal_a_zombie_doubles_an_effect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeTransport, "use_journal", False)
    monkeypatch.setattr("cowhand.hands.sandbox.SandboxHand.attach", _execute_again)
    doubled = 0
    for number in range(1, (await quiet()).points):
        ran = (await paused_and_taken_over(number, fenced=False)).effects()
        doubled += len(ran) != len(set(ran))
    assert doubled
