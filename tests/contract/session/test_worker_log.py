"""`WorkerLog` on a real store: work, leases, appends, parking, and every error."""

from __future__ import annotations

import asyncio

import pytest
from redis import exceptions as redis_errors

from cowhand.errors import Fenced, SessionClosed, StoreUnavailable, UserError
from cowhand.session import events as ev
from cowhand.session import link as link_module
from cowhand.session.events import INLINE_LIMIT
from cowhand.session.log import Held, Lease, Parked
from support import sessions as make


@pytest.fixture
async def other(log_roles):
    worker = log_roles.store.worker_log("pod-2")
    await worker.beat()
    return worker


async def die(roles, worker) -> None:
    """The worker's deadline passes."""
    for base in roles.store.keys().bases():
        await roles.store.writes.call("ZADD", base + "w", 1, worker.worker_id)


async def test_a_worker_id_is_the_pod_and_an_incarnation(log_roles):
    again = log_roles.store.worker_log("pod-1")
    assert again.worker_id != log_roles.worker.worker_id
    assert again.worker_id.split(".")[0] == "pod-1"


async def test_work_nominates_what_comes_while_it_waits(log_roles):
    work = log_roles.worker.work()
    waiting = asyncio.create_task(anext(work))
    sid = await make.start(log_roles.log)
    assert await asyncio.wait_for(waiting, 60) == sid
    await work.aclose()


async def test_each_session_goes_to_one_of_many_readers(log_roles, other):
    got: list[str] = []
    complete = asyncio.Event()

    async def read(worker):
        async for sid in worker.work():
            got.append(sid)
            await worker.claim(sid)
            if len(got) >= 40:
                complete.set()

    tasks = [asyncio.create_task(read(w)) for w in (log_roles.worker, other)]
    sids = {await make.start(log_roles.log) for _ in range(40)}
    await asyncio.wait_for(complete.wait(), 20)
    for task in tasks:
        task.cancel()
    assert set(got) == sids
    assert len(got) == 40


async def test_an_entry_whose_reader_died_is_read_by_another(log_roles, other, monkeypatch):
    sid = await make.start(log_roles.log)
    assert await make.first(log_roles.worker.work()) == sid
    monkeypatch.setattr("cowhand.session.worker.ORPHAN_MS", 0)
    assert await make.first(other.work()) == sid
    assert (await make.take(other, sid)).next_seq == 4
    assert (await log_roles.control.backlog("team-a")).ready == 0


async def test_claim_writes_a_wake_and_answers_where_to_go_on(log_roles):
    sid = await make.start(log_roles.log)
    lease = await make.take(log_roles.worker, sid)
    assert lease.value.split(":")[:2] == [str(lease.epoch), log_roles.worker.worker_id]
    assert lease.next_seq == 4
    wake = (await log_roles.log.get_events(sid, 3))[0]
    assert (wake.type, wake.lease, wake.payload, wake.data) == (
        ev.SESSION_WAKE,
        lease.value,
        b"",
        {},
    )
    state = await log_roles.log.get_session(sid)
    assert (state.state, state.lease, state.epoch) == ("running", lease.value, lease.epoch)


async def test_reasons_why_a_claim_is_refused(log_roles, other):
    sid = await make.start(log_roles.log)
    assert await log_roles.store.worker_log("new").claim(sid) == Held("DEADWORKER")
    assert await other.claim(make.new_sid()) == Held("NOSESSION")
    lease = await make.take(log_roles.worker, sid)
    assert await other.claim(sid) == Held("HELD", lease.value)
    assert await log_roles.worker.claim(sid) == Held("HELD", lease.value)
    await log_roles.control.set_mode("team-a", sid, "suspended", make.suspended())
    assert await other.claim(sid) == Held("SUSPENDED")
    await log_roles.control.close("team-a", sid, make.deleted(), retain_s=60)
    assert await other.claim(sid) == Held("CLOSED")


async def test_epochs_grow_even_if_the_clock_goes_back(log_roles, other):
    sid = await make.start(log_roles.log)
    keys = log_roles.store.keys().session(sid)
    await log_roles.store.writes.call("HSET", keys.meta, "epoch", 9_000_000_000_000)
    assert (await make.take(log_roles.worker, sid)).epoch == 9_000_000_000_001
    await die(log_roles, log_roles.worker)
    assert (await make.take(other, sid)).epoch == 9_000_000_000_002


async def test_append_answers_positions_and_keeps_bytes_and_status(log_roles):
    sid = await make.start(log_roles.log)
    lease = await make.take(log_roles.worker, sid)
    status = {"turns": 1, "hands": [], "text": "grüß"}
    assert await log_roles.worker.append(lease, [make.result("a"), make.result("b")]) == 4
    assert await log_roles.worker.append(lease, [make.result("c")], status=status) == 6
    assert await log_roles.worker.append(lease, [], status=status | {"turns": 2}) == 7
    log = await log_roles.log.get_events(sid, 4)
    assert [(e.seq, e.id) for e in log] == [
        (4, f"1.0@{lease.value}"),
        (5, f"1.1@{lease.value}"),
        (6, f"2.0@{lease.value}"),
    ]
    assert [e.payload for e in log] == [make.result(x).payload() for x in "abc"]
    assert (await log_roles.log.get_session(sid)).status == status | {"turns": 2}


async def test_append_refuses_what_a_worker_may_not_write(log_roles):
    lease = await make.take(log_roles.worker, await make.start(log_roles.log))
    with pytest.raises(ValueError, match="not an event that a worker appends"):
        await log_roles.worker.append(lease, [make.message("x")])
    with pytest.raises(ValueError, match="nothing"):
        await log_roles.worker.append(lease, [])
    with pytest.raises(UserError, match="split it"):
        await log_roles.worker.append(lease, [make.result("x" * INLINE_LIMIT)])
    assert await log_roles.worker.append(lease, [make.result()]) == 4


async def test_appends_at_once_all_arrive_once_and_in_order(log_roles):
    leases = [await make.take(log_roles.worker, await make.start(log_roles.log)) for _ in range(20)]
    await asyncio.gather(
        *(
            log_roles.worker.append(lease, [make.result(str(n))])
            for n in range(10)
            for lease in leases
        )
    )
    for lease in leases:
        log = await log_roles.log.get_events(lease.session_id, 4)
        assert [e.data["content"] for e in log] == [str(n) for n in range(10)]


async def test_an_old_lease_writes_nothing(log_roles, other):
    sid = await make.start(log_roles.log)
    old = await make.take(log_roles.worker, sid)
    await die(log_roles, log_roles.worker)
    new = await make.take(other, sid)
    await log_roles.worker.beat()  # The old holder is back.
    for attempt in (
        log_roles.worker.append(old, [make.result()]),
        log_roles.worker.touch(old),
        log_roles.worker.park(old, 5),
        log_roles.worker.handover(old),
    ):
        with pytest.raises(Fenced):
            await attempt
    assert (await log_roles.log.get_session(sid)).lease == new.value
    assert (await log_roles.log.get_session(sid)).next_seq == 5


@pytest.mark.parametrize("retain_s", [0, 60])
async def test_a_deleted_session_fences_its_holder(log_roles, retain_s):
    sid = await make.start(log_roles.log)
    lease = await make.take(log_roles.worker, sid)
    await log_roles.control.close("team-a", sid, make.deleted(), retain_s=retain_s)
    assert sid in await log_roles.worker.beat()
    with pytest.raises(Fenced):
        await log_roles.worker.append(lease, [make.result()])


async def test_park_only_if_everything_was_seen(log_roles):
    sid = await make.start(log_roles.log)
    lease = await make.take(log_roles.worker, sid)
    await log_roles.log.emit_event(sid, make.message("m1"))
    assert await log_roles.worker.park(lease, 4) == Parked(parked=False, next_seq=5)
    assert await log_roles.worker.append(lease, [make.result()]) == 5
    assert await log_roles.worker.park(lease, 6) == Parked(parked=True, next_seq=6)
    assert await log_roles.worker.park(lease, 6) == Parked(parked=True, next_seq=6)
    state = await log_roles.log.get_session(sid)
    assert (state.state, state.lease) == ("idle", "")
    with pytest.raises(Fenced):
        await log_roles.worker.append(lease, [make.result()])
    await log_roles.log.emit_event(sid, make.message("m2"))
    work = log_roles.worker.work()
    assert await anext(work) == sid
    await work.aclose()


async def test_a_terminated_session_takes_no_input(log_roles):
    sid = await make.start(log_roles.log)
    lease = await make.take(log_roles.worker, sid)
    await log_roles.worker.park(lease, 4, state="terminated")
    with pytest.raises(SessionClosed):
        await log_roles.log.emit_event(sid, make.message("m1"))
    assert await log_roles.worker.claim(sid) == Held("CLOSED")


async def test_a_session_parked_for_rescheduling_comes_back(log_roles):
    sid = await make.start(log_roles.log)
    lease = await make.take(log_roles.worker, sid)
    await log_roles.worker.park(lease, 4, state="rescheduling")
    assert await log_roles.control.sweep("team-a") == 1
    assert (await make.take(log_roles.worker, sid)).next_seq == 5


async def server_ms(roles) -> int:
    seconds, micros = await roles.store.reads.call("TIME")
    return int(seconds) * 1000 + int(micros) // 1000


async def timers(roles) -> dict[str, int]:
    found: dict[str, int] = {}
    for base in roles.store.keys().bases():
        flat = await roles.store.reads.call("ZRANGE", base + "tmr", 0, -1, "WITHSCORES")
        found |= {sid.decode(): int(at) for sid, at in zip(flat[::2], flat[1::2], strict=True)}
    return found


async def reschedule(roles, wake_at: int) -> str:
    sid = await make.start(roles.log)
    lease = await make.take(roles.worker, sid)
    parked = await roles.worker.park(lease, 4, state="rescheduling", wake_at_ms=wake_at)
    assert parked == Parked(True, 4)
    return sid


async def test_a_timer_that_is_up_makes_the_session_ready_and_no_other(log_roles):
    now = await server_ms(log_roles)
    due = await reschedule(log_roles, now - 1)
    later = await reschedule(log_roles, now + 600_000)
    assert await timers(log_roles) == {due: now - 1, later: now + 600_000}
    assert await log_roles.worker.sweep() == 1
    assert await timers(log_roles) == {later: now + 600_000}
    work = log_roles.worker.work()
    async with asyncio.timeout(60):  # entries of the claims before may come first
        while await anext(work) != due:
            pass
    await work.aclose()
    # Neither the operator's sweep with its audit nor another of a worker takes the other one before its time.
    assert await log_roles.control.sweep("team-a") == 0
    assert await log_roles.worker.sweep() == 0


async def test_the_audit_finds_a_session_whose_timer_was_lost(log_roles):
    sid = await reschedule(log_roles, await server_ms(log_roles) + 600_000)
    base = log_roles.store.keys().base_of(sid)
    await log_roles.store.writes.call("ZREM", base + "tmr", sid)
    assert await log_roles.control.sweep("team-a") == 1


async def test_input_wakes_a_session_before_its_timer_and_clears_it(log_roles):
    sid = await reschedule(log_roles, await server_ms(log_roles) + 600_000)
    await log_roles.log.emit_event(sid, make.message("m1"))
    work = log_roles.worker.work()
    assert await asyncio.wait_for(anext(work), 60) == sid
    await work.aclose()
    lease = await make.take(log_roles.worker, sid)
    assert await timers(log_roles) == {}
    assert lease.next_seq == 6


async def test_a_timer_does_not_wake_a_suspended_held_or_deleted_session(log_roles):
    past = await server_ms(log_roles) - 1
    suspended, held, deleted = [await reschedule(log_roles, past) for _ in range(3)]
    await log_roles.control.set_mode("team-a", suspended, "suspended", make.suspended())
    await make.take(log_roles.worker, held)
    await log_roles.control.close("team-a", deleted, make.deleted(), retain_s=60)
    assert await timers(log_roles) == {suspended: past}
    keys = log_roles.store.keys()
    for sid in (held, deleted):  # entries that came back with an old copy of the store
        await log_roles.store.writes.call("ZADD", keys.base_of(sid) + "tmr", past, sid)
    assert await log_roles.worker.sweep() == 0
    assert await timers(log_roles) == {}
    await log_roles.control.set_mode("team-a", suspended, "running", make.resumed())
    assert (await make.take(log_roles.worker, suspended)).next_seq == 7


async def test_a_herd_of_timers_comes_in_portions(log_roles, monkeypatch):
    monkeypatch.setattr("cowhand.session.upkeep.DUE_AT_A_TIME", 1)
    past = await server_ms(log_roles) - 10
    sid = make.new_sid()
    base = log_roles.store.keys().base_of(sid)
    same = [sid]
    while len(same) < 3:
        one = make.new_sid()
        if log_roles.store.keys().base_of(one) == base:
            same.append(one)
    for number, one in enumerate(same):
        await make.start(log_roles.log, sid=one)
        lease = await make.take(log_roles.worker, one)
        await log_roles.worker.park(lease, 4, state="rescheduling", wake_at_ms=past + number)
    for left in (same[1:], same[2:], []):
        assert await log_roles.worker.sweep() == 1
        assert list(await timers(log_roles)) == left, "the earliest first"


async def test_handover_gives_the_session_to_another_worker_at_once(log_roles, other):
    sid = await make.start(log_roles.log)
    lease = await make.take(log_roles.worker, sid)
    await log_roles.worker.handover(lease)
    await log_roles.worker.handover(lease)
    assert (await log_roles.log.get_session(sid)).state == "rescheduling"
    work = other.work()
    assert await asyncio.wait_for(anext(work), 60) == sid
    await work.aclose()
    await make.take(other, sid)


async def test_input_for_a_holder_is_announced_and_kept_for_its_next_beat(log_roles):
    sid = await make.start(log_roles.log)
    await make.take(log_roles.worker, sid)
    nudges = log_roles.worker.nudges()
    waiting = asyncio.create_task(anext(nudges))
    await asyncio.sleep(0)  # The task has asked for its channels; the server confirms them:
    await asyncio.gather(*(e.wait() for e in log_roles.store.hub._confirmed.values()))
    await log_roles.log.emit_event(sid, make.message("m1"))
    assert await asyncio.wait_for(waiting, 60) == sid
    await nudges.aclose()
    await log_roles.worker.beat()
    await log_roles.log.emit_event(sid, make.message("m2"))
    assert await log_roles.worker.beat() == {sid}
    assert await log_roles.worker.beat() == set()


async def test_sweep_takes_sessions_from_the_dead_and_the_stuck_only(log_roles, other):
    live, stuck, dead = [await make.start(log_roles.log) for _ in range(3)]
    await make.take(other, live)
    lease = await make.take(other, stuck)
    await make.take(log_roles.worker, dead)
    assert await other.sweep() == 0
    await die(log_roles, log_roles.worker)
    base = log_roles.store.keys().base_of(stuck)
    await log_roles.store.writes.call("ZADD", base + "own", 1, stuck)
    assert await other.sweep() == 2
    assert await other.sweep() == 0
    assert (await other.claim(live)).why == "HELD"
    await make.take(other, dead)
    # Touching shows progress again.
    await other.touch(lease)
    assert (await other.claim(stuck)).why == "HELD"


async def test_retiring_gives_back_what_was_nominated_and_frees_the_rest(log_roles, other):
    held, nominated = await make.start(log_roles.log), ""
    work = log_roles.worker.work()
    assert await anext(work) == held
    await make.take(log_roles.worker, held)
    nominated = await make.start(log_roles.log)
    assert await anext(work) == nominated
    await work.aclose()
    await log_roles.worker.retire()
    got = other.work()
    assert await asyncio.wait_for(anext(got), 60) == nominated
    await got.aclose()
    assert (await make.take(other, held)).next_seq == 5


# Lost requests and replies


class Cut:
    """Breaks the connection of the next scripts: before they are sent, or after they have run."""

    def __init__(self, link, monkeypatch):
        self.mode, self.times, self.run = "", 0, link.run
        monkeypatch.setattr(link, "run", self)
        self.link = link

    async def __call__(self, commands, timeout=5.0):
        if not self.times:
            return await self.run(commands, timeout)
        self.times -= 1
        if self.mode == "reply":
            await self.run(commands, timeout)
        await self.link.close()
        raise redis_errors.ConnectionError("cut")


@pytest.fixture
def cut(log_roles, monkeypatch):
    return Cut(log_roles.store.writes.link, monkeypatch)


@pytest.mark.parametrize("mode", ["request", "reply"])
async def test_every_write_survives_a_broken_connection_exactly_once(log_roles, cut, mode):
    cut.mode = mode
    sid = make.new_sid()

    async def broken(work):
        cut.times = 2
        return await work

    log, worker, control = log_roles.log, log_roles.worker, log_roles.control
    await broken(log.create_session(make.meta(sid), [make.created(), make.message()]))
    assert await broken(log.emit_event(sid, make.message("m1"))) == 3
    lease = await broken(worker.claim(sid))
    assert await broken(worker.append(lease, [make.result()])) == 5
    assert await broken(worker.append(lease, [make.result()])) == 6
    assert await broken(control.set_mode("team-a", sid, "suspended", make.suspended())) == 7
    assert await broken(control.set_mode("team-a", sid, "running", make.resumed())) == 8
    assert await broken(worker.park(lease, 9)) == Parked(parked=True, next_seq=9)
    lease = await broken(worker.claim(sid))
    assert await broken(worker.beat()) == {sid}, "after a reconnect everything held is looked at"
    await broken(worker.handover(lease))
    await broken(control.close("team-a", sid, make.deleted(), retain_s=60))
    assert [e.seq for e in await log.get_events(sid)] == list(range(1, 11))


@pytest.mark.parametrize("mode", ["request", "reply"])
async def test_an_append_that_failed_may_be_repeated(log_roles, cut, monkeypatch, mode):
    sid = await make.start(log_roles.log)
    lease = await make.take(log_roles.worker, sid)
    monkeypatch.setattr(link_module, "RETRY_SECONDS", 0.0)
    cut.mode, cut.times = mode, 1
    with pytest.raises(StoreUnavailable):
        await log_roles.worker.append(lease, [make.result("a")])
    assert await log_roles.worker.append(lease, [make.result("a")]) == 4
    cut.times = 1
    with pytest.raises(StoreUnavailable):
        await log_roles.worker.append(lease, [make.result("b")])
    # Something else instead: the doubtful one comes first, because it may already be there.
    assert await log_roles.worker.append(lease, [make.result("c")]) == 6
    log = await log_roles.log.get_events(sid, 4)
    assert [e.data["content"] for e in log] == ["a", "b", "c"]


@pytest.mark.parametrize("mode", ["request", "reply"])
async def test_a_claim_in_doubt_is_nominated_again(log_roles, cut, monkeypatch, mode):
    sid = await make.start(log_roles.log)
    work = log_roles.worker.work()
    assert await anext(work) == sid
    with monkeypatch.context() as short:
        short.setattr(link_module, "RETRY_SECONDS", 0.0)
        cut.mode, cut.times = mode, 1
        with pytest.raises(StoreUnavailable):
            await log_roles.worker.claim(sid)
    assert await asyncio.wait_for(anext(work), 60) == sid
    await work.aclose()
    lease = await make.take(log_roles.worker, sid)
    assert lease.next_seq == 4, "there is one wake, not two"


async def test_nominating_a_claim_in_doubt_lets_others_run(log_roles, monkeypatch):
    """A reader that asks for more work before its claim has run must not keep the event loop for itself."""
    sid = await make.start(log_roles.log)
    worker = log_roles.worker

    async def unreachable(*_args):
        raise StoreUnavailable("for a test")

    with monkeypatch.context() as patch:
        patch.setattr(log_roles.store, "script", unreachable)
        with pytest.raises(StoreUnavailable):
            await worker.claim(sid)
    work = worker.work()
    assert await asyncio.wait_for(anext(work), 60) == sid
    turns = []
    asyncio.get_running_loop().call_soon(turns.append, "others")
    assert await anext(work) == sid
    assert turns, "nominated without a wait: a loop over this would never let a claim run"
    assert isinstance(await worker.claim(sid), Lease)
    await work.aclose()


async def test_a_cancelled_append_is_not_half_done(log_roles):
    sid = await make.start(log_roles.log)
    lease = await make.take(log_roles.worker, sid)
    for number in range(30):
        task = asyncio.create_task(log_roles.worker.append(lease, [make.result(f"x{number}")]))
        for _ in range(number % 6):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await log_roles.worker.append(lease, [make.result("end")])
    log = await log_roles.log.get_events(sid, 4)
    contents = [e.data["content"] for e in log]
    assert contents[-1] == "end"
    assert len(set(contents)) == len(contents)


async def test_a_store_that_lost_our_events_takes_the_lease(log_roles, other):
    """A failover to a replica that lacked the tail: what the worker remembers is not the log any more."""
    sid = await make.start(log_roles.log)
    lease = await make.take(log_roles.worker, sid)
    await log_roles.worker.append(lease, [make.result("kept")])
    keys = log_roles.store.keys().session(sid)
    before = await log_roles.store.reads.call("HGETALL", keys.meta)
    await log_roles.worker.append(lease, [make.result("lost")])
    await log_roles.store.writes.call("HSET", keys.meta, *before)
    await log_roles.store.writes.call("XTRIM", keys.log, "MAXLEN", 0)
    with pytest.raises(Fenced, match="failover"):
        await log_roles.worker.append(lease, [make.result("next")])
    work = other.work()
    assert await asyncio.wait_for(anext(work), 60) == sid
    await work.aclose()


async def test_profile_dev_has_no_barrier(log_roles):
    lease = await make.take(log_roles.worker, await make.start(log_roles.log))
    await log_roles.worker.append(lease, [make.result()])
    await log_roles.worker.barrier()
    await log_roles.worker.barrier(lease)
