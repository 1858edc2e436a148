"""`spec.fork` from the object to the log, on a real store: made once, only at a position between turns."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from cowhand.desired import names
from cowhand.harness.decide import SendRequest, next_step
from cowhand.harness.fold import fold
from cowhand.harness.profiles.registry import load
from cowhand.kube import kinds
from cowhand.session import connect
from cowhand.session import events as ev
from cowhand.session.log import StoreConfig
from support.operator_rig import NS, Rig, session
from support.turns import violations, work

AS = kinds.AGENT_SESSION


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Any]:
    async with connect(StoreConfig(store_url)) as made:
        yield made


async def source(rig: Rig, store: Any) -> str:
    """A session after two turns: positions 1 to 14; answers its id."""
    made = await rig.kube.create(session("one", budget={"maxToolCalls": 9}, title="first"))
    await rig.settle()
    sid = names.session_id(made["metadata"]["uid"])
    await work(store, NS, sid, "one")
    log = store.session_log(NS)
    await log.emit_event(sid, ev.NewEvent(ev.USER_MESSAGE, {"content": "more"}, id="m2"))
    await work(store, NS, sid, "two")
    await rig.settle()
    return sid


def forked(
    name: str = "two", at: int | None = None, of: str = "one", **spec: Any
) -> dict[str, Any]:
    fork: dict[str, Any] = {"session": of} if at is None else {"session": of, "at": at}
    return session(name, **{"agent": None, "message": None, "fork": fork, **spec})


async def fork(rig: Rig, body: dict[str, Any]) -> str:
    made = await rig.kube.create(body)
    await rig.settle()
    return names.session_id(made["metadata"]["uid"])


async def test_a_fork_goes_on_where_its_source_was(store: Any) -> None:
    rig = Rig(real_store=store)
    first = await source(rig, store)
    log = store.session_log(NS)
    before, state = await log.get_events(first), await log.get_session(first)
    at = next(event.seq for event in before if event.type == ev.STATUS_IDLE)
    sid = await fork(rig, forked(at=at, message="another way", budget={"maxToolCalls": 3}))
    assert await rig.condition(AS, "two", "Ready") == ("True", "Accepted")
    events = await log.get_events(sid)
    assert [event.payload for event in events[1:at]] == [event.payload for event in before[1:at]]
    assert [event.type for event in events[at:]] == [ev.SESSION_FORKED, ev.USER_MESSAGE]
    created = events[0].data
    assert created["lineage"] == [{"session": first, "position": at}]
    assert (created["name"], created["budget"], "title" in created) == (
        "two", {"max_tool_calls": 3}, False,
    )  # fmt: skip
    assert created["agent"] == before[0].data["agent"]
    assert (await log.get_session(sid)).budget == {"max_tool_calls": 3}
    # Claude gets what it got before, and the new message; usage and turns count anew.
    step = next_step(fold(sid, events), profiles=load())
    assert isinstance(step, SendRequest)
    prompt = b"".join(one.raw() for one in fold(sid, events).prompt(step.horizon))
    assert b"another way" in prompt
    assert b"more" not in prompt
    await work(store, NS, sid, "three")
    await rig.settle()
    assert (await rig.get(AS, "two"))["status"]["turns"] == 1
    assert await violations(store, NS, sid) == []
    # The source was only read.
    assert (await log.get_events(first), await log.get_session(first)) == (before, state)


async def test_a_fork_is_made_once(store: Any) -> None:
    rig = Rig(real_store=store)
    await source(rig, store)
    sid = await fork(rig, forked(message="go"))
    events = await store.session_log(NS).get_events(sid)
    for same in (rig, Rig(real_store=store)):
        same.kube.restore(rig.kube.backup())
        await same.look(AS, "two")
    assert await store.session_log(NS).get_events(sid) == events
    # Deleted and applied again it adopts the fork that was made.
    await rig.kube.delete(AS, NS, "two")
    await rig.settle()
    await rig.kube.create(forked(message="go"))
    await rig.settle()
    assert await rig.condition(AS, "two", "Ready") == ("True", "AlreadyRan")
    assert (await rig.get(AS, "two"))["status"]["sessionID"] == sid


async def test_without_a_position_it_is_the_end_of_the_last_turn(store: Any) -> None:
    rig = Rig(real_store=store)
    first = await source(rig, store)
    log = store.session_log(NS)
    last = (await log.get_session(first)).next_seq - 1
    await log.emit_event(first, ev.NewEvent(ev.USER_MESSAGE, {"content": "x"}, id="m3"))
    await work(store, NS, first, "", idle=False)
    sid = await fork(rig, forked())
    (noted,) = await log.get_events(sid, types={ev.SESSION_FORKED})
    # The message that waited is part of it, the turn that it began is not; nor is the wake behind it.
    assert noted.data["position"] in (last + 1, last + 2)
    assert await rig.condition(AS, "two", "TurnComplete") == ("False", "Running")


async def test_a_position_inside_a_turn_or_beyond_the_end_is_refused_with_the_nearest(
    store: Any,
) -> None:
    rig = Rig(real_store=store)
    first = await source(rig, store)
    events = await store.session_log(NS).get_events(first)
    running = [event.seq for event in events if event.type == ev.STATUS_RUNNING]
    idle = [event.seq for event in events if event.type == ev.STATUS_IDLE]
    await fork(rig, forked(at=running[1] + 1))
    assert await rig.condition(AS, "two", "Stalled") == ("True", "InvalidFork")
    status = (await rig.get(AS, "two"))["status"]
    said = next(c["message"] for c in status["conditions"] if c["type"] == "Stalled")
    assert f"fork at {running[1] - 1} or {idle[1]}" in said
    sid = await fork(rig, forked("three", at=len(events) + 1))
    assert await rig.condition(AS, "three", "Stalled") == ("True", "InvalidFork")
    with pytest.raises(Exception, match="no session"):
        await store.session_log(NS).get_session(sid)
    # Control: the positions that the message names are taken.
    for number, at in enumerate((running[1] - 1, idle[1])):
        await fork(rig, forked(f"ok-{number}", at=at))
        assert await rig.condition(AS, f"ok-{number}", "Ready") == ("True", "Accepted")


async def test_a_source_that_is_not_there_is_waited_for(store: Any) -> None:
    rig = Rig(real_store=store)
    await fork(rig, forked())
    assert await rig.condition(AS, "two", "Ready") == ("False", "ForkSourceNotFound")
    await fork(rig, forked("three", of="sesn_" + "0" * 32))
    assert await rig.condition(AS, "three", "Ready") == ("False", "ForkSourceNotFound")
    await source(rig, store)
    await rig.look(AS, "two")
    assert await rig.condition(AS, "two", "Ready") == ("True", "Accepted")


async def test_a_session_of_another_namespace_cannot_be_forked(store: Any) -> None:
    """Not even by its id: the operator reads the fork's own namespace alone."""
    rig = Rig(real_store=store)
    first = await source(rig, store)
    body = forked(of=first)
    body["metadata"]["namespace"] = "other"
    rig.session_controller._observer._tenants = frozenset({NS, "other"})
    made = await rig.kube.create(body)
    await rig.session_controller.reconcile(("other", "two"))
    found = await rig.kube.get(AS, "other", "two")
    assert found is not None
    ready = next(c for c in found["status"]["conditions"] if c["type"] == "Ready")
    assert ready["reason"] == "ForkSourceNotFound"
    # Control: in its own namespace the id is enough, also after its object is gone.
    await rig.kube.delete(AS, NS, "one")
    await rig.settle()
    await fork(rig, forked(of=first))
    assert await rig.condition(AS, "two", "Ready") == ("True", "Accepted")
    assert made["metadata"]["namespace"] == "other"


async def test_a_fork_of_a_fork_knows_who_wrote_what(store: Any) -> None:
    rig = Rig(real_store=store)
    first = await source(rig, store)
    log = store.session_log(NS)
    at = next(e.seq for e in await log.get_events(first) if e.type == ev.STATUS_IDLE)
    second = await fork(rig, forked(at=at, message="go"))
    await work(store, NS, second, "two")
    last = (await log.get_session(second)).next_seq - 1
    third = await fork(rig, forked("three", of="two", message="and on"))
    assert (await log.get_events(third, 1, 1))[0].data["lineage"] == [
        {"session": first, "position": at},
        {"session": second, "position": last},
    ]
    await work(store, NS, third, "three")
    assert await violations(store, NS, third) == []
    early = await fork(rig, forked("four", of="two", at=at, message="and on"))
    assert (await log.get_events(early, 1, 1))[0].data["lineage"] == [
        {"session": first, "position": at}
    ]
