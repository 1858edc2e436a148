"""Tables and details for `cowhand get`. Pure: resources and the time in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from cowhand.cli.render import safe

Resource = Mapping[str, Any]


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header, in columns as wide as needed, as kubectl prints them."""
    cells = [list(header), *([safe(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = (
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def age(timestamp: str, now: float) -> str:
    """How long ago, as kubectl writes it: `45s`, `7m`, `3h`, `9d`."""
    if not timestamp:
        return ""
    seconds = max(0, int(now - datetime.fromisoformat(timestamp).timestamp()))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def sessions(items: Sequence[Resource], now: float, *, namespaces: bool = False) -> str:
    """A row for each AgentSession."""
    if not items:
        return "No AgentSessions here. `cowhand run --help` starts one."
    header = ["NAME", "STATE", "TURN", "TURNS", "TOOLS", "TOKENS", "AGE", "SESSION"]
    rows = []
    for item in items:
        status = item.get("status") or {}
        row = [
            str(item["metadata"]["name"]),
            str(status.get("state") or _ready(status)),
            str(_condition(status, "TurnComplete").get("reason") or ""),
            str(status.get("turns") or 0),
            str(status.get("toolCalls") or 0),
            str(_tokens(status)),
            age(str(item["metadata"].get("creationTimestamp") or ""), now),
            str(status.get("sessionID") or ""),
        ]
        rows.append([str(item["metadata"].get("namespace")), *row] if namespaces else row)
    return columns(["NAMESPACE", *header] if namespaces else header, rows)


def session(item: Resource, now: float) -> str:
    """One AgentSession in detail."""
    metadata, status = item["metadata"], item.get("status") or {}
    agent = status.get("agent") or {}
    usage = status.get("usage") or {}
    fields = [
        ("Name", f"{metadata.get('namespace')}/{metadata['name']}"),
        ("Session", status.get("sessionID") or "not accepted yet"),
        (
            "State",
            f"{status.get('state') or '-'} ({status.get('stopReason') or 'no turn ended yet'})",
        ),
        ("Agent", f"{agent.get('name') or 'inline'} generation {agent.get('generation', '-')}"),
        ("Turns", f"{status.get('turns') or 0}, {status.get('toolCalls') or 0} tool calls"),
        ("Tokens", ", ".join(f"{name}: {value}" for name, value in usage.items()) or "none"),
        ("First token", _milliseconds(status.get("timeToFirstTokenMilliseconds"))),
        ("Age", age(str(metadata.get("creationTimestamp") or ""), now)),
    ]
    if error := status.get("error"):
        fields.append(("Error", f"{error.get('type')}: {error.get('message')}"))
    text = [_pairs(fields)]
    if hands := status.get("hands"):
        rows = [
            [
                str(h["name"]),
                str(h.get("instance", "")),
                str(h.get("state", "")),
                str(h.get("sandboxName", "")),
            ]
            for h in hands
        ]
        text.append(columns(["HAND", "INSTANCE", "STATE", "SANDBOX"], rows))
    if conditions := status.get("conditions"):
        rows = [
            [str(c["type"]), str(c["status"]), str(c.get("reason", "")), str(c.get("message", ""))]
            for c in conditions
        ]
        text.append(columns(["CONDITION", "STATUS", "REASON", "MESSAGE"], rows))
    return "\n\n".join(text)


def session_object(item: Resource) -> str:
    """A session of the API that has no AgentSession."""
    more = item["cowhand"]
    pending = ", ".join(str(call["tool_use_id"]) for call in more["pending"]) or "none"
    return _pairs(
        [
            ("Session", item["id"]),
            ("Name", f"{more['namespace']}/{more['name'] or '(made over the API)'}"),
            ("State", f"{more['state']}, mode {more['mode']}"),
            ("Agent", f"{item['agent']['name']}, model {item['agent']['model']['id']}"),
            ("Turns", f"{more['turns']}, {more['tool_calls']} tool calls"),
            ("Events", more["last_seq"]),
            ("Waiting", pending),
            ("Created", item["created_at"]),
        ]
    )


def _pairs(fields: Sequence[tuple[str, Any]]) -> str:
    return "\n".join(f"{name + ':':<13}{safe(str(value))}" for name, value in fields)


def _condition(status: Resource, kind: str) -> Resource:
    conditions = status.get("conditions") or ()
    return next((item for item in conditions if item.get("type") == kind), {})


def _ready(status: Resource) -> str:
    ready = _condition(status, "Ready")
    return str(ready.get("reason") or "Pending")


def _tokens(status: Resource) -> int:
    return sum(int(value or 0) for value in (status.get("usage") or {}).values())


def _milliseconds(value: Any) -> str:
    return "-" if value is None else f"{value} ms"
