"""AgentSessions through the whole operator, on in-memory API and log."""

from __future__ import annotations

from typing import Any

import pytest

from cowhand.desired import names
from cowhand.kube import kinds
from cowhand.kube.errors import Conflict, KubeUnavailable
from support.operator_rig import NS, RETAIN_S, Rig, resource, session

AS = kinds.AGENT_SESSION


@pytest.fixture
def rig() -> Rig:
    return Rig()


async def start(rig: Rig, **spec: Any) -> str:
    """Apply a session and let it be created; answers its id."""
    made = await rig.kube.apply(session(**spec), manager="kubectl")
    await rig.settle()
    return names.session_id(made["metadata"]["uid"])


async def test_apply_makes_the_session_and_reports_it(rig: Rig) -> None:
    sid = await start(rig)
    assert rig.log.types(NS, sid) == ["session.created", "user.message"]
    assert rig.log.ids(NS, sid) == ["created", "msg:0"]
    found = await rig.get(AS, "one")
    assert found["metadata"]["finalizers"] == ["cowhand.dev/session"]
    assert found["status"]["sessionID"] == sid
    assert await rig.condition(AS, "one", "Ready") == ("True", "Accepted")
    assert await rig.condition(AS, "one", "TurnComplete") == ("False", "Running")
    assert await rig.condition(AS, "one", "Reconciling") is None


async def test_a_turn_is_projected(rig: Rig) -> None:
    sid = await start(rig)
    rig.log.run(NS, sid)
    await rig.settle()
    assert await rig.condition(AS, "one", "TurnComplete") == ("False", "Running")
    rig.log.finish(NS, sid, usage={"input_tokens": 3, "output_tokens": 5}, ttft_ms=120)
    await rig.settle()
    status = (await rig.get(AS, "one"))["status"]
    assert await rig.condition(AS, "one", "TurnComplete") == ("True", "EndTurn")
    assert await rig.condition(AS, "one", "Succeeded") == ("Unknown", "Idle")
    assert (status["turns"], status["usage"]["outputTokens"]) == (1, 5)
    assert status["timeToFirstTokenMilliseconds"] == 120


async def test_reapply_and_looking_again_write_nothing(rig: Rig) -> None:
    sid = await start(rig)
    writes = rig.kube.writes.copy()
    await rig.kube.apply(session(), manager="kubectl")
    await rig.look(AS, "one")
    writes[("apply", "agentsessions")] += 1  # the user's own apply
    assert rig.kube.writes == writes
    assert rig.log.types(NS, sid) == ["session.created", "user.message"]


async def test_one_status_write_per_change(rig: Rig) -> None:
    sid = await start(rig)
    before = rig.kube.writes[("apply", "agentsessions")]
    rig.log.run(NS, sid)
    await rig.settle()
    assert rig.kube.writes[("apply", "agentsessions")] - before <= 1
    rig.log.finish(NS, sid)
    await rig.settle()
    assert rig.kube.writes[("apply", "agentsessions")] - before <= 2


async def test_counters_alone_are_written_every_30_seconds(rig: Rig) -> None:
    sid = await start(rig)
    rig.log.run(NS, sid)
    await rig.settle()
    before = rig.kube.writes[("apply", "agentsessions")]
    for number in range(5):
        rig.log.write(NS, sid, "tool.started", {}, tool_calls=number + 1)
        await rig.settle()
    assert rig.kube.writes[("apply", "agentsessions")] == before
    rig.later(seconds=31)
    await rig.look(AS, "one")
    assert (await rig.get(AS, "one"))["status"]["toolCalls"] == 5


async def test_the_agent_may_come_later_and_is_pinned(rig: Rig) -> None:
    sid = await start(rig, agent=None, agentRef={"name": "coder"})
    assert await rig.condition(AS, "one", "Ready") == ("False", "AgentNotFound")
    assert await rig.condition(AS, "one", "Reconciling") == ("True", "WaitingForReference")
    assert len(rig.log) == 0
    agent = resource(kinds.AGENT, "coder", model={"id": "claude-opus-5-5"}, system="Be kind.")
    made = await rig.kube.create(agent)
    await rig.settle()  # the Agent's event wakes the session: no clock was moved
    assert await rig.condition(AS, "one", "Ready") == ("True", "Accepted")
    pinned = (await rig.get(AS, "one"))["status"]["agent"]
    assert (pinned["name"], pinned["uid"]) == ("coder", made["metadata"]["uid"])
    await rig.kube.patch(kinds.AGENT, NS, "coder", {"spec": {"system": "Be rude."}})
    await rig.look(AS, "one")
    created = rig.log.session(NS, sid).log[0].data
    assert created["request"]["system"] == [{"type": "text", "text": "Be kind."}]
    assert (await rig.get(AS, "one"))["status"]["agent"] == pinned


async def test_an_added_message_is_sent_once(rig: Rig) -> None:
    first = [{"id": "a", "content": "start"}]
    sid = await start(rig, message=None, messages=first)
    rig.log.finish(NS, sid)
    await rig.settle()
    await rig.kube.apply(
        session(message=None, messages=[*first, {"id": "b", "content": "go on"}]), manager="kubectl"
    )
    await rig.settle()
    await rig.look(AS, "one")
    assert rig.log.ids(NS, sid) == ["created", "msg:a", "msg:b"]
    assert await rig.condition(AS, "one", "TurnComplete") == ("False", "Running")
    assert (await rig.get(AS, "one"))["status"]["deliveredMessages"] == ["a", "b"]


async def test_a_lost_status_does_not_send_messages_again(rig: Rig) -> None:
    sid = await start(rig, message=None, messages=[{"id": "a", "content": "start"}])
    rig.kube.put({**await rig.get(AS, "one"), "status": None})
    await rig.settle()
    assert rig.log.ids(NS, sid) == ["created", "msg:a"]
    status = (await rig.get(AS, "one"))["status"]
    assert status["sessionID"] == sid
    assert status["agent"]["hash"] == rig.log.session(NS, sid).log[0].data["agent"]["hash"]


async def test_suspend_and_resume(rig: Rig) -> None:
    sid = await start(rig)
    await rig.kube.apply(session(operatingMode="Suspended"), manager="kubectl")
    await rig.settle()
    assert rig.log.session(NS, sid).mode == "suspended"
    assert await rig.condition(AS, "one", "Ready") == ("True", "Suspended")
    await rig.kube.apply(session(operatingMode="Running"), manager="kubectl")
    await rig.settle()
    assert rig.log.session(NS, sid).mode == "running"
    assert rig.log.ids(NS, sid)[-2:] == ["mode:2:2", "mode:3:3"]


async def test_an_edited_budget_reaches_the_log_once_for_each_edit(rig: Rig) -> None:
    sid = await start(rig, budget={"maxTokens": 5})
    assert rig.log.session(NS, sid).budget == {"max_tokens": 5}
    for tokens in (6, 5, None):
        budget = None if tokens is None else {"maxTokens": tokens}
        await rig.kube.apply(session(budget=budget), manager="kubectl")
        await rig.settle()
        await rig.look(AS, "one")
    assert rig.log.ids(NS, sid)[2:] == ["budget:2:2", "budget:3:3", "budget:4:4"]
    updates = [e.data for e in rig.log.session(NS, sid).log if e.type == "session.updated"]
    assert [data["budget"] for data in updates] == [{"max_tokens": 6}, {"max_tokens": 5}, None]
    assert updates[0]["actor"] == {"user": f"agentsession:{NS}/one", "via": "kubernetes"}
    assert await rig.condition(AS, "one", "Reconciling") is None


async def test_made_suspended_it_never_runs_in_between(rig: Rig) -> None:
    sid = await start(rig, operatingMode="Suspended")
    assert rig.log.types(NS, sid) == ["session.created", "user.message", "session.suspended"]
    assert await rig.condition(AS, "one", "Ready") == ("True", "Suspended")
    assert await rig.condition(AS, "one", "TurnComplete") == ("False", "Suspended")


@pytest.mark.parametrize(("policy", "kept"), [("Retain", RETAIN_S), ("Delete", None)])
async def test_delete_ends_the_log(rig: Rig, policy: str, kept: int | None) -> None:
    sid = await start(rig, deletionPolicy=policy)
    await rig.kube.delete(AS, NS, "one")
    await rig.settle()
    assert await rig.kube.get(AS, NS, "one") is None
    if kept is None:
        assert len(rig.log) == 0
    else:
        assert rig.log.types(NS, sid)[-1] == "session.deleted"
        assert rig.log.session(NS, sid).retain_s == kept


async def test_made_again_it_adopts_the_run(rig: Rig) -> None:
    first = await start(rig)
    rig.log.finish(NS, first)
    await rig.kube.delete(AS, NS, "one")
    await rig.settle()
    await rig.kube.apply(session(budget={"maxToolCalls": 9}), manager="kubectl")
    await rig.settle()
    assert len(rig.log) == 1
    assert (await rig.get(AS, "one"))["status"]["sessionID"] == first
    assert await rig.condition(AS, "one", "Ready") == ("True", "AlreadyRan")
    assert await rig.condition(AS, "one", "Succeeded") == ("True", "Completed")
    await rig.look(AS, "one")
    assert await rig.condition(AS, "one", "Ready") == ("True", "AlreadyRan")


async def test_an_adopted_run_shows_the_agent_that_ran(rig: Rig) -> None:
    await rig.kube.create(resource(kinds.AGENT, "coder", model={"id": "old"}))
    first = await start(rig, agent=None, agentRef={"name": "coder"})
    pinned = (await rig.get(AS, "one"))["status"]["agent"]
    await rig.kube.delete(AS, NS, "one")
    await rig.settle()
    await rig.kube.patch(kinds.AGENT, NS, "coder", {"spec": {"model": {"id": "new"}}})
    await start(rig, agent=None, agentRef={"name": "coder"})
    status = (await rig.get(AS, "one"))["status"]
    assert status["sessionID"] == first
    assert status["agent"] == pinned


async def test_another_message_or_run_id_is_another_run(rig: Rig) -> None:
    first = await start(rig)
    for spec in ({"message": "another"}, {"runID": "2"}):
        await rig.kube.delete(AS, NS, "one")
        await rig.settle()
        again = await start(rig, **spec)
        assert again != first
        assert await rig.condition(AS, "one", "Ready") == ("True", "Accepted")
    assert len(rig.log) == 3


async def test_adopted_says_which_messages_were_not_sent(rig: Rig) -> None:
    one, two = {"id": "a", "content": "x"}, {"id": "b", "content": "y"}
    await start(rig, message=None, messages=[one])
    await rig.kube.delete(AS, NS, "one")
    await rig.settle()
    await start(rig, message=None, messages=[one, two])
    found = (await rig.get(AS, "one"))["status"]
    text = next(c["message"] for c in found["conditions"] if c["type"] == "Ready")
    assert "messages b" in text
    assert found["deliveredMessages"] == ["a"]


async def test_a_dead_store_is_said_and_healed(rig: Rig) -> None:
    rig.log.down = True
    made = await rig.kube.apply(session(), manager="kubectl")
    await rig.settle()
    assert await rig.condition(AS, "one", "Ready") == ("False", "StoreUnavailable")
    assert await rig.condition(AS, "one", "Reconciling") == ("True", "StoreUnavailable")
    rig.log.down = False
    rig.logs._breaker._down = None
    await rig.look(AS, "one")
    assert await rig.condition(AS, "one", "Ready") == ("True", "Accepted")
    assert len(rig.log) == 1
    assert rig.log.session(NS, names.session_id(made["metadata"]["uid"]))


async def test_a_namespace_without_room_in_the_store_is_told_and_goes_on_later(rig: Rig) -> None:
    rig.log.full = True
    await rig.kube.apply(session(), manager="kubectl")
    await rig.settle()
    assert await rig.condition(AS, "one", "Ready") == ("False", "QuotaExceeded")
    assert await rig.condition(AS, "one", "Reconciling") == ("True", "QuotaExceeded")
    found = (await rig.get(AS, "one"))["status"]["conditions"]
    assert "store.tenantQuota" in next(c["message"] for c in found if c["type"] == "Ready")
    rig.log.full = False
    await rig.look(AS, "one")
    assert await rig.condition(AS, "one", "Ready") == ("True", "Accepted")


@pytest.mark.parametrize("how", ["down", "hang"])
async def test_deletion_gives_up_on_a_dead_store_and_finishes_later(rig: Rig, how: str) -> None:
    sid = await start(rig)
    setattr(rig.log, how, True)
    await rig.kube.delete(AS, NS, "one")
    await rig.look(AS, "one")
    assert await rig.condition(AS, "one", "Ready") == ("False", "Deleting")
    rig.later(seconds=50)
    await rig.look(AS, "one")
    assert await rig.kube.get(AS, NS, "one") is not None
    rig.later(seconds=5)
    await rig.look(AS, "one")
    assert await rig.kube.get(AS, NS, "one") is None
    assert len(rig.orphans) == 1
    await rig.orphans.sweep()
    assert len(rig.orphans) == 1
    setattr(rig.log, how, False)
    rig.logs._breaker._down = None
    await rig.orphans.sweep()
    assert rig.log.types(NS, sid)[-1] == "session.deleted"
    assert len(rig.orphans) == 0


async def test_a_session_that_the_store_lost_is_stalled(rig: Rig) -> None:
    sid = await start(rig)
    rig.log.lose(NS, sid)
    await rig.look(AS, "one")
    assert await rig.condition(AS, "one", "Ready") == ("False", "SessionLost")
    assert await rig.condition(AS, "one", "Stalled") == ("True", "SessionLost")
    assert len(rig.log) == 0


async def test_an_unreadable_spec_stalls_only_itself(rig: Rig) -> None:
    await rig.kube.apply(session("bad", agent={"model": {"id": ""}}), manager="kubectl")
    await start(rig)
    assert await rig.condition(AS, "bad", "Stalled") == ("True", "InvalidSpec")
    assert await rig.condition(AS, "one", "Ready") == ("True", "Accepted")


async def test_a_snapshot_that_is_too_large_is_refused_with_a_remedy(rig: Rig) -> None:
    wide = [{"name": f"V{i}", "value": "😀" * 4096} for i in range(100)]
    await start(rig, environment={"env": wide})
    assert await rig.condition(AS, "one", "Stalled") == ("True", "TooLarge")
    assert len(rig.log) == 0


async def test_time_to_live_after_the_last_turn(rig: Rig) -> None:
    sid = await start(rig, ttlSecondsAfterFinished=60)
    rig.later(seconds=600)
    await rig.look(AS, "one")
    rig.log.finish(NS, sid)
    await rig.settle()
    rig.later(seconds=59)
    await rig.look(AS, "one")
    assert await rig.kube.get(AS, NS, "one") is not None
    rig.later(seconds=2)
    await rig.look(AS, "one")
    assert await rig.kube.get(AS, NS, "one") is None
    assert rig.log.types(NS, sid)[-1] == "session.deleted"


async def test_conflicts_and_outages_of_the_api_are_tried_again(rig: Rig) -> None:
    rig.kube.fail("patch", AS, Conflict("somebody was faster"))
    rig.kube.fail("apply", AS, KubeUnavailable("no answer"))
    await rig.kube.create(session())
    for _ in range(4):
        await rig.settle(horizon_s=60.0)
    assert await rig.condition(AS, "one", "Ready") == ("True", "Accepted")
    assert len(rig.log) == 1


async def test_a_name_made_again_between_look_and_write_keeps_its_own_status(rig: Rig) -> None:
    old = await rig.kube.apply(session(), manager="kubectl")
    status = {**session(), "status": {"sessionID": "x"}}
    del status["spec"]
    status["metadata"] = {**status["metadata"], "uid": "another"}
    with pytest.raises(Conflict):
        await rig.kube.apply(status, manager="m", subresource="status")
    assert old["metadata"]["uid"] != "another"


async def test_forced_deletion_without_finalizer_still_ends_the_log(rig: Rig) -> None:
    sid = await start(rig)
    await rig.kube.patch(AS, NS, "one", {"metadata": {"finalizers": None}})
    rig.operator.sessions._schedule.pop(
        1e18
    )  # its MODIFIED event is not worked off: it is too late
    await rig.kube.delete(AS, NS, "one")
    await rig.orphans.sweep()
    assert rig.log.types(NS, sid)[-1] == "session.deleted"
