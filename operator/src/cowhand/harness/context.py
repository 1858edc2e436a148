"""The context window between the log and the profiles: what to ask them, and what becomes of the answer.

`decide` asks `select` and `next_change` before each new turn request; `loop` builds every request
with `outgoing` and turns the answer to one that renews the window into events with `renewal`. Pure:
the clock is a parameter. Whoever shows or checks a request of the past uses `outgoing` too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from cowhand.harness.budget import known_input
from cowhand.harness.fold import CONTEXT_EXCEEDED, Conversation
from cowhand.harness.profiles.base import Change, Clear, OldResult, Profile, Thresholds, View
from cowhand.harness.profiles.registry import AUTO, choose
from cowhand.harness.request import Ttl, body, cache_ttl, prefix_sha
from cowhand.harness.window import (
    BYTES_PER_TOKEN,
    COMPACTION_BETA,
    Purpose,
    extra_fields,
    newest_results,
    split_newest,
)
from cowhand.session import events as ev
from cowhand.session import rawjson
from cowhand.session.events import NewEvent
from cowhand.session.rawjson import RawObject

SIDE_MAX_TOKENS: Final = 4096
"""Least output limit of a request for a summary or notes: thinking counts too."""

PATIENCE: Final = 4
"""Turn requests that are sent after a side request failed for good, before the next one is tried."""

LOG_TOOLS: Final = ("read_log", "search_log")

LOOK_UP: Final = (
    " What left the window is not lost: read_log and search_log show the events of this session."
)
GO_ON: Final = (
    "The conversation so far was summarized to make room. Go on where it stopped.{look_up}"
)
NEW_WINDOW: Final = (
    "This is a new context window: above are the first message of this conversation and the notes "
    "that you wrote for yourself.{look_up}"
)
GO_ON_FROM_NOTES: Final = " Go on where the notes stop."


@dataclass(frozen=True)
class Outgoing:
    """A model request that may be sent.

    Attributes:
        start: data of its `span.model_request_start`.
        betas: values of the header `anthropic-beta`.
        render: makes the bytes; they are large, so whoever sends them keeps no name for them.
    """

    start: dict[str, Any]
    betas: tuple[str, ...]
    render: Callable[[], bytes]


def outgoing(
    conversation: Conversation,
    *,
    n: int,
    attempt: int,
    horizon: int,
    max_tokens: int,
    purpose: Purpose = "turn",
    now_ms: int = 0,
) -> Outgoing:
    """The request that follows from the log up to `horizon`.

    Args:
        conversation: the folded log, before the request's start is in it.
        n: number of the turn request; of a side request that of the turn request after it.
        attempt: from 1.
        horizon: last position that it may see.
        max_tokens: output limit.
        purpose: what it is for.
        now_ms: time, only for the life of cache entries and for the log.
    """
    window, session_id = conversation.window, conversation.session_id
    turn = purpose == "turn"
    prompt = conversation.prompt(horizon) if turn else conversation.side_prompt(purpose)
    base = {**conversation.base, **extra_fields(window, purpose)}
    ttl = _ttl(conversation, turn, attempt, now_ms)
    start: dict[str, Any] = {
        "n": n,
        "attempt": attempt,
        "horizon": horizon,
        "prefix_sha": prefix_sha(base, session_id, max_tokens, prompt),
        "n_messages": len(prompt),
    }
    if window.asked is not None:
        start |= {"at": now_ms, "cache_ttl": ttl}
    if not turn:
        start |= {"purpose": purpose, "max_tokens": max_tokens}
    elif max_tokens != conversation.wanted_tokens:
        start["max_tokens"] = max_tokens
    compacted = any(item.type == "compaction" for entry in prompt[:1] for item in entry.blocks)
    betas = (COMPACTION_BETA,) if compacted or purpose == "compaction" else ()
    return Outgoing(
        start=start,
        betas=(*window.betas, *betas),
        render=partial(body, base, session_id, max_tokens, prompt, ttl),
    )


def _ttl(conversation: Conversation, turn: bool, attempt: int, now_ms: int) -> Ttl:
    window = conversation.window
    if window.asked is None:
        return "5m"  # assembler 1 knew no other
    again = (conversation.request if turn else window.side) if attempt > 1 else None
    # A repeat is the same request byte for byte, however long the one before it took to fail.
    return cache_ttl((*window.starts, now_ms)) if again is None else again.ttl


def profile_name(conversation: Conversation) -> str:
    """The profile that a session has, or wants before one was selected; empty if it knows of none."""
    window = conversation.window
    if window.selected is not None:
        return str(window.selected["profile"])
    return "" if window.asked is None else str(window.asked.get("profile") or AUTO)


def select(conversation: Conversation, profiles: Mapping[str, Profile]) -> NewEvent | None:
    """`context.selected`: profile, thresholds and extras of the session, frozen for its life.

    None if nobody has the profile.
    """
    asked = conversation.window.asked or {}
    model = str(conversation.base["model"])
    profile = choose(profiles, profile_name(conversation), model)
    if profile is None:
        return None
    limits = Thresholds.resolve(model, int(conversation.base["max_tokens"]), asked)
    extras = profile.extras(model, limits)
    data: dict[str, Any] = {
        "profile": profile.name,
        **limits.to_json(),
        "fields": dict(extras.fields),
        "betas": list(extras.betas),
    }
    warning = profile.warning(model)
    if warning:
        data["warning"] = warning
    return NewEvent(ev.CONTEXT_SELECTED, data)


def rescue(conversation: Conversation, profile: Profile) -> Change | None:
    """What the profile wants after something did not fit the window; None: the turn ends.

    It ends by itself: each result is cleared once, and a second renewal needs an answer after the first.
    """
    window = conversation.window
    seen = view(conversation, counted=not conversation.unresolved)
    newest = tuple(
        one for one in newest_results(conversation.messages) if one not in window.cleared
    )
    kept = conversation.messages
    if window.overflow == "prompt":
        kept, _, _ = split_newest(kept)
    can_renew = bool(kept) and not window.fresh and not conversation.paused
    change = profile.rescue(replace(seen, newest=newest, can_renew=can_renew), window.overflow)
    return None if isinstance(change, Clear) and not change.tool_use_ids else change


def view(conversation: Conversation, *, counted: bool = True) -> View:
    """What the profile may look at; the next request is `counted` only where all its results are there."""
    window = conversation.window
    selected = window.selected or {}
    limits = Thresholds(**{key: selected[key] for key in Thresholds.__dataclass_fields__})
    open_ids = {use.id for use in conversation.uses}
    return View(
        model=str(conversation.base["model"]),
        thresholds=limits,
        tokens=known_input(conversation) if counted else 0,
        results=tuple(
            OldResult(use_id, result.name, result.seq, result.size // BYTES_PER_TOKEN)
            for use_id, result in window.results.items()
            if use_id not in window.cleared and use_id not in open_ids
        ),
        can_renew=bool(conversation.messages)
        and not conversation.paused
        and conversation.n > window.renewed_at,
    )


def next_change(conversation: Conversation, profile: Profile) -> Change | None:
    """What the profile wants before the next turn request; nothing for a while after a failure."""
    gave_up = conversation.window.gave_up
    if gave_up and conversation.n + 1 - gave_up < PATIENCE:
        return None
    return profile.next(view(conversation))


def cleared(conversation: Conversation, tool_use_ids: tuple[str, ...]) -> NewEvent:
    """`context.cleared`."""
    data = {"tool_use_ids": list(tool_use_ids), "profile": profile_name(conversation)}
    return NewEvent(ev.CONTEXT_CLEARED, data)


def _look_up(conversation: Conversation) -> str:
    names = {tool.get("name") for tool in conversation.base.get("tools") or []}
    return LOOK_UP if names.issuperset(LOG_TOOLS) else ""


def renewal(
    conversation: Conversation,
    purpose: Purpose,
    seq: int,
    message: Mapping[str, Any],
    cost: Mapping[str, int],
) -> tuple[NewEvent, ...]:
    """The events that follow a complete response to a side request.

    Args:
        conversation: the folded log.
        purpose: `compaction` or `notes`.
        seq: position of the request's start.
        message: the response.
        cost: `cost_nanousd` of the response, if prices are known.

    Returns:
        `context.compacted` or `context.reset` with the request's end; only an end with an error if
        the answer holds no summary or no notes: the session goes on without.
    """
    spent = {"usage": message.get("usage") or {}, **cost}
    data: dict[str, Any] = {
        "upto": conversation.last_seq,
        "profile": profile_name(conversation),
        **spent,
    }
    look_up = _look_up(conversation)
    found: RawObject | str | None
    if purpose == "compaction":
        found = _summary(message)
        data |= {"block": found, "continue": GO_ON.format(look_up=look_up)}
        kind = ev.CONTEXT_COMPACTED
    else:
        found = _notes(message)
        text = NEW_WINDOW.format(look_up=look_up)
        go_on = "" if conversation.ended else GO_ON_FROM_NOTES
        data |= {"notes": found, "continue": text + go_on}
        kind = ev.CONTEXT_RESET
    if found is not None:
        end = {"start": seq, "outcome": "ok"}
        return NewEvent(kind, data), NewEvent(ev.MODEL_REQUEST_END, end)
    error = {
        "type": "no_summary",
        "message": f"the request for {purpose} brought none (stop_reason {message.get('stop_reason')})",
    }
    end = {"start": seq, "outcome": "error", "error": error, **spent}
    return (NewEvent(ev.MODEL_REQUEST_END, end),)


def _summary(message: Mapping[str, Any]) -> RawObject | None:
    """The compaction block with the text it came with."""
    if message.get("stop_reason") != "compaction":
        return None
    text = message.raw.decode() if isinstance(message, RawObject) else rawjson.dumps(dict(message))
    for item in rawjson.items(rawjson.members(text).get("content", "[]")):
        block = RawObject(item.encode())
        if block.get("type") == "compaction" and block.get("content"):
            return block
    return None


def _notes(message: Mapping[str, Any]) -> str | None:
    """The text of an answer, also of one that was cut: the log has the rest."""
    if message.get("stop_reason") not in (
        "end_turn",
        "stop_sequence",
        "max_tokens",
        CONTEXT_EXCEEDED,
    ):
        return None
    content = message.get("content") or []
    text = "\n".join(str(item["text"]) for item in content if item.get("type") == "text")
    return text.strip() or None
