"""What a session needs next, as a pure function of its conversation.

`loop` asks `next_step` after every change, carries the step out and folds what it appended, so that
a new worker that finds the same log takes the same step. Nothing here waits, reads or writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from cowhand.harness import budget, context
from cowhand.harness.calls import INTERRUPTED, ToolCall, plan_open, synthesized
from cowhand.harness.fold import CONTEXT_EXCEEDED, Conversation
from cowhand.harness.profiles.base import Change, Clear, Compact, Profile
from cowhand.harness.window import Purpose
from cowhand.session import events as ev
from cowhand.session.events import NewEvent

MAX_WAKES: Final = 5
"""Wakes in a row without progress before the session is given up."""

MAX_CONTINUATIONS: Final = 8
"""Cut or paused responses in a row before the turn is given up."""


@dataclass(frozen=True)
class Policy:
    """How a type of error is tried again.

    Attributes:
        attempts: of one request, before the turn is given up.
        first: longest first wait, in units of BACKOFF_BASE_S; each further one is twice as long.
        cap_s: longest wait, seconds.
    """

    attempts: int
    first: float
    cap_s: float


BACKOFF_BASE_S: Final = 1.0
RETRY_AFTER_CAP_S: Final = 600.0

BACKOFF: Final[Mapping[str, Policy]] = {
    # The endpoint has no room: patience, waits that give the place back, one probe for all (see `admission`).
    "rate_limit_error": Policy(attempts=10, first=1, cap_s=60),
    "overloaded_error": Policy(attempts=10, first=1, cap_s=60),
    # Something broke there.
    "api_error": Policy(attempts=5, first=1, cap_s=30),
    # Minutes have passed already, and tokens may have been paid for.
    "timeout_error": Policy(attempts=3, first=2, cap_s=60),
    # The way there: an endpoint or a proxy that restarts is back in seconds.
    "connection_error": Policy(attempts=8, first=0.5, cap_s=30),
    "stream_cut": Policy(attempts=5, first=0.5, cap_s=15),
    "proxy_unavailable": Policy(attempts=8, first=0.5, cap_s=30),
}
"""Types of model errors that another attempt may cure; every other type ends the turn at once."""

OUT_OF_TIME: Final = (
    "The session's budget of running time is used up: this call was stopped, or did not start. It may have "
    "partly executed."
)
FORKED: Final = (
    "This session was forked while the call was open: its result stayed in the other session, and so did "
    "the sandbox with its files. The next tool call starts a new, empty sandbox."
)


@dataclass(frozen=True)
class Append:
    """Append these events, then ask again."""

    events: tuple[NewEvent, ...]


@dataclass(frozen=True)
class Provision:
    """Wait for this hand before the first request (`provisioning: Eager`)."""

    hand: str


@dataclass(frozen=True)
class SendRequest:
    """Send a model request.

    Attributes:
        horizon: last position that it may see.
        backoff: seconds to wait first, drawn evenly between both numbers.
        accept_cut: take a response that the output limit cut inside a tool call.
        purpose: a turn of the conversation, or a summary or notes that renew the context window.
    """

    n: int
    attempt: int
    horizon: int
    max_tokens: int
    backoff: tuple[float, float] = (0.0, 0.0)
    accept_cut: bool = False
    purpose: Purpose = "turn"


@dataclass(frozen=True)
class RunTools:
    """Run these calls at the same time; the newest state decides what follows."""

    calls: tuple[ToolCall, ...]


@dataclass(frozen=True)
class Park:
    """Nothing to do: give the lease back.

    Attributes:
        until: nothing to do before this time, milliseconds of the store's clock; None: until input comes.
    """

    until: int | None = None


@dataclass(frozen=True)
class Stop:
    """The log has ended: drop the session."""


Step = Append | Provision | SendRequest | RunTools | Park | Stop


def backoff(kind: str, failures: int, retry_after: float | None) -> tuple[float, float]:
    """Range of seconds to wait before the next attempt: full jitter, with `retry-after` as a floor.

    Args:
        kind: type of the newest error.
        failures: failed attempts in a row.
        retry_after: seconds that the endpoint named.
    """
    policy = BACKOFF.get(kind)
    if failures < 1 or policy is None:
        return 0.0, 0.0
    top = min(policy.cap_s, BACKOFF_BASE_S * policy.first * 2 ** (failures - 1))
    floor = min(RETRY_AFTER_CAP_S, retry_after or 0.0)
    return floor, floor + top


def retried(kind: str, failures: int) -> bool:
    """After so many failures in a row, the newest of this type, the request is sent again."""
    policy = BACKOFF.get(kind)
    return policy is not None and failures < policy.attempts


def idle(reason: str, event_ids: Sequence[str] = (), **more: str) -> NewEvent:
    """`session.status_idle` with this stop reason."""
    stop: dict[str, Any] = {"type": reason, **more}
    if event_ids:
        stop["event_ids"] = list(event_ids)
    return NewEvent(ev.STATUS_IDLE, {"stop_reason": stop})


def error(kind: str, message: str, retry: str, horizon: int | None = None) -> NewEvent:
    """`session.error`; `horizon` is the last position that was known when the turn was given up."""
    data: dict[str, Any] = {
        "error": {"type": kind, "message": message, "retry_status": {"type": retry}}
    }
    if horizon is not None:
        data["horizon"] = horizon
    return NewEvent(ev.SESSION_ERROR, data)


def _give_up(
    conversation: Conversation, kind: str, message: str, retry: str = "exhausted"
) -> Append:
    """End the turn with an error; open tool calls get a result, so that a later turn can go on."""
    return Append(
        (
            *(synthesized(use, f"{INTERRUPTED} ({message})") for use in conversation.unresolved),
            error(kind, message, retry, conversation.last_seq),
            idle("retries_exhausted"),
        )
    )


# Tools.


def _tools_step(conversation: Conversation) -> Step:
    plan = plan_open(conversation)
    if plan.events:
        return Append(plan.events)
    if plan.run:
        return RunTools(plan.run)
    stop = {"type": "requires_action", "event_ids": list(plan.blocked)}
    if conversation.idle == stop:
        return Park()
    return Append((idle("requires_action", plan.blocked),))


# Requests.


def over_budget(conversation: Conversation) -> bool:
    """The next request does not fit the budget."""
    return budget.allowance(conversation, conversation.wanted_tokens).max_tokens == 0


def _budget_reached(conversation: Conversation, limit: str) -> Step:
    """End the turn because of a limit; calls that run are stopped, and their results say why."""
    if conversation.refused:
        return Park()
    cut = (synthesized(use, OUT_OF_TIME) for use in conversation.unresolved)
    return Append((*cut, idle("budget_reached", budget=limit)))


def _context_step(conversation: Conversation, profiles: Mapping[str, Profile]) -> Step | None:
    """What the context profile wants before a new turn request; None if it may be sent."""
    window, name = conversation.window, context.profile_name(conversation)
    selected = context.select(conversation, profiles) if window.selected is None else None
    profile = profiles.get(name)
    if selected is not None:
        return Append((selected,))
    if profile is None:
        have = ", ".join(sorted(profiles)) or "none"
        text = (
            f"the agent wants the context profile {name!r}, and this harness has {have}: install it, or "
            "create the session anew with an Agent that names another one"
        )
        return _give_up(conversation, "context_profile_missing", text, "terminal")
    step = _side_step(conversation, profile)
    if isinstance(step, SendRequest):
        wanted = step.max_tokens
        if budget.allowance(conversation, wanted).max_tokens < wanted:
            return None  # what is left of the budget is for the work itself
    return step


def _rescue(
    conversation: Conversation, profiles: Mapping[str, Profile], now_ms: int | None
) -> Step | None:
    """What the context profile does about a request or a response that did not fit; None: the turn ends."""
    window, profile = conversation.window, profiles.get(context.profile_name(conversation))
    if not window.overflow or window.selected is None or profile is None:
        return None
    change = None if window.side is not None else context.rescue(conversation, profile)
    if change is None and window.side is None:
        return None
    if conversation.unresolved:
        return _tools_step(conversation)
    wake_at = conversation.wake_at
    if wake_at is not None and now_ms is not None and now_ms < wake_at:
        return Park(until=wake_at)
    step = _side_again(conversation) if change is None else _change_step(conversation, change)
    if isinstance(step, SendRequest):
        allowed = budget.allowance(conversation, step.max_tokens)
        if allowed.max_tokens < step.max_tokens:
            return _budget_reached(conversation, allowed.reached)
    return step


def _side_step(conversation: Conversation, profile: Profile) -> Step | None:
    """The change that the profile wants, or the next attempt of the one that is under way."""
    if conversation.window.side is not None:
        return _side_again(conversation)
    change = context.next_change(conversation, profile)
    return None if change is None else _change_step(conversation, change)


def _change_step(conversation: Conversation, change: Change) -> Step:
    """Make a change of the window, or ask the model for what it needs."""
    if isinstance(change, Clear):
        return Append((context.cleared(conversation, change.tool_use_ids),))
    return SendRequest(
        n=conversation.n + 1,
        attempt=1,
        horizon=conversation.last_seq,
        max_tokens=max(int(conversation.base["max_tokens"]), context.SIDE_MAX_TOKENS),
        purpose="compaction" if isinstance(change, Compact) else "notes",
    )


def _side_again(conversation: Conversation) -> Step | None:
    """The next attempt of a request that renews the window; None to go on without."""
    window = conversation.window
    side, failure = window.side, window.side_error
    assert side is not None, "checked by the caller"
    kind = "" if failure is None else str(failure["type"])
    if failure is not None and not retried(kind, window.side_failures):
        return None
    pause = backoff(kind, window.side_failures, (failure or {}).get("retry_after_s"))
    return SendRequest(
        n=side.n,
        attempt=side.attempt + 1,
        horizon=side.horizon,
        max_tokens=side.max_tokens,
        backoff=(0.0, 0.0) if conversation.wake_at is not None else pause,
        purpose=side.purpose,
    )


def _request_step(
    conversation: Conversation, profiles: Mapping[str, Profile], now_ms: int | None
) -> Step:
    wake_at = conversation.wake_at
    if wake_at is not None and now_ms is not None and now_ms < wake_at:
        return Park(until=wake_at)
    allowed = budget.allowance(conversation, conversation.wanted_tokens)
    if not allowed.max_tokens:
        return _budget_reached(conversation, allowed.reached)
    if not conversation.prefix_matches():
        return _give_up(
            conversation,
            "prefix_mismatch",
            "the request rebuilt from the log is not the one that was sent; nothing was sent. "
            "This is a bug of the harness: please report it with the session's log",
            "terminal",
        )
    if conversation.retry:
        assert conversation.request is not None
        last = conversation.request
        failure = conversation.error or {}
        pause = backoff(
            str(failure.get("type", "")), conversation.failures, failure.get("retry_after_s")
        )
        return SendRequest(
            n=last.n,
            attempt=last.attempt + 1,
            horizon=last.horizon,
            max_tokens=allowed.max_tokens,
            backoff=(0.0, 0.0) if wake_at is not None else pause,
            accept_cut=conversation.limit_step > 0 or bool(allowed.reached),
        )
    if conversation.window.asked is not None:
        step = _context_step(conversation, profiles)
        if step is not None:
            return step
    return SendRequest(
        n=conversation.n + 1,
        attempt=1,
        horizon=conversation.last_seq,
        max_tokens=allowed.max_tokens,
        accept_cut=bool(allowed.reached),
    )


def _failed(conversation: Conversation) -> Step | None:
    """Give the turn up after an error that no further attempt cures."""
    failure = conversation.error
    if failure is None or conversation.ended:
        return None
    kind, message = str(failure["type"]), str(failure["message"])
    if kind not in BACKOFF:
        return _give_up(conversation, kind, message, "terminal")
    if not retried(kind, conversation.failures):
        return _give_up(conversation, kind, f"{conversation.failures} attempts failed: {message}")
    return None


def _ending(conversation: Conversation) -> Step | None:
    """What the stop reason of the newest response ends at once, whatever waits."""
    if conversation.ended:
        return None
    if conversation.stop_reason == "refusal":
        return Append((idle("refusal"),))
    if conversation.window.overflow == "answer":
        return _give_up(
            conversation,
            "context_window_exceeded",
            "the conversation no longer fits the model's context window",
        )
    if conversation.continuations > MAX_CONTINUATIONS:
        return _give_up(
            conversation,
            "max_tokens",
            f"{conversation.continuations} responses in a row were cut off or paused",
        )
    return None


def _leftover(conversation: Conversation) -> Step | None:
    """What comes before any new work: ends, leftovers of a dead worker, interrupts, suspension."""
    if conversation.open_request:
        data = {"start": conversation.open_seq, "outcome": "lost"}
        return Append((NewEvent(ev.MODEL_REQUEST_END, data),))
    if conversation.orphaned:
        return Append(tuple(synthesized(use, FORKED) for use in conversation.orphaned))
    working = not conversation.ended or conversation.triggered
    if conversation.interrupted:
        results = (synthesized(use, INTERRUPTED) for use in conversation.unresolved)
        return Append((*results, idle("interrupted")))
    if conversation.wakes > MAX_WAKES and working:
        return _give_up(
            conversation,
            "wakes_exhausted",
            f"{conversation.wakes} workers in a row took this session and made no progress",
        )
    if conversation.suspended:
        if not working or (conversation.idle or {}).get("type") == "suspended":
            return Park()
        return Append((idle("suspended"),))
    return None


def next_step(
    conversation: Conversation,
    *,
    provisioned: bool = False,
    profiles: Mapping[str, Profile] = MappingProxyType({}),
    now_ms: int | None = None,
) -> Step:
    """The next step of a session; see the module.

    Args:
        conversation: the folded log.
        provisioned: this worker has already waited for the eager hands.
        profiles: installed context profiles by name.
        now_ms: time by the store's clock, for the limit of running time; None: it is not looked at.
    """
    if conversation.closed:
        return Stop()
    if conversation.created is None:
        return Park()
    step = _leftover(conversation)
    if step is not None:
        return step
    if not conversation.ended or conversation.triggered:
        left = None if now_ms is None else budget.seconds_left(conversation, now_ms)
        if left is not None and left <= 0:
            return _budget_reached(conversation, budget.MAX_DURATION)
        return _work_step(conversation, provisioned, profiles, now_ms)
    return Park()


def _work_step(
    conversation: Conversation,
    provisioned: bool,
    profiles: Mapping[str, Profile],
    now_ms: int | None,
) -> Step:
    """The next step of an open turn, or of one that is to begin."""
    step = _rescue(conversation, profiles, now_ms) or _failed(conversation) or _ending(conversation)
    if step is None and not provisioned:
        step = _eager(conversation)
    if step is not None:
        return step
    if conversation.unresolved:
        return _tools_step(conversation)
    unanswered = (
        conversation.retry
        or bool(conversation.uses)
        or conversation.stop_reason in ("pause_turn", "max_tokens", CONTEXT_EXCEEDED)
        or conversation.unanswered
        or bool(conversation.window.carry and not conversation.ended)
    )
    if conversation.triggered or unanswered:
        return _request_step(conversation, profiles, now_ms)
    return Append((idle("end_turn"),))


def _eager(conversation: Conversation) -> Step | None:
    """An eager hand is waited for before the first request; a failed one is left to the first call."""
    if conversation.n > 0:
        return None
    assert conversation.created is not None
    for hand in conversation.created.get("hands") or []:
        state = conversation.hands.get(str(hand["name"]))
        if hand.get("provisioning") == "Eager" and (state is None or state.state == "Pending"):
            return Provision(str(hand["name"]))
    return None
