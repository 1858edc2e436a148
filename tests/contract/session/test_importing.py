"""Forks and restored sessions on a real store: all at once or not at all, and nothing that is there is overwritten."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from cowhand.errors import Fenced, SessionNotFound, UserError
from cowhand.session import connect
from cowhand.session import events as ev
from cowhand.session.events import Event, NewEvent
from cowhand.session.export import Export, header_of
from cowhand.session.log import Held, Lease, Restored, StoreConfig
from support import sessions as make
from support.memory_archive import MemoryArchive

NS = "team-a"


async def stream(events: Sequence[Event]) -> AsyncIterator[Event]:
    for event in events:
        yield event


async def run(roles: Any, sid: str, *, results: int = 3, idle: bool = True) -> Lease:
    """A turn with some results."""
    await roles.worker.beat()
    lease = await make.take(roles.worker, sid)
    events = [make.result(f"r{number}") for number in range(results)]
    status = {"stop_reason": {"type": "end_turn"}, "turns": 1}
    await roles.worker.append(lease, events, status=status)
    if idle:
        stop = NewEvent(ev.STATUS_IDLE, {"stop_reason": {"type": "end_turn"}})
        first = await roles.worker.append(lease, [stop])
        await roles.worker.park(lease, first + 1)
    return lease


async def backup(roles: Any, sid: str) -> Export:
    state = await roles.log.get_session(sid)
    return Export(header_of(state, 1), tuple(await roles.log.get_events(sid)))


async def put_back(roles: Any, export: Export) -> Restored:
    return await roles.log.restore_session(export.header, stream(export.events))


async def lose(roles: Any, sid: str, keep: int) -> None:
    """What a store that was restored to an older state looks like: the tail is gone."""
    keys = roles.store.keys().session(sid)
    events = await roles.log.get_events(sid)
    await roles.store.reads.call("DEL", keys.log)
    for event in events[:keep]:
        await roles.store.reads.call(
            *("XADD", keys.log, f"{event.seq}-0", "t", event.type, "e", event.id),
            *("ts", event.ts, "w", event.lease, "p", event.payload),
        )
    meta = ("HSET", keys.meta, "next", keep + 1, "lease", "", "state", "idle", "input", 0)
    await roles.store.reads.call(*meta)


async def forget(roles: Any, sid: str) -> None:
    keys = roles.store.keys().session(sid)
    await roles.store.reads.call("DEL", keys.meta, keys.log, keys.name("dedupe"), keys.hands)


# Restore.


async def test_a_missing_session_comes_back_byte_for_byte(log_roles):
    digest = "ab" * 32
    sid = make.new_sid()
    first = [make.created(), make.message()]
    await log_roles.log.create_session(make.meta(sid, tombstone=digest), first)
    await run(log_roles, sid, results=200)
    kept = await backup(log_roles, sid)
    before = await log_roles.log.get_session(sid)
    await forget(log_roles, sid)
    await log_roles.store.reads.call("DEL", log_roles.store.keys().tombstone(digest))
    last = kept.header.last_seq
    assert await put_back(log_roles, kept) == Restored("restored", 0, last)
    assert tuple(await log_roles.log.get_events(sid)) == kept.events
    after = await log_roles.log.get_session(sid)
    assert after == before
    # Again changes nothing, input is deduplicated as before, and the run counts as made.
    assert await put_back(log_roles, kept) == Restored("unchanged", last, last)
    assert await log_roles.log.emit_event(sid, make.message()) == 2
    other = make.meta(make.new_sid(), tombstone=digest)
    assert (await log_roles.log.create_session(other, first)).session_id == sid
    # It goes on: under a lease that is higher than any before.
    assert await log_roles.log.emit_event(sid, make.message("m2")) == last + 1
    lease = await make.take(log_roles.worker, sid)
    assert lease.epoch > before.epoch


async def test_a_session_in_mid_turn_comes_back_suspended_and_goes_on_when_resumed(log_roles):
    sid = await make.start(log_roles.log)
    await run(log_roles, sid, idle=False)
    kept = await backup(log_roles, sid)
    assert kept.header.state == "running"
    await forget(log_roles, sid)
    await log_roles.store.reads.call("DEL", log_roles.store.keys().session(sid).name("own"))
    await put_back(log_roles, kept)
    state = await log_roles.log.get_session(sid)
    assert (state.state, state.mode, state.lease) == ("rescheduling", "suspended", "")
    assert await log_roles.worker.claim(sid) == Held("SUSPENDED")
    await log_roles.control.set_mode(NS, sid, "running", make.resumed())
    assert isinstance(await log_roles.worker.claim(sid), Lease)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (ev.USER_MESSAGE, {"content": [{"type": "text", "text": "hi"}]}),
        (ev.USER_TOOL_CONFIRMATION, {"tool_use_id": "toolu_1", "result": "allow"}),
        (ev.USER_CUSTOM_TOOL_RESULT, {"custom_tool_use_id": "toolu_1", "content": []}),
        (ev.SYSTEM_MESSAGE, {"content": [{"type": "text", "text": "hi"}]}),
    ],
)
async def test_input_that_waited_in_the_backup_wakes_the_session(log_roles, kind, data):
    sid = await make.start(log_roles.log)
    await run(log_roles, sid)
    await log_roles.log.emit_event(sid, NewEvent(kind, data, id="waits"))
    kept = await backup(log_roles, sid)
    await forget(log_roles, sid)
    await put_back(log_roles, kept)
    state = await log_roles.log.get_session(sid)
    if kind == ev.SYSTEM_MESSAGE:
        # Control: it starts no turn, so there is nothing to hold back.
        assert (state.state, state.mode) == ("idle", "running")
        return
    assert (state.state, state.mode) == ("rescheduling", "suspended")
    before = (await log_roles.control.backlog(NS)).ready
    await log_roles.control.set_mode(NS, sid, "running", make.resumed())
    assert (await log_roles.control.backlog(NS)).ready == before + 1
    assert isinstance(await log_roles.worker.claim(sid), Lease)


async def test_the_lost_tail_comes_back_and_old_leases_stay_fenced(log_roles):
    sid = await make.start(log_roles.log)
    lease = await run(log_roles, sid, results=150)
    kept = await backup(log_roles, sid)
    await lose(log_roles, sid, 70)
    assert len(await log_roles.log.get_events(sid)) == 70
    assert await put_back(log_roles, kept) == Restored("extended", 70, kept.header.last_seq)
    assert tuple(await log_roles.log.get_events(sid)) == kept.events
    with pytest.raises(Fenced):
        await log_roles.worker.append(lease, [make.result("late")])


async def test_a_tail_comes_back_behind_the_note_that_it_was_lost(log_roles):
    sid = await make.start(log_roles.log)
    await run(log_roles, sid)
    kept = await backup(log_roles, sid)
    await lose(log_roles, sid, 4)
    note = NewEvent(ev.LOG_REGRESSED, {"seen": 7, "position": 4}, id="regressed:7:4")
    assert await log_roles.control.regress(NS, sid, note, seen=kept.header.last_seq) == 5
    assert (await log_roles.log.get_session(sid)).regressed == (kept.header.last_seq, 4)
    assert await log_roles.worker.claim(sid) == Held("SUSPENDED")
    assert (await put_back(log_roles, kept)).outcome == "extended"
    state = await log_roles.log.get_session(sid)
    assert (state.regressed, state.mode) == (None, "running")
    assert tuple(await log_roles.log.get_events(sid)) == kept.events


@pytest.mark.parametrize("keep", [4, 5])
async def test_a_log_that_went_on_is_never_overwritten(log_roles, keep):
    sid = await make.start(log_roles.log)
    await run(log_roles, sid)
    kept = await backup(log_roles, sid)
    await lose(log_roles, sid, keep)
    await log_roles.log.emit_event(sid, make.message("other"))
    now = await log_roles.log.get_events(sid)
    with pytest.raises(UserError, match=f"another event {keep + 1} than the backup"):
        await put_back(log_roles, kept)
    assert await log_roles.log.get_events(sid) == now


async def test_a_longer_log_stays(log_roles):
    sid = await make.start(log_roles.log)
    await run(log_roles, sid)
    kept = await backup(log_roles, sid)
    await log_roles.log.emit_event(sid, make.message("more"))
    last = kept.header.last_seq
    assert await put_back(log_roles, kept) == Restored("unchanged", last + 1, last)
    assert len(await log_roles.log.get_events(sid)) == last + 1


async def test_a_torn_backup_changes_nothing(log_roles):
    sid = await make.start(log_roles.log)
    await run(log_roles, sid, results=200)
    kept = await backup(log_roles, sid)
    await forget(log_roles, sid)

    async def torn() -> AsyncIterator[Event]:
        for event in kept.events[:-3]:
            yield event
        raise UserError("torn")

    with pytest.raises(UserError, match="torn"):
        await log_roles.log.restore_session(kept.header, torn())
    with pytest.raises(UserError, match="its header says"):
        await log_roles.log.restore_session(kept.header, stream(kept.events[:-1]))
    events = stream((*kept.events[:2], *kept.events[3:]))
    with pytest.raises(UserError, match="event 4 stands where 3 should"):
        await log_roles.log.restore_session(kept.header, events)
    with pytest.raises(SessionNotFound):
        await log_roles.log.get_session(sid)
    # What was staged goes by itself.
    staged = f"{log_roles.store.keys().session(sid).log}:*"
    _, keys = await log_roles.store.reads.call("SCAN", 0, "MATCH", staged, "COUNT", 10000)
    assert keys
    for key in keys:
        assert await log_roles.store.reads.call("PTTL", key) > 0


async def test_a_backup_of_another_tenant_or_of_a_held_session_is_refused(log_roles):
    sid = await make.start(log_roles.log)
    await run(log_roles, sid)
    kept = await backup(log_roles, sid)
    foreign = replace(kept.header, meta=replace(kept.header.meta, namespace="team-b"))
    with pytest.raises(UserError, match="namespace team-b"):
        await log_roles.log.restore_session(foreign, stream(kept.events))
    await lose(log_roles, sid, 4)
    await make.take(log_roles.worker, sid)
    held = await log_roles.log.get_events(sid)
    with pytest.raises(UserError, match="another event 5"):
        await put_back(log_roles, kept)
    assert await log_roles.log.get_events(sid) == held


async def test_an_ended_session_comes_back_for_a_while(log_roles):
    sid = await make.start(log_roles.log)
    await log_roles.control.close(NS, sid, make.deleted(), retain_s=1000)
    kept = await backup(log_roles, sid)
    await forget(log_roles, sid)
    await put_back(log_roles, kept)
    assert (await log_roles.log.get_session(sid)).state == "closed"
    assert await log_roles.store.reads.call("PTTL", log_roles.store.keys().session(sid).meta) > 0


async def test_large_payloads_become_blobs_again(store_url):
    archive = MemoryArchive()
    async with connect(StoreConfig(store_url), namespace=NS, archive=archive) as store:
        roles = type("R", (), {"store": store, "log": store.session_log()})
        sid = make.new_sid()
        await roles.log.create_session(
            make.meta(sid), [make.created(), make.message(text="b" * 90_000)]
        )
        kept = await backup(roles, sid)
        await forget(roles, sid)
        archive.blobs.clear()
        await put_back(roles, kept)
        assert await roles.log.get_events(sid) == list(kept.events)
        assert len(archive.blobs[NS, sid]) == 1
        raw = await store.archive_log().stored(NS, sid, 1, 9, 10**9)
        assert len(raw[1].payload) < 1000


async def test_a_dry_run_says_what_would_be_done_and_does_nothing(log_roles):
    async def look(export: Export) -> Restored:
        events = stream(export.events)
        return await log_roles.log.restore_session(export.header, events, dry_run=True)

    sid = await make.start(log_roles.log)
    await run(log_roles, sid, results=150)
    kept = await backup(log_roles, sid)
    last = kept.header.last_seq
    assert await look(kept) == Restored("unchanged", last, last)
    await lose(log_roles, sid, 70)
    before = await log_roles.store.reads.call("SCAN", 0, "COUNT", 10000)
    assert await look(kept) == Restored("extended", 70, last)
    assert len(await log_roles.log.get_events(sid)) == 70
    await forget(log_roles, sid)
    assert await look(kept) == Restored("restored", 0, last)
    with pytest.raises(SessionNotFound):
        await log_roles.log.get_session(sid)
    # Nothing was staged either.
    found = await log_roles.store.reads.call("SCAN", 0, "COUNT", 10000)
    assert set(found[1]) <= set(before[1])


async def test_the_suspension_of_a_session_without_its_object_gives_way_to_the_lost_tail(log_roles):
    sid = await make.start(log_roles.log)
    await run(log_roles, sid)
    kept = await backup(log_roles, sid)
    await lose(log_roles, sid, 4)
    stray = NewEvent(ev.SESSION_SUSPENDED, {"actor": {"user": "operator"}}, id="stray:4")
    await log_roles.control.set_mode(NS, sid, "suspended", stray)
    assert (await put_back(log_roles, kept)).outcome == "extended"
    assert tuple(await log_roles.log.get_events(sid)) == kept.events
    # Control: what a person asked for is kept, and the backup refused.
    await lose(log_roles, sid, 4)
    await log_roles.control.set_mode(NS, sid, "suspended", make.suspended(9))
    with pytest.raises(UserError, match="another event 5"):
        await put_back(log_roles, kept)


async def test_the_sessions_of_a_tenant_are_listed_each_once(log_roles):
    sids = {await make.start(log_roles.log) for _ in range(20)}
    other = log_roles.store.session_log("team-b")
    foreign = await make.start(other, namespace="team-b")
    found = [sid async for sid in log_roles.log.session_ids()]
    assert (len(found), set(found)) == (20, sids)
    assert [sid async for sid in other.session_ids()] == [foreign]


async def test_the_archive_does_not_delete_what_was_brought_back(store_url):
    archive = MemoryArchive()
    async with connect(StoreConfig(store_url), namespace=NS, archive=archive) as store:
        roles = type("R", (), {"store": store, "log": store.session_log()})
        sid = await make.start(roles.log)
        kept = await backup(roles, sid)
        await store.control_log().close(NS, sid, make.deleted(), retain_s=0)
        due = store.archive_log()
        assert (NS, sid) in await due.doomed(10)
        await forget(roles, sid)
        await put_back(roles, kept)
        assert (NS, sid) not in await due.doomed(10)


# The log that lost its tail.


async def test_a_regression_is_noted_once_and_accepted_only_as_it_is(log_roles):
    sid = await make.start(log_roles.log)
    note = NewEvent(ev.LOG_REGRESSED, {"seen": 9, "position": 2}, id="regressed:9:2")
    assert await log_roles.control.regress(NS, sid, note, seen=2) == 2
    assert (await log_roles.log.get_session(sid)).regressed is None
    for _ in range(2):
        await log_roles.control.regress(NS, sid, note, seen=9)
    state = await log_roles.log.get_session(sid)
    assert (state.regressed, state.mode, state.next_seq) == ((9, 2), "suspended", 4)
    assert not await log_roles.control.accept_regression(NS, sid, 3)
    assert (await log_roles.log.get_session(sid)).regressed == (9, 2)
    assert await log_roles.control.accept_regression(NS, sid, 2)
    state = await log_roles.log.get_session(sid)
    assert (state.regressed, state.accepted, state.mode) == (None, 9, "suspended")
    # What was accepted is not noted again, a greater loss is.
    other = replace(note, id="regressed:9:3")
    assert await log_roles.control.regress(NS, sid, other, seen=9) == 3
    assert await log_roles.control.regress(NS, sid, other, seen=10) == 4


# Forks.


def forked_created(**more: Any) -> NewEvent:
    return NewEvent(ev.SESSION_CREATED, {"name": "fork", **more}, id="created")


def forked(sid: str, at: int) -> NewEvent:
    return NewEvent(ev.SESSION_FORKED, {"session": sid, "position": at}, id="forked")


async def test_a_fork_has_the_events_of_its_source_and_its_own_ids(log_roles):
    source = await make.start(log_roles.log)
    await run(log_roles, source, results=150)
    before, state = await log_roles.log.get_events(source), await log_roles.log.get_session(source)
    sid, at = make.new_sid(), 100
    extra = [forked(source, at), make.message("msg:0", "go on")]
    made = await log_roles.log.fork_session(make.meta(sid), forked_created(), (source, at), extra)
    assert (made.session_id, made.existed) == (sid, False)
    events = await log_roles.log.get_events(sid)
    assert [event.seq for event in events] == list(range(1, at + 3))
    assert [event.payload for event in events[1:at]] == [event.payload for event in before[1:at]]
    assert [event.type for event in events[1:at]] == [event.type for event in before[1:at]]
    assert [event.type for event in events[at:]] == [ev.SESSION_FORKED, ev.USER_MESSAGE]
    assert len({event.id for event in events}) == len(events)
    assert events[1].id == f"msg:0@{source}"
    again = await log_roles.log.fork_session(make.meta(sid), forked_created(), (source, at), extra)
    assert again.existed
    assert await log_roles.log.get_events(sid) == events
    # The source is as it was, and the fork is ready.
    assert await log_roles.log.get_events(source) == before
    assert await log_roles.log.get_session(source) == state
    assert await log_roles.log.emit_event(sid, make.message("msg:0", "go on")) == at + 2
    assert isinstance(await log_roles.worker.claim(sid), Lease)


async def test_a_suspended_fork_and_a_run_that_was_made(log_roles):
    source = await make.start(log_roles.log)
    sid, digest = make.new_sid(), "cd" * 32
    extra = [forked(source, 2), make.suspended()]
    meta = make.meta(sid, tombstone=digest)
    await log_roles.log.fork_session(meta, forked_created(), (source, 2), extra)
    assert (await log_roles.log.get_session(sid)).mode == "suspended"
    assert await log_roles.worker.claim(sid) == Held("SUSPENDED")
    later = make.meta(make.new_sid(), tombstone=digest)
    adopted = await log_roles.log.fork_session(later, forked_created(), (source, 2), extra)
    assert (adopted.session_id, adopted.existed) == (sid, True)


async def test_a_fork_beyond_the_source_or_of_its_end_is_refused(log_roles):
    source = await make.start(log_roles.log)
    sid = make.new_sid()
    with pytest.raises(SessionNotFound, match="no event 3"):
        await log_roles.log.fork_session(
            make.meta(sid), forked_created(), (source, 3), [forked(source, 3)]
        )
    await log_roles.control.close(NS, source, make.deleted(), retain_s=1000)
    with pytest.raises(UserError, match="fork at 2 or before"):
        await log_roles.log.fork_session(
            make.meta(sid), forked_created(), (source, 3), [forked(source, 3)]
        )
    with pytest.raises(SessionNotFound):
        await log_roles.log.get_session(sid)
    # A session that has ended can be forked before its end.
    await log_roles.log.fork_session(
        make.meta(sid), forked_created(), (source, 2), [forked(source, 2)]
    )
    assert len(await log_roles.log.get_events(sid)) == 3
