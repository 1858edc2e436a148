"""`ControlLog` on a real store: mode, close, dead workers, backlog, projections, hand records."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cowhand.errors import SessionClosed, SessionNotFound, UserError
from cowhand.session import connect
from cowhand.session import events as ev
from cowhand.session import scripts as lua
from cowhand.session.events import NewEvent
from cowhand.session.log import Backlog, HandRecord, Held, StoreConfig
from cowhand.session.store import Store
from support import sessions as make

RECORD = HandRecord(
    session_id="",
    hand="sandbox",
    instance=1,
    state="Pending",
    reason="Scheduling",
    message='A "quoted" {text}',
    sandbox="abc-sandbox-1",
    sandbox_uid="uid-1",
)


async def test_suspend_and_resume(log_roles):
    sid = await make.start(log_roles.log)
    control = log_roles.control
    assert await control.set_mode("team-a", sid, "suspended", make.suspended()) == 3
    assert await control.set_mode("team-a", sid, "suspended", make.suspended()) == 3
    assert (await log_roles.log.get_session(sid)).mode == "suspended"
    assert await make.first(log_roles.worker.work()) == sid
    assert await log_roles.worker.claim(sid) == Held("SUSPENDED")
    assert (await control.backlog("team-a")).ready == 0
    await log_roles.log.emit_event(sid, make.message("m1"))
    assert (await control.backlog("team-a")).ready == 0
    assert await control.set_mode("team-a", sid, "running", make.resumed()) == 5
    assert (await control.backlog("team-a")).ready == 1
    # A late repetition of the suspension changes nothing.
    assert await control.set_mode("team-a", sid, "suspended", make.suspended()) == 3
    assert (await log_roles.log.get_session(sid)).mode == "running"


def updated(number: int, **budget: int) -> NewEvent:
    return NewEvent(ev.SESSION_UPDATED, {"budget": budget or None}, id=f"budget:{number}")


async def test_a_budget_is_set_once_and_wakes_nobody(log_roles):
    log, control, worker = log_roles.log, log_roles.control, log_roles.worker
    sid = make.new_sid()
    first = replace(make.created(), data={"name": "fix-it", "budget": {"max_tokens": 1}})
    await log.create_session(make.meta(sid), [first])
    assert (await log.get_session(sid)).budget == {"max_tokens": 1}
    assert await control.set_budget("team-a", sid, updated(2, max_tokens=2)) == 2
    assert (await log.get_session(sid)).budget == {"max_tokens": 2}
    assert await control.set_budget("team-a", sid, updated(3)) == 3
    # A late repetition of the older edit changes nothing.
    assert await control.set_budget("team-a", sid, updated(2, max_tokens=2)) == 2
    assert (await log.get_session(sid)).budget == {}
    assert (await control.backlog("team-a")).ready == 0
    lease = await make.take(worker, sid)
    await control.set_budget("team-a", sid, updated(4, max_tool_calls=4))
    assert await worker.beat() == {sid}, "the holder is nudged"
    assert not (await worker.park(lease, 5)).parked, "it must read the edit before it parks"
    with pytest.raises(ValueError, match=r"session\.updated"):
        await control.set_budget("team-a", sid, make.suspended())
    with pytest.raises(UserError, match="cannot be emitted"):
        await log.emit_event(sid, updated(5))
    with pytest.raises(SessionNotFound):
        await control.set_budget("team-a", make.new_sid(), updated(1))
    await control.close("team-a", sid, make.deleted(), retain_s=60)
    with pytest.raises(SessionClosed):
        await control.set_budget("team-a", sid, updated(6))


async def test_resuming_wakes_only_a_session_that_has_work(log_roles):
    control, worker = log_roles.control, log_roles.worker
    idle = await make.start(log_roles.log)
    lease = await make.take(worker, idle)
    await worker.park(lease, 4)
    await control.set_mode("team-a", idle, "suspended", make.suspended())
    await control.set_mode("team-a", idle, "running", make.resumed())
    assert (await control.backlog("team-a")).ready == 1, "the entry of its creation, never read"
    stopped = await make.start(log_roles.log)
    lease = await make.take(worker, stopped)
    await control.set_mode("team-a", stopped, "suspended", make.suspended())
    assert await worker.beat() == {stopped}
    await worker.park(lease, 5)
    await control.set_mode("team-a", stopped, "running", make.resumed())
    assert (
        await log_roles.store.reads.call(
            "HGET", log_roles.store.keys().session(stopped).meta, "rdy"
        )
    ) != b"0"
    assert (
        await log_roles.store.reads.call("HGET", log_roles.store.keys().session(idle).meta, "rdy")
    ) == b"0"


async def test_mode_errors(log_roles):
    control = log_roles.control
    with pytest.raises(SessionNotFound):
        await control.set_mode("team-a", make.new_sid(), "suspended", make.suspended())
    sid = await make.start(log_roles.log)
    with pytest.raises(ValueError, match="goes with"):
        await control.set_mode("team-a", sid, "suspended", make.resumed())
    with pytest.raises(SessionNotFound):
        await control.set_mode("team-b", sid, "suspended", make.suspended())
    await control.close("team-a", sid, make.deleted(), retain_s=60)
    with pytest.raises(SessionClosed):
        await control.set_mode("team-a", sid, "suspended", make.suspended())


async def test_close_ends_the_log_and_lets_it_expire(log_roles):
    sid = await make.start(log_roles.log)
    control = log_roles.control
    await control.close("team-a", sid, make.deleted(), retain_s=60)
    await control.close("team-a", sid, make.deleted(), retain_s=6000)
    log = await log_roles.log.get_events(sid)
    assert [e.type for e in log][-1] == "session.deleted"
    assert len(log) == 3
    assert (await log_roles.log.get_session(sid)).state == "closed"
    keys = log_roles.store.keys().session(sid)
    for key in (keys.meta, keys.log, keys.name("dedupe")):
        assert 0 < await log_roles.store.reads.call("PTTL", key) <= 60_000
    await control.close("team-a", sid, make.deleted(), retain_s=0)
    with pytest.raises(SessionNotFound):
        await log_roles.log.get_session(sid)
    await control.close("team-a", sid, make.deleted(), retain_s=0)
    with pytest.raises(UserError, match="retain_s"):
        await control.close("team-a", sid, make.deleted(), retain_s=-1)
    with pytest.raises(ValueError, match="ends with"):
        await control.close("team-a", sid, make.message(), retain_s=0)


async def test_a_dead_pod_loses_its_sessions_at_once(log_roles):
    other = log_roles.store.worker_log("pod-10")  # pod-1 is a prefix of its name.
    await other.beat()
    mine, theirs = await make.start(log_roles.log), await make.start(log_roles.log)
    await make.take(log_roles.worker, mine)
    await make.take(other, theirs)
    assert await log_roles.control.drop_worker("team-a", "pod-1") == 1
    assert await log_roles.control.drop_worker("team-a", "pod-1") == 0
    assert (await log_roles.log.get_session(mine)).state == "rescheduling"
    assert (await log_roles.log.get_session(theirs)).state == "running"
    await make.take(other, mine)


async def test_backlog_counts_waiting_held_and_workers(log_roles):
    assert await log_roles.control.backlog("team-a") == Backlog(0, 0, 1, 0)
    assert await log_roles.control.backlog("team-b") == Backlog(0, 0, 0, 0)
    sids = [await make.start(log_roles.log) for _ in range(5)]
    work = log_roles.worker.work()
    first = await anext(work)
    backlog = await log_roles.control.backlog("team-a")
    assert (backlog.ready, backlog.leased, backlog.workers) == (5, 0, 1)
    await make.take(log_roles.worker, first)
    backlog = await log_roles.control.backlog("team-a")
    assert (backlog.ready, backlog.leased, backlog.workers) == (4, 1, 1)
    await work.aclose()
    await log_roles.worker.retire()
    backlog = await log_roles.control.backlog("team-a")
    assert (backlog.ready, backlog.leased, backlog.workers) == (len(sids) - 1, 1, 0)


async def test_the_sweep_trims_what_was_claimed(log_roles):
    sids = [await make.start(log_roles.log) for _ in range(40)]
    work = log_roles.worker.work()
    for _ in range(30):
        await make.take(log_roles.worker, await anext(work))
    await work.aclose()
    await log_roles.control.sweep("team-a")
    left = [
        await log_roles.store.reads.call("XLEN", base + "rdy")
        for base in log_roles.store.keys().bases()
    ]
    assert sum(left) <= len(sids) - 30 + 16, "read entries are gone but the last of each partition"
    assert (await log_roles.control.backlog("team-a")).ready == 10


@pytest.mark.parametrize("defended", [True, False])
async def test_trimming_keeps_what_was_read_but_not_claimed(store_url, defended):
    scripts = lua.load()
    if not defended:  # Control: without the look at pending entries they are lost.
        line = "local low = pending[1] > 0 and pending[2] or nil\n"
        source = scripts["trim"].source
        assert line in source
        scripts["trim"] = lua.Script("trim", source.replace(line, "local low = nil\n"))
    async with Store(StoreConfig(store_url, partitions=1), "team-a", scripts) as store:
        worker = store.worker_log("pod-1")
        await worker.beat()
        sids = [await make.start(store.session_log()) for _ in range(5)]
        work = worker.work()
        assert [await anext(work) for _ in sids] == sids
        await work.aclose()
        await worker.sweep()
        await worker.retire()  # Gives back what is still there.
        ready = store.keys().base(0) + "rdy"
        again = await store.reads.call(
            *("XREADGROUP", "GROUP", "h", "pod-2", "COUNT", 10, "STREAMS", ready, ">")
        )
        assert len(again[0][1]) == (5 if defended else 1)


async def test_the_lag_that_autoscalers_read_stays_exact(store_url):
    async with connect(StoreConfig(store_url, partitions=1), namespace="team-a") as store:
        worker = store.worker_log("pod-1")
        await worker.beat()
        work, lags = worker.work(), []
        for count in (1, 2, 3):
            for _ in range(count):
                await make.start(store.session_log())
            await make.take(worker, await anext(work))
            (raw,) = await store.reads.call("XINFO", "GROUPS", store.keys().base(0) + "rdy")
            lags.append(dict(zip(raw[::2], raw[1::2], strict=True))[b"lag"])
        await work.aclose()
        assert lags == [0, 1, 3]


async def test_the_audit_heals_a_lost_ready_entry(log_roles):
    lost, parked = await make.start(log_roles.log), await make.start(log_roles.log)
    lease = await make.take(log_roles.worker, parked)
    await log_roles.worker.park(lease, 4)
    for base in log_roles.store.keys().bases():
        await log_roles.store.writes.call("DEL", base + "rdy")
    assert await log_roles.control.sweep("team-a") == 1
    assert await make.first(log_roles.worker.work()) == lost


async def test_a_sweep_before_any_harness_ran_leaves_the_session_for_the_first_one(log_roles):
    """There is no consumer group yet: that is no error, and the entry is not made a second time."""
    sid = await make.start(log_roles.log)
    assert await log_roles.control.sweep("team-a") == 0
    assert await make.first(log_roles.worker.work()) == sid
    backlog = await log_roles.control.backlog("team-a")
    assert backlog.ready == 1


async def test_projections_are_announced_and_taken_once(log_roles):
    control = log_roles.control
    nudges = control.projection_nudges(["team-a", "team-b"])
    assert [await anext(nudges), await anext(nudges)] == ["team-a", "team-b"]
    sid = await make.start(log_roles.log)
    assert await asyncio.wait_for(anext(nudges), 60) == "team-a"
    assert await control.take_projections("team-a") == [sid]
    assert await control.take_projections("team-a") == []
    lease = await make.take(log_roles.worker, sid)
    assert await control.take_projections("team-a") == [sid]
    await log_roles.worker.append(lease, [make.result()])
    assert await control.take_projections("team-a") == []
    await log_roles.worker.append(lease, [], status={"turns": 1})
    assert await control.take_projections("team-a") == [sid]
    await log_roles.worker.park(lease, 5)
    assert await control.take_projections("team-a") == [sid]
    await control.set_mode("team-a", sid, "suspended", make.suspended())
    assert await control.take_projections("team-a") == [sid]
    await control.close("team-a", sid, make.deleted(), retain_s=0)
    assert await control.take_projections("team-a") == [sid]
    await nudges.aclose()


async def test_take_projections_keeps_to_its_limit(log_roles):
    sids = {await make.start(log_roles.log) for _ in range(30)}
    first = await log_roles.control.take_projections("team-a", 20)
    assert len(first) == 20
    assert set(first) | set(await log_roles.control.take_projections("team-a")) == sids


async def test_a_hand_record_reaches_the_worker(log_roles):
    sid = await make.start(log_roles.log)
    await make.take(log_roles.worker, sid)
    control = log_roles.control
    assert await log_roles.worker.get_hand(sid, "sandbox", 1) is None
    pending = replace(RECORD, session_id=sid)
    await control.put_hand("team-a", pending)
    assert await log_roles.worker.get_hand(sid, "sandbox", 1) == pending
    assert await control.get_hand("team-a", sid, "sandbox", 1) == pending
    assert await control.get_sandbox("team-a", "uid-1") == pending
    assert await log_roles.worker.beat() == {sid}
    assert await control.get_hand("team-a", sid, "sandbox", 2) is None
    assert await control.get_sandbox("team-b", "uid-1") is None


async def test_a_hand_record_does_not_go_back(log_roles):
    sid = await make.start(log_roles.log)
    control = log_roles.control
    ready = replace(RECORD, session_id=sid, state="Ready", owner=sid, owner_epoch=2)

    async def put(record: HandRecord) -> HandRecord | None:
        await control.put_hand("team-a", record)
        found = await control.get_hand("team-a", sid, "sandbox", 1)
        assert found == await control.get_sandbox("team-a", "uid-1")
        return found

    failed = replace(ready, state="Failed", owner_epoch=0)
    assert await put(failed) == failed
    assert await put(ready) == ready
    assert await put(failed) == ready
    assert await put(replace(ready, state="Pending", owner_epoch=9)) == ready
    assert await put(replace(ready, owner_epoch=1)) == ready
    newer = replace(ready, owner_epoch=3, owner="sesn_other")
    assert await put(newer) == newer
    lost = replace(ready, state="Lost", owner_epoch=0)
    assert await put(lost) == lost
    assert await put(newer) == lost


async def test_a_sandbox_without_a_session_has_a_record_too(log_roles):
    await log_roles.control.put_hand("team-a", RECORD)
    assert await log_roles.control.get_sandbox("team-a", "uid-1") == RECORD
    with pytest.raises(SessionNotFound):
        await log_roles.control.put_hand("team-a", replace(RECORD, session_id=make.new_sid()))


async def test_an_event_needs_an_id(log_roles):
    sid = await make.start(log_roles.log)
    with pytest.raises(UserError, match="needs an id"):
        await log_roles.control.set_mode(
            "team-a", sid, "suspended", NewEvent("session.suspended", {})
        )
