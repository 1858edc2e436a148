"""The raw log as NDJSON: an extension for people who debug, and the source of `cowhand events`.

One line per event, `{"seq","type","id","ts","lease","payload"}` with the payload as JSON.
Empty lines are keep-alives. A line `{"error":...}` at the end says why a followed log stopped.
Lines `{"preview":{"start","block","offset","text","kind"?}}` (with `previews`, and `thinking`) are text that is
still being written: they are not events, and no position counts them.

`export_lines` makes the file of `cowhand export` (see `session.export`), whose payloads survive byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from multidict import MultiMapping

from cowhand.errors import SessionNotFound, UserError
from cowhand.gateway.window import chunks
from cowhand.session.events import Event
from cowhand.session.export import Writer, header_of
from cowhand.session.log import SessionLog, SessionState


@dataclass(frozen=True)
class Query:
    """A parsed query string.

    Attributes:
        start: first position; negative: from the end, -1 is the newest event.
        end: last position, None for the newest.
        follow: go on with new events.
        types: types to keep, empty for all.
        previews: with the text of responses that are still written; only with `follow`.
        thinking: with their thinking too; only with `previews`.
    """

    start: int = 1
    end: int | None = None
    follow: bool = False
    types: frozenset[str] = frozenset()
    previews: bool = False
    thinking: bool = False

    def render(self, event: Event) -> bytes:
        """The line of an event, empty for one that the filter leaves out."""
        return line(event) if not self.types or event.type in self.types else b""


def _position(query: MultiMapping[str], name: str) -> int | None:
    raw = query.get(name, "")
    if not raw:
        return None
    digits = raw.removeprefix("-")
    if not digits.isdecimal() or len(digits) > 15 or int(digits) == 0:
        raise UserError(
            f"{name}: {raw!r} is not a position: they count from 1, and from the end with -1",
            field=name,
        )
    return int(raw)


def parse(query: MultiMapping[str]) -> Query:
    """The query: `start`, `end`, `follow`, `previews`, `thinking`, `types` (comma separated, may be repeated).

    Raises:
        UserError: a value that is not valid; `field` names the parameter.
    """
    start = _position(query, "start") or 1
    end = _position(query, "end")
    follow, previews = _flag(query, "follow"), _flag(query, "previews")
    if follow and end is not None:
        raise UserError("end: cannot be combined with follow", field="end")
    given = [*query.getall("types", []), *query.getall("types[]", [])]
    types = frozenset(word for text in given for word in text.split(",") if word)
    return Query(start, end, follow, types, previews, _flag(query, "thinking"))


def _flag(query: MultiMapping[str], name: str) -> bool:
    given = query.get(name, "false")
    if given not in ("true", "false", "1", "0"):
        raise UserError(f"{name}: {given!r} is not true or false", field=name)
    return given in ("true", "1")


def line(event: Event) -> bytes:
    """One event as a line with its newline."""
    head = {
        "seq": event.seq,
        "type": event.type,
        "id": event.id,
        "ts": event.ts,
        "lease": event.lease,
    }
    payload = event.payload or b"null"
    if b"\n" in payload or b"\r" in payload:
        payload = json.dumps(json.loads(payload), ensure_ascii=False).encode()
    return json.dumps(head, ensure_ascii=False).encode()[:-1] + b', "payload": ' + payload + b"}\n"


async def export_lines(log: SessionLog, state: SessionState, now_ms: int) -> AsyncIterator[bytes]:
    """The lines of an export: the session as `state` says, and its events up to there.

    Args:
        log: of the session's tenant.
        state: the session, read before its events.
        now_ms: milliseconds since the epoch.

    Raises:
        SessionNotFound: the log went away meanwhile; the file lacks its footer then.
    """
    writer = Writer()
    yield writer.begin(header_of(state, now_ms))
    last, seq = state.next_seq - 1, 0
    async for found in chunks(log, state.meta.session_id, 1, last):
        for event in found:
            seq = event.seq
            yield writer.event(event)
    if seq != last:
        raise SessionNotFound(
            f"the log of {state.meta.session_id} was deleted at {seq} of {last} events"
        )
    yield writer.end()


def error_line(envelope: dict[str, Any]) -> bytes:
    """The last line of a followed log that failed."""
    return json.dumps({"error": envelope["error"]}, ensure_ascii=False).encode() + b"\n"
