"""Store and cluster of different ages: what was lost is noticed, nothing runs on silently, no sweep ends anything."""

from __future__ import annotations

from typing import Any

import pytest

from cowhand.desired import names
from cowhand.kube import kinds
from support.operator_rig import NS, Rig, session

AS = kinds.AGENT_SESSION
LOST = ("False", "LogRolledBack")


@pytest.fixture
def rig() -> Rig:
    return Rig()


async def worked(rig: Rig, **spec: Any) -> str:
    """A session after a turn, its status written; answers its id."""
    made = await rig.kube.create(session("one", **spec))
    await rig.settle()
    sid = names.session_id(made["metadata"]["uid"])
    for _ in range(3):
        rig.log.run(NS, sid)
        rig.log.finish(NS, sid, usage={"input_tokens": 3, "output_tokens": 5})
    await rig.settle()
    rig.later(seconds=60)
    await rig.look(AS, "one")
    return sid


async def position(rig: Rig) -> int:
    found: int = (await rig.get(AS, "one"))["status"]["lastSeq"]
    return found


def other(rig: Rig, log: Any = None) -> Rig:
    """Another operator process on the same cluster and store."""
    made = Rig()
    made.kube.restore(rig.kube.backup())
    made.log._sessions = (log or rig.log)._sessions
    made.log._tombs = (log or rig.log)._tombs
    made.now = rig.now
    return made


@pytest.mark.parametrize("restarted", [True, False])
async def test_a_store_older_than_the_status_stops_the_session(rig: Rig, restarted: bool) -> None:
    sid = await worked(rig)
    seen = await position(rig)
    rig.log.roll_back(NS, sid, 4)
    rig = other(rig) if restarted else rig
    await rig.look(AS, "one")
    assert await rig.condition(AS, "one", "Ready") == LOST
    assert await rig.condition(AS, "one", "Stalled") == ("True", "LogRolledBack")
    assert await rig.condition(AS, "one", "Reconciling") is None
    message = (await rig.get(AS, "one"))["status"]["conditions"][0]["message"]
    assert "up to position 4" in message
    assert f"{seen} was seen" in message
    state = rig.log.session(NS, sid)
    assert (state.mode, state.regressed) == ("suspended", (seen, 4))
    assert rig.log.types(NS, sid)[-1] == "log.regressed"
    # What was seen is kept, and looking again changes nothing.
    assert await position(rig) == seen
    before = rig.log.types(NS, sid)
    for again in (rig, other(rig)):
        await again.look(AS, "one")
        assert await again.condition(AS, "one", "Ready") == LOST
    assert rig.log.types(NS, sid) == before


async def test_a_loss_that_no_status_has_is_noticed_by_the_operator_that_saw_it(rig: Rig) -> None:
    sid = await worked(rig)
    rig.log.write(NS, sid, "tool.started", {})
    await rig.look(AS, "one")
    written = await position(rig)
    for _ in range(4):
        rig.log.write(NS, sid, "tool.started", {})
    await rig.look(AS, "one")
    assert await position(rig) == written, "counters are written later"
    rig.log.roll_back(NS, sid, written)
    await rig.look(AS, "one")
    assert await rig.condition(AS, "one", "Ready") == LOST


async def test_control_a_log_that_is_whole_or_longer_runs_on(rig: Rig) -> None:
    sid = await worked(rig)
    rig.log.run(NS, sid)
    for same in (rig, other(rig)):
        await same.look(AS, "one")
        assert await same.condition(AS, "one", "Ready") == ("True", "Accepted")
    assert "log.regressed" not in rig.log.types(NS, sid)


async def test_sandboxes_of_a_log_that_lost_its_end_stay(rig: Rig) -> None:
    sid = await worked(rig)
    rig.log.hand(NS, sid, "sandbox", 1, "Pending")
    await rig.settle()
    assert len(rig.kube.all(kinds.SANDBOX)) == 1
    state = rig.log.session(NS, sid)
    rig.log.roll_back(NS, sid, 4)
    state.status = {**state.status, "hands": []}
    await rig.look(AS, "one")
    assert await rig.condition(AS, "one", "Ready") == LOST
    assert len(rig.kube.all(kinds.SANDBOX)) == 1


async def accept(rig: Rig, at: int) -> None:
    await rig.kube.apply(session("one", acceptLogPosition=at), manager="kubectl")
    await rig.settle()


async def test_only_the_right_position_accepts_the_loss(rig: Rig) -> None:
    sid = await worked(rig)
    rig.log.roll_back(NS, sid, 4)
    await rig.look(AS, "one")
    await accept(rig, 3)
    assert await rig.condition(AS, "one", "Ready") == LOST
    await accept(rig, 4)
    assert await rig.condition(AS, "one", "Ready") == ("True", "Accepted")
    assert await rig.condition(AS, "one", "Stalled") is None
    assert rig.log.types(NS, sid)[4:] == ["log.regressed", "session.resumed"]
    assert await position(rig) == len(rig.log.types(NS, sid))
    # A later loss is another one.
    rig.log.run(NS, sid)
    rig.log.finish(NS, sid)
    for _ in range(8):
        rig.log.write(NS, sid, "tool.started", {})
    rig.later(seconds=60)
    await rig.look(AS, "one")
    rig.log.roll_back(NS, sid, 7)
    await rig.look(AS, "one")
    assert await rig.condition(AS, "one", "Ready") == LOST


async def test_messages_of_the_spec_that_were_lost_are_sent_again_after_acceptance(
    rig: Rig,
) -> None:
    first, second = {"id": "a", "content": "x"}, {"id": "b", "content": "y"}
    made = await rig.kube.create(session("one", message=None, messages=[first]))
    await rig.settle()
    sid = names.session_id(made["metadata"]["uid"])
    rig.log.run(NS, sid)
    rig.log.finish(NS, sid)
    body = session("one", message=None, messages=[first, second])
    await rig.kube.apply(body, manager="kubectl")
    await rig.settle()
    assert rig.log.ids(NS, sid)[-1] == "msg:b"
    rig.log.roll_back(NS, sid, 3)
    await rig.look(AS, "one")
    assert "msg:b" not in rig.log.ids(NS, sid)
    body["spec"]["acceptLogPosition"] = 3
    await rig.kube.apply(body, manager="kubectl")
    await rig.settle()
    assert rig.log.ids(NS, sid).count("msg:b") == 1
    assert rig.log.types(NS, sid).count("user.message") == 2


async def test_a_store_without_the_session_is_noticed_and_nothing_runs_again(rig: Rig) -> None:
    sid = await worked(rig)
    rig.log.lose(NS, sid)
    rig.log._tombs.clear()
    rig = other(rig)
    await rig.operator.resync(spread_s=0.0)
    await rig.settle()
    assert await rig.condition(AS, "one", "Stalled") == ("True", "SessionLost")
    assert "cowhand restore" in (await rig.get(AS, "one"))["status"]["conditions"][0]["message"]
    assert len(rig.log) == 0


async def test_a_cluster_older_than_the_session_suspends_it_and_ends_nothing(rig: Rig) -> None:
    await rig.kube.create(session("zero", message="other"))
    await rig.settle()
    etcd = rig.kube.backup()
    sid = await worked(rig)
    rig.log.run(NS, sid)
    rig.kube.restore(etcd)
    for operator in (rig, other(rig)):
        await operator.operator.resync(spread_s=0.0)
        await operator.settle()
        await operator.orphans.sweep()
        operator.later(seconds=3600)
        await operator.operator.resync(spread_s=0.0)
        await operator.orphans.sweep()
    assert rig.log.session(NS, sid).state == "running"
    assert rig.log.session(NS, sid).mode == "suspended"
    assert rig.log.types(NS, sid).count("session.suspended") == 1
    # GitOps makes the object again: it takes the session over, and it goes on.
    await rig.kube.create(session("one"))
    await rig.settle()
    assert await rig.condition(AS, "one", "Ready") == ("True", "AlreadyRan")
    assert (await rig.get(AS, "one"))["status"]["sessionID"] == sid
    assert rig.log.session(NS, sid).mode == "running"


async def test_a_cluster_from_before_the_last_changes_repeats_none_and_can_make_new_ones(
    rig: Rig,
) -> None:
    """Generations count again from an older number: their events must not be taken for the old ones."""
    sid = await worked(rig)
    etcd = rig.kube.backup()
    for mode in ("Suspended", "Running"):
        await rig.kube.apply(session("one", operatingMode=mode), manager="kubectl")
        await rig.settle()
    before = rig.log.types(NS, sid)
    rig.kube.restore(etcd)
    rig = other(rig)
    await rig.operator.resync(spread_s=0.0)
    await rig.settle()
    assert rig.log.types(NS, sid) == before
    await rig.kube.apply(session("one", operatingMode="Suspended"), manager="kubectl")
    await rig.settle()
    assert rig.log.session(NS, sid).mode == "suspended"
    assert await rig.condition(AS, "one", "Ready") == ("True", "Suspended")
