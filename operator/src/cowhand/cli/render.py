"""Events of the raw log as lines for a terminal. Pure: event and options in, lines out.

What comes from a model or a sandbox is untrusted text: control characters (which could move the cursor,
change colours or the window's title) are made visible, never passed on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

Data = Mapping[str, Any]

FOLD: Final = 4
"""Lines of a tool's output that are shown."""
MARGIN: Final = 22
"""Columns before the text: time, symbol, label."""

DIM, BOLD = "2", "1"
RED, GREEN, YELLOW, BLUE, MAGENTA, CYAN = "31", "32", "33", "34", "35", "36"

_UNSAFE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200e\u200f]")


@dataclass(frozen=True)
class Style:
    """How to draw.

    Attributes:
        color: with ANSI colours.
        full: whole tool outputs, no shortened lines.
        verbose: internal events too.
        width: columns of the terminal; longer lines are cut unless `full`.
    """

    color: bool = False
    full: bool = False
    verbose: bool = False
    width: int = 100


@dataclass(frozen=True)
class Entry:
    """What is drawn of one event: a head line, and lines below it."""

    symbol: str
    label: str
    text: str
    tone: str = ""
    body: tuple[str, ...] = ()
    body_tone: str = DIM
    quiet: bool = False


def safe(text: str) -> str:
    """Text without anything a terminal would act on; tabs become spaces, carriage returns line ends."""
    plain = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", "    ")
    return _UNSAFE.sub(lambda match: f"\\x{ord(match[0]):02x}", plain)


def calls_of(event: Data) -> dict[str, str]:
    """Tool use id -> name of the tool, of a model response; empty for other events."""
    if event.get("type") != "model.response":
        return {}
    message = ((event.get("payload") or {}).get("d") or {}).get("message") or {}
    return {
        str(block.get("id")): str(block.get("name"))
        for block in message.get("content") or ()
        if block.get("type") == "tool_use"
    }


def render(
    event: Data, base_ms: int, style: Style, calls: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """Lines of one event of the raw log (`{"seq","type","ts","lease","payload"}`), empty for hidden ones.

    Args:
        event: decoded line of `GET /v1/sessions/{id}/log`.
        base_ms: time of the session's start, milliseconds.
        style: how to draw.
        calls: names of earlier tool uses (`calls_of`), so that a result says what it is the result of.
    """
    payload = event.get("payload") or {}
    data = payload.get("d") or {}
    if event.get("type") == "tool.result":
        data = {**data, "name": calls.get(str(data.get("tool_use_id")), "")}
    entries = _entries(event, data, style)
    shown = [entry for entry in entries if style.verbose or not entry.quiet]
    elapsed = relative(int(event["ts"]) - base_ms)
    lines: list[str] = []
    for number, entry in enumerate(shown):
        lines += _draw(entry, elapsed if number == 0 else "", style)
    return lines


def relative(ms: int) -> str:
    """A duration in at most 8 columns: `0.52s`, `12.3s`, `4m07s`, `2h05m`."""
    seconds = max(0, ms) / 1000
    if seconds < 10:
        return f"{seconds:.2f}s"
    if seconds < 60:
        return f"{seconds:.1f}s"
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _paint(tone: str, text: str, style: Style) -> str:
    return f"\x1b[{tone}m{text}\x1b[0m" if style.color and tone and text else text


def _cut(text: str, width: int, style: Style) -> str:
    if style.full or len(text) <= width:
        return text
    return text[: max(1, width - 1)] + "…"


def _draw(entry: Entry, elapsed: str, style: Style) -> list[str]:
    room = max(20, style.width - MARGIN)
    first, *rest = entry.text.split("\n")
    tone = entry.tone or (DIM if entry.quiet else "")
    head = f"{_paint(DIM, f'{elapsed:>8}', style)}  "
    head += _paint(tone, f"{entry.symbol} {entry.label:<9}", style) + " "
    text = _cut(first, room, style)
    lines = [(head + (_paint(DIM, text, style) if tone == DIM else text)).rstrip()]
    indent = " " * MARGIN
    lines += [f"{indent}{line}".rstrip() for line in rest]
    lines += [
        (indent + _paint(entry.body_tone, f"│ {_cut(line, room - 2, style)}", style)).rstrip()
        for line in entry.body
    ]
    return lines


def fold(text: str, style: Style, keep: int = FOLD) -> tuple[str, ...]:
    """The first lines of a text, and how many more there are."""
    lines = safe(text).rstrip("\n").split("\n") if text.strip() else []
    if style.full or len(lines) <= keep + 1:
        return tuple(lines)
    return (*lines[:keep], f"… {len(lines) - keep} more lines (--full)")


def _entries(event: Data, data: Data, style: Style) -> list[Entry]:
    builder = _BUILDERS.get(str(event.get("type")))
    if builder is None:
        return [Entry("·", "event", safe(str(event.get("type"))), DIM, quiet=True)]
    return builder(event, data, style)


def _actor(data: Data) -> str:
    actor = data.get("actor") or {}
    return safe(str(actor.get("user") or "")).rsplit(":", 1)[-1]


def _created(_: Data, data: Data, __: Style) -> list[Entry]:
    agent = data.get("agent") or {}
    name = agent.get("name") or "inline agent"
    model = (data.get("request") or {}).get("model", "?")
    where = f"{data.get('namespace', '')}/{data.get('name') or '(API)'}"
    return [Entry("◆", "session", safe(f"{where} · {name} · {model}"), BOLD)]


def _message(_: Data, data: Data, style: Style) -> list[Entry]:
    parts = []
    for block in data.get("content") or ():
        kind = block.get("type")
        parts.append(str(block.get("text", "")) if kind == "text" else f"[{kind}]")
    lines = fold("\n".join(parts), style, keep=12)
    who = f"{_actor(data)}: " if _actor(data) else ""
    return [Entry("▶", "user", who + "\n".join(lines), f"{BOLD};{BLUE}")]


def _wake(event: Data, _: Data, __: Style) -> list[Entry]:
    epoch, _sep, rest = str(event.get("lease") or "").partition(":")
    worker = rest.split(":")[0].split(".")[0]
    return [Entry("·", "wake", safe(f"harness {worker[:8]} holds the session, epoch {epoch}"), DIM)]


def _request(_: Data, data: Data, __: Style) -> list[Entry]:
    attempt = int(data.get("attempt") or 1)
    again = f", attempt {attempt}" if attempt > 1 else ""
    purpose = {"compaction": " for a summary", "notes": " for notes"}
    what = purpose.get(str(data.get("purpose")), "")
    text = f"request {data.get('n')}{what} with {data.get('n_messages')} messages{again}"
    return [Entry("→", "model", text, DIM, quiet=attempt == 1)]


def _selected(_: Data, data: Data, __: Style) -> list[Entry]:
    name, warning = safe(str(data.get("profile"))), safe(str(data.get("warning") or ""))
    text = f"profile {name}: {warning}" if warning else f"profile {name}"
    tone = YELLOW if warning else DIM
    return [Entry("◔", "context", text.replace("\n", " "), tone, quiet=not warning)]


def _compacted(_: Data, data: Data, style: Style) -> list[Entry]:
    lines = fold(str((data.get("block") or {}).get("content") or ""), style, keep=2)
    return [Entry("◔", "context", "summarized by the model", YELLOW, body=lines)]


def _reset(_: Data, data: Data, style: Style) -> list[Entry]:
    lines = fold(str(data.get("notes") or ""), style, keep=2)
    return [Entry("◔", "context", "new window, with the model's notes", YELLOW, body=lines)]


def _cleared(_: Data, data: Data, __: Style) -> list[Entry]:
    count = len(data.get("tool_use_ids") or ())
    return [Entry("◔", "context", f"{count} old tool results removed", YELLOW)]


def _request_end(_: Data, data: Data, __: Style) -> list[Entry]:
    outcome = str(data.get("outcome"))
    if outcome == "ok":
        return [Entry("←", "model", "response complete", DIM, quiet=True)]
    error = data.get("error") or {}
    kind = "" if error.get("type") == outcome else f"{error.get('type', '')}: "
    text = f"{outcome}: {kind}{error.get('message', '')}".rstrip(": ")
    return [Entry("✗", "model", safe(text).replace("\n", " "), YELLOW)]


def _response(_: Data, data: Data, style: Style) -> list[Entry]:
    entries = []
    for block in (data.get("message") or {}).get("content") or ():
        kind = block.get("type")
        if kind == "text" and str(block.get("text", "")).strip():
            entries.append(Entry("●", "claude", safe(block["text"]).strip("\n"), f"{BOLD};{GREEN}"))
        elif kind == "thinking":
            lines = fold(str(block.get("thinking") or ""), style, keep=1)
            entries.append(Entry("✻", "thinking", "\n".join(lines) or "…", MAGENTA))
        elif kind == "redacted_thinking":
            entries.append(Entry("✻", "thinking", "(redacted)", MAGENTA))
        elif kind == "tool_use":
            name = safe(str(block.get("name")))
            entries.append(Entry("⚒", name, _arguments(block.get("input") or {}), CYAN))
    usage = (data.get("message") or {}).get("usage") or {}
    counts = (
        f"{usage.get('input_tokens', 0)} in, {usage.get('output_tokens', 0)} out, "
        f"{usage.get('cache_read_input_tokens', 0)} cached · first token {data.get('ttft_ms')} ms"
    )
    return [*entries, Entry("·", "tokens", counts, DIM, quiet=True)]


def _arguments(arguments: Data) -> str:
    """A tool's input in one line: the argument that says most, then the others."""
    for name in ("command", "file_path", "pattern"):
        if isinstance(arguments.get(name), str):
            first = safe(arguments[name]).replace("\n", " ⏎ ")
            rest = {key: value for key, value in arguments.items() if key != name}
            return f"{first}  {_compact(rest)}" if rest else first
    return _compact(arguments) if arguments else ""


def _compact(value: Data) -> str:
    return safe(json.dumps(value, ensure_ascii=False))


def _pending(_: Data, data: Data, __: Style) -> list[Entry]:
    name, call = safe(str(data.get("name"))), safe(str(data.get("tool_use_id")))
    if data.get("permission") == "Deny":
        return [Entry("✗", "denied", f"{name} is not allowed for this agent", YELLOW)]
    if data.get("kind") == "custom_tool":
        text = f"{name} waits for its client (`cowhand answer`): {call}"
        return [Entry("?", "answer?", text, f"{BOLD};{YELLOW}")]
    return [Entry("?", "approve?", f"{name} waits for approval: {call}", f"{BOLD};{YELLOW}")]


def _started(_: Data, data: Data, __: Style) -> list[Entry]:
    attempt = int(data.get("attempt") or 1)
    text = f"{data.get('name')} in {data.get('hand')} {data.get('instance')}"
    if attempt > 1:
        return [Entry("↻", "again", safe(f"{text}, attempt {attempt}"), YELLOW)]
    return [Entry("·", "started", safe(text), DIM, quiet=True)]


def _result(_: Data, data: Data, style: Style) -> list[Entry]:
    content = data.get("content")
    failed = bool(data.get("is_error"))
    facts = [safe(data["name"])] if data.get("name") else []
    if data.get("exit_code") is not None:
        facts.append(f"exit {data['exit_code']}")
    if data.get("duration_ms") is not None:
        facts.append(relative(int(data["duration_ms"])))
    if data.get("synthesized"):
        facts.append("written by the harness")
    body = fold(content if isinstance(content, str) else _compact({"content": content}), style)
    if len(facts) <= 1:
        facts.append("error" if failed else "ok")
    head = " · ".join(facts)
    return [Entry("✗" if failed else "✓", "result", head, RED if failed else GREEN, body)]


def _hand(event: Data, data: Data, __: Style) -> list[Entry]:
    hand = f"{data.get('hand')} {data.get('instance')}"
    kind = event.get("type")
    if kind == "hand.requested":
        return [Entry("○", "hand", safe(f"{hand} requested ({data.get('reason')})"), DIM)]
    if kind == "hand.provisioned":
        text = f"{hand} is sandbox {data.get('sandbox')}, after {data.get('waited_ms')} ms"
        return [Entry("●", "hand", safe(text), DIM)]
    text = safe(f"{hand} lost: {data.get('reason')}: {data.get('message', '')}").replace("\n", " ")
    return [Entry("✗", "hand", text, RED)]


def _confirmation(_: Data, data: Data, __: Style) -> list[Entry]:
    allowed = data.get("result") == "allow"
    why = f": {data['deny_message']}" if data.get("deny_message") else ""
    text = safe(
        f"{_actor(data)} {'allows' if allowed else 'denies'} {data.get('tool_use_id')}{why}"
    )
    symbol, label = ("✓", "approved") if allowed else ("✗", "denied")
    return [Entry(symbol, label, text.replace("\n", " "), GREEN if allowed else YELLOW)]


def _custom_result(_: Data, data: Data, __: Style) -> list[Entry]:
    failed = bool(data.get("is_error"))
    text = f"{_actor(data)} answers {data.get('custom_tool_use_id')}{' with an error' if failed else ''}"
    return [Entry("✗" if failed else "✓", "answered", safe(text), RED if failed else GREEN)]


def _system(_: Data, data: Data, style: Style) -> list[Entry]:
    said = "\n".join(str(block.get("text", "")) for block in data.get("content") or ())
    who = f"{_actor(data)}: " if _actor(data) else ""
    return [Entry("▶", "system", who + "\n".join(fold(said, style, keep=12)), f"{BOLD};{MAGENTA}")]


def _exec(_: Data, data: Data, __: Style) -> list[Entry]:
    if "exit_code" in data:
        return [Entry("⌨", "exec", f"exit {data['exit_code']}", YELLOW, quiet=True)]
    text = f"{_actor(data)} in {data.get('sandbox')}: {data.get('command')}"
    return [Entry("⌨", "exec", safe(text).replace("\n", " ⏎ "), YELLOW)]


_ENDS: Final = {
    "end_turn": ("■", GREEN, "turn complete"),
    "requires_action": ("?", YELLOW, "waits for an answer (`cowhand approve`, `deny` or `answer`)"),
    "retries_exhausted": ("✗", RED, "gave up after retries"),
    "budget_reached": ("✗", YELLOW, "budget reached"),
    "refusal": ("✗", YELLOW, "the model refused"),
    "interrupted": ("■", YELLOW, "interrupted"),
    "suspended": ("■", YELLOW, "suspended"),
}


def _idle(_: Data, data: Data, __: Style) -> list[Entry]:
    kind = str((data.get("stop_reason") or {}).get("type"))
    symbol, tone, text = _ENDS.get(kind, ("■", "", kind))
    return [Entry(symbol, "idle", safe(text), f"{BOLD};{tone}" if tone else BOLD)]


def _error(_: Data, data: Data, __: Style) -> list[Entry]:
    error = data.get("error") or {}
    retry = (error.get("retry_status") or {}).get("type", "")
    text = safe(f"{error.get('type')}: {error.get('message')}").replace("\n", " ")
    return [Entry("✗", "error", f"{text} ({retry})" if retry else text, RED)]


def _updated(_: Data, data: Data, __: Style) -> list[Entry]:
    limits = data.get("budget") or {}
    text = ", ".join(f"{safe(str(key))} {safe(str(value))}" for key, value in limits.items())
    who = f" by {_actor(data)}" if _actor(data) else ""
    return [Entry("·", "budget", f"budget: {text or 'no limits'}{who}", YELLOW)]


def _plain(symbol: str, label: str, text: str, tone: str = "", *, quiet: bool = False) -> Any:
    def build(_: Data, data: Data, __: Style) -> list[Entry]:
        who = f" by {_actor(data)}" if _actor(data) else ""
        why = f": {safe(str(data['reason']))}" if data.get("reason") else ""
        return [Entry(symbol, label, f"{text}{who}{why}", tone, quiet=quiet)]

    return build


_BUILDERS: Final[Mapping[str, Callable[[Data, Data, Style], list[Entry]]]] = {
    "session.created": _created,
    "user.message": _message,
    "user.interrupt": _plain("■", "interrupt", "interrupt asked for", YELLOW),
    "user.tool_confirmation": _confirmation,
    "user.custom_tool_result": _custom_result,
    "system.message": _system,
    "session.wake": _wake,
    "session.status_running": _plain("·", "running", "", DIM, quiet=True),
    "session.status_idle": _idle,
    "session.status_rescheduled": _plain("↻", "retrying", "will be tried again", YELLOW),
    "session.status_terminated": _plain("■", "ended", "session terminated", RED),
    "session.suspended": _plain("■", "suspend", "suspended", YELLOW),
    "session.resumed": _plain("▶", "resume", "resumed", GREEN),
    "session.updated": _updated,
    "session.deleted": _plain("■", "deleted", "the log ends here", YELLOW),
    "session.exec": _exec,
    "session.error": _error,
    "span.model_request_start": _request,
    "span.model_request_end": _request_end,
    "model.response": _response,
    "context.selected": _selected,
    "context.compacted": _compacted,
    "context.reset": _reset,
    "context.cleared": _cleared,
    "tool.pending": _pending,
    "tool.started": _started,
    "tool.result": _result,
    "hand.requested": _hand,
    "hand.provisioned": _hand,
    "hand.lost": _hand,
}
