"""What to do next for one Sandbox: a pure function from a snapshot and the time to a plan.

Called by `controller.sandboxes`. Two kinds of Sandbox: a session's (it has a holder) lives once, and when
its pod is gone the hand record says Lost and the session asks for the next instance; one that somebody
applied by hand gets a new pod. Nothing here needs the store: a dead store delays only the hand record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final, Literal

from cowhand.api.v1alpha1 import Sandbox, SandboxStatus
from cowhand.api.v1alpha1.reasons import (
    SandboxCondition,
    SandboxReady,
    SandboxReconciling,
    SandboxStalled,
)
from cowhand.reconcile import conditions, pod_state
from cowhand.reconcile.conditions import Observed
from cowhand.reconcile.pod_state import Cause

RETRY_S: Final = 5.0
"""How soon to look again for something that nobody will announce."""

REFUSED_RETRY_S: Final = 15.0
"""How soon to try again after the API server refused a pod."""

ANOTHER: Final = " Another pod is made."
GONE: Final = "The sandbox is gone, with its files and processes. The next tool call starts a new, empty sandbox."

_STALLED: Final[Mapping[SandboxReady, SandboxStalled]] = {
    SandboxReady.INVALID_SPEC: SandboxStalled.INVALID_SPEC,
    SandboxReady.EGRESS_NOT_ENFORCED: SandboxStalled.EGRESS_NOT_ENFORCED,
    SandboxReady.STARTUP_TIMEOUT: SandboxStalled.STARTUP_TIMEOUT,
    SandboxReady.FOREIGN_POD: SandboxStalled.FOREIGN_POD,
    SandboxReady.NAMESPACE_NOT_SERVED: SandboxStalled.NAMESPACE_NOT_SERVED,
}
_GIVEN_UP: Final[Mapping[SandboxReady, SandboxStalled]] = {
    SandboxReady.IMAGE_UNAVAILABLE: SandboxStalled.IMAGE_UNAVAILABLE,
    SandboxReady.CONTAINER_NOT_CREATED: SandboxStalled.CONTAINER_NOT_CREATED,
}
_WAITING: Final = frozenset({SandboxReady.ENVIRONMENT_NOT_FOUND, SandboxReady.CONFIG_MAP_NOT_FOUND})
_STARTING: Final = frozenset(
    {
        SandboxReady.PENDING,
        SandboxReady.STARTING,
        SandboxReady.UNSCHEDULABLE,
        SandboxReady.IMAGE_UNAVAILABLE,
        SandboxReady.CONTAINER_NOT_CREATED,
        SandboxReady.CRASHED,
        SandboxReady.POD_REFUSED,
    }
)


@dataclass(frozen=True)
class SandboxSnapshot:
    """Everything that one decision looks at.

    Attributes:
        sandbox: the resource.
        served: its namespace is a tenant.
        pod: the pod of its name, whoever owns it, or None.
        startup_timeout_s: of its environment.
        missing_environment: name of the Environment that does not exist, or None.
        missing_config_map: what is missing of a ConfigMap, in words, or None.
        invalid: why no pod can be made of the spec, or None.
        refused: what the API server said when the pod was created last, or None.
        refused_at: when that was.
        record: state of its hand record; None: there is none, or the store does not answer.
        record_reason: reason in the record.
        record_message: text in the record.
        last_pod: the newest pod that we saw of it before it went away, or None.
    """

    sandbox: Sandbox
    served: bool
    pod: Mapping[str, Any] | None
    startup_timeout_s: int = 180
    missing_environment: str | None = None
    missing_config_map: str | None = None
    invalid: str | None = None
    refused: str | None = None
    refused_at: datetime | None = None
    record: Literal["Pending", "Ready", "Failed", "Lost"] | None = None
    record_reason: str = ""
    record_message: str = ""
    last_pod: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Mark:
    """What the hand record should say; only for Sandboxes with a holder. Ready is the broker's word."""

    state: Literal["Pending", "Failed", "Lost"]
    reason: str
    message: str


@dataclass(frozen=True)
class SandboxPlan:
    """What to do.

    Attributes:
        create_pod: make the pod.
        delete_pod: uid of the pod to delete, or None.
        delete_self: the time to live is over.
        mark: what the hand record should say, or None to leave it.
        status: the status to write, None if it stands there already.
        requeue_after: seconds until the next look, or None.
    """

    create_pod: bool = False
    delete_pod: str | None = None
    delete_self: bool = False
    mark: Mark | None = None
    status: SandboxStatus | None = None
    requeue_after: float | None = None


@dataclass(frozen=True)
class _Verdict:
    """Outcome of the checks: why it is not Ready (None: it is), and what to do about it.

    `anew`: this pod counts as if it had never been; the next look, without it, makes one.
    """

    cause: Cause | None
    create: bool = False
    delete: bool = False
    mark: Literal["Pending", "Failed", "Lost"] | None = None
    stopping: bool = False
    doomed: bool = False
    anew: bool = False
    requeue_after: float | None = None


def reconcile_sandbox(snap: SandboxSnapshot, now: datetime) -> SandboxPlan:
    """The plan for one Sandbox."""
    verdict = _judge(snap, now)
    status = _status(snap, verdict, now)
    requeue, delete_self = verdict.requeue_after, False
    if (left := _time_to_live(snap, now)) is not None:
        delete_self = left <= 0
        requeue = left if requeue is None else min(requeue, left)
    return SandboxPlan(
        create_pod=verdict.create,
        delete_pod=snap.pod["metadata"]["uid"] if verdict.delete and snap.pod else None,
        delete_self=delete_self and snap.served,
        mark=_mark(snap, verdict),
        status=None if status == snap.sandbox.status else status,
        requeue_after=None if delete_self else requeue,
    )


def _judge(snap: SandboxSnapshot, now: datetime) -> _Verdict:
    """The first thing that stands between this Sandbox and being Ready."""
    meta, spec = snap.sandbox.metadata, snap.sandbox.spec
    if not snap.served:
        text = f"Namespace {meta.namespace} is not a tenant: add it to the chart's value tenants."
        return _Verdict(Cause(SandboxReady.NAMESPACE_NOT_SERVED, text))
    if meta.deletion_timestamp is not None:
        return _Verdict(
            Cause(SandboxReady.DELETING, "The sandbox is being deleted."), stopping=True
        )
    if (left := _time_to_live(snap, now)) is not None and left <= 0:
        text = "spec.ttlSecondsAfterCreation is over."
        return _Verdict(Cause(SandboxReady.EXPIRED, text), stopping=True)
    if snap.pod is not None and not pod_state.owned_by(snap.pod, meta.uid):
        text = (
            f"A pod named {meta.name} exists that this Sandbox does not own: it is left alone. Delete "
            "it, or give the Sandbox another name."
        )
        return _Verdict(Cause(SandboxReady.FOREIGN_POD, text), mark="Failed", requeue_after=RETRY_S)
    if spec.operating_mode == "Suspended":
        return _suspended(snap)
    if snap.pod is None:
        return _without_pod(snap, now)
    return _with_pod(snap, snap.pod, now)


def _time_to_live(snap: SandboxSnapshot, now: datetime) -> float | None:
    """Seconds until the Sandbox is over, None for never."""
    meta, ttl = snap.sandbox.metadata, snap.sandbox.spec.ttl_seconds_after_creation
    if ttl is None or meta.creation_timestamp is None or meta.deletion_timestamp is not None:
        return None
    return (meta.creation_timestamp + timedelta(seconds=ttl) - now).total_seconds()


def _suspended(snap: SandboxSnapshot) -> _Verdict:
    cause = Cause(SandboxReady.SUSPENDED, "spec.operatingMode is Suspended: there is no pod.")
    if snap.pod is None:
        return _Verdict(cause, mark="Lost")
    return _Verdict(
        cause, delete=not pod_state.is_terminating(snap.pod), mark="Lost", stopping=True
    )


def _without_pod(snap: SandboxSnapshot, now: datetime) -> _Verdict:
    """There is no pod: make it, unless this was a session's and had one before."""
    meta, spec = snap.sandbox.metadata, snap.sandbox.spec
    if spec.holder is not None and (
        snap.record in ("Failed", "Lost") or snap.sandbox.status.pod_uid
    ):
        return _lost(snap)
    if snap.invalid is not None:
        return _Verdict(Cause(SandboxReady.INVALID_SPEC, snap.invalid), mark="Failed")
    if snap.missing_environment is not None:
        text = (
            f"Environment {snap.missing_environment!r} does not exist in this namespace: create it."
        )
        return _waits(snap, Cause(SandboxReady.ENVIRONMENT_NOT_FOUND, text), now)
    if snap.missing_config_map is not None:
        return _waits(snap, Cause(SandboxReady.CONFIG_MAP_NOT_FOUND, snap.missing_config_map), now)
    if snap.refused is not None:
        cause = Cause(SandboxReady.POD_REFUSED, snap.refused)
        mark = _waits(snap, cause, now).mark
        left = REFUSED_RETRY_S - (now - (snap.refused_at or now)).total_seconds()
        if left > 0:
            return _Verdict(cause, mark=mark, requeue_after=left)
        return _Verdict(cause, create=True, mark=mark, requeue_after=REFUSED_RETRY_S)
    assert meta.uid, "a Sandbox that the API server gave us has a uid"
    cause = Cause(SandboxReady.PENDING, "The pod is being made.")
    return _Verdict(cause, create=True, mark="Pending")


def _waits(snap: SandboxSnapshot, cause: Cause, now: datetime) -> _Verdict:
    """Something outside is missing; after the startup timeout the session is told."""
    since = snap.sandbox.metadata.creation_timestamp or now
    late = now - since >= timedelta(seconds=snap.startup_timeout_s)
    return _Verdict(cause, mark="Failed" if late else "Pending", requeue_after=RETRY_S)


def _lost(snap: SandboxSnapshot) -> _Verdict:
    """A session's sandbox whose pod is gone: it stays gone."""
    if snap.record in ("Failed", "Lost") and snap.record_message:
        # The record says why; what we see now is only that there is nothing left to see.
        known = snap.record_reason in {str(reason) for reason in SandboxReady}
        reason = SandboxReady(snap.record_reason) if known else SandboxReady.POD_LOST
        text = snap.record_message.removesuffix(GONE).rstrip()
        return _Verdict(Cause(reason, text), doomed=True)
    text = "The pod was deleted."
    if snap.last_pod is not None and pod_state.has_failed(snap.last_pod):
        text = pod_state.end_cause(snap.last_pod).message
    return _Verdict(Cause(SandboxReady.POD_LOST, text), mark="Lost", doomed=True)


def _with_pod(snap: SandboxSnapshot, pod: Mapping[str, Any], now: datetime) -> _Verdict:
    held = snap.sandbox.spec.holder is not None
    if (unstarted := _another_try(snap, pod, now)) is not None:
        return unstarted
    if held and pod_state.is_terminating(pod) and snap.record in ("Failed", "Lost"):
        return replace(_lost(snap), stopping=True)
    if pod_state.is_terminating(pod):
        cause = Cause(SandboxReady.POD_LOST, "The pod is being deleted.")
        return _Verdict(cause, mark="Lost", stopping=True, doomed=held)
    if pod_state.has_failed(pod):
        return _failed(snap, pod)
    if pod_state.is_ready(pod):
        return _Verdict(None)
    cause = pod_state.start_cause(pod)
    if snap.record == "Ready" or _was_ready(snap, pod):
        return _Verdict(cause)
    limit = timedelta(seconds=snap.startup_timeout_s)
    left = (pod_state.created(pod) + limit - now).total_seconds()
    if cause.patience is not None:
        sure = (pod_state.scheduled_at(pod) + cause.patience - now).total_seconds()
        if sure <= 0:
            delete = held and cause.reason is not SandboxReady.EGRESS_NOT_ENFORCED
            return _Verdict(cause, delete=delete, mark="Failed", doomed=True)
        left = min(left, sure)
    if left > 0:
        return _Verdict(cause, mark="Pending", requeue_after=left)
    text = f"The pod was not ready within {snap.startup_timeout_s} s: {cause.message}"
    # A pod that starts after its session was told that it failed must not come to life.
    return _Verdict(
        Cause(SandboxReady.STARTUP_TIMEOUT, text), delete=held, mark="Failed", doomed=True
    )


def _was_ready(snap: SandboxSnapshot, pod: Mapping[str, Any]) -> bool:
    """This very pod was Ready before."""
    status = snap.sandbox.status
    return status.started_time is not None and status.pod_uid == pod["metadata"]["uid"]


def _another_try(snap: SandboxSnapshot, pod: Mapping[str, Any], now: datetime) -> _Verdict | None:
    """A pod whose node could not start a container: nothing ran in it, so that another one may take its place."""
    cause = pod_state.failed_to_start(pod) or _given_up(snap, pod)
    if cause is None or _was_ready(snap, pod) or not _in_time(snap, now):
        return None
    if snap.sandbox.spec.holder is not None and snap.record != "Pending":
        return (
            None  # only what the store itself says counts: the session may have been given this pod
        )
    cause = replace(cause, message=f"{cause.message}{ANOTHER}")
    return _Verdict(cause, delete=not pod_state.is_terminating(pod), mark="Pending", anew=True)


def _given_up(snap: SandboxSnapshot, pod: Mapping[str, Any]) -> Cause | None:
    """A pod that an earlier look had deleted for another one, whatever its containers did meanwhile."""
    status = snap.sandbox.status
    ready = next((c for c in status.conditions if c.type == SandboxCondition.READY), None)
    if ready is None or ready.reason != SandboxReady.CONTAINER_NOT_CREATED or status.pod_uid:
        return None
    if not pod_state.is_terminating(pod):
        return None
    return Cause(SandboxReady.CONTAINER_NOT_CREATED, ready.message.removesuffix(ANOTHER))


def _in_time(snap: SandboxSnapshot, now: datetime) -> bool:
    """Within the startup timeout since the Sandbox was made."""
    since = snap.sandbox.metadata.creation_timestamp or now
    return now - since < timedelta(seconds=snap.startup_timeout_s)


def _failed(snap: SandboxSnapshot, pod: Mapping[str, Any]) -> _Verdict:
    """The pod has ended. A session's stays for people to look at; one made by hand is replaced."""
    cause = pod_state.end_cause(pod)
    held = snap.sandbox.spec.holder is not None
    if cause.reason is SandboxReady.EGRESS_NOT_ENFORCED:
        return _Verdict(cause, mark="Failed", doomed=True)
    if not (snap.record == "Ready" or _was_ready(snap, pod)):
        return _Verdict(cause, mark="Failed", doomed=True)
    return _Verdict(cause, delete=not held, mark="Lost", doomed=held, stopping=not held)


def _mark(snap: SandboxSnapshot, verdict: _Verdict) -> Mark | None:
    """The hand record that follows; never away from Failed or Lost."""
    if snap.sandbox.spec.holder is None or verdict.mark is None or verdict.cause is None:
        return None
    if snap.record in ("Failed", "Lost") or (snap.record == "Ready" and verdict.mark != "Lost"):
        return None
    text = verdict.cause.message
    if verdict.mark == "Lost":
        text = f"{text} {GONE}" if text.endswith(".") else f"{text}. {GONE}"
    return Mark(verdict.mark, str(verdict.cause.reason), text)


def _status(snap: SandboxSnapshot, verdict: _Verdict, now: datetime) -> SandboxStatus:
    """The whole status, from this look alone."""
    old, meta = snap.sandbox.status, snap.sandbox.metadata
    pod = snap.pod if snap.pod and pod_state.owned_by(snap.pod, meta.uid) else None
    pod = None if verdict.anew else pod
    observed = [_ready(verdict), pod_state.egress(pod)]
    if (doomed := _stalled(verdict)) is not None:
        observed.append(doomed)
    elif (moving := _reconciling(verdict)) is not None:
        observed.append(moving)
    merged = conditions.merge(old.conditions, observed, generation=meta.generation, now=now)
    uid = str(pod["metadata"]["uid"]) if pod else ""
    if not uid and snap.sandbox.spec.holder is not None and not verdict.anew:
        uid = (
            old.pod_uid
        )  # that it had a pod is what keeps a session's sandbox from getting another
    started = pod_state.ready_since(pod) if pod else None
    return SandboxStatus(
        conditions=merged,
        observed_generation=meta.generation,
        pod_name=meta.name if pod else "",
        pod_uid=uid,
        pod_ip=str((pod.get("status") or {}).get("podIP", "")) if pod else "",
        started_time=started or (old.started_time if uid and uid == old.pod_uid else None),
    )


def _ready(verdict: _Verdict) -> Observed:
    if verdict.cause is None:
        text = "The pod is ready: egress is enforced, proxy and sandboxd answer."
        return Observed(SandboxCondition.READY, "True", SandboxReady.READY, text)
    return Observed(SandboxCondition.READY, "False", verdict.cause.reason, verdict.cause.message)


def _stalled(verdict: _Verdict) -> Observed | None:
    if verdict.cause is None or verdict.stopping:
        return None
    reason = _STALLED.get(verdict.cause.reason)
    if reason is None and verdict.doomed:
        reason = _GIVEN_UP.get(verdict.cause.reason, SandboxStalled.POD_LOST)
    if reason is None:
        return None
    return Observed(SandboxCondition.STALLED, "True", reason, verdict.cause.message)


def _reconciling(verdict: _Verdict) -> Observed | None:
    if verdict.cause is None:
        return None
    reason = None
    if verdict.stopping:
        reason = SandboxReconciling.STOPPING
    elif verdict.cause.reason in _WAITING:
        reason = SandboxReconciling.WAITING_FOR_REFERENCE
    elif verdict.cause.reason in _STARTING:
        reason = SandboxReconciling.STARTING
    if reason is None:
        return None
    return Observed(SandboxCondition.RECONCILING, "True", reason, verdict.cause.message)
