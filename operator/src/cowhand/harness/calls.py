"""What becomes of open tool calls: refused, asked about, left to the client, or run. Pure.

`decide` asks for each step, `loop` when it appends a response together with what may start at once. A
confirmation counts only for the arguments that it was given for, and any deny wins over an allow that
has not been acted upon; a custom tool is never run here, its client answers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cowhand.hands import session_log
from cowhand.hands.toolset import ToolClass, tool_class
from cowhand.harness import budget
from cowhand.harness.fold import Answer, Conversation, Decision, ToolUse
from cowhand.session import events as ev
from cowhand.session.events import NewEvent, input_sha256

INTERRUPTED: Final = "Tool execution was interrupted before completion. Please retry."
CUT_CALL: Final = (
    "The output limit (max_tokens) cut this call off before its input was complete, so it did not "
    "run. Make the input smaller, for example by writing a file in several steps."
)
NO_CALLS_LEFT: Final = "The session's budget of tool calls is used up, so this call did not run."
OTHER_ARGUMENTS: Final = (
    "The approval of this call was given for other arguments than these, so it did not run."
)


@dataclass(frozen=True)
class ToolCall:
    """One tool call that may run now."""

    use: ToolUse
    hand: str
    klass: ToolClass


@dataclass(frozen=True)
class ToolPlan:
    """What happens to open tool calls.

    Attributes:
        events: results of refused and answered calls, and questions to ask, to be appended.
        run: calls that may run now, at the same time.
        blocked: ids of calls that wait for somebody outside, if nothing can run before them.
    """

    events: tuple[NewEvent, ...]
    run: tuple[ToolCall, ...]
    blocked: tuple[str, ...]


def synthesized(use: ToolUse, text: str) -> NewEvent:
    """The error result of a call that Cowhand itself answers."""
    data: dict[str, Any] = {
        "tool_use_id": use.id,
        "content": text,
        "is_error": True,
        "synthesized": True,
    }
    if use.custom:
        data["kind"] = ev.CUSTOM_TOOL
    return NewEvent(ev.TOOL_RESULT, data)


def _answered(use: ToolUse, answer: Answer) -> NewEvent:
    """The result of a custom tool, as its client gave it."""
    return NewEvent(
        ev.TOOL_RESULT,
        {
            "tool_use_id": use.id,
            "content": answer.content,
            "is_error": answer.is_error,
            "synthesized": False,
            "kind": ev.CUSTOM_TOOL,
        },
    )


def _pending(use: ToolUse) -> NewEvent:
    """The question about a call that cannot go on by itself."""
    data: dict[str, Any] = {
        "tool_use_id": use.id,
        "name": use.name,
        "kind": ev.CUSTOM_TOOL if use.custom else ev.CONFIRMATION,
        "input_sha256": input_sha256(use.input),
    }
    if not use.custom:
        data["permission"] = "Ask"
    return NewEvent(ev.TOOL_PENDING, data)


def sandbox_hand(created: Mapping[str, Any]) -> str | None:
    """The hand that answers the built-in tools: the first sandbox of the agent."""
    for hand in created.get("hands") or []:
        if hand.get("kind", "sandbox") == "sandbox":
            return str(hand["name"])
    return None


def hand_of(created: Mapping[str, Any], tool: str) -> str | None:
    """The hand that answers a tool: the session itself for its log, a sandbox for the others."""
    return session_log.HAND if tool in session_log.LOG_TOOLS else sandbox_hand(created)


def _refusal(
    created: Mapping[str, Any], use: ToolUse, permission: str, decision: Decision | None
) -> str | None:
    """Why this call gets an error instead of running, None if it may run or has to wait."""
    offered = {tool.get("name") for tool in created["request"].get("tools") or []}
    if use.cut:
        return CUT_CALL
    if use.name not in offered or (permission == "Deny" and not use.custom):
        names = ", ".join(sorted(str(name) for name in offered)) or "none"
        return f"There is no tool {use.name!r} here, or it is denied. Available tools: {names}."
    if use.custom:
        return None
    if decision is not None and permission != "Allow":
        if not decision.allow:
            return decision.message or "The user denied this tool call."
        if decision.input_sha256 not in ("", input_sha256(use.input)):
            return OTHER_ARGUMENTS
    if hand_of(created, use.name) is None:
        return "This agent has no sandbox, so the tool cannot run."
    return None


def _permission(created: Mapping[str, Any], name: str) -> str:
    """Allow, Ask or Deny; a tool without a permission is denied, an unknown permission asks."""
    permission = (created.get("permissions") or {}).get(name, "Deny")
    return permission if permission in ("Allow", "Deny") else "Ask"


def _within(
    uses: Sequence[ToolUse], resolved: Collection[str], begun: Collection[str], left: int | None
) -> frozenset[str]:
    """Open calls that the budget lets begin; those that have begun count already."""
    new = [use.id for use in uses if use.id not in resolved and use.id not in begun]
    return frozenset(new if left is None else new[:left])


def plan_tools(
    created: Mapping[str, Any],
    uses: Sequence[ToolUse],
    *,
    resolved: Collection[str] = (),
    started: Collection[str] = (),
    asked: Collection[str] = (),
    decisions: Mapping[str, Decision] | None = None,
    answers: Mapping[str, Answer] | None = None,
    left: int | None = None,
) -> ToolPlan:
    """Sort open tool calls into refused, answered, waiting and runnable.

    Calls run in the order of their blocks: all at once if every one that may run is pure, otherwise
    the first alone. A call that waits for an approval holds back those after it; one that waits for
    its client (a custom tool) holds back nothing. A call that was started is never refused any more.
    Of the others `left` may begin (None: all); each beyond that gets an error.
    """
    decisions, answers = decisions or {}, answers or {}
    events: list[NewEvent] = []
    runnable: list[ToolCall] = []
    blocked: list[str] = []
    held = False
    known = {*started, *(use.id for use in uses if use.custom and use.id in asked)}
    within = _within(uses, resolved, known, left)
    for use in uses:
        if use.id in resolved:
            continue
        permission, decision = _permission(created, use.name), decisions.get(use.id)
        begun = use.id in started
        refusal = None if begun else _refusal(created, use, permission, decision)
        if refusal is None and use.id not in known and use.id not in within:
            refusal = NO_CALLS_LEFT
        if refusal is not None:
            events.append(synthesized(use, refusal))
        elif use.custom and use.id in answers:
            events.append(_answered(use, answers[use.id]))
        elif use.custom or (permission == "Ask" and decision is None and not begun):
            blocked.append(use.id)
            held = held or not use.custom
            if use.id not in asked:
                events.append(_pending(use))
        elif not held:
            hand = hand_of(created, use.name)
            assert hand is not None, "checked in _refusal"
            runnable.append(ToolCall(use, hand, tool_class(use.name)))
    parallel = all(call.klass == "pure" for call in runnable)
    run = tuple(runnable if parallel else runnable[:1])
    return ToolPlan(tuple(events), run, () if run else tuple(blocked))


def plan_open(conversation: Conversation, *, resolved: Collection[str] = ()) -> ToolPlan:
    """`plan_tools` for the open calls of a conversation; `resolved` are about to be."""
    assert conversation.created is not None, "tool calls come after session.created"
    return plan_tools(
        conversation.created,
        conversation.uses,
        resolved={*conversation.results, *resolved},
        started=conversation.started,
        asked=conversation.asked,
        decisions=conversation.decisions,
        answers=conversation.answers,
        left=budget.calls_left(conversation),
    )
