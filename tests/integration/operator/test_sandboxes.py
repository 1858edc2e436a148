"""Hands and Sandboxes through the whole operator, on in-memory API and log."""

from __future__ import annotations

from typing import Any

import pytest

from cowhand.desired import names
from cowhand.kube import kinds
from cowhand.kube.errors import Forbidden
from cowhand.session.log import HandRecord
from support.operator_rig import KILLED, NS, READY, Rig, pod_status, resource, session

AS, SBX, POD = kinds.AGENT_SESSION, kinds.SANDBOX, kinds.POD


@pytest.fixture
def rig() -> Rig:
    return Rig()


async def with_hand(rig: Rig, **spec: Any) -> tuple[str, str]:
    """A session that asks for its first sandbox: (session id, sandbox name)."""
    made = await rig.kube.apply(session(**spec), manager="kubectl")
    await rig.settle()
    sid = names.session_id(made["metadata"]["uid"])
    rig.log.run(NS, sid)
    rig.log.hand(NS, sid, "sandbox", 1, "Pending")
    await rig.settle()
    return sid, names.sandbox_name(sid, "sandbox", 1)


async def record(rig: Rig, sid: str, instance: int = 1) -> HandRecord:
    found = await rig.log.get_hand(NS, sid, "sandbox", instance)
    assert found is not None
    return found


async def becomes_ready(rig: Rig, sid: str, name: str) -> None:
    """kubelet and broker do their part."""
    rig.kube.put(pod_status(await rig.get(POD, name), **READY))
    old = await record(rig, sid)
    await rig.log.put_hand(NS, HandRecord(**{**vars(old), "state": "Ready", "owner_epoch": 1}))
    await rig.settle()


async def test_a_requested_hand_becomes_a_sandbox_and_a_pod(rig: Rig) -> None:
    sid, name = await with_hand(rig, resources=[])
    owner = await rig.get(AS, "one")
    sandbox = await rig.get(SBX, name)
    ref = sandbox["metadata"]["ownerReferences"][0]
    assert (ref["uid"], ref["controller"]) == (owner["metadata"]["uid"], True)
    assert sandbox["spec"]["holder"] == {"sessionID": sid, "hand": "sandbox", "instance": 1}
    assert sandbox["spec"]["environment"]["image"] == "sandbox:1"
    pod = await rig.get(POD, name)
    assert pod["metadata"]["ownerReferences"][0]["uid"] == sandbox["metadata"]["uid"]
    assert pod["metadata"]["labels"]["cowhand.dev/session-id"] == sid
    assert await rig.condition(SBX, name, "Ready") == ("False", "Pending")
    found = await record(rig, sid)
    assert (found.state, found.sandbox_uid) == ("Pending", sandbox["metadata"]["uid"])
    assert (found.owner, found.owner_epoch) == (sid, 1)


async def test_a_ready_pod_is_a_ready_sandbox(rig: Rig) -> None:
    sid, name = await with_hand(rig)
    await becomes_ready(rig, sid, name)
    assert await rig.condition(SBX, name, "Ready") == ("True", "Ready")
    assert await rig.condition(SBX, name, "EgressEnforced") == ("True", "Verified")
    assert await rig.condition(SBX, name, "Reconciling") is None
    assert (await record(rig, sid)).state == "Ready"
    assert (await rig.get(SBX, name))["status"]["podIP"] == "10.0.0.9"


async def test_a_killed_sandbox_is_lost_and_not_made_again(rig: Rig) -> None:
    sid, name = await with_hand(rig)
    await becomes_ready(rig, sid, name)
    rig.kube.put(pod_status(await rig.get(POD, name), **KILLED))
    await rig.settle()
    lost = await record(rig, sid)
    assert lost.state == "Lost"
    assert "OOMKilled" in lost.message
    assert "no memory" in lost.message
    assert lost.owner == sid
    assert await rig.condition(SBX, name, "Stalled") == ("True", "PodLost")
    before = rig.kube.writes[("create", "pods")]
    await rig.kube.delete(POD, NS, name)
    await rig.settle()
    assert rig.kube.writes[("create", "pods")] == before
    assert "OOMKilled" in (await record(rig, sid)).message


async def test_the_next_instance_replaces_the_lost_one(rig: Rig) -> None:
    sid, name = await with_hand(rig)
    await becomes_ready(rig, sid, name)
    await rig.kube.delete(POD, NS, name)
    await rig.settle()
    assert (await record(rig, sid)).state == "Lost"
    rig.log.hand(NS, sid, "sandbox", 2, "Pending")
    await rig.settle()
    second = names.sandbox_name(sid, "sandbox", 2)
    assert [item["metadata"]["name"] for item in rig.kube.all(SBX)] == [second]
    assert [item["metadata"]["name"] for item in rig.kube.all(POD)] == [second]


async def test_a_deleted_sandbox_is_a_lost_hand(rig: Rig) -> None:
    sid, name = await with_hand(rig)
    await becomes_ready(rig, sid, name)
    await rig.kube.delete(SBX, NS, name)
    await rig.settle()
    assert rig.kube.all(POD) == []
    lost = await record(rig, sid)
    assert (lost.state, lost.reason) == ("Lost", "SandboxDeleted")
    assert rig.kube.all(SBX) == []


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "control"])
async def test_an_empty_list_of_sandboxes_loses_no_hand(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, guard: bool
) -> None:
    sid, name = await with_hand(rig)
    await becomes_ready(rig, sid, name)

    async def nothing(*args: Any, **more: Any) -> list[dict[str, Any]]:
        return []

    async def believed(namespace: str, snap: Any, hand: str, instance: int) -> Any:
        return snap

    monkeypatch.setattr(rig.kube, "list", nothing)
    if not guard:
        observer = rig.session_controller._observer
        monkeypatch.setattr(observer, "_confirm_absence", believed)
    await rig.look(AS, "one")
    assert (await record(rig, sid)).state == ("Ready" if guard else "Lost")
    assert len(rig.kube.all(POD)) == 1


async def test_suspending_the_session_ends_its_sandbox(rig: Rig) -> None:
    sid, name = await with_hand(rig)
    await becomes_ready(rig, sid, name)
    await rig.kube.apply(session(operatingMode="Suspended"), manager="kubectl")
    await rig.settle()
    assert rig.kube.all(POD) == []
    assert (await rig.get(SBX, name))["spec"]["operatingMode"] == "Suspended"
    assert await rig.condition(SBX, name, "Ready") == ("False", "Suspended")
    assert (await record(rig, sid)).reason == "Suspended"
    await rig.kube.apply(session(operatingMode="Running"), manager="kubectl")
    await rig.settle()
    assert rig.kube.all(POD) == []


async def test_an_idle_session_gives_its_sandbox_back_after_the_timeout(rig: Rig) -> None:
    sid, name = await with_hand(rig, environment={"idleTimeoutSeconds": 60})
    await becomes_ready(rig, sid, name)
    rig.log.finish(NS, sid)
    await rig.settle()
    rig.later(seconds=59)
    await rig.look(AS, "one")
    assert len(rig.kube.all(POD)) == 1
    rig.later(seconds=2)
    await rig.look(AS, "one")
    assert rig.kube.all(POD) == []


async def test_a_pod_that_cannot_start_tells_the_session_why(rig: Rig) -> None:
    sid, name = await with_hand(rig, environment={"startupTimeoutSeconds": 30})
    waiting = {
        "phase": "Pending",
        "conditions": [{"type": "PodScheduled", "status": "True"}],
        "containerStatuses": [
            {
                "name": "sandbox",
                "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}},
            }
        ],
    }
    rig.kube.put(pod_status(await rig.get(POD, name), **waiting))
    await rig.settle()
    assert await rig.condition(SBX, name, "Ready") == ("False", "ImageUnavailable")
    assert "no such image" in (await record(rig, sid)).message
    rig.later(seconds=31)
    await rig.look(SBX, name)
    failed = await record(rig, sid)
    assert (failed.state, failed.reason) == ("Failed", "StartupTimeout")
    assert "no such image" in failed.message
    assert rig.kube.all(POD) == []
    assert await rig.condition(SBX, name, "Stalled") == ("True", "StartupTimeout")


async def test_what_the_scheduler_says_stands_in_the_status_of_both(rig: Rig) -> None:
    sid, name = await with_hand(rig)
    why = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    why["message"] = "0/1 nodes are available: 1 Insufficient memory."
    rig.kube.put(pod_status(await rig.get(POD, name), phase="Pending", conditions=[why]))
    await rig.settle()
    assert await rig.condition(SBX, name, "Ready") == ("False", "Unschedulable")
    (hand,) = (await rig.get(AS, "one"))["status"]["hands"]
    assert hand["message"] == f"Unschedulable: {why['message']}"
    assert (await record(rig, sid)).message == why["message"]


async def test_rules_that_cannot_be_loaded_fail_the_sandbox(rig: Rig) -> None:
    sid, name = await with_hand(rig)
    ended = {"exitCode": 1, "reason": "Error", "message": "no nft_ct in this kernel"}
    status = {
        "phase": "Failed",
        "initContainerStatuses": [{"name": "egress-rules", "state": {"terminated": ended}}],
    }
    rig.kube.put(pod_status(await rig.get(POD, name), **status))
    await rig.settle()
    assert await rig.condition(SBX, name, "EgressEnforced") == ("False", "RulesFailed")
    assert await rig.condition(SBX, name, "Stalled") == ("True", "EgressNotEnforced")
    failed = await record(rig, sid)
    assert failed.state == "Failed"
    assert "nft_ct" in failed.message


async def test_a_pod_that_its_node_could_not_start_is_followed_by_another(rig: Rig) -> None:
    """Nothing ran in it, so that the session need not know; Claude's call waits a little longer."""
    sid, name = await with_hand(rig)
    first = await rig.get(POD, name)
    ended = {"exitCode": 128, "reason": "StartError", "message": "runc: unable to freeze"}
    status = {
        "phase": "Failed",
        "initContainerStatuses": [{"name": "egress-verify", "state": {"terminated": ended}}],
    }
    rig.kube.put(pod_status(first, **status))
    await rig.settle()
    second = await rig.get(POD, name)
    assert second["metadata"]["uid"] != first["metadata"]["uid"]
    assert (await record(rig, sid)).state == "Pending"
    assert await rig.condition(SBX, name, "Stalled") is None
    rig.later(seconds=181)  # its startup timeout is over: the session hears of it
    rig.kube.put(pod_status(second, **status))
    await rig.settle()
    failed = await record(rig, sid)
    assert (failed.state, failed.reason) == ("Failed", "ContainerNotCreated")
    assert "unable to freeze" in failed.message


async def test_a_refused_pod_is_said_and_tried_again(rig: Rig) -> None:
    rig.kube.fail("create", POD, Forbidden("exceeded quota"), times=1)
    sid, name = await with_hand(rig)
    assert await rig.condition(SBX, name, "Ready") == ("False", "PodRefused")
    assert "exceeded quota" in (await record(rig, sid)).message
    await rig.look(SBX, name)
    assert rig.kube.all(POD) == []
    rig.later(seconds=16)
    await rig.look(SBX, name)
    assert len(rig.kube.all(POD)) == 1
    await rig.look(SBX, name)
    assert await rig.condition(SBX, name, "Ready") == ("False", "Pending")


async def test_a_foreign_pod_is_left_alone(rig: Rig) -> None:
    foreign = resource(POD, "byhand", containers=[])
    foreign["metadata"]["labels"] = {"app.kubernetes.io/name": "cowhand"}
    before = await rig.kube.create(foreign)
    await rig.kube.create(resource(SBX, "byhand"))
    await rig.settle()
    assert await rig.condition(SBX, "byhand", "Ready") == ("False", "ForeignPod")
    assert await rig.condition(SBX, "byhand", "Stalled") == ("True", "ForeignPod")
    await rig.kube.patch(SBX, NS, "byhand", {"spec": {"operatingMode": "Suspended"}})
    await rig.settle()
    await rig.kube.delete(SBX, NS, "byhand")
    await rig.settle()
    assert await rig.get(POD, "byhand") == before
    assert rig.kube.writes[("delete", "pods")] == 0


async def test_a_sandbox_made_by_hand_gets_a_new_pod(rig: Rig) -> None:
    await rig.kube.create(resource(SBX, "byhand"))
    await rig.settle()
    first = await rig.get(POD, "byhand")
    rig.kube.put(pod_status(first, **READY))
    await rig.settle()
    assert await rig.condition(SBX, "byhand", "Ready") == ("True", "Ready")
    rig.kube.put(pod_status(await rig.get(POD, "byhand"), **KILLED))
    await rig.settle()
    second = await rig.get(POD, "byhand")
    assert second["metadata"]["uid"] != first["metadata"]["uid"]


async def test_config_maps_and_environments_may_come_later(rig: Rig) -> None:
    files = {"configMap": {"name": "code", "items": [{"key": "a", "path": "a.py"}]}}
    spec = {
        "environmentRef": {"name": "big"},
        "resources": [{**files, "mountPath": "/workspace/src"}],
    }
    await rig.kube.create(resource(SBX, "byhand", **spec))
    await rig.settle()
    assert await rig.condition(SBX, "byhand", "Ready") == ("False", "EnvironmentNotFound")
    await rig.kube.create(resource(kinds.ENVIRONMENT, "big", resources={"cpu": "2"}))
    await rig.settle()
    assert await rig.condition(SBX, "byhand", "Ready") == ("False", "ConfigMapNotFound")
    code: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"namespace": NS, "name": "code"},
        "data": {"b": "x"},
    }
    await rig.kube.create(code)
    await rig.look(SBX, "byhand")
    assert await rig.condition(SBX, "byhand", "Ready") == ("False", "ConfigMapNotFound")
    await rig.kube.patch(kinds.CONFIG_MAP, NS, "code", {"data": {"a": "x"}})
    await rig.look(SBX, "byhand")
    pod = await rig.get(POD, "byhand")
    assert pod["spec"]["containers"][0]["resources"]["limits"] == {"cpu": "2"}


async def test_time_to_live_of_a_sandbox(rig: Rig) -> None:
    await rig.kube.create(resource(SBX, "byhand", ttlSecondsAfterCreation=60))
    await rig.settle()
    assert len(rig.kube.all(POD)) == 1
    rig.later(seconds=62)
    await rig.look(SBX, "byhand")
    assert rig.kube.all(SBX) == []
    assert rig.kube.all(POD) == []


@pytest.mark.parametrize("how", ["down", "hang"])
async def test_a_dead_store_holds_up_no_pod(rig: Rig, how: str) -> None:
    setattr(rig.log, how, True)
    await rig.kube.create(resource(SBX, "byhand"))
    holder = {"sessionID": "sesn_" + "a" * 32, "hand": "sandbox", "instance": 1}
    await rig.kube.create(resource(SBX, "held", holder=holder))
    await rig.settle()
    assert {pod["metadata"]["name"] for pod in rig.kube.all(POD)} == {"byhand", "held"}


async def test_a_name_that_somebody_else_uses_fails_the_hand(rig: Rig) -> None:
    made = await rig.kube.apply(session(), manager="kubectl")
    await rig.settle()
    sid = names.session_id(made["metadata"]["uid"])
    await rig.kube.create(resource(SBX, names.sandbox_name(sid, "sandbox", 1)))
    rig.log.run(NS, sid)
    rig.log.hand(NS, sid, "sandbox", 1, "Pending")
    await rig.settle()
    found = await record(rig, sid)
    assert (found.state, found.reason) == ("Failed", "ForeignSandbox")


async def test_deleting_the_session_takes_its_sandboxes(rig: Rig) -> None:
    sid, name = await with_hand(rig)
    await becomes_ready(rig, sid, name)
    await rig.kube.delete(AS, NS, "one")
    await rig.settle()
    assert rig.kube.all(SBX) == []
    assert rig.kube.all(POD) == []
