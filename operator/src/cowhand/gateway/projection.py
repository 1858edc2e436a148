"""Log events as public events of the Managed Agents API: pure functions, no I/O.

One event of the log becomes none (it is internal), one, or several (a model response is thinking,
messages and tool uses). Ids are derived, never stored: `sevt_<session>_<seq>_<i>`, and for a tool use
`sevt_<session>_<toolu id>`, so that its result and its approval need no look-up. What needs its
neighbours in the log (token usage of a request, when a user event was taken up) comes from `Context`,
which is folded from a window around the event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

from cowhand.session import events as ev
from cowhand.session.events import Event

Public = dict[str, Any]

USAGE: Final = (
    "input_tokens",
    "output_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
)

_ERRORS: Final[Mapping[str, str]] = {
    "overloaded_error": "model_overloaded_error",
    "rate_limit_error": "model_rate_limited_error",
    "api_error": "model_request_failed_error",
    "invalid_request_error": "model_request_failed_error",
    "authentication_error": "model_request_failed_error",
    "permission_error": "model_request_failed_error",
    "not_found_error": "model_request_failed_error",
    "request_too_large": "model_request_failed_error",
    "timeout_error": "model_request_failed_error",
}
"""Error types of the Messages API -> official error types of a session."""

_OFFICIAL_ERRORS: Final = frozenset(
    {
        "model_overloaded_error",
        "model_rate_limited_error",
        "model_request_failed_error",
        "mcp_connection_failed_error",
        "mcp_authentication_failed_error",
        "billing_error",
        "credential_host_unreachable_error",
        "tool_use_limit_reached_error",
        "compaction_limit_reached_error",
        "repository_authentication_error",
        "repository_forbidden_error",
        "repository_not_found_error",
        "repository_checkout_error",
        "repository_clone_error",
    }
)

_STOP_REASONS: Final = frozenset(
    {"end_turn", "requires_action", "retries_exhausted", "budget_reached", "refusal"}
)

_TAKEN_UP: Final = frozenset(
    {
        ev.USER_MESSAGE,
        ev.USER_INTERRUPT,
        ev.USER_TOOL_CONFIRMATION,
        ev.USER_CUSTOM_TOOL_RESULT,
        ev.SYSTEM_MESSAGE,
    }
)
"""Client events, whose `processed_at` is null until the harness acts on them."""

_RENEWALS: Final = frozenset({ev.CONTEXT_COMPACTED, ev.CONTEXT_RESET})
"""A summary or notes took the place of the prompt; official clients know one event for both."""

_EVALUATION: Final = {"allow": "always_allow", "ask": "always_ask"}


def rfc3339(ms: int) -> str:
    """Milliseconds since the epoch as RFC 3339, UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def event_id(session_id: str, seq: int, index: int = 0) -> str:
    """Public id of the `index`-th event that position `seq` became."""
    return f"sevt_{session_id.removeprefix('sesn_')}_{seq}_{index}"


def message_id(session_id: str, start: int, block: int) -> str:
    """Public id of the message (or thinking) that begins with a block of the response to a request.

    It stands on the position of the `span.model_request_start`, so that it is known while the text is written;
    that event itself has index 0.
    """
    return event_id(session_id, start, block + 1)


def tool_use_event_id(session_id: str, tool_use_id: str) -> str:
    """Public id of the event of a tool use (`toolu_...`)."""
    return f"sevt_{session_id.removeprefix('sesn_')}_{tool_use_id}"


def tool_use_of(session_id: str, public_id: str) -> str:
    """The model's tool use id in a public event id; anything else is answered as it is."""
    return public_id.removeprefix(f"sevt_{session_id.removeprefix('sesn_')}_")


@dataclass
class Context:
    """What an event's projection needs to know of other events.

    Attributes:
        session_id: the session.
        permissions: tool -> `Allow`, `Ask` or `Deny`, of `session.created`.
        tools: names of the tools that the model knows; None before `session.created` was seen.
        custom: names of the tools that the client answers.
        usage: position of `span.model_request_start` -> token counts.
        processed: position of a user event -> when it was taken up, milliseconds.
        light: user events that wait are remembered without their content: for who does not show them again when they
            are taken up.
    """

    session_id: str
    light: bool = False
    permissions: Mapping[str, str] = field(default_factory=dict)
    tools: frozenset[str] | None = None
    custom: frozenset[str] = frozenset()
    usage: dict[int, Mapping[str, int]] = field(default_factory=dict)
    processed: dict[int, int] = field(default_factory=dict)
    _waiting: dict[int, tuple[Event, str]] = field(default_factory=dict)
    _open_start: int = 0
    _fed: int = 0

    def feed(self, event: Event) -> list[Event]:
        """Take the next event of the log into account; answers the user events that it takes up.

        Events come in the order of the log; one that was fed before changes nothing.
        """
        if event.seq <= self._fed:
            return []
        self._fed = event.seq
        if event.type == ev.SESSION_CREATED:
            self.permissions = event.data.get("permissions") or {}
            request = event.data.get("request") or {}
            self.tools = frozenset(tool.get("name", "") for tool in request.get("tools") or ())
            self.custom = frozenset(event.data.get("custom_tools") or ())
        elif event.type == ev.MODEL_REQUEST_START:
            self._open_start = event.seq
        elif event.type == ev.MODEL_RESPONSE:
            message = event.data.get("message") or {}
            self.usage[self._open_start] = message.get("usage") or {}
        elif event.type in _RENEWALS:
            self.usage[self._open_start] = event.data.get("usage") or {}
        elif event.type in _TAKEN_UP:
            kept = replace(event, payload=b"") if self.light else event
            self._waiting[event.seq] = (kept, _call_of(event))
            return []
        taken = [kept for kept, call in self._waiting.values() if _takes_up(event, kept, call)]
        for waiting in taken:
            del self._waiting[waiting.seq]
            self.processed[waiting.seq] = event.ts
        return taken

    def waiting_before(self, seq: int) -> bool:
        """Whether a user event up to `seq` is not known to be taken up."""
        return any(position <= seq for position in self._waiting)


def _call_of(event: Event) -> str:
    """The tool use that a user event answers; empty for messages and interrupts."""
    if event.type in (ev.USER_MESSAGE, ev.SYSTEM_MESSAGE, ev.USER_INTERRUPT):
        return ""
    return str(event.data.get("tool_use_id") or event.data.get("custom_tool_use_id") or "")


def _takes_up(event: Event, waiting: Event, call: str) -> bool:
    """Whether `event` shows that the harness has acted on the user event `waiting`, an answer to `call`."""
    if waiting.type in (ev.USER_MESSAGE, ev.SYSTEM_MESSAGE):
        horizon = (
            event.data.get("horizon", event.seq) if event.type == ev.MODEL_REQUEST_START else 0
        )
        return event.type == ev.MODEL_REQUEST_START and waiting.seq <= int(horizon)
    if waiting.type == ev.USER_INTERRUPT:
        return event.type in (
            ev.MODEL_REQUEST_START,
            ev.MODEL_REQUEST_END,
            ev.TOOL_RESULT,
            ev.STATUS_IDLE,
        )
    return event.type in (ev.TOOL_STARTED, ev.TOOL_RESULT) and event.data.get("tool_use_id") == call


def project(event: Event, context: Context) -> list[Public]:
    """The public events of one event of the log, oldest first; empty for internal and unknown types."""
    builder = _BUILDERS.get(event.type)
    return builder(event, context) if builder else []


def _base(event: Event, context: Context, index: int = 0) -> Public:
    return {
        "id": event_id(context.session_id, event.seq, index),
        "type": event.type,
        "processed_at": rfc3339(event.ts),
    }


def _bare(event: Event, context: Context) -> list[Public]:
    return [_base(event, context)]


def _renewed(event: Event, context: Context) -> list[Public]:
    return [{**_base(event, context), "type": "agent.thread_context_compacted"}]


def _updated(event: Event, context: Context) -> list[Public]:
    # The official field `budget` is an amount of money; ours counts tokens and calls.
    return [{**_base(event, context), "cowhand_budget": event.data.get("budget")}]


def _user(event: Event, context: Context) -> list[Public]:
    out = _base(event, context)
    taken = context.processed.get(event.seq)
    out["processed_at"] = rfc3339(taken) if taken else None
    data = event.data
    if event.type in (ev.USER_MESSAGE, ev.SYSTEM_MESSAGE):
        out["content"] = data.get("content") or []
    elif event.type == ev.USER_TOOL_CONFIRMATION:
        out["tool_use_id"] = tool_use_event_id(context.session_id, data["tool_use_id"])
        out["result"] = data["result"]
        if data.get("deny_message"):
            out["deny_message"] = data["deny_message"]
    elif event.type == ev.USER_CUSTOM_TOOL_RESULT:
        call = tool_use_event_id(context.session_id, data["custom_tool_use_id"])
        out["custom_tool_use_id"] = call
        out["content"] = data.get("content") or []
        out["is_error"] = bool(data.get("is_error"))
    return [out]


def _response(event: Event, context: Context) -> list[Public]:
    message = event.data.get("message") or {}
    start = event.data.get("start")  # none in logs of older releases
    out: list[Public] = []

    def base_of(index: int) -> Public:
        base = _base(event, context, index)
        return {**base, "id": message_id(context.session_id, start, index)} if start else base

    for index, block in enumerate(message.get("content") or ()):
        kind = block.get("type")
        previous = out[-1]["type"] if out else ""
        if kind == "text" and block.get("text"):
            text = {"type": "text", "text": block["text"]}
            if previous == "agent.message":
                out[-1]["content"].append(text)
            else:
                out.append({**base_of(index), "type": "agent.message", "content": [text]})
        elif kind in ("thinking", "redacted_thinking") and previous != "agent.thinking":
            out.append({**base_of(index), "type": "agent.thinking"})
        elif kind == "tool_use":
            out.append(_tool_use(event, context, block))
    return out


def _tool_use(event: Event, context: Context, block: Mapping[str, Any]) -> Public:
    name = block["name"]
    base = _base(event, context)
    base["id"] = tool_use_event_id(context.session_id, block["id"])
    if name in context.custom:
        arguments = block.get("input") or {}
        return {**base, "type": "agent.custom_tool_use", "name": name, "input": arguments}
    known = context.tools is None or name in context.tools
    permission = context.permissions.get(name, "Allow").lower() if known else "deny"
    out = {
        **base,
        "type": "agent.tool_use",
        "name": name,
        "input": block.get("input") or {},
        "evaluated_permission": permission,
    }
    if permission in _EVALUATION:
        out["evaluation"] = {"type": _EVALUATION[permission]}
    return out


def _tool_result(event: Event, context: Context) -> list[Public]:
    data = event.data
    if data.get("kind") == ev.CUSTOM_TOOL:
        return []  # the client's own user.custom_tool_result is the public event
    content = data.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [
        {
            **_base(event, context),
            "type": "agent.tool_result",
            "tool_use_id": tool_use_event_id(context.session_id, data["tool_use_id"]),
            "content": blocks or [],
            "is_error": bool(data.get("is_error")),
        }
    ]


def _request_end(event: Event, context: Context) -> list[Public]:
    start = int(event.data.get("start") or 0)
    usage = context.usage.get(start) or {}
    return [
        {
            **_base(event, context),
            "model_request_start_id": event_id(context.session_id, start),
            "is_error": event.data.get("outcome") != "ok",
            "model_usage": {name: int(usage.get(name) or 0) for name in USAGE},
        }
    ]


def stop_reason(session_id: str, stop: Mapping[str, Any]) -> dict[str, Any]:
    """The official stop reason of one of ours.

    `interrupted` and `suspended` are `end_turn` to official clients, which know no others; the field
    `cowhand_type` keeps the difference.
    """
    kind = str(stop.get("type") or "end_turn")
    out: dict[str, Any] = {"type": kind if kind in _STOP_REASONS else "end_turn"}
    if out["type"] != kind:
        out["cowhand_type"] = kind
    if kind == "requires_action":
        ids: Iterable[str] = stop.get("event_ids") or ()
        out["event_ids"] = [
            known if known.startswith("sevt_") else tool_use_event_id(session_id, known)
            for known in ids
        ]
    return out


def _idle(event: Event, context: Context) -> list[Public]:
    stop = stop_reason(context.session_id, event.data.get("stop_reason") or {})
    details = {"type": "refusal", "category": None, "explanation": None}
    return [
        {
            **_base(event, context),
            "stop_reason": stop,
            "stop_details": details if stop["type"] == "refusal" else None,
        }
    ]


def _error(event: Event, context: Context) -> list[Public]:
    error = event.data.get("error") or {}
    kind = str(error.get("type") or "")
    official = kind if kind in _OFFICIAL_ERRORS else _ERRORS.get(kind, "unknown_error")
    return [
        {
            **_base(event, context),
            "error": {
                "type": official,
                "message": str(error.get("message") or kind or "unknown error"),
                "retry_status": error.get("retry_status") or {"type": "terminal"},
            },
        }
    ]


_BUILDERS: Final[Mapping[str, Callable[[Event, Context], list[Public]]]] = {
    ev.USER_MESSAGE: _user,
    ev.USER_INTERRUPT: _user,
    ev.USER_TOOL_CONFIRMATION: _user,
    ev.USER_CUSTOM_TOOL_RESULT: _user,
    ev.SYSTEM_MESSAGE: _user,
    ev.MODEL_REQUEST_START: _bare,
    ev.MODEL_RESPONSE: _response,
    ev.MODEL_REQUEST_END: _request_end,
    ev.CONTEXT_COMPACTED: _renewed,
    ev.CONTEXT_RESET: _renewed,
    ev.TOOL_RESULT: _tool_result,
    ev.STATUS_RUNNING: _bare,
    ev.STATUS_IDLE: _idle,
    ev.STATUS_RESCHEDULED: _bare,
    ev.STATUS_TERMINATED: _bare,
    ev.SESSION_ERROR: _error,
    ev.SESSION_UPDATED: _updated,
    ev.SESSION_DELETED: _bare,
}
