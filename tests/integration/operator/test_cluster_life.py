"""Leadership, missed events, dead harnesses and scaling, on in-memory API and log."""

from __future__ import annotations

from typing import Any

import pytest

from cowhand.controller.leader import LeaderKube
from cowhand.desired import names
from cowhand.errors import Retryable
from cowhand.kube import kinds
from cowhand.kube.errors import Forbidden, KubeUnavailable
from cowhand.session.log import Backlog
from support.memory_kube import MemoryKube
from support.operator_rig import NS, Rig, resource, session

AS, SBX, POD = kinds.AGENT_SESSION, kinds.SANDBOX, kinds.POD


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.kube.missing.add(kinds.SCALED_OBJECT)
    return rig


async def test_lost_leadership_stops_writes() -> None:
    leading = True

    def wrap(kube: MemoryKube) -> LeaderKube:
        return LeaderKube(kube, lambda: leading)

    rig = Rig(wrap)
    await rig.kube.apply(session(), manager="kubectl")
    await rig.settle()
    assert await rig.condition(AS, "one", "Ready") == ("True", "Accepted")
    leading = False
    before = rig.kube.writes.copy()
    await rig.kube.create(resource(SBX, "byhand"))
    await rig.kube.create(session("two"))
    await rig.settle()
    before[("create", "sandboxes")] += 1
    before[("create", "agentsessions")] += 1
    assert rig.kube.writes == before
    assert len(rig.log) == 1
    guard = wrap(rig.kube)
    for write in (
        guard.apply(resource(SBX, "x"), manager="m"),
        guard.create(resource(SBX, "x")),
        guard.patch(SBX, NS, "byhand", {}),
        guard.delete(SBX, NS, "byhand"),
    ):
        with pytest.raises(Retryable):
            await write


async def test_an_object_that_is_gone_unseen_suspends_its_session_and_another_one_takes_it_over(
    rig: Rig,
) -> None:
    one = await rig.kube.create(session("one"))
    await rig.kube.create(session("two", message="other"))
    await rig.settle()
    rig.kube.vanish(AS, NS, "one")
    await rig.operator.resync(spread_s=0.0)
    await rig.settle()
    sid = names.session_id(one["metadata"]["uid"])
    await rig.orphans.sweep()
    assert rig.log.types(NS, sid)[-1] == "session.suspended"
    await rig.kube.create(session("one"))
    await rig.settle()
    assert await rig.condition(AS, "one", "Ready") == ("True", "AlreadyRan")
    assert rig.log.session(NS, sid).mode == "running"
    await rig.kube.delete(AS, NS, "one")
    await rig.settle()
    assert rig.log.types(NS, sid)[-1] == "session.deleted"


@pytest.mark.parametrize("why", ["empty", "failed", "not served"])
async def test_a_list_that_proves_nothing_ends_nothing(rig: Rig, why: str) -> None:
    one = await rig.kube.create(session("one"))
    await rig.settle()
    rig.kube.vanish(AS, NS, "one")
    if why == "failed":
        await rig.kube.create(session("two", message="other"))
        rig.kube.fail("list", AS, KubeUnavailable("no answer"), times=99)
    elif why == "not served":
        rig.kube.missing.add(AS)
    await rig.operator.resync(spread_s=0.0)
    sid = names.session_id(one["metadata"]["uid"])
    assert "session.deleted" not in rig.log.types(NS, sid)
    assert len(rig.orphans) == 0


def short(rig: Rig, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Lists lack one object from now on, as from a cache that is behind; asked for by name it is there."""
    whole = rig.kube.list

    async def partial(*args: Any, **more: Any) -> list[dict[str, Any]]:
        return [item for item in await whole(*args, **more) if item["metadata"]["name"] != missing]

    monkeypatch.setattr(rig.kube, "list", partial)


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "control"])
async def test_a_short_list_stops_neither_session_nor_harness(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, guard: bool
) -> None:
    one = await rig.kube.create(session("one"))
    await rig.kube.create(session("two", message="other"))
    for name in ("h1", "h2"):
        await rig.kube.create(harness_pod(name))
    await rig.settle()
    if not guard:

        async def believed(kind: kinds.Kind, gone: Any) -> dict[Any, Any]:
            return dict(gone)

        monkeypatch.setattr(rig.operator, "_confirmed", believed)
    whole = rig.kube.list
    for missing in ("one", "h1"):
        short(rig, monkeypatch, missing)
        await rig.operator.resync(spread_s=0.0)
        monkeypatch.setattr(rig.kube, "list", whole)
    sid = names.session_id(one["metadata"]["uid"])
    assert ("session.suspended" in rig.log.types(NS, sid)) is not guard
    await rig.settle()
    assert (len(rig.log.dropped) == 0) is guard


async def test_an_object_that_cannot_be_asked_for_is_not_gone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await rig.kube.create(session("one"))
    await rig.kube.create(session("two", message="other"))
    await rig.settle()
    rig.kube.vanish(AS, NS, "one")
    rig.kube.fail("get", AS, KubeUnavailable("no answer"), times=99)
    sid = names.session_id(one["metadata"]["uid"])
    await rig.operator.resync(spread_s=0.0)
    assert "session.suspended" not in rig.log.types(NS, sid)
    rig.kube.heal()
    await rig.operator.resync(spread_s=0.0)
    assert "session.suspended" in rig.log.types(NS, sid), "when it can be asked for again"


@pytest.mark.parametrize("returns", [True, False], ids=["returns", "control"])
async def test_an_object_that_is_back_before_the_store_is_not_suspended(
    rig: Rig, returns: bool
) -> None:
    one = await rig.kube.create(session("one"))
    await rig.kube.create(session("two", message="other"))
    await rig.settle()
    kept = rig.kube.backup()
    rig.kube.vanish(AS, NS, "one")
    rig.log.down = True
    await rig.operator.resync(spread_s=0.0)
    rig.log.down, rig.logs._breaker._down = False, None
    if returns:
        rig.kube.restore(kept)
        rig.operator.seen(AS, None, await rig.get(AS, "one"))
    await rig.orphans.sweep()
    sid = names.session_id(one["metadata"]["uid"])
    assert ("session.suspended" in rig.log.types(NS, sid)) is not returns


async def test_a_running_session_without_object_is_suspended_and_never_ended(rig: Rig) -> None:
    one = await rig.kube.create(session("one"))
    await rig.settle()
    sid = names.session_id(one["metadata"]["uid"])
    rig.kube.vanish(AS, NS, "one")
    rig.operator._by_session.clear()  # as after a restart of the operator
    await rig.kube.create(session("two", message="other"))
    rig.log.run(NS, sid)
    await rig.settle()
    await rig.orphans.sweep()
    assert rig.log.session(NS, sid).mode == "suspended"
    rig.log.finish(NS, sid)
    await rig.settle()
    await rig.orphans.sweep()
    assert rig.log.types(NS, sid)[-3:] == [
        "session.status_running",
        "session.suspended",
        "session.status_idle",
    ]
    assert len(rig.orphans) == 0


async def test_resync_repairs_what_no_event_told(rig: Rig) -> None:
    rig.deaf = True
    await rig.kube.create(session("one"))
    await rig.kube.create(resource(SBX, "byhand"))
    await rig.settle()
    assert rig.kube.all(POD) == []
    await rig.operator.resync(spread_s=0.0)
    await rig.settle()
    assert len(rig.kube.all(POD)) == 1
    assert len(rig.log) == 1


def harness_pod(name: str) -> dict[str, Any]:
    pod = resource(POD, name, containers=[])
    pod["metadata"]["labels"] = {
        "app.kubernetes.io/name": "cowhand",
        "app.kubernetes.io/component": "harness",
    }
    return pod


async def test_a_dead_harness_pod_is_dropped(rig: Rig) -> None:
    first = await rig.kube.create(harness_pod("h1"))
    second = await rig.kube.create(harness_pod("h2"))
    third = await rig.kube.create(harness_pod("h3"))
    await rig.settle()
    assert rig.log.dropped == []
    await rig.kube.delete(POD, NS, "h1")
    rig.kube.put({**second, "status": {"phase": "Failed"}})
    await rig.settle()
    assert rig.log.dropped == [(NS, first["metadata"]["uid"]), (NS, second["metadata"]["uid"])]
    await rig.kube.create(harness_pod("h4"))
    rig.kube.vanish(POD, NS, "h3")
    await rig.operator.resync(spread_s=0.0)
    await rig.settle()
    assert rig.log.dropped[-1] == (NS, third["metadata"]["uid"])


def deployment(replicas: int) -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"namespace": NS, "name": "cowhand-harness"},
        "spec": {"replicas": replicas},
    }


async def replicas(rig: Rig) -> int:
    found: int = (await rig.get(kinds.DEPLOYMENT, "cowhand-harness"))["spec"]["replicas"]
    return found


async def test_scaling_follows_the_backlog(rig: Rig) -> None:
    await rig.kube.create(deployment(1))
    rig.log.backlogs[NS] = Backlog(ready=25, leased=10, workers=1, oldest_ready_ms=100)
    await rig.scaler.step(NS)
    assert await replicas(rig) == 4
    rig.log.backlogs[NS] = Backlog(0, 0, 4, 0)
    await rig.scaler.step(NS)
    assert await replicas(rig) == 4
    rig.later(minutes=6)
    await rig.scaler.step(NS)
    assert await replicas(rig) == 3


@pytest.mark.parametrize("kind", [kinds.HORIZONTAL_POD_AUTOSCALER, kinds.SCALED_OBJECT])
async def test_scaling_leaves_replicas_to_an_autoscaler(rig: Rig, kind: kinds.Kind) -> None:
    rig.kube.missing.discard(kinds.SCALED_OBJECT)
    await rig.kube.create(deployment(1))
    await rig.kube.create(resource(kind, "x", scaleTargetRef={"name": "cowhand-harness"}))
    rig.log.backlogs[NS] = Backlog(ready=25, leased=10, workers=1, oldest_ready_ms=100)
    await rig.scaler.step(NS)
    assert await replicas(rig) == 1


async def test_scaling_does_nothing_when_it_cannot_see_autoscalers_or_the_log(rig: Rig) -> None:
    await rig.kube.create(deployment(1))
    rig.log.backlogs[NS] = Backlog(ready=25, leased=10, workers=1, oldest_ready_ms=100)
    rig.kube.fail("list", kinds.HORIZONTAL_POD_AUTOSCALER, Forbidden("may not list"))
    with pytest.raises(Forbidden):
        await rig.scaler.step(NS)
    rig.log.down = True
    await rig.scaler.step(NS)
    assert await replicas(rig) == 1
