"""The official `anthropic` SDK drives the gateway, with its own validation of every answer."""

from __future__ import annotations

import asyncio
import uuid

import anthropic
import pytest

from cowhand.session import events as ev
from cowhand.session.preview import Preview
from support.gateway_rig import HEX, SID, response, tool_use


async def collect(stream, last):
    found = []
    async for event in stream:
        found.append(event)
        if event.type == last:
            break
    return found


def say(text):
    return {"type": "user.message", "content": [{"type": "text", "text": text}]}


async def test_session_and_history(rig):
    await rig.create()
    await rig.run_turn()
    client = rig.sdk()
    session = await client.beta.sessions.retrieve(SID)
    assert (session.id, session.status, session.agent.name) == (SID, "running", "coder")
    assert session.agent.tools[0].configs[0].permission_policy.type == "always_ask"
    rows = [event async for event in client.beta.sessions.events.list(SID, limit=3)]
    assert [row.type for row in rows][:3] == [
        "user.message",
        "session.status_running",
        "span.model_request_start",
    ]
    assert rows[-1].type == "session.status_idle"
    assert rows[-1].stop_reason.type == "end_turn"
    backwards = [
        event async for event in client.beta.sessions.events.list(SID, order="desc", limit=5)
    ]
    assert [row.id for row in backwards] == [row.id for row in rows][::-1]
    tools = client.beta.sessions.events.list(SID, types=["agent.tool_use", "agent.tool_result"])
    use, result = [event async for event in tools]
    assert (use.id, use.input) == (result.tool_use_id, {"command": "pytest"})


async def test_stream_then_send(rig):
    await rig.create()
    client = rig.sdk()
    async with await client.beta.sessions.events.stream(SID) as stream:
        sent = await client.beta.sessions.events.send(SID, events=[say("Fix the tests now")])
        await rig.run_turn()
        found = await asyncio.wait_for(collect(stream, "session.status_idle"), 60)
    assert sent.data[0].id == found[0].id
    assert found[0].processed_at is None
    kinds = [event.type for event in found]
    assert kinds[:5] == [
        "user.message",
        "session.status_running",
        "user.message",  # the session's first message, taken up
        "user.message",
        "span.model_request_start",
    ]
    stored = (await rig.logs["default"].get_events(SID, 3, 3))[0]
    assert stored.data["actor"] == {"user": "jane", "groups": ["dev"], "via": "gateway"}


async def test_send_first_and_stream_second_misses_nothing(rig):
    await rig.create()
    await rig.run_turn()
    client = rig.sdk()
    await client.beta.sessions.events.send(SID, events=[say("And now?")])
    await rig.work((ev.STATUS_IDLE, {"stop_reason": {"type": "end_turn"}}))
    async with await client.beta.sessions.events.stream(SID) as stream:
        found = await asyncio.wait_for(collect(stream, "session.status_idle"), 60)
    assert [event.type for event in found] == ["user.message", "session.status_idle"]


async def test_a_stream_shows_only_new_events(rig):
    await rig.create()
    await rig.run_turn()
    client = rig.sdk()
    async with await client.beta.sessions.events.stream(SID) as stream:
        await rig.work((ev.STATUS_RESCHEDULED, {}))
        found = await asyncio.wait_for(collect(stream, "session.status_rescheduled"), 60)
    assert len(found) == 1


async def test_a_stream_ends_with_the_session(rig):
    await rig.create()
    client = rig.sdk()
    async with await client.beta.sessions.events.stream(SID) as stream:
        await rig.finish()
        found = await asyncio.wait_for(collect(stream, "never"), 60)
    assert found[-1].type == "session.deleted"
    async with await client.beta.sessions.events.stream(SID) as stream:
        assert await asyncio.wait_for(collect(stream, "never"), 60) == []
    with pytest.raises(anthropic.ConflictError) as caught:
        await rig.sdk(max_retries=2).beta.sessions.events.send(SID, events=[say("hello?")])
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"


async def test_approval_by_the_event_id(rig):
    await rig.create()
    pending = {"tool_use_id": "toolu_1", "name": "bash"}
    await rig.work(
        (ev.MODEL_REQUEST_START, {"horizon": 3}),
        (ev.MODEL_RESPONSE, response(tool_use("toolu_1", command="rm -r x"))),
        (ev.MODEL_REQUEST_END, {"start": 4, "outcome": "ok"}),
        (ev.TOOL_PENDING, {**pending, "permission": "Ask"}),
        (ev.STATUS_IDLE, {"stop_reason": {"type": "requires_action", "event_ids": ["toolu_1"]}}),
        status={"pending": [pending]},
    )
    client = rig.sdk()
    rows = [event async for event in client.beta.sessions.events.list(SID)]
    (asked,) = rows[-1].stop_reason.event_ids
    use = next(row for row in rows if row.id == asked)
    assert (use.type, use.evaluated_permission) == ("agent.tool_use", "ask")
    answer = {"type": "user.tool_confirmation", "tool_use_id": asked, "result": "allow"}
    sent = await client.beta.sessions.events.send(SID, events=[answer])
    assert sent.data[0].tool_use_id == asked
    newest = (await rig.logs["default"].get_events(SID))[-1]
    assert (newest.data["tool_use_id"], newest.data["result"]) == ("toolu_1", "allow")
    denied = {**answer, "result": "deny", "deny_message": "on second thoughts"}
    await client.beta.sessions.events.send(SID, events=[denied])  # any deny wins, until it runs
    with pytest.raises(anthropic.ConflictError, match="already answered with deny"):
        await client.beta.sessions.events.send(SID, events=[{**answer, "result": "deny"}])
    other = {**answer, "tool_use_id": f"sevt_{HEX}_toolu_2"}
    with pytest.raises(anthropic.BadRequestError, match=f"waiting: sevt_{HEX}_toolu_1"):
        await client.beta.sessions.events.send(SID, events=[other])


async def test_a_custom_tool_is_answered_by_the_event_id(rig):
    await rig.create(custom_tools=["lookup"])
    pending = {"tool_use_id": "toolu_1", "name": "lookup", "kind": "custom_tool"}
    await rig.work(
        (ev.MODEL_REQUEST_START, {"horizon": 3}),
        (ev.MODEL_RESPONSE, response(tool_use("toolu_1", "lookup", id="7"))),
        (ev.MODEL_REQUEST_END, {"start": 4, "outcome": "ok"}),
        (ev.TOOL_PENDING, pending),
        (ev.STATUS_IDLE, {"stop_reason": {"type": "requires_action", "event_ids": ["toolu_1"]}}),
        status={"pending": [pending]},
    )
    client = rig.sdk()
    rows = [event async for event in client.beta.sessions.events.list(SID)]
    (asked,) = rows[-1].stop_reason.event_ids
    use = next(row for row in rows if row.id == asked)
    assert (use.type, use.name, use.input) == ("agent.custom_tool_use", "lookup", {"id": "7"})
    content = [{"type": "text", "text": "ticket 7"}]
    answer = {"type": "user.custom_tool_result", "custom_tool_use_id": asked, "content": content}
    sent = await client.beta.sessions.events.send(SID, events=[answer])
    assert (sent.data[0].custom_tool_use_id, sent.data[0].processed_at) == (asked, None)
    result = {"tool_use_id": "toolu_1", "content": content, "is_error": False}
    await rig.work((ev.TOOL_RESULT, {**result, "kind": "custom_tool", "synthesized": False}))
    rows = [event async for event in client.beta.sessions.events.list(SID)]
    assert [row.type for row in rows if "result" in row.type] == ["user.custom_tool_result"]
    assert rows[-1].processed_at is not None
    session = await client.beta.sessions.retrieve(SID)
    assert [tool.type for tool in session.agent.tools] == ["agent_toolset_20260401", "custom"]


async def test_a_system_message_needs_a_right_of_its_own(rig):
    await rig.create()
    system = {"type": "system.message", "content": [{"type": "text", "text": "Be brief."}]}
    with pytest.raises(anthropic.PermissionDeniedError, match="agentsessions/systemmessages"):
        await rig.sdk().beta.sessions.events.send(SID, events=[say("hi"), system])
    rig.kube.rights |= {("joe", "create", p, "default") for p in ("messages", "systemmessages")}
    sent = await rig.sdk("joe-token").beta.sessions.events.send(SID, events=[say("hi"), system])
    assert [event.type for event in sent.data] == ["user.message", "system.message"]


async def test_interrupt(rig):
    await rig.create()
    await rig.sdk().beta.sessions.events.send(
        SID, events=[{"type": "user.interrupt"}, say("do this instead")]
    )
    kinds = [event.type for event in await rig.logs["default"].get_events(SID)]
    assert kinds[-2:] == ["user.interrupt", "user.message"]


async def test_errors_are_the_sdks_own_classes(rig):
    await rig.create()
    with pytest.raises(anthropic.AuthenticationError, match="does not accept this token"):
        await rig.sdk("nobody").beta.sessions.retrieve(SID)
    with pytest.raises(anthropic.PermissionDeniedError) as caught:
        await rig.sdk("joe-token").beta.sessions.events.send(SID, events=[say("hi")])
    assert "joe may not create agentsessions/messages.cowhand.dev" in caught.value.api_message
    assert caught.value.type == "permission_error"
    assert caught.value.request_id.startswith("req_")
    with pytest.raises(anthropic.NotFoundError, match="there is no session"):
        await rig.sdk().beta.sessions.retrieve(f"sesn_{uuid.uuid4().hex}")
    with pytest.raises(anthropic.BadRequestError, match=r"events\.0\.content\.0\.text"):
        await rig.sdk().beta.sessions.events.send(SID, events=[say("")])
    with pytest.raises(anthropic.PermissionDeniedError):
        await (await rig.sdk("joe-token").beta.sessions.events.stream(SID)).close()


async def test_a_lost_answer_does_not_double_a_message(rig, monkeypatch):
    """The first attempt is written, its answer is lost; the SDK's own retry must not write again."""
    await rig.create()
    from cowhand.gateway import app, messages

    write, attempts = messages.write, []

    async def write_and_lose_the_first_answer(*args):
        attempts.append(await write(*args))
        if len(attempts) == 1:
            raise RuntimeError("the answer is lost")
        return attempts[-1]

    monkeypatch.setattr(app.messages, "write", write_and_lose_the_first_answer)
    sent = await rig.sdk(max_retries=2).beta.sessions.events.send(SID, events=[say("once")])
    assert len(attempts) == 2
    said = [e for e in await rig.logs["default"].get_events(SID) if e.type == ev.USER_MESSAGE]
    assert len(said) == 2
    assert sent.data[0].id == f"sevt_{HEX}_3_0"


async def test_the_workspace_header_names_the_tenant(rig):
    await rig.create("team-a")
    with pytest.raises(anthropic.PermissionDeniedError, match="in namespace team-a"):
        await rig.sdk().beta.sessions.retrieve(SID)
    rig.kube.rights.add(("joe", "get", "events", "team-a"))
    found = await rig.sdk("joe-token").beta.sessions.retrieve(SID, workspace_id="team-a")
    assert found.to_dict()["cowhand"]["namespace"] == "team-a"
    with pytest.raises(anthropic.NotFoundError):
        await rig.sdk().beta.sessions.retrieve(SID, workspace_id="default")
    with pytest.raises(anthropic.NotFoundError, match="not served"):
        await rig.sdk().beta.sessions.retrieve(SID, workspace_id="kube-system")


async def test_thinking_is_announced_and_its_text_stands_in_the_raw_log_alone(rig):
    await rig.create()
    client, previews = rig.sdk(), rig.store.previews("default")
    await rig.work((ev.STATUS_RUNNING, {}))
    start = 5
    stream = await client.beta.sessions.events.stream(SID, event_deltas=["agent.thinking"])
    async with stream:
        await rig.work((ev.MODEL_REQUEST_START, {"n": 1, "attempt": 1, "horizon": 4}))
        thought = Preview(start, 0, 0, "qzj", "thinking")
        while not await previews.publish(SID, thought):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        heard = await asyncio.wait_for(collect(stream, "event_start"), 60)
        assert heard[-1].event.type == "agent.thinking"
        said = response({"type": "thinking", "thinking": "x"}, {"type": "text", "text": "Hello"})
        end = (ev.MODEL_REQUEST_END, {"start": start, "outcome": "ok"})
        await rig.work((ev.MODEL_RESPONSE, {**said, "start": start}), end)
        rest = await asyncio.wait_for(collect(stream, "agent.thinking"), 60)
        assert rest[-1].id == heard[-1].event.id
        assert not {"event_delta"} & {event.type for event in (*heard, *rest)}
    stored = await rig.logs["default"].get_events(SID)
    assert not [one for one in stored if b"qzj" in one.payload]


async def test_text_is_seen_while_it_is_written_and_only_by_who_asks(rig):
    await rig.create()
    client, previews = rig.sdk(), rig.store.previews("default")
    await rig.work((ev.STATUS_RUNNING, {}))
    start = 5
    events = client.beta.sessions.events
    asking = await events.stream(SID, event_deltas=["agent.message"])
    plain = await events.stream(SID)
    async with asking, plain:
        await rig.work((ev.MODEL_REQUEST_START, {"n": 1, "attempt": 1, "horizon": 4}))
        while not await previews.publish(SID, Preview(start, 0, 0, "Hel")):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        heard = await asyncio.wait_for(collect(asking, "event_delta"), 60)
        assert [event.type for event in heard[-2:]] == ["event_start", "event_delta"]
        assert heard[-1].delta.content.text == "Hel", "and the response is not in the log yet"
        await previews.publish(SID, Preview(start, 0, 3, "lo"))
        said = {**response({"type": "text", "text": "Hello"}), "start": start}
        end = (ev.MODEL_REQUEST_END, {"start": start, "outcome": "ok"})
        await rig.work((ev.MODEL_RESPONSE, said), end)
        rest = await asyncio.wait_for(collect(asking, "agent.message"), 60)
        assert rest[-1].id == heard[-2].event.id
        others = await asyncio.wait_for(collect(plain, "agent.message"), 60)
    assert not {"event_start", "event_delta"} & {event.type for event in others}
    stored = await rig.logs["default"].get_events(SID)
    assert not [one for one in stored if b"event_delta" in one.payload or "preview" in one.type]
