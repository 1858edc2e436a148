"""Reading of resources and logs into the values that decisions look at.

Used by `controller.sessions` and `controller.sandboxes`; tolerant where an object was written by somebody
else, so that one bad object never stops the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

from pydantic import ValidationError

from cowhand.api.v1alpha1 import (
    AgentSession,
    AgentSessionSpec,
    AgentSessionStatus,
    Condition,
    ObjectMeta,
    Sandbox,
    SandboxSpec,
    SandboxStatus,
)
from cowhand.api.v1alpha1.reasons import SandboxCondition
from cowhand.kube.client import Manifest
from cowhand.reconcile.session_snapshot import LogView, SandboxView
from cowhand.session import events
from cowhand.session.events import Event
from cowhand.session.log import SessionLog, SessionState

S = TypeVar("S", AgentSessionStatus, SandboxStatus)

TAIL: Final = 32
"""Events that are read to see whether input waits."""

_INPUT: Final = frozenset(
    {events.USER_MESSAGE, events.USER_TOOL_CONFIRMATION, events.USER_CUSTOM_TOOL_RESULT}
)
_LABEL: Final = "cowhand.dev/session-id"


def explain(error: ValidationError) -> str:
    """The first violation as `field: message`."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}"


def _status(kind: type[S], raw: Manifest) -> S:
    """The status, empty where it cannot be read: it is only an observation."""
    try:
        return kind.model_validate(raw.get("status") or {})
    except ValidationError:
        return kind()


def read_session(raw: Manifest) -> tuple[AgentSession, str | None]:
    """The resource, and why its spec cannot be read (then the spec is empty)."""
    meta = ObjectMeta.model_validate(raw["metadata"])
    status = _status(AgentSessionStatus, raw)
    try:
        spec, problem = AgentSessionSpec.model_validate(raw.get("spec") or {}), None
    except ValidationError as err:
        spec, problem = AgentSessionSpec.model_construct(), f"spec.{explain(err)}"
    return AgentSession.model_construct(metadata=meta, spec=spec, status=status), problem


def read_sandbox(raw: Manifest) -> tuple[Sandbox, str | None]:
    """The resource, and why its spec cannot be read (then the spec is empty)."""
    meta = ObjectMeta.model_validate(raw["metadata"])
    status = _status(SandboxStatus, raw)
    try:
        spec, problem = SandboxSpec.model_validate(raw.get("spec") or {}), None
    except ValidationError as err:
        spec, problem = SandboxSpec.model_construct(), f"spec.{explain(err)}"
    return Sandbox.model_construct(metadata=meta, spec=spec, status=status), problem


def conditions(raw: Manifest) -> tuple[Condition, ...]:
    """The conditions of any of our resources."""
    found = (raw.get("status") or {}).get("conditions") or ()
    return tuple(Condition.model_validate(item) for item in found)


def sandbox_view(raw: Manifest, session_id: str) -> SandboxView | None:
    """A Sandbox that carries the label of a session; None if it has no holder."""
    spec = raw.get("spec") or {}
    holder = spec.get("holder")
    if holder is None:
        return None
    return SandboxView(
        name=raw["metadata"]["name"],
        uid=raw["metadata"]["uid"],
        hand=holder["hand"],
        instance=int(holder["instance"]),
        mode="Suspended" if spec.get("operatingMode") == "Suspended" else "Running",
        ours=holder["sessionID"] == session_id,
        why=_not_ready(raw),
    )


def _not_ready(raw: Manifest) -> str:
    """Reason and message of a Sandbox's Ready, empty if it is True or nobody has looked yet."""
    for item in _status(SandboxStatus, raw).conditions:
        if item.type == SandboxCondition.READY and item.status != "True":
            return f"{item.reason}: {item.message}"
    return ""


def session_selector(session_id: str) -> str:
    """Label selector of what belongs to a session."""
    return f"{_LABEL}={session_id}"


async def log_view(log: SessionLog, state: SessionState) -> LogView:
    """The session as the log has it, including whether input waits for a turn."""
    waiting = False
    if state.state == "idle" and state.next_seq > 1:
        waiting = await _waiting(log, state)
    return LogView(
        state=state.state,
        mode=state.mode,
        last_seq=state.next_seq - 1,
        document=state.status,
        waiting=waiting,
        budget=state.budget,
        regressed=state.regressed,
        accepted=state.accepted,
    )


async def _waiting(log: SessionLog, state: SessionState) -> bool:
    """Input stands after the last `session.status_idle`."""
    end = state.next_seq - 1
    while end > 0:
        start = max(1, end - TAIL + 1)
        answer = _scan(await log.get_events(state.meta.session_id, start, end))
        if answer is not None:
            return answer
        end = start - 1
    return False


def _scan(found: Sequence[Event]) -> bool | None:
    """From the newest backwards: True for input, False for the end of a turn, None for neither."""
    for event in reversed(found):
        if event.type in _INPUT:
            return True
        if event.type == events.STATUS_IDLE:
            return False
    return None
