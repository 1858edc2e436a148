"""Status of an AgentSession: conditions and projection of the log, each from one snapshot.

Used by `reconcile.session` alone. The order of the checks in `_ready` is the order in which a person would
have to remove the obstacles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, Literal

from cowhand.api.v1alpha1 import (
    AgentSessionSpec,
    AgentSessionStatus,
    ErrorStatus,
    HandStatus,
    PinnedAgent,
    Usage,
)
from cowhand.api.v1alpha1.reasons import (
    ContextProfileFits,
    SessionCondition,
    SessionReady,
    SessionReconciling,
    SessionStalled,
    Succeeded,
    TurnComplete,
)
from cowhand.reconcile import conditions
from cowhand.reconcile.conditions import Observed
from cowhand.reconcile.session_snapshot import Absent, LogView, SessionSnapshot, Unreachable
from cowhand.reconcile.store_profile import store_durable

_TURN: Final[Mapping[str, tuple[TurnComplete, Succeeded]]] = {
    "end_turn": (TurnComplete.END_TURN, Succeeded.IDLE),
    "requires_action": (TurnComplete.REQUIRES_ACTION, Succeeded.REQUIRES_ACTION),
    "interrupted": (TurnComplete.INTERRUPTED, Succeeded.INTERRUPTED),
    "budget_reached": (TurnComplete.BUDGET_REACHED, Succeeded.BUDGET_REACHED),
    "refusal": (TurnComplete.REFUSED, Succeeded.REFUSED),
    "retries_exhausted": (TurnComplete.ERROR, Succeeded.ERROR),
}
_FAILED: Final = frozenset({Succeeded.ERROR, Succeeded.REFUSED, Succeeded.BUDGET_REACHED})

_TURN_TEXT: Final[Mapping[TurnComplete, str]] = {
    TurnComplete.END_TURN: "The model ended its turn.",
    TurnComplete.INTERRUPTED: "The turn was interrupted; send a message to go on.",
    TurnComplete.BUDGET_REACHED: "spec.budget is used up.",
    TurnComplete.REFUSED: "The model refused to go on.",
}


_LIMITS: Final = {
    "max_tokens": "maxTokens",
    "max_tool_calls": "maxToolCalls",
    "max_cost_microusd": "maxCost",
    "max_duration_s": "maxDurationSeconds",
}
"""Limits of a budget in the words of the log -> members of spec.budget."""


def lost_tail(snap: SessionSnapshot) -> tuple[int, int] | None:
    """(position that was seen, last position that is left) of a log that lost its end, None for a whole one.

    The log says so itself once it was stopped; before that, somebody has seen more than there is: the status of
    this object, or this process.
    """
    log = snap.log
    if not isinstance(log, LogView) or log.ended:
        return None
    if log.regressed is not None:
        return log.regressed
    seen = max(snap.session.status.last_seq, snap.seen)
    return (seen, log.last_seq) if seen > max(log.last_seq, log.accepted) else None


def session_status(snap: SessionSnapshot, now: datetime) -> AgentSessionStatus:
    """The whole status. What the log cannot tell now stays as it stands in the old status."""
    old = snap.session.status
    observed = [item for item in (ready(snap), _reconciling(snap), _stalled(snap)) if item]
    observed += [_turn_complete(snap), _succeeded(snap)]
    if snap.served:
        down = isinstance(snap.log, Unreachable) and not snap.log.full
        observed.append(store_durable(snap.store, ready(snap).message if down else ""))
    fits = _context_profile_fits(snap)
    if fits is not None:
        observed.append(fits)
    merged = conditions.merge(
        old.conditions, observed, generation=snap.session.metadata.generation, now=now
    )
    update: dict[str, Any] = {
        "conditions": merged,
        "observed_generation": snap.session.metadata.generation,
    }
    if isinstance(snap.log, LogView):
        update |= _projection(snap, snap.log)
    elif snap.adopted:
        update["session_id"] = snap.session_id
    return old.model_copy(update=update)


def _projection(snap: SessionSnapshot, log: LogView) -> dict[str, Any]:
    """The fields that mirror the log."""
    document = log.document
    usage, error = document.get("usage"), document.get("error")
    ids = [message.id for message in snap.session.spec.messages or ()]
    waiting = {(view.hand, view.instance): view.why for view in snap.sandboxes or () if view.ours}
    return {
        "session_id": snap.session_id,
        "state": log.state,
        "mode": "Suspended" if log.mode == "suspended" else "Running",
        "stop_reason": stop_reason(log) or "",
        # What was seen stays seen, until the loss is accepted.
        "last_seq": max(log.last_seq, snap.session.status.last_seq)
        if lost_tail(snap)
        else log.last_seq,
        "turns": int(document.get("turns") or 0),
        "usage": Usage(
            input_tokens=usage.get("input_tokens", 0),
            output_tokens=usage.get("output_tokens", 0),
            cache_read_input_tokens=usage.get("cache_read_input_tokens", 0),
            cache_creation_input_tokens=usage.get("cache_creation_input_tokens", 0),
            cost=_dollars(document.get("cost_nanousd")),
        )
        if usage
        else None,
        "tool_calls": int(document.get("tool_calls") or 0),
        "time_to_first_token_milliseconds": document.get("ttft_ms"),
        "agent": snap.pinned or snap.session.status.agent or PinnedAgent(),
        "delivered_messages": tuple(one for one in ids if one in snap.delivered),
        "hands": tuple(
            HandStatus(
                name=hand["name"],
                instance=hand["instance"],
                sandbox_name=hand.get("sandbox") or "",
                state=hand["state"],
                message=waiting.get((hand["name"], int(hand["instance"])), "")[:4096],
            )
            for hand in document.get("hands") or ()
        ),
        "error": ErrorStatus(type=str(error["type"])[:128], message=str(error["message"])[:4096])
        if error
        else None,
    }


def _dollars(nano: int | None) -> str:
    """Billionths of a dollar as dollars, rounded up to a millionth; empty for an unknown cost."""
    return "" if nano is None else f"{Decimal(-(-int(nano) // 1000)) / 1_000_000:.6f}"


def stop_reason(log: LogView) -> str | None:
    """Type of the last stop reason, None while a turn runs or before the first."""
    reason = log.document.get("stop_reason")
    return str(reason["type"]) if reason else None


def ready(snap: SessionSnapshot) -> Observed:
    """Ready: the session is in the log and does what its spec asks."""
    kind = SessionCondition.READY
    log = snap.log
    if snap.deleting:
        return Observed(kind, "False", SessionReady.DELETING, "The log is being ended.")
    if not snap.served:
        return Observed(kind, "False", SessionReady.NAMESPACE_NOT_SERVED, _not_served(snap))
    if isinstance(log, Unreachable):
        text = f"{log.message}; it is tried again."
        full, down = SessionReady.QUOTA_EXCEEDED, SessionReady.STORE_UNAVAILABLE
        return Observed(kind, "False", full if log.full else down, text)
    if isinstance(log, Absent):
        return _not_in_log(snap)
    return _in_log(snap, log)


def _not_served(snap: SessionSnapshot) -> str:
    namespace = snap.session.metadata.namespace
    return f"Namespace {namespace} is not a tenant: add it to the chart's value tenants."


def _not_in_log(snap: SessionSnapshot) -> Observed:
    kind = SessionCondition.READY
    if snap.adopted:
        text = "This run was made before and its log is gone. Set spec.runID for a new run."
        return Observed(kind, "True", SessionReady.ALREADY_RAN, text)
    if snap.session.status.session_id:
        text = (
            f"The store does not know {snap.session_id}: its data was lost or replaced. Bring it back "
            "with `cowhand restore`, or make a new AgentSession to run it again."
        )
        return Observed(kind, "False", SessionReady.SESSION_LOST, text)
    if snap.missing_agent is not None:
        text = f"Agent {snap.missing_agent!r} does not exist in this namespace: create it."
        return Observed(kind, "False", SessionReady.AGENT_NOT_FOUND, text)
    if snap.missing_environments:
        named = ", ".join(repr(name) for name in snap.missing_environments)
        text = f"Environment {named} does not exist in this namespace: create it."
        return Observed(kind, "False", SessionReady.ENVIRONMENT_NOT_FOUND, text)
    if snap.missing_source is not None:
        text = f"There is no session {snap.missing_source!r} in this namespace to fork: name one that is."
        return Observed(kind, "False", SessionReady.FORK_SOURCE_NOT_FOUND, text)
    if snap.refusal is not None:
        reason = SessionReady(snap.refusal.reason)
        return Observed(kind, "False", reason, snap.refusal.message)
    return Observed(kind, "Unknown", SessionReady.PENDING, "The session is being created.")


def _in_log(snap: SessionSnapshot, log: LogView) -> Observed:
    kind = SessionCondition.READY
    if snap.adopted:
        text = (
            f"The log has this run already, as {snap.session_id}: nothing ran again. Set "
            "spec.runID for a new run."
        )
        unsent = [m.id for m in snap.session.spec.messages or () if m.id not in snap.delivered]
        if unsent:
            text += f" Not sent, because that run has ended: messages {', '.join(unsent)}."
        return Observed(kind, "True", SessionReady.ALREADY_RAN, text)
    lost = lost_tail(snap)
    if lost is not None:
        seen, position = lost
        text = (
            f"The store has the log up to position {position}, and {seen} was seen: its end was lost. "
            "Nothing runs. Bring the missing events back with `cowhand restore`, or let the session go "
            f"on without them: set spec.acceptLogPosition to {position}. What ran after it may run again."
        )
        return Observed(kind, "False", SessionReady.LOG_ROLLED_BACK, text)
    if log.ended:
        text = "The session has ended; its log can be read."
        return Observed(kind, "True", SessionReady.TERMINATED, text)
    if log.mode == "suspended":
        text = "No model request and no tool call starts while spec.operatingMode is Suspended."
        return Observed(kind, "True", SessionReady.SUSPENDED, text)
    return Observed(kind, "True", SessionReady.ACCEPTED, f"Session {snap.session_id} may run.")


def _reconciling(snap: SessionSnapshot) -> Observed | None:
    """Reconciling: present while something is on its way."""
    reason = _on_its_way(snap)
    if reason is None:
        return None
    return Observed(SessionCondition.RECONCILING, "True", reason, ready(snap).message)


def _on_its_way(snap: SessionSnapshot) -> SessionReconciling | None:
    if snap.deleting:
        return SessionReconciling.DELETING
    if not snap.served or _doomed(snap) is not None:
        return None
    if isinstance(snap.log, Unreachable):
        full = snap.log.full
        return SessionReconciling.QUOTA_EXCEEDED if full else SessionReconciling.STORE_UNAVAILABLE
    if isinstance(snap.log, Absent):
        if snap.adopted:
            return None
        if snap.waits:
            return SessionReconciling.WAITING_FOR_REFERENCE
        return SessionReconciling.CREATING
    if snap.log.ended or snap.adopted:
        return None
    if snap.log.mode != wanted_mode(snap):
        return SessionReconciling.CHANGING_MODE
    if snap.refusal is None and snap.log.budget != wanted_budget(snap.session.spec):
        return SessionReconciling.CHANGING_BUDGET
    if any(message.id not in snap.delivered for message in snap.session.spec.messages or ()):
        return SessionReconciling.DELIVERING
    return None


def wanted_mode(snap: SessionSnapshot) -> Literal["running", "suspended"]:
    """Mode that the spec asks for, in the words of the log."""
    return "suspended" if snap.session.spec.operating_mode == "Suspended" else "running"


def wanted_budget(spec: AgentSessionSpec) -> dict[str, int]:
    """Limits that the spec asks for, in the words of the log; empty for none."""
    if spec.budget is None:
        return {}
    cost = spec.budget.max_cost
    pairs = {
        "max_tokens": spec.budget.max_tokens,
        "max_tool_calls": spec.budget.max_tool_calls,
        "max_cost_microusd": None if cost is None else int(Decimal(cost) * 1_000_000),
        "max_duration_s": spec.budget.max_duration_seconds,
    }
    return {key: value for key, value in pairs.items() if value is not None}


def _doomed(snap: SessionSnapshot) -> SessionStalled | None:
    """Why trying again cannot help, or None."""
    if not snap.served:
        return SessionStalled.NAMESPACE_NOT_SERVED
    if isinstance(snap.log, Absent) and not snap.adopted:
        if snap.session.status.session_id:
            return SessionStalled.SESSION_LOST
        if snap.refusal is not None and not snap.waits:
            return SessionStalled(snap.refusal.reason)
    if lost_tail(snap) is not None and not snap.adopted:
        return SessionStalled.LOG_ROLLED_BACK
    return None


def _stalled(snap: SessionSnapshot) -> Observed | None:
    """Stalled: present when trying again cannot help."""
    reason = None if snap.deleting else _doomed(snap)
    if reason is None:
        return None
    return Observed(SessionCondition.STALLED, "True", reason, ready(snap).message)


def _turn_complete(snap: SessionSnapshot) -> Observed:
    """TurnComplete: True only while the session is idle after a turn and nothing waits."""
    kind = SessionCondition.TURN_COMPLETE
    pending = Observed(kind, "False", TurnComplete.PENDING, "No turn has started yet.")
    log = snap.log
    if not isinstance(log, LogView):
        return conditions.keep(snap.session.status.conditions, kind, pending)
    reason = stop_reason(log) or ""
    running = log.state in ("running", "rescheduling")
    if reason == "suspended" or (log.mode == "suspended" and (running or log.waiting)):
        text = "The session was suspended before its turn ended."
        return Observed(kind, "False", TurnComplete.SUSPENDED, text)
    if not log.ended and (running or log.waiting):
        return Observed(kind, "False", TurnComplete.RUNNING, "A turn is being worked on.")
    if reason in _TURN:
        word = _TURN[reason][0]
        return Observed(kind, "True", word, _turn_text(word, log))
    if log.ended:
        return Observed(kind, "True", TurnComplete.ERROR, "The session ended before its turn did.")
    return pending


def _turn_text(word: TurnComplete, log: LogView) -> str:
    if word is TurnComplete.REQUIRES_ACTION:
        return _waits_for(log.document.get("pending") or ())
    if word is TurnComplete.ERROR:
        error = log.document.get("error") or {}
        return f"{error.get('type', 'error')}: {error.get('message', 'retries were used up')}"
    if word is TurnComplete.BUDGET_REACHED:
        limit = (log.document.get("stop_reason") or {}).get("budget")
        return f"spec.budget.{_LIMITS[limit]} is used up." if limit in _LIMITS else _TURN_TEXT[word]
    return _TURN_TEXT[word]


def _waits_for(pending: Sequence[Mapping[str, Any]]) -> str:
    """Whom a turn waits for, and with which command they answer."""
    custom: list[str] = []
    approvals: list[str] = []
    for call in pending:
        group = custom if call.get("kind") == "custom_tool" else approvals
        group.append(f"{call['name']} ({call['tool_use_id']})")
    parts = []
    if approvals:
        listed = ", ".join(approvals)
        parts.append(f"Waits for an approval: {listed}. Use `cowhand approve` or `cowhand deny`.")
    if custom:
        listed = ", ".join(custom)
        parts.append(f"Waits for its client's result of: {listed}. Use `cowhand answer`.")
    return " ".join(parts) or "Waits for an answer."


def _context_profile_fits(snap: SessionSnapshot) -> Observed | None:
    """ContextProfileFits: what the harness said of its profile; None before it has chosen one."""
    kind, log = SessionCondition.CONTEXT_PROFILE_FITS, snap.log
    if not isinstance(log, LogView):
        old = conditions.find(snap.session.status.conditions, kind)
        return None if old is None else Observed(old.type, old.status, old.reason, old.message)
    context = log.document.get("context")
    if not context:
        return None
    warning = str(context.get("warning") or "")
    if warning:
        return Observed(kind, "False", ContextProfileFits.NOT_MADE_FOR_MODEL, warning)
    text = f"Context profile {context.get('profile')!r} was made for the session's model."
    return Observed(kind, "True", ContextProfileFits.MADE_FOR_MODEL, text)


def _succeeded(snap: SessionSnapshot) -> Observed:
    """Succeeded: Unknown while the run can go on."""
    kind = SessionCondition.SUCCEEDED
    pending = Observed(kind, "Unknown", Succeeded.PENDING, "No turn has started yet.")
    log = snap.log
    if not isinstance(log, LogView):
        return conditions.keep(snap.session.status.conditions, kind, pending)
    turn = _turn_complete(snap)
    reason = stop_reason(log)
    known = _TURN.get(reason or "")
    if log.ended:
        return _ended(reason, turn.message)
    if turn.status == "True" and known is not None:
        status = "False" if known[1] in _FAILED else "Unknown"
        return Observed(kind, "False" if status == "False" else "Unknown", known[1], turn.message)
    if turn.reason == TurnComplete.SUSPENDED:
        return Observed(kind, "Unknown", Succeeded.SUSPENDED, turn.message)
    if turn.reason == TurnComplete.RUNNING:
        return Observed(kind, "Unknown", Succeeded.RUNNING, turn.message)
    return pending


def _ended(reason: str | None, message: str) -> Observed:
    kind = SessionCondition.SUCCEEDED
    if reason == "end_turn":
        text = "The session was ended after a complete turn."
        return Observed(kind, "True", Succeeded.COMPLETED, text)
    known = _TURN.get(reason or "")
    if known is not None and known[1] in _FAILED:
        return Observed(kind, "False", known[1], message)
    text = "The session was ended before its turn was complete."
    return Observed(kind, "False", Succeeded.TERMINATED, text)
