"""What a sandbox pod's status means: ready, on its way, or broken, and the real cause in words.

Pure reading of the dict that the API server gave; the exit of each init container says whether the
egress rules hold (desired/sandbox_pod.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from cowhand.api.v1alpha1.reasons import EgressEnforced, SandboxCondition, SandboxReady
from cowhand.desired import sandbox_pod
from cowhand.reconcile.conditions import Observed

Pod = Mapping[str, Any]

_IMAGE: Final = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
    }
)


_NEVER: Final = frozenset({"InvalidImageName", "ErrImageNeverPull"})
"""Waits that end only with another spec."""

_CONFIG: Final = frozenset({"CreateContainerConfigError", "CreateContainerError"})

_NEVER_RAN: Final = frozenset({"StartError", "ContainerCannotRun"})
"""Ends of containers whose process was never started: the runtime failed, not what should have run in them."""

PATIENCE: Final = timedelta(seconds=45)
"""After so long the kubelet has tried about three times to pull an image or to create a container (its pauses
are 10, 20, 40 s). The status does not count attempts."""


@dataclass(frozen=True)
class Cause:
    """Why a pod is not usable: a reason of Ready, and the text.

    Attributes:
        patience: how long to wait from the moment the pod got its node before this cause is final; None:
            it may pass at any time.
    """

    reason: SandboxReady
    message: str
    patience: timedelta | None = None


def owned_by(pod: Pod, uid: str) -> bool:
    """The pod's controller is the object with this uid."""
    return any(
        ref.get("uid") == uid and ref.get("controller")
        for ref in pod["metadata"].get("ownerReferences") or ()
    )


def is_ready(pod: Pod) -> bool:
    """Condition Ready of the pod."""
    return _condition(pod, "Ready").get("status") == "True"


def is_terminating(pod: Pod) -> bool:
    """Somebody asked for its deletion."""
    return bool(pod["metadata"].get("deletionTimestamp"))


def has_failed(pod: Pod) -> bool:
    """The pod has ended, or its sandbox container has: it never restarts."""
    if (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded"):
        return True
    return any(
        status["name"] == sandbox_pod.SANDBOX and "terminated" in (status.get("state") or {})
        for status in _statuses(pod, "containerStatuses")
    )


def failed_to_start(pod: Pod) -> Cause | None:
    """Why a pod ended for a reason of its node alone, before anything of ours ran; another pod may do better.

    A sidecar is tried again by the kubelet: the pod goes on.
    """
    spec = pod.get("spec") or {}
    sidecars = {
        container["name"]
        for container in spec.get("initContainers") or ()
        if container.get("restartPolicy") == "Always"
    }
    for kind in ("initContainerStatuses", "containerStatuses"):
        for container in _statuses(pod, kind):
            if container["name"] in sidecars:
                continue
            end = (container.get("state") or {}).get("terminated") or {}
            if end.get("reason") in _NEVER_RAN:
                text = f"container {container['name']} was not started: {_last_words(end)}"
                return Cause(SandboxReady.CONTAINER_NOT_CREATED, text)
    return None


def created(pod: Pod) -> datetime:
    """When the pod was made."""
    return datetime.fromisoformat(pod["metadata"]["creationTimestamp"])


def scheduled_at(pod: Pod) -> datetime:
    """When it got its node, or when it was made if nobody says."""
    raw = _condition(pod, "PodScheduled")
    if raw.get("status") != "True" or not raw.get("lastTransitionTime"):
        return created(pod)
    return datetime.fromisoformat(raw["lastTransitionTime"])


def ready_since(pod: Pod) -> datetime | None:
    """When it became Ready, None if it is not."""
    raw = _condition(pod, "Ready")
    if raw.get("status") != "True" or not raw.get("lastTransitionTime"):
        return None
    return datetime.fromisoformat(raw["lastTransitionTime"])


def egress(pod: Pod | None) -> Observed:
    """Condition EgressEnforced, from the init containers that load and check the rules."""
    kind = SandboxCondition.EGRESS_ENFORCED
    if pod is None:
        return Observed(kind, "Unknown", EgressEnforced.PENDING, "There is no pod.")
    ends = {
        status["name"]: status["state"]["terminated"]
        for status in _statuses(pod, "initContainerStatuses")
        if "terminated" in (status.get("state") or {})
        and status["state"]["terminated"].get("reason") not in _NEVER_RAN
    }
    rules, verify = ends.get(sandbox_pod.RULES), ends.get(sandbox_pod.VERIFY)
    if rules is not None and rules.get("exitCode") != 0:
        text = f"The egress rules could not be loaded: {_finding(rules)}"
        return Observed(kind, "False", EgressEnforced.RULES_FAILED, text)
    if verify is not None and verify.get("exitCode") != 0:
        text = f"The check from inside the sandbox failed: {_finding(verify)}"
        return Observed(kind, "False", EgressEnforced.VERIFY_FAILED, text)
    if verify is not None:
        text = "A check under the sandbox's user id reached nothing but its proxy."
        return Observed(kind, "True", EgressEnforced.VERIFIED, text)
    return Observed(kind, "Unknown", EgressEnforced.PENDING, "The check has not run yet.")


def end_cause(pod: Pod) -> Cause:
    """Why a pod that has ended ended."""
    enforced = egress(pod)
    if enforced.status == "False":
        return Cause(SandboxReady.EGRESS_NOT_ENFORCED, enforced.message)
    if (unstarted := failed_to_start(pod)) is not None:
        return unstarted
    status = pod.get("status") or {}
    if status.get("reason"):
        text = f"{status['reason']}: {status.get('message', '')}".rstrip(": ")
        return Cause(SandboxReady.POD_LOST, text)
    for kind in ("containerStatuses", "initContainerStatuses"):
        for container in _statuses(pod, kind):
            end = (container.get("state") or {}).get("terminated")
            if end is not None and (end.get("exitCode") != 0 or kind == "containerStatuses"):
                text = f"container {container['name']} ended: {_last_words(end)}"
                return Cause(SandboxReady.POD_LOST, text)
    return Cause(SandboxReady.POD_LOST, str(status.get("message") or "the pod ended"))


def start_cause(pod: Pod) -> Cause:
    """Why a pod that has not ended is not Ready (yet)."""
    enforced = egress(pod)
    if enforced.status == "False":
        # The pod does not restart what failed: it is over, though its phase does not say so yet.
        return Cause(SandboxReady.EGRESS_NOT_ENFORCED, enforced.message, timedelta())
    scheduled = _condition(pod, "PodScheduled")
    if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable":
        return Cause(SandboxReady.UNSCHEDULABLE, str(scheduled.get("message", "")))
    if scheduled.get("status") != "True":
        return Cause(SandboxReady.PENDING, "The pod waits for a node.")
    return _container_cause(pod)


def _container_cause(pod: Pod) -> Cause:
    """What the first container that waits says."""
    both = [*_statuses(pod, "initContainerStatuses"), *_statuses(pod, "containerStatuses")]
    for container in both:
        waiting = (container.get("state") or {}).get("waiting")
        if waiting is None or waiting.get("reason") in (
            None,
            "PodInitializing",
            "ContainerCreating",
        ):
            continue
        reason = str(waiting["reason"])
        text = f"container {container['name']}: {reason}: {waiting.get('message', '')}"
        if reason in _IMAGE:
            patience = timedelta() if reason in _NEVER else PATIENCE
            return Cause(SandboxReady.IMAGE_UNAVAILABLE, text, patience)
        if reason in _CONFIG:
            return Cause(SandboxReady.CONTAINER_NOT_CREATED, text, PATIENCE)
        if reason == "CrashLoopBackOff":
            end = (container.get("lastState") or {}).get("terminated") or {}
            return Cause(SandboxReady.CRASHED, f"{text} {_last_words(end)}".rstrip())
        return Cause(SandboxReady.STARTING, text)
    unready = [
        c["name"] for c in both if not c.get("ready") and "running" in (c.get("state") or {})
    ]
    if unready:
        return Cause(SandboxReady.STARTING, f"Running, not ready yet: {', '.join(unready)}.")
    return Cause(SandboxReady.STARTING, "The containers are starting.")


def _statuses(pod: Pod, kind: str) -> Iterator[Mapping[str, Any]]:
    yield from (pod.get("status") or {}).get(kind) or ()


def _condition(pod: Pod, kind: str) -> Mapping[str, Any]:
    for condition in (pod.get("status") or {}).get("conditions") or ():
        if condition["type"] == kind:
            found: Mapping[str, Any] = condition
            return found
    return {}


def _finding(end: Mapping[str, Any]) -> str:
    """What egress-rules or egress-verify found: the JSON line of its termination message, in words."""
    for line in reversed(str(end.get("message") or "").splitlines()):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(found, dict) or not found.get("reason"):
            continue
        text = str(found.get("message") or "no details")
        feature = str(found.get("feature") or "")
        if feature and feature not in text:
            text = f"{text} (missing: {feature})"
        return f"{found['reason']}: {text}"
    return _last_words(end)


def _last_words(end: Mapping[str, Any]) -> str:
    """Reason, exit code and message of a terminated container."""
    head = f"{end.get('reason', 'Error')} (exit code {end.get('exitCode', '?')})"
    message = str(end.get("message") or "").strip()
    return f"{head}: {message}" if message else head
