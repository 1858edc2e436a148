"""`SessionLog` on a real store: create, emit, read, follow, and every error."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cowhand.errors import SessionClosed, SessionNotFound, UserError
from cowhand.session import events as ev
from cowhand.session.events import INLINE_LIMIT, NewEvent
from cowhand.session.log import Created, Held
from support import sessions as make


async def test_a_created_session_has_its_events_from_position_1_and_is_ready(log_roles):
    sid = make.new_sid()
    meta = make.meta(sid)
    assert await log_roles.log.create_session(meta, [make.created(), make.message()]) == Created(
        sid, existed=False
    )
    state = await log_roles.log.get_session(sid)
    assert state.meta == meta
    assert (state.state, state.mode, state.lease, state.epoch) == ("idle", "running", "", 0)
    assert (state.next_seq, state.status) == (3, {})
    assert state.created_ms > 0
    log = await log_roles.log.get_events(sid)
    assert [(e.seq, e.type, e.id, e.lease) for e in log] == [
        (1, ev.SESSION_CREATED, "created", ""),
        (2, ev.USER_MESSAGE, "msg:0", ""),
    ]
    assert log[1].payload == make.message().payload()
    assert await make.first(log_roles.worker.work()) == sid


async def test_creating_again_changes_nothing(log_roles):
    sid = await make.start(log_roles.log)
    again = await log_roles.log.create_session(make.meta(sid), [make.created(), make.message("x")])
    assert again == Created(sid, existed=True)
    assert len(await log_roles.log.get_events(sid)) == 2
    assert (await log_roles.control.backlog("team-a")).ready == 1


async def test_a_session_without_a_message_is_not_ready(log_roles):
    sid = make.new_sid()
    await log_roles.log.create_session(make.meta(sid), [make.created()])
    assert (await log_roles.control.backlog("team-a")).ready == 0
    await log_roles.log.emit_event(sid, make.message())
    assert (await log_roles.control.backlog("team-a")).ready == 1


async def test_a_session_created_suspended_waits_for_resuming(log_roles):
    sid = make.new_sid()
    events = [make.created(), make.message(), make.suspended()]
    await log_roles.log.create_session(make.meta(sid), events)
    assert (await log_roles.log.get_session(sid)).mode == "suspended"
    assert (await log_roles.control.backlog("team-a")).ready == 0
    assert await log_roles.worker.claim(sid) == Held("SUSPENDED")
    await log_roles.control.set_mode("team-a", sid, "running", make.resumed())
    assert await make.first(log_roles.worker.work()) == sid


async def test_a_tombstone_answers_the_session_that_made_the_run(log_roles):
    digest = "ab" * 32
    old, new = make.new_sid(), make.new_sid()
    events = [make.created(), make.message()]
    await log_roles.log.create_session(make.meta(old, tombstone=digest), events)
    for _ in range(2):
        assert await log_roles.log.create_session(
            make.meta(new, tombstone=digest), events
        ) == Created(old, existed=True)
    with pytest.raises(SessionNotFound):
        await log_roles.log.get_session(new)
    # It outlives a log that is deleted at once.
    await log_roles.control.close("team-a", old, make.deleted(), retain_s=0)
    third = make.meta(make.new_sid(), tombstone=digest)
    assert (await log_roles.log.create_session(third, events)).session_id == old


async def test_a_tombstone_of_a_creator_that_died_is_taken_over(log_roles):
    digest, dead, sid = "cd" * 32, make.new_sid(), make.new_sid()
    key = log_roles.store.keys().tombstone(digest)
    await log_roles.store.writes.call("SET", key, f"?{dead}")
    meta = make.meta(sid, tombstone=digest)
    assert await log_roles.log.create_session(meta, [make.created()]) == Created(sid, existed=False)
    # Control: if the dead creator's session is there, it counts.
    await log_roles.store.writes.call("SET", key, f"?{sid}")
    other = make.meta(dead, tombstone=digest)
    assert await log_roles.log.create_session(other, [make.created()]) == Created(sid, existed=True)


@pytest.mark.parametrize(
    ("meta", "events", "text"),
    [
        (make.meta("sesn_1"), [make.created()], "not a session id"),
        (make.meta(make.new_sid(), "team-b"), [make.created()], "team-b"),
        (make.meta(make.new_sid()), [], "session.created"),
        (make.meta(make.new_sid()), [make.message()], "session.created"),
        (make.meta(make.new_sid()), [make.created(), make.result()], "id of 1 to 256"),
        (
            make.meta(make.new_sid()),
            [make.created(), replace(make.result(), id="x")],
            "tool.result cannot",
        ),
        (
            make.meta(make.new_sid()),
            [make.created(), make.message("x"), make.message("x")],
            "different ids",
        ),
        (
            make.meta(make.new_sid()),
            [make.created(), make.message(text="x" * INLINE_LIMIT)],
            "limit is 1048576: split it",
        ),
    ],
)
async def test_a_bad_session_is_refused_and_nothing_is_written(log_roles, meta, events, text):
    with pytest.raises(UserError, match=text):
        await log_roles.log.create_session(meta, events)
    assert not await log_roles.store.reads.call(
        "EXISTS", log_roles.store.keys().session(meta.session_id).meta
    )


async def test_the_script_refuses_a_payload_over_the_limit_too(log_roles):
    """The client's check is not the only one: the script counts the bytes it is given."""
    sid = await make.start(log_roles.log)
    keys = log_roles.store.keys().session(sid)
    big = b"x" * (INLINE_LIMIT + 1)
    with pytest.raises(UserError, match="1048577 bytes"):
        await log_roles.store.script("ingest", keys, "big", ev.USER_MESSAGE, big, INLINE_LIMIT, 1)
    lease = await make.take(log_roles.worker, sid)
    with pytest.raises(UserError, match="1048577 bytes"):
        await log_roles.store.script(
            "append", keys, lease.value, 1, 1000, INLINE_LIMIT, "", ev.TOOL_RESULT, big
        )
    assert len(await log_roles.log.get_events(sid)) == 3


async def test_the_same_event_id_answers_the_first_position_even_after_the_end(log_roles):
    sid = await make.start(log_roles.log)
    first = await log_roles.log.emit_event(sid, make.message("m1", "one"))
    assert await log_roles.log.emit_event(sid, make.message("m1", "two")) == first == 3
    await log_roles.control.close("team-a", sid, make.deleted(), retain_s=60)
    assert await log_roles.log.emit_event(sid, make.message("m1", "three")) == 3
    with pytest.raises(SessionClosed):
        await log_roles.log.emit_event(sid, make.message("m2"))


async def test_emit_refuses_what_it_must(log_roles):
    sid = await make.start(log_roles.log)
    with pytest.raises(UserError, match="cannot be emitted"):
        await log_roles.log.emit_event(sid, make.suspended())
    with pytest.raises(UserError, match="needs an id"):
        await log_roles.log.emit_event(sid, make.message(""))
    with pytest.raises(UserError, match="split it"):
        await log_roles.log.emit_event(sid, make.message("m", "x" * INLINE_LIMIT))
    with pytest.raises(SessionNotFound):
        await log_roles.log.emit_event(make.new_sid(), make.message())
    assert len(await log_roles.log.get_events(sid)) == 2


async def test_an_exec_is_logged_without_waking_the_session(log_roles):
    sid = make.new_sid()
    await log_roles.log.create_session(make.meta(sid), [make.created()])
    await log_roles.log.emit_event(sid, NewEvent(ev.SESSION_EXEC, {"command": "ls"}, id="e1"))
    assert (await log_roles.control.backlog("team-a")).ready == 0


async def test_ranges(log_roles):
    sid = await make.start(log_roles.log)
    for number in range(600):
        await log_roles.log.emit_event(sid, make.message(f"m{number}"))

    async def seqs(*args, **more):
        return [e.seq for e in await log_roles.log.get_events(sid, *args, **more)]

    assert await seqs() == list(range(1, 603))
    assert await seqs(5, 7) == [5, 6, 7]
    assert await seqs(600) == [600, 601, 602]
    assert await seqs(1, limit=300) == list(range(1, 301))
    assert await seqs(0, 1) == [1]
    assert await seqs(603) == []
    assert await seqs(7, 5) == []
    assert await seqs(-3) == [600, 601, 602]
    assert await seqs(-3, -2) == [600, 601]
    assert await seqs(601, -1) == [601, 602]
    assert await seqs(-9999, 2) == [1, 2]
    assert await seqs(1, -9999) == []
    with pytest.raises(SessionNotFound):
        await log_roles.log.get_events(make.new_sid())


async def test_a_filter_by_type_looks_at_the_whole_range(log_roles):
    sid = await make.start(log_roles.log)
    lease = await make.take(log_roles.worker, sid)
    for number in range(70):
        more = [make.result(f"r{number}")] if number % 30 == 0 else []
        await log_roles.worker.append(lease, [NewEvent(ev.STATUS_RUNNING, {}), *more])

    async def found(*args, **more):
        events = await log_roles.log.get_events(sid, *args, **more)
        return [(event.seq, event.type) for event in events]

    wanted = [(5, ev.TOOL_RESULT), (36, ev.TOOL_RESULT), (67, ev.TOOL_RESULT)]
    assert await found(types={ev.TOOL_RESULT}) == wanted
    assert await found(types={ev.TOOL_RESULT}, limit=2) == wanted[:2]
    assert await found(6, -1, types=[ev.TOOL_RESULT, ev.USER_MESSAGE]) == wanted[1:]
    assert await found(types=[]) == []


async def test_follow_gives_old_and_new_events_and_ends_with_the_log(log_roles, monkeypatch):
    monkeypatch.setattr("cowhand.session.sessions.POLL_SECONDS", 600)
    sid = await make.start(log_roles.log)
    seen: list[str] = []
    read = asyncio.Event()

    async def follow():
        async for event in log_roles.log.follow(sid):
            seen.append(event.id)
            read.set()

    task = asyncio.create_task(follow())
    await read.wait()
    for number in range(20):
        await log_roles.log.emit_event(sid, make.message(f"m{number}"))
    await log_roles.control.close("team-a", sid, make.deleted(), retain_s=60)
    await asyncio.wait_for(task, 60)  # Below the poll: the nudges did it.
    assert seen == ["created", "msg:0", *(f"m{n}" for n in range(20)), "deleted"]


async def test_follow_from_the_end_gives_only_new_events(log_roles, monkeypatch):
    monkeypatch.setattr("cowhand.session.sessions.POLL_SECONDS", 600)
    sid = await make.start(log_roles.log)
    state = await log_roles.log.get_session(sid)
    waiting = asyncio.create_task(make.first(log_roles.log.follow(sid, state.next_seq)))
    await asyncio.sleep(0)
    assert await log_roles.log.emit_event(sid, make.message("new")) == 3
    assert (await asyncio.wait_for(waiting, 60)).id == "new"


async def test_follow_heals_a_lost_nudge(log_roles, monkeypatch):
    monkeypatch.setattr("cowhand.session.sessions.POLL_SECONDS", 0.05)
    monkeypatch.setattr("cowhand.session.hub.Subscription.offer", lambda self, message: None)
    sid = await make.start(log_roles.log)
    waiting = asyncio.create_task(make.first(log_roles.log.follow(sid, 3)))
    await log_roles.log.emit_event(sid, make.message("new"))
    assert (await asyncio.wait_for(waiting, 60)).id == "new"


async def test_follow_of_a_session_that_is_not_there_or_goes(log_roles, monkeypatch):
    monkeypatch.setattr("cowhand.session.sessions.POLL_SECONDS", 0.05)
    with pytest.raises(SessionNotFound):
        await make.first(log_roles.log.follow(make.new_sid()))
    sid = await make.start(log_roles.log)
    seen = []

    async def follow():
        async for event in log_roles.log.follow(sid):
            seen.append(event.type)
            if event.seq == 2:
                await log_roles.control.close("team-a", sid, make.deleted(), retain_s=0)

    await asyncio.wait_for(follow(), 60)
    assert seen == [ev.SESSION_CREATED, ev.USER_MESSAGE]


async def test_many_followers_share_one_connection(log_roles):
    link, opened = log_roles.store.hub._link, []
    connect = link._connect

    async def counted():
        opened.append(1)
        return await connect()

    link._connect = counted
    sids = [await make.start(log_roles.log) for _ in range(30)]
    waiting = [
        asyncio.create_task(make.first(log_roles.log.follow(sid, 3))) for sid in sids for _ in "ab"
    ]
    for sid in sids:
        await log_roles.log.emit_event(sid, make.message("new"))
    got = await asyncio.wait_for(asyncio.gather(*waiting), 60)
    assert {event.id for event in got} == {"new"}
    assert len(opened) == 1
