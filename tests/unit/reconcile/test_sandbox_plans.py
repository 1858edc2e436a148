"""Snapshots of a Sandbox and the plans that follow; every documented reason is reached."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cowhand.api.v1alpha1 import Sandbox
from cowhand.api.v1alpha1.reasons import REASONS
from cowhand.reconcile.sandbox import SandboxPlan, SandboxSnapshot, reconcile_sandbox

NOW = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)
HOLDER = {"sessionID": "sesn_" + "0" * 32, "hand": "sandbox", "instance": 1}
SCHEDULED = {"type": "PodScheduled", "status": "True"}


def sandbox(*, held: bool = True, deleted: bool = False, **more: Any) -> Sandbox:
    meta: dict[str, Any] = {"name": "s", "namespace": "ns", "uid": "u", "generation": 1}
    meta["creationTimestamp"] = NOW.isoformat()
    if deleted:
        meta["deletionTimestamp"] = NOW.isoformat()
    status = more.pop("status", {})
    spec = {"holder": HOLDER, **more} if held else more
    return Sandbox.model_validate({"metadata": meta, "spec": spec, "status": status})


def pod(owner: str = "u", *, terminating: bool = False, **status: Any) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "name": "s",
        "uid": "p",
        "creationTimestamp": NOW.isoformat(),
        "ownerReferences": [{"uid": owner, "kind": "Sandbox", "name": "s", "controller": True}],
    }
    if terminating:
        meta["deletionTimestamp"] = NOW.isoformat()
    return {"metadata": meta, "status": status}


def ended(name: str, code: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "state": {"terminated": {"exitCode": code, **more}}}


def waiting(name: str, reason: str) -> dict[str, Any]:
    return {"name": name, "state": {"waiting": {"reason": reason, "message": "so it is"}}}


LACKS = (
    '{"reason": "FeatureMissing", "feature": "reject in inet tables (CONFIG_NFT_REJECT_INET)", '
    '"message": "The node lacks it: Operation not supported."}'
)
VERIFIED = [ended("egress-rules", 0), ended("egress-verify", 0)]
READY = pod(
    phase="Running",
    conditions=[
        SCHEDULED,
        {"type": "Ready", "status": "True", "lastTransitionTime": NOW.isoformat()},
    ],
    initContainerStatuses=VERIFIED,
)
KILLED = pod(
    phase="Failed",
    containerStatuses=[ended("sandbox", 137, reason="OOMKilled")],
    initContainerStatuses=VERIFIED,
)
STARTING = pod(phase="Pending", conditions=[SCHEDULED])


def snapshot(of: Sandbox | None = None, pod: Any = None, **more: Any) -> SandboxSnapshot:
    base: dict[str, Any] = {"sandbox": of or sandbox(), "served": True, "pod": pod}
    return SandboxSnapshot(**{**base, **more})


def image(reason: str, *, node_after: float = 0) -> dict[str, Any]:
    since = (NOW + timedelta(seconds=node_after)).isoformat()
    scheduled = {**SCHEDULED, "lastTransitionTime": since}
    return pod(conditions=[scheduled], containerStatuses=[waiting("sandbox", reason)])


def table() -> dict[str, tuple[SandboxSnapshot, float]]:
    """Name -> (snapshot, seconds after NOW)."""
    unschedulable = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "Insufficient cpu",
    }
    had_pod = sandbox(status={"podUID": "p"})
    crash = {**waiting("proxy", "CrashLoopBackOff"), "lastState": {"terminated": {"exitCode": 3}}}
    rules = pod(phase="Failed", initContainerStatuses=[ended("egress-rules", 1, message="no nft")])
    early = pod(
        phase="Pending",
        conditions=[SCHEDULED],
        initContainerStatuses=[ended("egress-rules", 1, message=LACKS)],
    )
    verify = pod(
        phase="Failed",
        initContainerStatuses=[ended("egress-rules", 0), ended("egress-verify", 1, message="DNS")],
    )
    freeze = ended("egress-verify", 128, reason="StartError", message="runc: unable to freeze")
    frozen = pod(phase="Failed", initContainerStatuses=[ended("egress-rules", 0), freeze])
    late = pod(
        phase="Failed",
        initContainerStatuses=VERIFIED,
        containerStatuses=[ended("sandbox", 128, reason="StartError", message="runc: no")],
    )
    tried = sandbox(status={"podUID": "p"})
    sidecar = pod(
        phase="Pending",
        conditions=[SCHEDULED],
        initContainerStatuses=[
            ended("egress-rules", 0),
            ended("proxy", 128, reason="StartError", message="runc: unable to freeze"),
        ],
    )
    sidecar["spec"] = {"initContainers": [{"name": "proxy", "restartPolicy": "Always"}]}
    given_up = sandbox(
        status={
            "conditions": [
                {
                    "type": "Ready",
                    "status": "False",
                    "reason": "ContainerNotCreated",
                    "message": "container sandbox was not started: StartError Another pod is made.",
                    "lastTransitionTime": NOW.isoformat(),
                }
            ]
        }
    )
    going = pod(terminating=True, phase="Pending", conditions=[SCHEDULED])
    ran = sandbox(status={"podUID": "p", "startedTime": NOW.isoformat()})
    return {
        "check not started": (snapshot(pod=frozen, record="Pending"), 9),
        "check not started, by hand": (snapshot(sandbox(held=False), frozen), 9),
        "check not started, deleted": (
            snapshot(
                tried, {**frozen, **pod(terminating=True, **frozen["status"])}, record="Pending"
            ),
            9,
        ),
        "sidecar not started": (snapshot(pod=sidecar, record="Pending"), 9),
        "not started, deleted, its end unseen": (snapshot(given_up, going, record="Pending"), 9),
        "deleted by somebody": (snapshot(tried, going, record="Pending"), 9),
        "check not started, late": (snapshot(pod=frozen, record="Pending"), 181),
        "check not started, store down": (snapshot(pod=frozen), 9),
        "sandbox not started": (snapshot(pod=late, record="Pending"), 9),
        "sandbox not started after it ran": (snapshot(ran, late, record="Pending"), 9),
        "new": (snapshot(), 0),
        "pending": (snapshot(pod=pod(phase="Pending")), 1),
        "starting": (snapshot(pod=STARTING), 1),
        "unschedulable": (snapshot(pod=pod(conditions=[unschedulable])), 1),
        "no image": (snapshot(pod=image("ErrImagePull")), 1),
        "no image, again": (snapshot(pod=image("ImagePullBackOff")), 46),
        "no image, by hand": (snapshot(sandbox(held=False), image("ErrImagePull")), 46),
        "no image, late node": (snapshot(pod=image("ErrImagePull", node_after=30)), 46),
        "never image": (snapshot(pod=image("ErrImageNeverPull")), 1),
        "bad image": (snapshot(pod=image("InvalidImageName")), 0),
        "config error": (snapshot(pod=image("CreateContainerConfigError")), 1),
        "config error, again": (snapshot(pod=image("CreateContainerConfigError")), 46),
        "rules, before the phase says so": (snapshot(pod=early, record="Pending"), 0),
        "crashes": (
            snapshot(pod=pod(conditions=[SCHEDULED], initContainerStatuses=[crash])),
            1,
        ),
        "ready": (snapshot(pod=READY, record="Ready"), 5),
        "killed": (snapshot(pod=KILLED, record="Ready"), 9),
        "killed, by hand": (
            snapshot(
                sandbox(held=False, status={"podUID": "p", "startedTime": "2026-11-21T09:00:00Z"}),
                pod=KILLED,
            ),
            9,
        ),
        "terminating": (snapshot(pod={**READY, **pod(terminating=True)}, record="Ready"), 9),
        "gone": (snapshot(had_pod, record="Ready"), 9),
        "gone, record lost": (snapshot(had_pod, record="Lost"), 9),
        "gone, store down": (snapshot(had_pod, last_pod=KILLED), 9),
        "timeout": (snapshot(pod=STARTING, record="Pending"), 181),
        "rules": (snapshot(pod=rules, record="Pending"), 2),
        "verify": (snapshot(pod=verify, record="Pending"), 2),
        "suspended": (snapshot(sandbox(operatingMode="Suspended"), record="Ready"), 2),
        "suspending": (snapshot(sandbox(operatingMode="Suspended"), READY, record="Ready"), 2),
        "foreign": (snapshot(pod=pod(owner="somebody")), 2),
        "no environment": (snapshot(missing_environment="big"), 2),
        "no environment, late": (snapshot(missing_environment="big"), 181),
        "no config map": (snapshot(missing_config_map="ConfigMap 'x' does not exist"), 2),
        "invalid": (snapshot(invalid="spec.environment.image: no"), 2),
        "refused": (snapshot(refused="exceeded quota", refused_at=NOW), 2),
        "refused, again": (snapshot(refused="exceeded quota", refused_at=NOW), 16),
        "expired": (snapshot(sandbox(ttlSecondsAfterCreation=10)), 10),
        "deleting": (snapshot(sandbox(deleted=True), READY), 2),
        "not served": (snapshot(served=False), 2),
    }


def plan_of(name: str) -> SandboxPlan:
    snap, age = table()[name]
    return reconcile_sandbox(snap, NOW + timedelta(seconds=age))


def found(plan: SandboxPlan) -> dict[str, str]:
    assert plan.status is not None
    return {c.type: c.reason for c in plan.status.conditions}


@pytest.mark.parametrize(
    ("name", "ready", "mark", "creates", "deletes"),
    [
        ("check not started", "ContainerNotCreated", "Pending", False, True),
        ("check not started, by hand", "ContainerNotCreated", None, False, True),
        ("check not started, deleted", "ContainerNotCreated", "Pending", False, False),
        ("sidecar not started", "Starting", "Pending", False, False),
        ("not started, deleted, its end unseen", "ContainerNotCreated", "Pending", False, False),
        ("deleted by somebody", "PodLost", "Lost", False, False),
        ("check not started, late", "ContainerNotCreated", "Failed", False, False),
        ("check not started, store down", "ContainerNotCreated", "Failed", False, False),
        ("sandbox not started", "ContainerNotCreated", "Pending", False, True),
        ("sandbox not started after it ran", "ContainerNotCreated", "Lost", False, False),
        ("new", "Pending", "Pending", True, False),
        ("pending", "Pending", "Pending", False, False),
        ("unschedulable", "Unschedulable", "Pending", False, False),
        ("no image", "ImageUnavailable", "Pending", False, False),
        ("no image, again", "ImageUnavailable", "Failed", False, True),
        ("no image, by hand", "ImageUnavailable", None, False, False),
        ("no image, late node", "ImageUnavailable", "Pending", False, False),
        ("never image", "ImageUnavailable", "Failed", False, True),
        ("bad image", "ImageUnavailable", "Failed", False, True),
        ("config error", "ContainerNotCreated", "Pending", False, False),
        ("config error, again", "ContainerNotCreated", "Failed", False, True),
        ("rules, before the phase says so", "EgressNotEnforced", "Failed", False, False),
        ("crashes", "Crashed", "Pending", False, False),
        ("ready", "Ready", None, False, False),
        ("killed", "PodLost", "Lost", False, False),
        ("killed, by hand", "PodLost", None, False, True),
        ("terminating", "PodLost", "Lost", False, False),
        ("gone", "PodLost", "Lost", False, False),
        ("gone, record lost", "PodLost", None, False, False),
        ("gone, store down", "PodLost", "Lost", False, False),
        ("timeout", "StartupTimeout", "Failed", False, True),
        ("rules", "EgressNotEnforced", "Failed", False, False),
        ("verify", "EgressNotEnforced", "Failed", False, False),
        ("suspended", "Suspended", "Lost", False, False),
        ("suspending", "Suspended", "Lost", False, True),
        ("foreign", "ForeignPod", "Failed", False, False),
        ("no environment", "EnvironmentNotFound", "Pending", False, False),
        ("no environment, late", "EnvironmentNotFound", "Failed", False, False),
        ("invalid", "InvalidSpec", "Failed", False, False),
        ("refused", "PodRefused", "Pending", False, False),
        ("refused, again", "PodRefused", "Pending", True, False),
        ("expired", "Expired", None, False, False),
        ("deleting", "Deleting", None, False, False),
        ("not served", "NamespaceNotServed", None, False, False),
    ],
)
def test_plans(name: str, ready: str, mark: str | None, creates: bool, deletes: bool) -> None:
    plan = plan_of(name)
    assert found(plan)["Ready"] == ready
    assert (plan.mark.state if plan.mark else None) == mark
    assert plan.create_pod is creates
    assert (plan.delete_pod is not None) is deletes
    assert plan.delete_self is (name == "expired")


def test_every_documented_reason_is_reached_and_no_other() -> None:
    reached: dict[str, set[str]] = {str(kind): set() for kind in REASONS["Sandbox"]}
    for name in table():
        for kind, reason in found(plan_of(name)).items():
            reached[kind].add(reason)
    documented = {str(kind): {str(r) for r in rs} for kind, rs in REASONS["Sandbox"].items()}
    assert reached == documented


def test_a_written_status_is_quiet() -> None:
    for name, (snap, age) in table().items():
        now = NOW + timedelta(seconds=age)
        status = reconcile_sandbox(snap, now).status
        written = snap.sandbox.model_copy(update={"status": status})
        again = SandboxSnapshot(**{**vars(snap), "sandbox": written})
        if name not in ("new", "refused, again"):
            assert reconcile_sandbox(again, now).status is None, name


@pytest.mark.parametrize("record", ["Failed", "Lost"])
def test_a_record_never_comes_back(record: Any) -> None:
    for name, (snap, age) in table().items():
        again = SandboxSnapshot(**{**vars(snap), "record": record})
        plan = reconcile_sandbox(again, NOW + timedelta(seconds=age))
        assert plan.mark is None, name


def test_a_ready_record_is_only_ever_lost() -> None:
    for name, (snap, age) in table().items():
        again = SandboxSnapshot(**{**vars(snap), "record": "Ready"})
        plan = reconcile_sandbox(again, NOW + timedelta(seconds=age))
        assert plan.mark is None or plan.mark.state == "Lost", name


def test_the_cause_stays_while_and_after_the_pod_goes() -> None:
    why = {"record": "Failed", "record_reason": "StartupTimeout", "record_message": "no image"}
    had_pod = sandbox(status={"podUID": "p"})
    for left in (pod(terminating=True), None):
        plan = reconcile_sandbox(snapshot(had_pod, left, **why), NOW)
        assert plan.status is not None
        (ready,) = [c for c in plan.status.conditions if c.type == "Ready"]
        assert (ready.reason, ready.message) == ("StartupTimeout", "no image")


def test_what_is_lost_says_why_and_what_follows() -> None:
    mark = plan_of("killed").mark
    assert mark is not None
    assert "OOMKilled" in mark.message
    assert "empty sandbox" in mark.message
    mark = plan_of("gone, store down").mark
    assert mark is not None
    assert "OOMKilled" in mark.message


def test_no_foreign_pod_is_ever_deleted() -> None:
    for snap, age in table().values():
        foreign = SandboxSnapshot(**{**vars(snap), "pod": pod(owner="somebody")})
        assert reconcile_sandbox(foreign, NOW + timedelta(seconds=age)).delete_pod is None


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (LACKS, "FeatureMissing: The node lacks it: Operation not supported. (missing: reject in"),
        ('{"reason":"NftMissing","message":"no nft"}', "NftMissing: no nft"),
        ('{"probe":"DNS","ok":false}\n{"reason":"NotEnforced","message":"open"}', "NotEnforced: open"),
        ("Killed", "Error (exit code 1): Killed"),
        ('{"reason": "cut off', "Error (exit code 1): {"),
        ("[" * 3000, "Error (exit code 1): [["),
        (None, "Error (exit code 1)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("container", ["egress-rules", "egress-verify"])
def test_egress_enforced_carries_what_the_check_found(
    container: str, message: str | None, said: str
) -> None:
    of = pod(phase="Failed", initContainerStatuses=[ended(container, 1, message=message)])
    plan = reconcile_sandbox(snapshot(pod=of, record="Pending"), NOW)
    assert plan.status is not None
    (egress,) = [c for c in plan.status.conditions if c.type == "EgressEnforced"]
    assert egress.status == "False"
    assert said in egress.message
    assert plan.mark is not None
    assert said in plan.mark.message, "Claude reads the same"


def test_a_check_that_was_not_started_found_nothing() -> None:
    plan = plan_of("check not started")
    assert found(plan)["EgressEnforced"] == "Pending"
    assert plan.mark is not None
    assert "container egress-verify was not started: StartError" in plan.mark.message
    assert "unable to freeze" in plan.mark.message


def test_a_pod_that_was_not_started_is_followed_by_another() -> None:
    snap, age = table()["check not started, deleted"]
    now = NOW + timedelta(seconds=age)
    status = reconcile_sandbox(snap, now).status
    assert status is not None
    written = snap.sandbox.model_copy(update={"status": status})
    for record in ("Pending", None):
        plan = reconcile_sandbox(snapshot(written, None, record=record), now)
        assert plan.create_pod
    # Control: one that had started, or of which nobody knows, is not.
    assert not reconcile_sandbox(snapshot(snap.sandbox, None, record="Pending"), now).create_pod


def test_it_looks_again_when_a_cause_becomes_final() -> None:
    assert plan_of("no image").requeue_after == 44
    assert plan_of("unschedulable").requeue_after == 179
    mark = plan_of("no image, again").mark
    assert mark is not None
    assert "ImagePullBackOff: so it is" in mark.message


def test_a_ready_sandbox_does_not_fail_by_patience() -> None:
    """An image that is pulled again for a restarted sidecar is no failed start."""
    plan = reconcile_sandbox(snapshot(pod=image("ErrImagePull"), record="Ready"), NOW)
    assert (plan.mark, plan.delete_pod) == (None, None)
