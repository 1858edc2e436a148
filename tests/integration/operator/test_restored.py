"""A restored log and a cluster of another age, on a real store: logs first or objects first, nothing runs twice."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from cowhand.desired import names
from cowhand.kube import kinds
from cowhand.session import connect
from cowhand.session import events as ev
from cowhand.session.events import Event, NewEvent
from cowhand.session.export import Export
from cowhand.session.log import Lease, StoreConfig
from support import sessions as make
from support.operator_rig import NS, Rig, session
from support.turns import backup, violations, work

AS = kinds.AGENT_SESSION


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Any]:
    async with connect(StoreConfig(store_url)) as made:
        yield made


async def started(rig: Rig, store: Any, **spec: Any) -> str:
    """A session after one turn, its status written; answers its id."""
    made = await rig.kube.create(session("one", **spec))
    await rig.settle()
    sid = names.session_id(made["metadata"]["uid"])
    await work(store, NS, sid, "one")
    rig.later(seconds=60)
    await rig.look(AS, "one")
    return sid


async def put_back(store: Any, export: Export) -> str:
    async def events() -> AsyncIterator[Event]:
        for event in export.events:
            yield event

    done = await store.session_log(NS).restore_session(export.header, events())
    return str(done.outcome)


async def lose_everything(store: Any) -> None:
    """A store with nothing of the tenant, as after a loss that somebody has accepted."""
    _, keys = await store.reads.call("SCAN", 0, "MATCH", f"cowhand:{NS}:*", "COUNT", 100_000)
    await store.reads.call("DEL", *keys)


async def types(store: Any, sid: str) -> list[str]:
    return [event.type for event in await store.session_log(NS).get_events(sid)]


async def sids(store: Any) -> list[str]:
    return [sid async for sid in store.session_log(NS).session_ids()]


def other(rig: Rig, store: Any, etcd: Any) -> Rig:
    """An operator that starts on a restored cluster."""
    made = Rig(real_store=store)
    made.kube.restore(etcd)
    made.now = rig.now
    return made


async def round_of(rig: Rig) -> None:
    """Everything that the operator does by itself: resync, projection, orphans."""
    for _ in range(2):
        await rig.operator.resync(spread_s=0.0)
        await rig.settle()
        await rig.orphans.sweep()
        rig.later(seconds=3600)


async def test_objects_first_they_wait_for_their_logs(store: Any) -> None:
    rig = Rig(real_store=store)
    sid = await started(rig, store)
    kept, etcd = await backup(store, NS, sid), rig.kube.backup()
    await lose_everything(store)
    rig = other(rig, store, etcd)
    await round_of(rig)
    assert await rig.condition(AS, "one", "Stalled") == ("True", "SessionLost")
    assert await sids(store) == []
    assert await put_back(store, kept) == "restored"
    await rig.settle()
    assert await rig.condition(AS, "one", "Ready") == ("True", "Accepted")
    assert await rig.condition(AS, "one", "Stalled") is None
    assert tuple(await store.session_log(NS).get_events(sid)) == kept.events


async def test_logs_first_then_objects_with_other_uids_adopt_them(store: Any) -> None:
    """GitOps makes every object again: none of them is run again."""
    rig = Rig(real_store=store)
    sid = await started(rig, store)
    kept = await backup(store, NS, sid)
    await lose_everything(store)
    rig = Rig(real_store=store)
    assert await put_back(store, kept) == "restored"
    await round_of(rig)
    assert await sids(store) == [sid]
    assert "session.deleted" not in await types(store, sid)
    made = await rig.kube.create(session("one"))
    await rig.settle()
    assert names.session_id(made["metadata"]["uid"]) != sid
    assert await rig.condition(AS, "one", "Ready") == ("True", "AlreadyRan")
    assert await sids(store) == [sid]
    assert (await types(store, sid)).count(ev.USER_MESSAGE) == 1


async def test_control_a_new_object_without_its_log_is_a_new_run(store: Any) -> None:
    """Why the logs come first where objects are made again."""
    rig = Rig(real_store=store)
    sid = await started(rig, store)
    await lose_everything(store)
    rig = Rig(real_store=store)
    await rig.kube.create(session("one"))
    await rig.settle()
    (new,) = await sids(store)
    assert new != sid


async def test_a_log_older_than_its_object_is_stopped_and_its_end_can_come_back_in_two_steps(
    store: Any,
) -> None:
    rig = Rig(real_store=store)
    sid = await started(rig, store)
    old = await backup(store, NS, sid)
    log = store.session_log(NS)
    await log.emit_event(sid, NewEvent(ev.USER_MESSAGE, {"content": "more"}, id="m2"))
    await work(store, NS, sid, "two")
    rig.later(seconds=60)
    await rig.look(AS, "one")
    new, etcd = await backup(store, NS, sid), rig.kube.backup()
    await lose_everything(store)
    await put_back(store, old)
    rig = other(rig, store, etcd)
    await round_of(rig)
    assert await rig.condition(AS, "one", "Stalled") == ("True", "LogRolledBack")
    assert (await log.get_session(sid)).mode == "suspended"
    # The newer backup replaces the note, and the session goes on by itself.
    assert await put_back(store, new) == "extended"
    await rig.settle()
    await rig.look(AS, "one")
    assert await rig.condition(AS, "one", "Ready") == ("True", "Accepted")
    assert tuple(await log.get_events(sid)) == new.events
    assert await violations(store, NS, sid) == []


async def test_a_loss_that_was_accepted_is_not_taken_back_by_a_backup(store: Any) -> None:
    rig = Rig(real_store=store)
    sid = await started(rig, store)
    old = await backup(store, NS, sid)
    await store.session_log(NS).emit_event(
        sid, NewEvent(ev.USER_MESSAGE, {"content": "more"}, id="m2")
    )
    await work(store, NS, sid, "two")
    rig.later(seconds=60)
    await rig.look(AS, "one")
    new = await backup(store, NS, sid)
    await lose_everything(store)
    await put_back(store, old)
    await rig.look(AS, "one")
    at = old.header.last_seq
    assert await rig.condition(AS, "one", "Ready") == ("False", "LogRolledBack")
    await rig.kube.apply(session("one", acceptLogPosition=at), manager="kubectl")
    await rig.settle()
    assert await rig.condition(AS, "one", "Ready") == ("True", "Accepted")
    with pytest.raises(Exception, match=f"another event {at + 1} than the backup"):
        await put_back(store, new)


async def test_a_deleted_object_does_not_let_the_restored_session_run_again(store: Any) -> None:
    """The log is newer than the cluster: in mid-turn when it was backed up, and nobody has its object."""
    rig = Rig(real_store=store)
    etcd = rig.kube.backup()
    sid = await started(rig, store)
    log = store.session_log(NS)
    await log.emit_event(sid, NewEvent(ev.USER_MESSAGE, {"content": "more"}, id="m2"))
    await work(store, NS, sid, "", idle=False)
    kept = await backup(store, NS, sid)
    await lose_everything(store)
    await put_back(store, kept)
    rig = other(rig, store, etcd)
    await round_of(rig)
    state = await log.get_session(sid)
    assert (state.state, state.mode) == ("rescheduling", "suspended")
    assert tuple(await log.get_events(sid)) == kept.events, "neither ended nor touched"
    # Its object is made again: it goes on where it was, and its first message is not sent a second time.
    await rig.kube.create(session("one"))
    await rig.settle()
    state = await log.get_session(sid)
    assert state.mode == "running"
    assert (await types(store, sid)).count(ev.USER_MESSAGE) == 2
    worker = store.worker_log("pod", NS)
    await worker.beat()
    assert isinstance(await make.take(worker, sid), Lease)


async def test_an_idle_session_without_its_object_is_suspended_and_can_still_be_extended(
    store: Any,
) -> None:
    rig = Rig(real_store=store)
    etcd = rig.kube.backup()
    sid = await started(rig, store)
    old = await backup(store, NS, sid)
    log = store.session_log(NS)
    await log.emit_event(sid, NewEvent(ev.USER_MESSAGE, {"content": "more"}, id="m2"))
    await work(store, NS, sid, "two")
    new = await backup(store, NS, sid)
    await lose_everything(store)
    await put_back(store, old)
    rig = other(rig, store, etcd)
    await round_of(rig)
    assert (await types(store, sid))[-1] == ev.SESSION_SUSPENDED
    assert "session.deleted" not in await types(store, sid)
    assert await put_back(store, new) == "extended"
    assert tuple(await log.get_events(sid)) == new.events
