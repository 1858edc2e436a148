"""Reading a log in bounded pieces, with the context that the projection of a piece needs.

Used by the list of events and by the streams. A log may hold thousands of events, each of up to 16 MiB: nothing here
reads all of it, nor holds more than some megabytes at a time, and nothing depends on where a client's page begins.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Final

from cowhand.gateway.projection import Context
from cowhand.session import events as ev
from cowhand.session.events import Event
from cowhand.session.log import SessionLog

CHUNK: Final = 20
"""Events read from the log at once."""

CHUNK_BYTES: Final = 4 * 1024 * 1024
"""Payloads held at a time, unless one event alone has more."""

LOOK_BACK: Final = 64
"""Events before a window that are folded, to find user events that still wait."""


async def chunks(
    log: SessionLog, session_id: str, start: int, end: int | None = None
) -> AsyncIterator[Sequence[Event]]:
    """The log from `start` to `end` (both inclusive; None: what is there now), a chunk at a time."""
    while end is None or start <= end:
        last = start + CHUNK - 1 if end is None else min(end, start + CHUNK - 1)
        found = await log.get_events(session_id, start, last, max_bytes=CHUNK_BYTES)
        if not found:
            return
        yield found
        start = found[-1].seq + 1


async def context_at(
    log: SessionLog, session_id: str, start: int, *, light: bool = False
) -> Context:
    """The context with which the event at `start` is projected; `light`: see `Context`."""
    context = Context(session_id, light=light)
    if start > 1:
        for event in await log.get_events(session_id, 1, 1):
            context.feed(event)
        async for found in chunks(log, session_id, max(2, start - LOOK_BACK), start - 1):
            for event in found:
                context.feed(event)
    return context


async def complete(log: SessionLog, context: Context, events: Sequence[Event]) -> None:
    """Feed a chunk, and look up what its events need from before and after it."""
    for event in events:
        context.feed(event)
    for event in events:
        start = int(event.data.get("start") or 0) if event.type == ev.MODEL_REQUEST_END else 0
        if start and start not in context.usage:
            await _find_usage(log, context, start, event.seq)
    last = events[-1].seq
    if context.waiting_before(last):
        async for later in chunks(log, context.session_id, last + 1):
            for event in later:
                context.feed(event)
            if not context.waiting_before(last):
                return


async def _find_usage(log: SessionLog, context: Context, start: int, end: int) -> None:
    async for between in chunks(log, context.session_id, start, end):
        for event in between:
            if event.type == ev.MODEL_RESPONSE:
                context.usage[start] = (event.data.get("message") or {}).get("usage") or {}
                return
