"""What to do next for one AgentSession: a pure function from a snapshot and the time to a plan.

Called by `controller.sessions` for each key that its queue hands out, as often as needed: same snapshot,
same plan. Which side is right when they differ: the log about what happened, the spec about what is
wanted, the status about nothing (it is only written, but for the id of an adopted session).
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from cowhand.api.v1alpha1 import AgentSessionStatus, OperatingMode
from cowhand.api.v1alpha1.reasons import SessionCondition, TurnComplete
from cowhand.reconcile import conditions
from cowhand.reconcile.session_snapshot import (
    Absent,
    LogView,
    Loss,
    Send,
    SessionPlan,
    SessionSnapshot,
    Unreachable,
    Wish,
)
from cowhand.reconcile.session_status import (
    lost_tail,
    session_status,
    wanted_budget,
    wanted_mode,
)

FINALIZER_PATIENCE: Final = timedelta(seconds=54)
"""After so long a dead store no longer holds up the deletion of an object; the last try takes the rest of a
minute."""

STATUS_INTERVAL: Final = timedelta(seconds=30)
"""Counters alone change the status at most so often."""

RETRY_S: Final = 5.0
"""How soon to look again for something that nobody will announce."""

_WANTED: Final = frozenset({"Pending", "Requested", "Ready"})
_COUNTERS: Final = frozenset({"last_seq", "usage", "tool_calls"})


def reconcile_session(snap: SessionSnapshot, now: datetime) -> SessionPlan:
    """The plan for one AgentSession."""
    if snap.deleting:
        return _end(snap, now)
    status = session_status(snap, now)
    if not snap.served:
        return _write(snap, status, now, SessionPlan())
    log = snap.log
    if isinstance(log, Unreachable):
        return _write(snap, status, now, SessionPlan(requeue_after=RETRY_S))
    if isinstance(log, Absent):
        return _write(snap, status, now, _start(snap))
    plan = SessionPlan(add_finalizer=not snap.finalized)
    lost = lost_tail(snap)
    if lost is not None:
        # The log speaks of an older time than the cluster: neither hands nor modes follow from it.
        return _write(snap, status, now, _stop(snap, log, lost, plan))
    if not log.ended:
        plan = _steer(snap, log, plan)
    plan = _hands(snap, log, status, now, plan)
    return _write(snap, status, now, _expire(snap, status, now, plan))


def _start(snap: SessionSnapshot) -> SessionPlan:
    """The session is not in the log: make it, if everything that it needs is there."""
    if snap.adopted or snap.session.status.session_id:
        return SessionPlan()
    if snap.waits:
        return SessionPlan(requeue_after=RETRY_S)
    if snap.refusal is not None:
        return SessionPlan()
    return SessionPlan(add_finalizer=not snap.finalized, create=True)


def _stop(
    snap: SessionSnapshot, log: LogView, lost: tuple[int, int], plan: SessionPlan
) -> SessionPlan:
    """The end of the log was lost: stop the session, until a person accepts exactly that loss."""
    seen, position = lost
    if log.regressed is None:
        return replace(plan, regress=seen)
    accepted = snap.refusal is None and snap.session.spec.accept_log_position == position
    return replace(plan, accept=position if accepted else None)


def _steer(snap: SessionSnapshot, log: LogView, plan: SessionPlan) -> SessionPlan:
    """Mode, budget and messages that the spec asks for and the log does not have."""
    if snap.refusal is not None:
        return plan  # nobody knows what an unreadable spec asks for
    mode = wanted_mode(snap)
    if snap.adopted:
        # An object that was made again owns the run of the one before; its messages were sent then.
        return replace(plan, mode=None if log.mode == mode else mode)
    send = tuple(
        Send(message.id, message.content)
        for message in snap.session.spec.messages or ()
        if message.id not in snap.delivered
    )
    budget = wanted_budget(snap.session.spec)
    return replace(
        plan,
        mode=None if log.mode == mode else mode,
        budget=None if log.budget == budget else budget,
        send=send,
    )


def _hands(
    snap: SessionSnapshot,
    log: LogView,
    status: AgentSessionStatus,
    now: datetime,
    plan: SessionPlan,
) -> SessionPlan:
    """Sandboxes that should exist, those that should not, and records of those that are gone."""
    if snap.sandboxes is None:
        return plan
    there = {(view.hand, view.instance): view for view in snap.sandboxes if view.ours}
    current: set[tuple[str, int]] = set()
    wishes: list[Wish] = []
    losses: list[Loss] = []
    requeue = plan.requeue_after
    for hand in () if log.ended or snap.adopted else log.document.get("hands") or ():
        key = (str(hand["name"]), int(hand["instance"]))
        current.add(key)
        record = snap.records.get(key)
        if hand["state"] not in _WANTED or record in ("Failed", "Lost"):
            continue
        if key not in there and record is not None:
            losses.append(_deleted(*key))
            continue
        mode, left = _sandbox_mode(snap, log, status, now, key[0])
        if left is not None:
            requeue = left if requeue is None else min(requeue, left)
        if key not in there or there[key].mode != mode:
            wishes.append(Wish(*key, mode))
    surplus = [view for key, view in there.items() if _is_surplus(snap, log, key, current)]
    return replace(
        plan,
        losses=tuple(losses),
        wishes=tuple(wishes),
        drop=tuple((view.name, view.uid) for view in surplus),
        requeue_after=requeue,
    )


def _is_surplus(
    snap: SessionSnapshot, log: LogView, key: tuple[str, int], current: set[tuple[str, int]]
) -> bool:
    """Whether a Sandbox may go: the log says so, by its end or by a later instance of the hand.

    That the log does not name it is no evidence: a log that lost its end, or was read from a server that is
    behind, does not either. Once a person has accepted such a loss, what the log names is all there is.
    """
    if log.ended or snap.adopted or log.accepted:
        return key not in current
    hand, instance = key
    return any(name == hand and newer > instance for name, newer in current)


def _deleted(hand: str, instance: int) -> Loss:
    text = (
        "The sandbox was deleted: its files and processes are gone. The next tool call starts a new, "
        "empty sandbox."
    )
    return Loss(hand, instance, "Lost", "SandboxDeleted", text)


def _sandbox_mode(
    snap: SessionSnapshot, log: LogView, status: AgentSessionStatus, now: datetime, hand: str
) -> tuple[OperatingMode, float | None]:
    """Mode of a hand's Sandbox, and the seconds until its idle timeout if that is ahead."""
    if snap.session.spec.operating_mode == "Suspended":
        return "Suspended", None
    timeout = snap.idle_timeouts.get(hand)
    turn = conditions.find(status.conditions, SessionCondition.TURN_COMPLETE)
    if timeout is None or turn is None or turn.status != "True" or log.waiting:
        return "Running", None
    left = (turn.last_transition_time + timedelta(seconds=timeout) - now).total_seconds()
    return ("Suspended", None) if left <= 0 else ("Running", left)


def _expire(
    snap: SessionSnapshot, status: AgentSessionStatus, now: datetime, plan: SessionPlan
) -> SessionPlan:
    """Delete the object when its time to live after its last turn is over."""
    ttl = snap.session.spec.ttl_seconds_after_finished
    turn = conditions.find(status.conditions, SessionCondition.TURN_COMPLETE)
    if ttl is None or turn is None or turn.status != "True" or plan.send:
        return plan
    if turn.reason == TurnComplete.REQUIRES_ACTION:
        return plan
    left = (turn.last_transition_time + timedelta(seconds=ttl) - now).total_seconds()
    if left <= 0:
        return replace(plan, delete_self=True)
    return _sooner(plan, left)


def _end(snap: SessionSnapshot, now: datetime) -> SessionPlan:
    """The object is being deleted: end the log, drop the Sandboxes, let go within a minute."""
    drop = tuple((view.name, view.uid) for view in snap.sandboxes or () if view.ours)
    if not snap.finalized:
        return SessionPlan(drop=drop)
    log = snap.log
    if isinstance(log, Absent) or (isinstance(log, LogView) and log.state == "closed"):
        return SessionPlan(drop=drop, remove_finalizer=True)
    if isinstance(log, LogView):
        return SessionPlan(drop=drop, close=True, remove_finalizer=True)
    since = snap.session.metadata.deletion_timestamp
    assert since is not None, "only called while the object is being deleted"
    left = (since + FINALIZER_PATIENCE - now).total_seconds()
    if left <= 0:
        return SessionPlan(drop=drop, remove_finalizer=True)
    plan = SessionPlan(drop=drop, requeue_after=min(RETRY_S, left))
    return _write(snap, session_status(snap, now), now, plan)


def _write(
    snap: SessionSnapshot, status: AgentSessionStatus, now: datetime, plan: SessionPlan
) -> SessionPlan:
    """Write the status if more than counters changed, or counters did and the interval is over."""
    old = snap.session.status
    if status == old:
        return plan
    counters = {name: getattr(old, name) for name in _COUNTERS}
    if status.model_copy(update=counters) != old or snap.written is None:
        return replace(plan, status=status)
    left = (snap.written + STATUS_INTERVAL - now).total_seconds()
    if left <= 0:
        return replace(plan, status=status)
    return _sooner(plan, left)


def _sooner(plan: SessionPlan, seconds: float) -> SessionPlan:
    old = plan.requeue_after
    return replace(plan, requeue_after=seconds if old is None else min(old, seconds))
