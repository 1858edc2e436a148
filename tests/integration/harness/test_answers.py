"""Answers from outside while a turn runs: custom tools, approvals, system messages, against the whole stack.

The model server refuses what the Messages API refuses: results out of order or missing, a system message in
the wrong place.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cowhand.session import events as ev
from cowhand.session.events import NewEvent
from support.harness_rig import user
from support.harness_stack import Stack, stack

pytestmark = pytest.mark.timeout(240)

ACTOR = {"user": "u"}


@pytest.fixture
async def here(store_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with stack(store_url, tmp_path) as made:
        yield made


def use(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "name": name, "input": arguments}


async def answer(here: Stack, sid: str, call: str, said: str) -> None:
    data = {
        "custom_tool_use_id": call,
        "content": [{"type": "text", "text": said}],
        "is_error": False,
        "actor": ACTOR,
    }
    await here.emit(sid, NewEvent(ev.USER_CUSTOM_TOOL_RESULT, data, id=f"result:{call}"))


async def calls(here: Stack, sid: str) -> list[str]:
    """Ids of the tool uses of the newest response."""
    message = (await here.of(sid, ev.MODEL_RESPONSE))[-1]["message"]
    return [block["id"] for block in message["content"] if block["type"] == "tool_use"]


async def test_custom_and_built_in_calls_in_one_response_with_partial_answers(here: Stack) -> None:
    await here.script(
        "mixed",
        {"content": [use("lookup", id=1), use("bash", command="echo hi"), use("lookup", id=2)]},
        {"content": [{"type": "text", "text": "done"}]},
    )
    sid = await here.create("[[script:mixed]]", custom=["lookup"])
    await here.local_worker()
    await here.reaches(sid, ev.STATUS_IDLE)
    first, shell, second = await calls(here, sid)
    (ran,) = await here.of(sid, ev.TOOL_RESULT)
    assert ran["tool_use_id"] == shell, "a built-in call does not wait for the client's"
    await answer(here, sid, second, "two")
    await here.reaches(sid, ev.STATUS_IDLE, 2)
    await answer(here, sid, first, "one")
    await here.settled(sid)
    stops = [data["stop_reason"] for data in await here.of(sid, ev.STATUS_IDLE)]
    assert [stop.get("event_ids") for stop in stops] == [[first, second], [first], None]
    results = (await here.requests(sid))[-1]["messages"][-1]["content"]
    assert [block["tool_use_id"] for block in results] == [first, shell, second]
    assert results[2]["content"] == [{"type": "text", "text": "two"}]
    assert (await here.state(sid)).status["tool_calls"] == 3


async def test_a_system_message_in_mid_turn_stands_where_the_api_takes_it(here: Stack) -> None:
    await here.script(
        "frozen",
        {"content": [use("lookup")]},
        {"content": [{"type": "text", "text": "I see."}]},
        {"content": [{"type": "text", "text": "still here"}]},
    )
    sid = await here.create("[[script:frozen]]", custom=["lookup"])
    await here.local_worker()
    await here.reaches(sid, ev.STATUS_IDLE)
    said = {"content": [{"type": "text", "text": "The branch is frozen."}], "actor": ACTOR}
    await here.emit(sid, NewEvent(ev.SYSTEM_MESSAGE, said, id="sys"))
    await answer(here, sid, (await calls(here, sid))[0], "x")
    await here.settled(sid)
    await here.emit(sid, user("more", "m2"))
    await here.settled(sid, turns=2)
    bodies = await here.requests(sid)
    roles = [message["role"] for message in bodies[-1]["messages"]]
    assert roles == ["user", "assistant", "user", "system", "assistant", "user"]
    assert [message["role"] for message in bodies[1]["messages"]] == roles[:4]
    assert {data["outcome"] for data in await here.of(sid, ev.MODEL_REQUEST_END)} == {"ok"}
