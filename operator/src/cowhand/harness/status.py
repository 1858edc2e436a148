"""The status document of a session, folded from its events: what `kubectl get` and the gateway show.

It is small and pure so that the loop can compute the document that follows from an append before it
appends, and write both in one script. Budgets are read from it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from cowhand.session import events as ev

ENDS_TURN: Final = frozenset(
    {"end_turn", "retries_exhausted", "budget_reached", "refusal", "interrupted"}
)
"""Stop reasons that end a turn; after `requires_action` and `suspended` the same turn goes on."""

_USAGE: Final = (
    "input_tokens",
    "output_tokens",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
)

_HAND_STATES: Final = {
    ev.HAND_REQUESTED: "Pending",
    ev.HAND_PROVISIONED: "Ready",
    ev.HAND_LOST: "Lost",
}

_SPENDING: Final = frozenset({ev.CONTEXT_COMPACTED, ev.CONTEXT_RESET, ev.MODEL_REQUEST_END})

_COUNTED: Final = ("turns", "requests", "tool_calls", "usage")


def empty_status() -> dict[str, Any]:
    """The document of a session in which nothing happened yet."""
    return {
        "stop_reason": None,
        "turns": 0,
        "requests": 0,
        "tool_calls": 0,
        "usage": dict.fromkeys(_USAGE, 0),
        "ttft_ms": None,
        "hands": [],
        "pending": [],
        "error": None,
    }


def response_usage(message: Mapping[str, Any]) -> dict[str, int]:
    """Tokens of one response; with `iterations` their sum, for the top level leaves some out."""
    usage = message.get("usage") or {}
    parts = usage.get("iterations") or [usage]
    return {key: sum(int(part.get(key) or 0) for part in parts) for key in _USAGE}


def context_tokens(message: Mapping[str, Any]) -> int:
    """Tokens of the conversation up to a response and with it, as its last iteration counted them."""
    usage = message.get("usage") or {}
    last = (usage.get("iterations") or [usage])[-1]
    return sum(int(last.get(key) or 0) for key in _USAGE)


def counted(status: Mapping[str, Any], field: str) -> int:
    """A counter of the document, 0 where it has not begun."""
    return int(status.get(field) or 0)


def total_tokens(status: Mapping[str, Any]) -> int:
    """All tokens that count against the budget: input, cached or not, and output."""
    return sum(int(value) for value in status["usage"].values())


def _with_hand(status: Mapping[str, Any], data: Mapping[str, Any], state: str) -> dict[str, Any]:
    others = [hand for hand in status["hands"] if hand["name"] != data["hand"]]
    old = next((hand for hand in status["hands"] if hand["name"] == data["hand"]), None)
    same = old is not None and old["instance"] == data["instance"]
    sandbox = data.get("sandbox") or (old["sandbox"] if old is not None and same else "")
    hand = {
        "name": data["hand"],
        "instance": data["instance"],
        "state": state,
        "sandbox": sandbox,
    }
    return {"hands": sorted([*others, hand], key=lambda item: str(item["name"]))}


def _with_usage(
    status: Mapping[str, Any], source: Mapping[str, Any], data: Mapping[str, Any]
) -> dict[str, Any]:
    added = response_usage(source)
    out: dict[str, Any] = {"usage": {key: status["usage"][key] + added[key] for key in _USAGE}}
    if "cost_nanousd" in data:
        out["cost_nanousd"] = counted(status, "cost_nanousd") + int(data["cost_nanousd"])
    return out


def _context_changes(
    status: Mapping[str, Any], kind: str, data: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields that events of the context window change; what renews it, or was thrown away, costs tokens too."""
    if kind == ev.CONTEXT_SELECTED:
        return {"context": {"profile": data["profile"], "warning": data.get("warning", "")}}
    if kind in _SPENDING and data.get("usage"):
        return _with_usage(status, data, data)
    return {}


def _changes(status: Mapping[str, Any], kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the document that one event changes."""
    match kind:
        case ev.STATUS_RUNNING:
            return {"stop_reason": None, "error": None}
        case ev.MODEL_REQUEST_START:
            return {"requests": status["requests"] + 1, "stop_reason": None}
        case ev.MODEL_RESPONSE:
            first = status["ttft_ms"]
            ttft = {"ttft_ms": data.get("ttft_ms") if first is None else first}
            return {**_with_usage(status, data["message"], data), **ttft}
        case ev.TOOL_PENDING:
            # A custom tool has no tool.started: it counts when its client is asked.
            custom = data.get("kind") == ev.CUSTOM_TOOL
            known = ("tool_use_id", "name", "kind", "input_sha256")
            entry = {key: data[key] for key in known if key in data}
            return {
                "pending": [*status["pending"], entry],
                "tool_calls": status["tool_calls"] + custom,
            }
        case ev.TOOL_STARTED:
            return {
                "tool_calls": status["tool_calls"] + (data.get("attempt", 1) == 1),
                "pending": _without(status["pending"], data["tool_use_id"]),
                "stop_reason": None,
            }
        case ev.TOOL_RESULT:
            return {"pending": _without(status["pending"], data["tool_use_id"])}
        case ev.HAND_REQUESTED | ev.HAND_PROVISIONED | ev.HAND_LOST:
            return _with_hand(status, data, _HAND_STATES[kind])
        case ev.SESSION_FORKED:
            # A fork counts from zero: what its source used was paid for there.
            return {**empty_status(), "inherited": {key: status[key] for key in _COUNTED}}
        case ev.SESSION_ERROR:
            error = data["error"]
            return {"error": {"type": error["type"], "message": error["message"]}}
        case ev.STATUS_IDLE:
            reason = data["stop_reason"]
            return {
                "stop_reason": dict(reason),
                "turns": status["turns"] + (reason["type"] in ENDS_TURN),
            }
    return _context_changes(status, kind, data)


def _without(pending: list[dict[str, Any]], tool_use_id: str) -> list[dict[str, Any]]:
    return [entry for entry in pending if entry["tool_use_id"] != tool_use_id]


def after(
    status: dict[str, Any], events: Iterable[tuple[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    """The document after more events, given as (type, data); the old one is left as it was."""
    for kind, data in events:
        changed = _changes(status, kind, data)
        if changed:
            status = {**status, **changed}
    return status
