"""The hand of kind `session`: an agent reads the log of its own session.

What left the context window (a compaction, a reset, a cleared result) stands in the log; the tools
`read_log` (a slice) and `search_log` (a text) bring it back as a tool result, which only appends to
the prompt. A search does not find searches, else each one would hide what it looks for. The harness
answers them itself, from `get_events` of the one session it works on: there is no argument that names
another. Both are pure: a call that may have run is simply run again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from cowhand.hands.base import Call, Outcome, cut_output, printable
from cowhand.session import events as ev
from cowhand.session.events import Event
from cowhand.session.log import SessionLog

HAND: Final = "session:log"
"""Name of this hand in `tool.started`; no hand of an agent can have it, theirs are DNS labels."""

LOG_TOOLS: Final = ("read_log", "search_log")

PAGE: Final = 200
"""Events read at a time."""

MAX_EVENTS: Final = 50
"""Most events that one read shows."""

MAX_MATCHES: Final = 20
"""Most matches that one search shows."""

AROUND: Final = 160
"""Characters of text on each side of a match."""

_SHOWN: Final = frozenset(
    {
        ev.SESSION_CREATED,
        ev.USER_MESSAGE,
        ev.MODEL_RESPONSE,
        ev.TOOL_STARTED,
        ev.TOOL_RESULT,
        ev.CONTEXT_COMPACTED,
        ev.CONTEXT_RESET,
        ev.CONTEXT_CLEARED,
        ev.HAND_LOST,
        ev.SESSION_ERROR,
        ev.STATUS_IDLE,
    }
)
"""Types that are shown unless `types` names others: what was said, done and decided."""


class _BadInput(Exception):
    """The tool's input is not valid; the text is for the model."""


class SessionLogHand:
    """`hands.base.Hand` that answers the log tools.

    Args:
        session_id: the session whose log is read, and no other.
        reader: reads events.
        max_output: characters of one result.
    """

    def __init__(self, session_id: str, reader: SessionLog, max_output: int = 30_000) -> None:
        self._session_id = session_id
        self._reader = reader
        self._max_output = max_output

    async def execute(self, call: Call) -> Outcome:
        """See `Hand`."""
        try:
            if call.name == "read_log":
                text = await self._read(call.input)
            elif call.name == "search_log":
                text = await self._search(call.input)
            else:
                return Outcome(f"the session's log has no tool {call.name!r}", True)
        except _BadInput as err:
            return Outcome(str(err), True)
        return Outcome(cut_output(printable(text), self._max_output), False)

    async def attach(self, call: Call) -> Outcome:
        """See `Hand`; reading twice changes nothing."""
        return await self.execute(call)

    async def interrupt(self, call_id: str) -> None:
        """See `Hand`; there is nothing to stop."""

    async def provision(self) -> Outcome | None:
        """See `Hand`; there is nothing to make."""
        return None

    async def _read(self, given: Mapping[str, Any]) -> str:
        start, end = _number(given, "start", 1), _number(given, "end", 0)
        types = _types(given)
        if end and end < start:
            raise _BadInput(f"end ({end}) must not be before start ({start})")
        lines: list[str] = []
        size, at = 0, start
        while len(lines) < MAX_EVENTS and size < self._max_output:
            page = await self._reader.get_events(self._session_id, at, end or None, limit=PAGE)
            for event in page:
                at = event.seq + 1
                if event.type not in types:
                    continue
                lines.append(_line(event, _text(event)))
                size += len(lines[-1])
                if len(lines) == MAX_EVENTS or size >= self._max_output:
                    break
            if len(page) < PAGE and (not page or at > page[-1].seq):
                return "\n".join(lines) or "There is no such event in that range."
        return "\n".join([*lines, f"[more follows: read_log with start {at}]"])

    async def _search(self, given: Mapping[str, Any]) -> str:
        query = given.get("query")
        if not isinstance(query, str) or not query.strip():
            raise _BadInput("query must be a text that is not empty")
        types, before = _types(given), _number(given, "before", 0)
        wanted = query.strip().casefold()
        found: list[str] = []
        at, more = 1, False
        while True:
            end = before - 1 if before else None
            page = await self._reader.get_events(self._session_id, at, end, limit=PAGE)
            for event in page:
                at = event.seq + 1
                if event.type not in types or _looks(event):
                    continue
                if hit := _around(_text(event, lookups=False), wanted):
                    found.append(_line(event, hit))
            if len(found) > MAX_MATCHES:
                found, more = found[-MAX_MATCHES:], True
            if len(page) < PAGE:
                break
        if not found:
            return f"No event contains {query.strip()!r}."
        found.reverse()
        if more:
            oldest = found[-1].split(" ", 1)[0].lstrip("#")
            found.append(f"[older matches: search_log with before {oldest}]")
        return "\n".join(found)


def _number(given: Mapping[str, Any], name: str, default: int) -> int:
    value = given.get(name, default)
    if type(value) is not int or value < (0 if default == 0 else 1):
        raise _BadInput(f"{name} must be a position in the log, a number from 1")
    return value


def _types(given: Mapping[str, Any]) -> frozenset[str]:
    value = given.get("types")
    if value is None:
        return _SHOWN
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _BadInput(f"types must be a list of event types, for example {ev.TOOL_RESULT!r}")
    return frozenset(value)


def _line(event: Event, text: str) -> str:
    return f"#{event.seq} {event.type}: {text}"


def _around(text: str, wanted: str) -> str:
    """The first match with the text around it, empty without one."""
    folded = text.casefold()
    at = folded.find(wanted)
    if at < 0:
        return ""
    if len(folded) != len(text):  # folding changed positions, as with the German sharp s
        text = folded
    start, end = max(0, at - AROUND), at + len(wanted) + AROUND
    left, right = ("..." if start else ""), ("..." if end < len(text) else "")
    return f"{left}{text[start:end]}{right}"


def _looks(event: Event) -> bool:
    """The event is the start or the result of a call of these tools: it only repeats what stands elsewhere."""
    return event.type in (ev.TOOL_STARTED, ev.TOOL_RESULT) and event.data.get("hand") == HAND


def _text(event: Event, *, lookups: bool = True) -> str:
    """What an event says, as text: the words of messages, calls and results; else its data as JSON.

    Args:
        event: of the log.
        lookups: with the calls of these tools in a response, which name what they look for.
    """
    data = event.data
    if event.type == ev.USER_MESSAGE:
        return _content(data.get("content"))
    if event.type == ev.MODEL_RESPONSE:
        content = data["message"].get("content")
        if not lookups and isinstance(content, list):
            content = [item for item in content if item.get("name") not in LOG_TOOLS]
        return _content(content)
    if event.type == ev.TOOL_RESULT:
        return str(data.get("content", ""))
    if event.type == ev.CONTEXT_COMPACTED:
        return str(data["block"].get("content", ""))
    if event.type == ev.CONTEXT_RESET:
        return str(data.get("notes", ""))
    return json.dumps(data, ensure_ascii=False)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = []
    for item in content or ():
        if item.get("type") == "text":
            parts.append(str(item.get("text", "")))
        elif item.get("type") == "tool_use":
            parts.append(f"{item.get('name')} {json.dumps(item.get('input'), ensure_ascii=False)}")
        elif item.get("type") not in ("thinking", "redacted_thinking"):
            parts.append(f"[{item.get('type')}]")
    return "\n".join(parts)
