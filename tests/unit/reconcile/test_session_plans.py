"""Snapshots of an AgentSession and the plans that follow; every documented reason is reached."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cowhand.api.v1alpha1 import AgentSession
from cowhand.api.v1alpha1.reasons import REASONS
from cowhand.reconcile.session import reconcile_session
from cowhand.reconcile.session_snapshot import (
    Absent,
    LogView,
    Refusal,
    SandboxView,
    SessionPlan,
    SessionSnapshot,
    Unreachable,
)
from cowhand.reconcile.store_profile import StoreProfile

NOW = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)
SID = "sesn_" + "0" * 32
WEAK = StoreProfile("strict", "dev", True, ("0 of 1 replicas are in step with it: add replicas",))


def session(
    *, deleted: datetime | None = None, status: dict[str, Any] | None = None, **spec: Any
) -> AgentSession:
    body: dict[str, Any] = {"agent": {"model": {"id": "m"}}, "message": "hi"}
    if "messages" in spec:
        del body["message"]
    meta: dict[str, Any] = {"name": "one", "namespace": "ns", "uid": "u", "generation": 3}
    if deleted is not None:
        meta["deletionTimestamp"] = deleted.isoformat()
    return AgentSession.model_validate(
        {"metadata": meta, "spec": {**body, **spec}, "status": status or {}}
    )


def snapshot(log: Any, of: AgentSession | None = None, **more: Any) -> SessionSnapshot:
    base: dict[str, Any] = {"session": of or session(), "served": True, "session_id": SID}
    return SessionSnapshot(**{**base, "log": log, **more})


def view(reason: str | None = None, **more: Any) -> LogView:
    document: dict[str, Any] = {"stop_reason": {"type": reason} if reason else None, "turns": 1}
    document |= more.pop("document", {})
    base: dict[str, Any] = {"state": "idle", "mode": "running", "last_seq": 4}
    return LogView(**{**base, **more}, document=document)


def context(warning: str = "") -> dict[str, Any]:
    return {"context": {"profile": "reset", "warning": warning}}


def table() -> dict[str, SessionSnapshot]:
    suspended = session(operatingMode="Suspended")
    two = session(messages=[{"id": "a", "content": "x"}, {"id": "b", "content": "y"}])
    known = session(status={"sessionID": SID})
    pending = {"pending": [{"tool_use_id": "toolu_1", "name": "bash"}]}
    snaps = {
        "new": snapshot(Absent()),
        "no agent": snapshot(Absent(), missing_agent="coder"),
        "no environment": snapshot(Absent(), missing_environments=("big",)),
        "invalid": snapshot(Absent(), refusal=Refusal("InvalidSpec", "spec.agent: no")),
        "no source": snapshot(Absent(), missing_source="other"),
        "invalid fork": snapshot(Absent(), refusal=Refusal("InvalidFork", "inside a turn")),
        "too large": snapshot(Absent(), refusal=Refusal("TooLarge", "too many bytes")),
        "not served": snapshot(Absent(), served=False),
        "store down": snapshot(Unreachable("no answer")),
        "over quota": snapshot(Unreachable("over its quota", full=True)),
        "lost": snapshot(Absent(), known),
        "deleting": snapshot(Unreachable("no answer"), session(deleted=NOW)),
        "created": snapshot(view()),
        "waits": snapshot(view(waiting=True)),
        "running": snapshot(view(state="running")),
        "end_turn": snapshot(view("end_turn")),
        "requires_action": snapshot(view("requires_action", document=pending)),
        "interrupted": snapshot(view("interrupted")),
        "budget": snapshot(view("budget_reached")),
        "refusal": snapshot(view("refusal")),
        "error": snapshot(view("retries_exhausted")),
        "suspended": snapshot(view(mode="suspended", waiting=True), suspended),
        "suspending": snapshot(view(state="running"), suspended),
        "delivering": snapshot(view("end_turn"), two, delivered=frozenset({"a"})),
        "budget changed": snapshot(view("end_turn"), session(budget={"maxTokens": 5})),
        "adopted": snapshot(view("end_turn", state="closed"), adopted=True),
        "adopted, log gone": snapshot(Absent(), adopted=True),
        "ended": snapshot(view("end_turn", state="terminated")),
        "ended in mid-turn": snapshot(view(state="closed")),
        "rolled back": snapshot(view("end_turn"), session(status={"sessionID": SID, "lastSeq": 9})),
        "ended after a failure": snapshot(view("refusal", state="closed")),
        "profile": snapshot(view(document=context())),
        "other profile": snapshot(view(document=context("not made for the model 'm'"))),
        "dev": snapshot(view(), store=StoreProfile("dev", "dev")),
        "standard": snapshot(view(), store=StoreProfile("standard", "standard")),
        "strict": snapshot(view(), store=StoreProfile("strict", "strict")),
        "managed": snapshot(view(), store=StoreProfile("managed", "managed")),
        "weaker": snapshot(view(), store=WEAK),
        "weaker, store down": snapshot(Unreachable("no answer"), store=WEAK),
        "weaker, over quota": snapshot(Unreachable("over its quota", full=True), store=WEAK),
    }
    return snaps


def found(plan: SessionPlan) -> dict[str, tuple[str, str]]:
    assert plan.status is not None
    return {c.type: (c.status, c.reason) for c in plan.status.conditions}


EXPECTED: dict[str, dict[str, tuple[str, str]]] = {
    "new": {"Ready": ("Unknown", "Pending"), "Reconciling": ("True", "Creating")},
    "no agent": {"Ready": ("False", "AgentNotFound")},
    "no source": {
        "Ready": ("False", "ForkSourceNotFound"),
        "Reconciling": ("True", "WaitingForReference"),
    },
    "invalid fork": {"Ready": ("False", "InvalidFork"), "Stalled": ("True", "InvalidFork")},
    "invalid": {"Ready": ("False", "InvalidSpec"), "Stalled": ("True", "InvalidSpec")},
    "not served": {"Stalled": ("True", "NamespaceNotServed")},
    "over quota": {"Ready": ("False", "QuotaExceeded"), "Reconciling": ("True", "QuotaExceeded")},
    "lost": {"Ready": ("False", "SessionLost"), "Stalled": ("True", "SessionLost")},
    "created": {"TurnComplete": ("False", "Pending"), "Succeeded": ("Unknown", "Pending")},
    "waits": {"TurnComplete": ("False", "Running"), "Succeeded": ("Unknown", "Running")},
    "end_turn": {"TurnComplete": ("True", "EndTurn"), "Succeeded": ("Unknown", "Idle")},
    "requires_action": {"TurnComplete": ("True", "RequiresAction")},
    "refusal": {"TurnComplete": ("True", "Refused"), "Succeeded": ("False", "Refused")},
    "error": {"TurnComplete": ("True", "Error"), "Succeeded": ("False", "Error")},
    "budget": {"Succeeded": ("False", "BudgetReached")},
    "suspended": {"Ready": ("True", "Suspended"), "TurnComplete": ("False", "Suspended")},
    "suspending": {"Reconciling": ("True", "ChangingMode")},
    "delivering": {"Reconciling": ("True", "Delivering")},
    "budget changed": {"Reconciling": ("True", "ChangingBudget")},
    "adopted": {"Ready": ("True", "AlreadyRan"), "Succeeded": ("True", "Completed")},
    "adopted, log gone": {"Ready": ("True", "AlreadyRan")},
    "ended": {"Ready": ("True", "Terminated"), "Succeeded": ("True", "Completed")},
    "ended in mid-turn": {"TurnComplete": ("True", "Error"), "Succeeded": ("False", "Terminated")},
    "rolled back": {"Ready": ("False", "LogRolledBack"), "Stalled": ("True", "LogRolledBack")},
    "ended after a failure": {"Succeeded": ("False", "Refused")},
    "profile": {"ContextProfileFits": ("True", "MadeForModel")},
    "other profile": {
        "ContextProfileFits": ("False", "NotMadeForModel"),
        "Ready": ("True", "Accepted"),
    },
    "dev": {"StoreDurable": ("True", "Dev")},
    "standard": {"StoreDurable": ("True", "Standard")},
    "strict": {"StoreDurable": ("True", "Strict")},
    "managed": {"StoreDurable": ("True", "Managed")},
    "weaker": {"StoreDurable": ("False", "WeakerThanDemanded"), "Ready": ("True", "Accepted")},
    "weaker, store down": {
        "StoreDurable": ("Unknown", "StoreUnavailable"),
        "Reconciling": ("True", "StoreUnavailable"),
    },
    "weaker, over quota": {
        "StoreDurable": ("False", "WeakerThanDemanded"),
        "Reconciling": ("True", "QuotaExceeded"),
    },
    "store down": {
        "StoreDurable": ("Unknown", "StoreUnavailable"),
        "Reconciling": ("True", "StoreUnavailable"),
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_conditions(name: str) -> None:
    conditions = found(reconcile_session(table()[name], NOW))
    for kind, wanted in EXPECTED[name].items():
        assert conditions[kind] == wanted
    assert ("Reconciling" in conditions) is ("Reconciling" in EXPECTED[name]) or name == "no agent"


@pytest.mark.parametrize("name", ["no agent", "no environment", "no source"])
def test_what_is_missing_is_looked_for_again(name: str) -> None:
    plan = reconcile_session(table()[name], NOW)
    assert (plan.create, plan.requeue_after) == (False, 5.0)


def test_a_fork_that_is_refused_is_not_made() -> None:
    assert not reconcile_session(table()["invalid fork"], NOW).create
    # Control: with a source that can be forked it is.
    assert reconcile_session(snapshot(Absent()), NOW).create


def test_every_documented_reason_is_reached_and_no_other() -> None:
    reached: dict[str, set[str]] = {str(kind): set() for kind in REASONS["AgentSession"]}
    for snap in table().values():
        for kind, (_, reason) in found(reconcile_session(snap, NOW)).items():
            reached[kind].add(reason)
    documented = {str(kind): {str(r) for r in rs} for kind, rs in REASONS["AgentSession"].items()}
    assert reached == documented


def test_same_snapshot_same_plan_and_a_written_status_is_quiet() -> None:
    for snap in table().values():
        plan = reconcile_session(snap, NOW)
        assert plan == reconcile_session(snap, NOW)
        written = snap.session.model_copy(update={"status": plan.status})
        again = SessionSnapshot(**{**vars(snap), "session": written, "written": NOW})
        if not (isinstance(snap.log, Absent) and plan.status and plan.status.session_id):
            assert reconcile_session(again, NOW + timedelta(seconds=1)).status is None


def test_nothing_is_created_for_what_cannot_run() -> None:
    for name, snap in table().items():
        assert reconcile_session(snap, NOW).create is (name == "new")


def test_a_profile_that_was_not_made_for_the_model_is_said_and_decides_nothing() -> None:
    warned, plain = (reconcile_session(table()[name], NOW) for name in ("other profile", "created"))
    assert warned.status is not None
    kind = "ContextProfileFits"
    text = next(c.message for c in warned.status.conditions if c.type == kind)
    assert text == "not made for the model 'm'", "the harness's own words"
    assert replace(warned, status=None) == replace(plain, status=None)
    assert kind not in found(plain), "no profile was chosen yet"
    shown = session().model_copy(update={"status": warned.status})
    away = reconcile_session(snapshot(Unreachable("no answer"), shown), NOW)
    assert found(away)[kind] == ("False", "NotMadeForModel"), "stays while nobody can look"
    fits = reconcile_session(snapshot(view(document=context()), shown, written=NOW), NOW)
    assert found(fits)[kind] == ("True", "MadeForModel")


def test_what_the_store_keeps_is_said_once_and_decides_nothing() -> None:
    weaker, plain = (reconcile_session(table()[name], NOW) for name in ("weaker", "created"))
    assert weaker.status is not None
    text = next(c.message for c in weaker.status.conditions if c.type == "StoreDurable")
    assert "strict is demanded, the store keeps dev: 0 of 1 replicas" in text
    assert replace(weaker, status=None) == replace(plain, status=None)
    assert "StoreDurable" not in found(reconcile_session(table()["not served"], NOW))
    shown = session().model_copy(update={"status": weaker.status})
    same = snapshot(view(), shown, store=WEAK, written=NOW)
    better = snapshot(view(), shown, store=StoreProfile("strict", "strict"), written=NOW)
    soon = NOW + timedelta(seconds=1)
    assert reconcile_session(same, soon).status is None
    assert reconcile_session(better, soon).status is not None, "not held back as counters are"


def test_the_finalizer_comes_before_the_session() -> None:
    plan = reconcile_session(snapshot(Absent(), finalized=False), NOW)
    assert (plan.add_finalizer, plan.create) == (True, True)


def test_transition_times_move_with_the_status_only() -> None:
    first = reconcile_session(snapshot(view(state="running")), NOW).status
    of = session().model_copy(update={"status": first})
    later = NOW + timedelta(minutes=1)
    second = reconcile_session(snapshot(view("end_turn"), of), later).status
    assert second is not None
    times = {c.type: c.last_transition_time for c in second.conditions}
    assert times["Ready"] == NOW
    assert times["TurnComplete"] == later


@pytest.mark.parametrize(
    ("log", "age", "close", "let_go"),
    [
        (view(), 0, True, True),
        (view(state="closed"), 0, False, True),
        (Absent(), 0, False, True),
        (Unreachable("x"), 53, False, False),
        (Unreachable("x"), 54, False, True),
    ],
)
def test_the_end(log: Any, age: int, close: bool, let_go: bool) -> None:
    snap = snapshot(log, session(deleted=NOW))
    plan = reconcile_session(snap, NOW + timedelta(seconds=age))
    assert (plan.close, plan.remove_finalizer) == (close, let_go)
    if not let_go:
        assert plan.requeue_after is not None
        assert plan.requeue_after <= 54 - age


def hands(state: str, instance: int = 1) -> dict[str, Any]:
    return {"hands": [{"name": "h", "instance": instance, "state": state, "sandbox": ""}]}


def sandbox(instance: int = 1, **more: Any) -> SandboxView:
    base: dict[str, Any] = {"name": f"h-{instance}", "uid": f"u{instance}", "hand": "h"}
    return SandboxView(**{**base, "instance": instance, "mode": "Running", **more})


@pytest.mark.parametrize(
    ("state", "record", "there", "wishes", "losses", "drops"),
    [
        ("Pending", None, (), 1, 0, 0),
        ("Pending", "Pending", (sandbox(),), 0, 0, 0),
        ("Pending", None, (sandbox(),), 0, 0, 0),
        ("Pending", "Pending", (), 0, 1, 0),
        ("Ready", "Ready", (), 0, 1, 0),
        ("Ready", "Lost", (), 0, 0, 0),
        ("Ready", "Failed", (sandbox(),), 0, 0, 0),
        ("Lost", "Lost", (sandbox(),), 0, 0, 0),
    ],
)
def test_hands(state: str, record: Any, there: Any, wishes: int, losses: int, drops: int) -> None:
    records = {("h", 1): record} if record else {}
    log = view(state="running", document=hands(state))
    plan = reconcile_session(snapshot(log, sandboxes=there, records=records), NOW)
    assert (len(plan.wishes), len(plan.losses), len(plan.drop)) == (wishes, losses, drops)


@pytest.mark.parametrize(
    ("there", "more", "dropped"),
    [
        (sandbox(1), {}, ["h-1"]),
        (sandbox(1, ours=False), {}, []),
        (sandbox(2), {}, []),
        # The log does not name it: it may have lost its end, or come from a server that is behind.
        (sandbox(7), {}, []),
        (sandbox(1, hand="other"), {}, []),
        # Now that is evidence.
        (sandbox(7), {"accepted": 4}, ["h-7"]),
        (sandbox(1, hand="other"), {"accepted": 4}, ["h-1"]),
        (sandbox(7), {"state": "closed"}, ["h-7"]),
    ],
)
def test_only_what_the_log_says_is_over_is_dropped(there: Any, more: Any, dropped: Any) -> None:
    log = view(document=hands("Ready", instance=2), **{"state": "running", **more})
    snap = snapshot(log, sandboxes=(sandbox(2), there), records={("h", 2): "Ready"})
    names = [name for name, _ in reconcile_session(snap, NOW).drop if name != "h-2"]
    assert names == dropped


def test_control_by_absence_alone_a_log_that_is_behind_takes_sandboxes_with_it(monkeypatch) -> None:
    monkeypatch.setattr(
        "cowhand.reconcile.session._is_surplus", lambda snap, log, key, current: key not in current
    )
    log = view(state="running", document=hands("Ready", instance=2))
    snap = snapshot(log, sandboxes=(sandbox(2), sandbox(7)), records={("h", 2): "Ready"})
    assert reconcile_session(snap, NOW).drop == (("h-7", "u7"),)


def test_a_hand_that_waits_says_why_in_the_status() -> None:
    log = view(state="running", document=hands("Pending"))
    waits = replace(sandbox(), why="Unschedulable: 0/3 nodes: Insufficient cpu")
    status = reconcile_session(snapshot(log, sandboxes=(waits,)), NOW).status
    assert status is not None
    assert status.hands[0].message == "Unschedulable: 0/3 nodes: Insufficient cpu"
    status = reconcile_session(snapshot(log, sandboxes=(sandbox(),)), NOW).status
    assert status is not None
    assert status.hands[0].message == ""


def test_an_ended_session_drops_its_sandboxes() -> None:
    log = view("end_turn", state="terminated", document=hands("Ready"))
    plan = reconcile_session(snapshot(log, sandboxes=(sandbox(),)), NOW)
    assert plan.drop == (("h-1", "u1"),)
    assert plan.wishes == ()


@pytest.mark.parametrize(
    ("reason", "age", "gone"),
    [("end_turn", 59, False), ("end_turn", 60, True), ("requires_action", 999, False)],
)
def test_time_to_live(reason: str, age: int, gone: bool) -> None:
    of = session(ttlSecondsAfterFinished=60)
    status = reconcile_session(snapshot(view(reason), of), NOW).status
    of = of.model_copy(update={"status": status})
    plan = reconcile_session(snapshot(view(reason), of), NOW + timedelta(seconds=age))
    assert plan.delete_self is gone


@pytest.mark.parametrize(
    ("spec", "in_log", "planned"),
    [
        (None, {}, None),
        ({"maxTokens": 5}, {"max_tokens": 5}, None),
        ({"maxTokens": 5}, {}, {"max_tokens": 5}),
        ({"maxToolCalls": 7}, {"max_tokens": 5}, {"max_tool_calls": 7}),
        ({"maxTokens": 6, "maxToolCalls": 7}, {"max_tokens": 5, "max_tool_calls": 7},
         {"max_tokens": 6, "max_tool_calls": 7}),
        (None, {"max_tokens": 5}, {}),
        ({}, {"max_tokens": 5}, {}),
    ],
)  # fmt: skip
def test_a_changed_budget_goes_into_the_log(spec: Any, in_log: Any, planned: Any) -> None:
    of = session(budget=spec) if spec is not None else session()
    plan = reconcile_session(snapshot(view("end_turn", budget=in_log), of), NOW)
    assert plan.budget == planned
    assert plan.observe_again == (planned is not None)
    ended = snapshot(view("end_turn", budget=in_log, state="terminated"), of)
    assert reconcile_session(ended, NOW).budget is None
    adopted = snapshot(view("end_turn", budget=in_log), of, adopted=True)
    assert reconcile_session(adopted, NOW).budget is None


def test_an_unreadable_spec_changes_neither_mode_nor_budget() -> None:
    log = view(mode="suspended", budget={"max_tokens": 5})
    snap = snapshot(log, refusal=Refusal("InvalidSpec", "spec.agent: no"))
    plan = reconcile_session(snap, NOW)
    assert (plan.mode, plan.budget) == (None, None)
