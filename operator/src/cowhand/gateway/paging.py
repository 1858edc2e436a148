"""`GET /v1/sessions/{id}/events`: one page of the projection, in the cursor scheme of the API.

A cursor says where in the log the next page begins and in which order; pages stay right while the log
grows. A page ends early when it gets heavy or when a filter matches too little: then `data` may be short
(even empty) and `next_page` goes on, which is what clients look at.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

from multidict import MultiMapping

from cowhand.errors import UserError
from cowhand.gateway.projection import Public, project, rfc3339
from cowhand.gateway.window import CHUNK, CHUNK_BYTES, complete, context_at
from cowhand.session.events import Event
from cowhand.session.log import SessionLog

MAX_LIMIT: Final = 1000
PAGE_BYTES: Final = 4 * 1024 * 1024
"""Payload bytes of the log that a page has at most, unless its first event alone has more."""
SCAN_EVENTS: Final = 5000
"""Events of the log after which a page ends, whatever matched."""

Order = Literal["asc", "desc"]
Position = tuple[int, int]
"""Position in the log, and index among the public events of that position."""

_BOUNDS: Final[Mapping[str, Callable[[datetime, datetime], bool]]] = {
    "gt": lambda at, bound: at > bound,
    "gte": lambda at, bound: at >= bound,
    "lt": lambda at, bound: at < bound,
    "lte": lambda at, bound: at <= bound,
}


@dataclass(frozen=True)
class Query:
    """A parsed query string.

    Attributes:
        limit: most events of a page.
        order: `asc` is the order of the log.
        begin: first position of the page, None for the end of the log that `order` begins at.
        types: public types to keep, empty for all.
        created: (operator, time) pairs that an event's time must meet.
    """

    limit: int = MAX_LIMIT
    order: Order = "asc"
    begin: Position | None = None
    types: frozenset[str] = frozenset()
    created: tuple[tuple[str, datetime], ...] = ()

    def keeps(self, public: Public, event: Event) -> bool:
        """Whether an event passes the filters."""
        if self.types and public["type"] not in self.types:
            return False
        if not self.created:
            return True
        at = datetime.fromisoformat(public["processed_at"] or rfc3339(event.ts))
        return all(_BOUNDS[name](at, bound) for name, bound in self.created)


def parse(query: MultiMapping[str]) -> Query:
    """The query of a request.

    Raises:
        UserError: a value that is not valid; `field` names the parameter.
    """
    order = query.get("order", "asc")
    if order not in ("asc", "desc"):
        raise UserError(f"order: {order!r} is not asc or desc", field="order")
    created = [
        (name, _time(f"created_at[{name}]", query[f"created_at[{name}]"]))
        for name in _BOUNDS
        if f"created_at[{name}]" in query
    ]
    return Query(
        limit=integer(query, "limit", MAX_LIMIT, low=1, high=MAX_LIMIT),
        order="asc" if order == "asc" else "desc",
        begin=_decode(query["page"], order) if query.get("page") else None,
        types=frozenset([*query.getall("types[]", []), *query.getall("types", [])]),
        created=tuple(created),
    )


def integer(
    query: MultiMapping[str], name: str, default: int, *, low: int, high: int = 2**53
) -> int:
    """An integer parameter within bounds. Raises UserError."""
    raw = query.get(name, "")
    if raw == "":
        return default
    if not raw.isdecimal() or not low <= int(raw) <= high:
        raise UserError(f"{name}: {raw!r} is not an integer from {low} to {high}", field=name)
    return int(raw)


def _time(name: str, raw: str) -> datetime:
    try:
        parsed = datetime.fromisoformat(raw)
    except ValueError:
        raise UserError(f"{name}: {raw!r} is not an RFC 3339 time", field=name) from None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def _encode(order: Order, position: Position) -> str:
    raw = json.dumps([order, *position], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decode(cursor: str, order: str) -> Position:
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        made_for, seq, index = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        position = (int(seq), int(index))
    except (ValueError, TypeError):
        raise UserError("page: this is not a cursor of ours", field="page") from None
    if made_for != order:
        raise UserError(f"page: this cursor was made with order={made_for}", field="page")
    return position


async def page(log: SessionLog, session_id: str, query: Query) -> dict[str, Any]:
    """One page: `{"data": [events], "next_page": cursor or null}`. Raises SessionNotFound."""
    rows: list[Public] = []
    weight = scanned = 0
    source = _ascending if query.order == "asc" else _descending
    async for event, publics in source(log, session_id, query.begin):
        heavy = bool(rows) and weight + len(event.payload) > PAGE_BYTES
        for index, public in publics:
            if not query.keeps(public, event):
                continue
            if len(rows) == query.limit or heavy:
                return {"data": rows, "next_page": _encode(query.order, (event.seq, index))}
            rows.append(public)
        scanned += 1
        weight += len(event.payload)
        if scanned >= SCAN_EVENTS:
            step = 1 if query.order == "asc" else -1
            following = (event.seq + step, 0 if step == 1 else 2**31)
            more = following[0] >= 1
            return {
                "data": rows,
                "next_page": _encode(query.order, following) if more else None,
            }
    return {"data": rows, "next_page": None}


Rows = AsyncIterator[tuple[Event, list[tuple[int, Public]]]]


async def _ascending(log: SessionLog, session_id: str, begin: Position | None) -> Rows:
    seq, first = begin or (1, 0)
    context = await context_at(log, session_id, seq, light=True)
    while True:
        found = await log.get_events(session_id, seq, seq + CHUNK - 1, max_bytes=CHUNK_BYTES)
        if not found:
            return
        await complete(log, context, found)
        for event in found:
            publics = list(enumerate(project(event, context)))
            skip = first if begin and event.seq == begin[0] else 0
            yield event, publics[skip:]
        seq = found[-1].seq + 1


async def _descending(log: SessionLog, session_id: str, begin: Position | None) -> Rows:
    last = begin[0] if begin else (await log.get_session(session_id)).next_seq - 1
    count = CHUNK
    while last >= 1:
        low = max(1, last - count + 1)
        found = await log.get_events(session_id, low, last, max_bytes=CHUNK_BYTES)
        if found and found[-1].seq < last:
            count = max(1, (last - low) // 2)  # the newest come first: a window that fits
            continue
        count = min(CHUNK, count * 2)
        context = await context_at(log, session_id, low, light=True)
        if found:
            await complete(log, context, found)
        for event in reversed(found):
            publics = list(enumerate(project(event, context)))
            upto = begin[1] if begin and event.seq == begin[0] else len(publics)
            yield event, [row for row in reversed(publics) if row[0] <= upto]
        last = low - 1
