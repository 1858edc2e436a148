"""Previews in a stream: only what fits to the log, in frames that the official client puts together."""

from __future__ import annotations

import asyncio
import json

import pytest
from anthropic.lib.sessions import accumulate_managed_agents_event
from anthropic.types.beta.sessions import BetaManagedAgentsStreamSessionEvents
from multidict import MultiDict
from pydantic import TypeAdapter

from cowhand.errors import UserError
from cowhand.gateway import log as rawlog
from cowhand.gateway.previews import HELD, Frames, line, merged, renderer, text_line, wanted
from cowhand.gateway.projection import Context, project
from cowhand.session import events as ev
from cowhand.session.preview import Preview
from support.gateway_rig import SID, at, response

OFFICIAL = TypeAdapter(BetaManagedAgentsStreamSessionEvents)

START = at(5, ev.MODEL_REQUEST_START, {"n": 1, "attempt": 1, "horizon": 4})
ANSWER = at(
    7,
    ev.MODEL_RESPONSE,
    {**response({"type": "thinking"}, {"type": "text", "text": "Hello you"}), "start": 5},
)
END = at(8, ev.MODEL_REQUEST_END, {"start": 5, "outcome": "ok"})


def shown(*items, start=1):
    """The texts of previews that are let through, with the types of the events between."""
    render = renderer(
        lambda event: f"<{event.type}>".encode(), lambda preview: preview.text.encode(), start
    )
    return b"".join(render(item) for item in items).decode()


BOTH = {"agent.message", "agent.thinking"}
HM, HMM = Preview(5, 0, 0, "hm", "thinking"), Preview(5, 0, 2, "m", "thinking")
HEL, LO = Preview(5, 1, 0, "Hello "), Preview(5, 1, 6, "you")
S, R = "<span.model_request_start>", "<model.response>"


def test_pieces_are_shown_while_their_request_is_the_newest():
    assert shown(START, HEL, LO, ANSWER) == f"{S}Hello you{R}"
    assert shown(START, HEL, ANSWER, LO) == f"{S}Hello {R}", "too late"
    assert shown(START, END, HEL) == f"{S}<span.model_request_end>"


def test_a_piece_that_overtakes_its_request_waits_for_it():
    assert shown(HEL, START, LO) == f"{S}Hello you"
    flood = [Preview(5, 1, number, "x") for number in range(10 * HELD)]
    assert shown(*flood, START).count("x") == HELD


def test_after_a_lost_piece_the_rest_of_the_block_is_left_out():
    lost = Preview(5, 1, 9, "!")
    assert shown(START, HEL, lost, LO) == f"{S}Hello you", "a gap, then the piece that fits"
    assert shown(START, LO, lost) == S, "not without the beginning"
    other = Preview(5, 2, 0, "More")
    assert shown(START, HEL, lost, other, HEL) == f"{S}Hello More"


def test_who_comes_in_the_middle_sees_what_begins_anew():
    assert shown(HEL, LO, ANSWER, start=7) == f"Hello you{R}"
    assert shown(LO, ANSWER, start=7) == R
    assert shown(HEL, start=3) == "", "that request is not there yet"


def test_the_official_client_puts_them_together_and_the_event_replaces_them():
    context = Context(SID)
    render = renderer(
        lambda event: b"".join(
            f"data: {json.dumps(one)}\n\n".encode() for one in project(event, context)
        ),
        Frames(SID, BOTH),
        1,
    )
    raw = b"".join(render(item) for item in (START, HM, HMM, HEL, LO, ANSWER)).decode()
    bodies = [json.loads(part[6:]) for part in raw.split("\n") if part.startswith("data: ")]
    assert [body["type"] for body in bodies] == [
        "span.model_request_start", "event_start", "event_start", "event_delta", "event_delta", "agent.thinking",
        "agent.message",
    ]  # fmt: skip
    parsed = [OFFICIAL.validate_python(body) for body in bodies]
    assert bodies[1]["event"] == {"type": "agent.thinking", "id": bodies[5]["id"]}
    assert "hm" not in raw, "thoughts are for the raw log"
    seen = None
    for event in parsed[2:5]:
        seen = accumulate_managed_agents_event(seen, event)
    assert seen is not None
    final = bodies[6]
    assert (seen.id, seen.content[0].text) == (final["id"], final["content"][0]["text"])
    assert len({body["id"] for body in bodies if "id" in body}) == 3
    assert "id:" not in Frames(SID, BOTH)(HEL).decode(), "no position to resume from"


def started(kinds, *previews):
    """Kind and block of each `event_start` that a stream which asks for these kinds gets."""
    one, found = Frames(SID, kinds), []
    for preview in previews:
        for part in one(preview).decode().split("\n"):
            body = json.loads(part[6:]) if part.startswith("data: ") else {}
            if body.get("type") == "event_start":
                found.append((body["event"]["type"], int(body["event"]["id"].split("_")[-1]) - 1))
    return found


def thought(block, offset=0):
    return Preview(5, block, offset, "hm", "thinking")


def test_a_stream_gets_what_it_asks_for():
    pieces = (thought(0), HEL, LO)
    assert started({"agent.thinking"}, *pieces) == [("agent.thinking", 0)]
    assert started({"agent.message"}, *pieces) == [("agent.message", 1)]
    assert Frames(SID, {"agent.thinking"})(HEL) == b""


def test_thinking_is_started_only_where_its_event_will_have_that_id():
    assert started(BOTH, HEL, thought(2)) == [("agent.message", 1), ("agent.thinking", 2)]
    assert started(BOTH, thought(0), thought(1)) == [("agent.thinking", 0)], "one event"
    assert started(BOTH, thought(1)) == [], "the block before may be redacted thinking"
    assert started(BOTH, thought(0, 2)) == [], "not its beginning"
    blocks = [{"type": "redacted_thinking", "data": "x"}, {"type": "thinking", "thinking": "hm"}]
    answer = at(7, ev.MODEL_RESPONSE, {**response(*blocks), "start": 5})
    assert [one["id"].split("_")[-1] for one in project(answer, Context(SID))] == ["1"]


def test_events_of_older_logs_keep_their_ids():
    old = at(7, ev.MODEL_RESPONSE, response({"type": "text", "text": "x"}))
    assert project(old, Context(SID))[0]["id"].endswith("_7_0")
    assert project(ANSWER, Context(SID))[1]["id"].endswith("_5_2")


def test_a_connection_says_what_it_wants():
    assert not wanted(MultiDict())
    given = [("event_deltas[]", "agent.thinking"), ("event_deltas[]", "agent.message")]
    assert wanted(MultiDict(given)) == BOTH
    assert wanted(MultiDict({"event_deltas": "agent.message"})) == {"agent.message"}
    assert wanted(MultiDict({"event_deltas": "agent.thinking"})) == {"agent.thinking"}
    with pytest.raises(UserError, match=r"agent\.tool_use"):
        wanted(MultiDict({"event_deltas[]": "agent.tool_use"}))
    assert rawlog.parse(MultiDict({"follow": "true", "previews": "1"})).previews
    assert not rawlog.parse(MultiDict()).previews
    both = rawlog.parse(MultiDict({"follow": "true", "previews": "1", "thinking": "1"}))
    assert both.previews
    assert both.thinking
    assert not rawlog.parse(MultiDict({"previews": "1"})).thinking
    with pytest.raises(UserError, match="previews"):
        rawlog.parse(MultiDict({"previews": "yes"}))
    assert json.loads(line(HEL)) == {
        "preview": {"start": 5, "block": 1, "offset": 0, "text": "Hello "}
    }
    assert text_line(HEL) == line(HEL)
    assert json.loads(line(HM))["preview"]["kind"] == "thinking"
    assert text_line(HM) == b"", "who knows of text alone gets text alone"


async def test_both_come_as_they_come_and_end_with_the_log():
    queues = asyncio.Queue(), asyncio.Queue()
    closed = []

    async def source(index):
        try:
            while (item := await queues[index].get()) is not None:
                yield item
        finally:
            closed.append(index)

    both = merged(source(0), source(1))
    queues[1].put_nowait(HEL)
    assert await anext(both) == HEL
    queues[0].put_nowait(START)
    assert await anext(both) == START
    queues[0].put_nowait(None)
    with pytest.raises(StopAsyncIteration):
        await anext(both)
    assert sorted(closed) == [0, 1]
