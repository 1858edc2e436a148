"""What clients may send: paths in errors, ids, repetitions, approvals."""

from __future__ import annotations

import json
import re

import pytest

from cowhand.errors import UserError
from cowhand.gateway.answers import check
from cowhand.gateway.auth import Caller
from cowhand.gateway.errors import Conflict, TooLarge
from cowhand.gateway.incoming import parse
from cowhand.gateway.messages import Ids, compose, uuid7, write
from cowhand.session import events as ev
from cowhand.session.events import EVENT_LIMIT
from support.gateway_rig import HEX, SID, ListLog, at, created, response, tool_use, user_message

JANE = Caller("jane", groups=("dev",))


def body(*events):
    return json.dumps({"events": list(events)}).encode()


def text(words="hello"):
    return {"type": "user.message", "content": [{"type": "text", "text": words}]}


def confirm(**extra):
    return {"type": "user.tool_confirmation", "tool_use_id": "toolu_1", "result": "allow", **extra}


def image(**source):
    return {"type": "user.message", "content": [{"type": "image", "source": source}]}


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"{", "not JSON"),
        (b"[]", "body:"),
        (b"{}", "events:"),
        (b'{"events":[]}', "events:"),
        (body(*[text()] * 51), "events: has 51"),
        (body(3), "events.0: must be an object"),
        (body(text(), {"type": "user.nothing"}), "events.1.type:"),
        (
            body({"type": "user.define_outcome"}),
            "events.0.type: user.define_outcome is not supported",
        ),
        (body({"type": "user.message"}), "events.0.content:"),
        (body({"type": "user.message", "content": []}), "events.0.content:"),
        (body({**text(), "role": "system"}), "events.0.role:"),
        (body(text(" ")), "events.0.content.0.text: must not be empty"),
        (body({"type": "user.message", "content": [{"type": "text"}]}), "events.0.content.0.text:"),
        (
            body({"type": "user.message", "content": [{"type": "video"}]}),
            "events.0.content.0.type:",
        ),
        (body(image(type="file", file_id="f")), "events.0.content.0.source.type: file sources"),
        (body(image(type="url", url="http://x/y.png")), "events.0.content.0.source.url:"),
        (
            body(image(type="base64", media_type="image/bmp", data="x")),
            "events.0.content.0.source.media_type:",
        ),
        (body({**text(), "id": "mode:3"}), "events.0.id:"),
        (body({**text(), "id": "x" * 65}), "events.0.id:"),
        (body(confirm(result="maybe")), "events.0.result:"),
        (body(confirm(deny_message="no")), "events.0.deny_message: is only allowed"),
        (body({"type": "user.tool_confirmation", "result": "allow"}), "events.0.tool_use_id:"),
        (body({"type": "user.interrupt", "session_thread_id": "t"}), "events.0.session_thread_id:"),
    ],
)
def test_a_bad_event_is_refused_by_the_path_of_its_field(raw, path):
    with pytest.raises(UserError, match=re.escape(path)):
        parse(raw, SID)


def test_good_events():
    found = parse(
        body(
            text(),
            image(type="base64", media_type="image/png", data="aGk="),
            {"type": "user.interrupt", "session_thread_id": None},
            confirm(tool_use_id=f"sevt_{HEX}_toolu_7", result="deny", deny_message="not now"),
            {"type": "user.message", "content": "short form", "id": "my-id.1"},
        ),
        SID,
    )
    assert [item.type for item in found] == [
        "user.message",
        "user.message",
        "user.interrupt",
        "user.tool_confirmation",
        "user.message",
    ]
    assert found[3].data == {"tool_use_id": "toolu_7", "result": "deny", "deny_message": "not now"}
    assert found[4].data == {"content": [{"type": "text", "text": "short form"}]}
    assert found[4].id == "my-id.1"


def test_the_actor_is_ours_and_not_the_clients():
    (event,) = compose(parse(body(text()), SID), JANE, ["made"])
    assert event.data["actor"] == {"user": "jane", "groups": ["dev"], "via": "gateway"}
    assert event.id == "made"
    with pytest.raises(UserError, match=r"events\.0\.actor"):
        parse(body({**text(), "actor": {"user": "root"}}), SID)


def test_an_event_over_the_inline_limit_is_too_large():
    with pytest.raises(TooLarge, match=r"events\.1: \d+ bytes"):
        compose(parse(body(text(), text("x" * 1_100_000)), SID), JANE, ["a", "b"])


def test_with_an_archive_an_event_may_be_larger_and_a_result_leaves_room_for_its_copy():
    (event,) = compose(parse(body(text("x" * 1_100_000)), SID), JANE, ["a"], EVENT_LIMIT)
    size = len(event.payload())
    assert compose(parse(body(text("x" * 1_100_000)), SID), JANE, ["a"], size) == [event]
    with pytest.raises(TooLarge, match=f"an event may have {size - 1}"):
        compose(parse(body(text("x" * 1_100_000)), SID), JANE, ["a"], size - 1)
    result = {
        "type": "user.custom_tool_result",
        "custom_tool_use_id": "toolu_01",
        "content": [{"type": "text", "text": "x"}],
    }
    (event,) = compose(parse(body(result), SID), JANE, ["a"], EVENT_LIMIT)
    with pytest.raises(TooLarge):
        compose(parse(body(result), SID), JANE, ["a"], len(event.payload()) + 1023)


def test_ids_are_uuid7_in_order_of_time():
    made = [uuid7() for _ in range(50)]
    assert all(
        re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", m)
        for m in made
    )
    assert len(set(made)) == 50
    assert [m[:13] for m in made] == sorted(m[:13] for m in made)


def test_a_repetition_gets_the_ids_of_its_first_attempt():
    ids = Ids()
    first = ids.of(JANE, SID, b"x", 2, 0)
    assert ids.of(JANE, SID, b"x", 2, 1) == first == ids.of(JANE, SID, b"x", 2, 2)


def test_the_same_words_said_again_on_purpose_are_a_new_event():
    ids = Ids()
    first = ids.of(JANE, SID, b"go on", 1, 0)
    second = ids.of(JANE, SID, b"go on", 1, 0)
    assert first != second
    assert ids.of(JANE, SID, b"go on", 1, 1) == second


def test_repetitions_of_others_do_not_meet():
    ids = Ids()
    first = ids.of(JANE, SID, b"x", 1, 0)
    assert ids.of(Caller("joe"), SID, b"x", 1, 1) != first
    assert ids.of(JANE, "sesn_other", b"x", 1, 1) != first
    assert ids.of(JANE, SID, b"y", 1, 1) != first


async def test_writing_twice_with_one_id_writes_once():
    log = ListLog([at(1, ev.SESSION_CREATED, created())])
    events = compose(parse(body({**text(), "id": "one"}), SID), JANE, [""])
    first, second = await write(log, SID, events), await write(log, SID, events)
    assert first == second
    assert len(log.events) == 2
    assert first[0][0] == {
        "id": f"sevt_{HEX}_2_0",
        "type": "user.message",
        "processed_at": None,
        "content": [{"type": "text", "text": "hello"}],
    }


async def test_one_id_with_other_content_is_a_conflict():
    log = ListLog([at(1, ev.SESSION_CREATED, created())])
    await write(log, SID, compose(parse(body({**text("a"), "id": "one"}), SID), JANE, [""]))
    with pytest.raises(Conflict, match="other content at position 2"):
        await write(log, SID, compose(parse(body({**text("b"), "id": "one"}), SID), JANE, [""]))


async def test_a_call_is_answered_once():
    log = ListLog([at(1, ev.SESSION_CREATED, created())])
    await write(log, SID, compose(parse(body(confirm()), SID), JANE, ["a"]))
    await write(log, SID, compose(parse(body(confirm()), SID), Caller("joe"), ["b"]))
    assert len(log.events) == 2
    deny = confirm(result="deny", deny_message="not on a Friday")
    await write(log, SID, compose(parse(body(deny), SID), JANE, ["c"]))
    assert len(log.events) == 3, "any deny wins: it stands beside the allow"
    with pytest.raises(Conflict, match="already answered with deny at position 3"):
        await write(log, SID, compose(parse(body(confirm(result="deny")), SID), JANE, ["d"]))


async def test_only_a_call_that_waits_can_be_confirmed():
    log = ListLog([at(1, ev.SESSION_CREATED, created()), at(2, ev.USER_MESSAGE, user_message("x"))])
    log.status = {"pending": [{"tool_use_id": "toolu_5", "name": "bash"}]}
    wanted = parse(body(confirm()), SID)
    with pytest.raises(UserError, match=rf"events\.0\.tool_use_id.*sevt_{HEX}_toolu_5"):
        await check(log, await log.get_session(SID), wanted)
    log.events.append(
        at(3, ev.TOOL_PENDING, {"tool_use_id": "toolu_1", "name": "bash", "permission": "Ask"})
    )
    await check(log, await log.get_session(SID), wanted)


def custom(**extra):
    return {"type": "user.custom_tool_result", "custom_tool_use_id": "toolu_1", **extra}


SYSTEM = {"type": "system.message", "content": "The branch is frozen."}


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (body(custom(is_error="no")), "events.0.is_error:"),
        (body(custom(content=3)), "events.0.content:"),
        (body(custom(content=[{"type": "text", "text": ""}])), "events.0.content.0.text:"),
        (body({"type": "user.custom_tool_result"}), "events.0.custom_tool_use_id:"),
        (body(confirm(input_sha256="abc")), "events.0.input_sha256:"),
        (body(SYSTEM), "events.0: a system.message must be the last"),
        (body(text(), SYSTEM, text()), "events.1: a system.message must be the last"),
        (body({"type": "user.interrupt"}, SYSTEM), "events.1: a system.message"),
        (body(text(), {**SYSTEM, "content": [image()["content"][0]]}), "events.1.content.0"),
    ],
)
def test_a_bad_answer_or_system_message_is_refused(raw, path):
    with pytest.raises(UserError, match=re.escape(path)):
        parse(raw, SID)


def asking(*blocks, **more):
    """A log whose newest response holds these calls; `lookup` is a custom tool."""
    made = {**created(), "custom_tools": ["lookup"]}
    rows = [(ev.SESSION_CREATED, made), (ev.MODEL_RESPONSE, response(*blocks))]
    return ListLog([at(seq, kind, data) for seq, (kind, data) in enumerate(rows, start=1)])


async def send(log, *events):
    found = parse(body(*events), SID)
    await check(log, await log.get_session(SID), found)
    return await write(log, SID, compose(found, JANE, [uuid7() for _ in found]))


async def test_a_custom_tool_is_answered_as_soon_as_its_use_is_seen_and_once():
    log = asking(tool_use("toolu_1", "lookup", id="7"))
    (echo,), seq = await send(log, custom(content="found"))
    assert (echo["custom_tool_use_id"], seq) == (f"sevt_{HEX}_toolu_1", 3)
    assert (await send(log, custom(content="found")))[1] == 3, "a repetition changes nothing"
    with pytest.raises(Conflict, match="already answered at position 3"):
        await send(log, custom(content="something else"))


async def test_each_kind_of_call_has_its_kind_of_answer():
    log = asking(tool_use("toolu_1", "lookup"), tool_use("toolu_2"), tool_use("toolu_3", "read"))
    with pytest.raises(UserError, match=r"answer it with user\.custom_tool_result"):
        await send(log, confirm())
    with pytest.raises(UserError, match=r"answer it with user\.tool_confirmation"):
        await send(log, custom(custom_tool_use_id="toolu_2"))
    for unknown in ("toolu_3", "toolu_9"):
        with pytest.raises(UserError, match="no call with this id waits"):
            await send(log, custom(custom_tool_use_id=unknown))
    assert len(log.events) == 2


async def test_an_answer_to_a_call_that_is_over_is_a_conflict():
    log = asking(tool_use("toolu_1", "lookup"), tool_use("toolu_2"))
    done = {"content": "interrupted", "is_error": True, "synthesized": True}
    log.events.append(at(3, ev.TOOL_RESULT, {"tool_use_id": "toolu_1", **done}))
    log.events.append(at(4, ev.TOOL_STARTED, {"tool_use_id": "toolu_2"}))
    for late in (custom(), confirm(tool_use_id="toolu_2", result="deny")):
        with pytest.raises(Conflict, match="the call is over"):
            await send(log, late)


async def test_an_approval_is_for_the_arguments_that_were_shown():
    log = asking(tool_use("toolu_1", command="ls"))
    shown = ev.input_sha256({"command": "ls"})
    with pytest.raises(UserError, match=rf"events\.0\.input_sha256: .*{shown}"):
        await send(log, confirm(input_sha256=ev.input_sha256({"command": "rm -rf /"})))
    await send(log, confirm(input_sha256=shown))
    log = asking(tool_use("toolu_1", command="ls"))
    log.status = {"pending": [{"tool_use_id": "toolu_1", "name": "bash", "input_sha256": shown}]}
    with pytest.raises(UserError, match="input_sha256"):
        await send(log, confirm(input_sha256="0" * 64))


async def test_a_system_message_is_written_before_what_it_follows():
    log = asking()
    echoes, first = await send(log, text(), SYSTEM)
    assert [echo["type"] for echo in echoes] == ["user.message", "system.message"]
    assert [event.type for event in log.events[2:]] == [ev.SYSTEM_MESSAGE, ev.USER_MESSAGE]
    assert first == 3
