"""Text that Claude is still writing, between the events of a stream: for connections that ask for it.

The frames are those of the Managed Agents API (`event_start`, `event_delta`): they have no position, are never in
the history, and end with the event itself, which has the same id, or with the `span.model_request_end` of a request
that brought none. Of thinking there is only the start, as in that API; its text is in previews of the raw log alone.
Previews and log come over different ways, so `Gate` lets through only what belongs to the request that the log is
at, from the beginning of a block and without a gap.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable
from typing import Any, Final

from multidict import MultiMapping

from cowhand.errors import UserError
from cowhand.gateway.iteration import leave, upcoming
from cowhand.gateway.projection import Public, message_id
from cowhand.session import events as ev
from cowhand.session.events import Event
from cowhand.session.preview import Preview

KINDS: Final = frozenset({"agent.message", "agent.thinking"})
"""What official clients may ask for."""

HELD: Final = 64
"""Previews of one request that wait for its event."""


def wanted(query: MultiMapping[str]) -> frozenset[str]:
    """The events that a stream asks for previews of: `event_deltas[]=agent.message`.

    Raises:
        UserError: a kind that is none.
    """
    given = {*query.getall("event_deltas[]", []), *query.getall("event_deltas", [])}
    unknown = sorted(given - KINDS)
    if unknown:
        listed = ", ".join(sorted(KINDS))
        raise UserError(f"event_deltas: {unknown[0]!r} is none of {listed}", field="event_deltas")
    return frozenset(given)


class Gate:
    """What of the previews fits to the log as it was shown so far. Pure.

    Args:
        start: position that the log is shown from. A response may be under way there already.
    """

    def __init__(self, start: int = 1) -> None:
        self._open: int | None = None
        self._seen = start - 1
        self._block = -1
        self._next = 0
        self._held: list[Preview] = []

    def event(self, event: Event) -> list[Preview]:
        """The next event of the log; answers previews that waited for it."""
        self._seen = event.seq
        held: list[Preview] = []
        if event.type == ev.MODEL_REQUEST_START:
            self._open, self._block = event.seq, -1
            held, self._held = [one for one in self._held if one.start == event.seq], []
        elif event.type in (ev.MODEL_RESPONSE, ev.MODEL_REQUEST_END):
            self._open = 0
        return [one for one in held if self.preview(one)]

    def preview(self, preview: Preview) -> bool:
        """Whether a preview is to be shown now."""
        if preview.start > self._seen:
            if len(self._held) < HELD:
                self._held.append(preview)
            return False
        if self._open is None and preview.offset == 0:
            self._open = preview.start
        if preview.start != self._open or not preview.text:
            return False
        if preview.offset == 0 and preview.block > self._block:
            self._block, self._next = preview.block, 0
        if (preview.block, preview.offset) != (self._block, self._next):
            return False
        self._next += len(preview.text)
        return True


class Frames:
    """Renders the previews of one stream of server-sent events.

    Args:
        session_id: of the stream.
        kinds: the events that it asks for, see `wanted`.
    """

    def __init__(self, session_id: str, kinds: Collection[str]) -> None:
        self._session_id = session_id
        self._kinds = kinds
        self._text: tuple[int, int] = (0, 0)

    def __call__(self, preview: Preview) -> bytes:
        """The frames of a preview; empty for one that was not asked for."""
        place = (preview.start, preview.block)
        if preview.kind == "text":
            self._text = place
            return self._message(preview) if "agent.message" in self._kinds else b""
        # Thinking blocks one after the other are one event, which has the id of the first, also if that one is
        # redacted and cannot be seen here: so it must be sure that another event stands before.
        first = preview.block == 0 or self._text == (preview.start, preview.block - 1)
        if preview.offset or not first or "agent.thinking" not in self._kinds:
            return b""
        return _frames([self._started("agent.thinking", preview)])

    def _message(self, preview: Preview) -> bytes:
        identity = message_id(self._session_id, preview.start, preview.block)
        content = {"type": "text", "text": preview.text}
        delta = {"type": "content_delta", "index": 0, "content": content}
        out: list[Public] = [{"type": "event_delta", "event_id": identity, "delta": delta}]
        if preview.offset == 0:
            out.insert(0, self._started("agent.message", preview))
        return _frames(out)

    def _started(self, kind: str, preview: Preview) -> Public:
        identity = message_id(self._session_id, preview.start, preview.block)
        return {"type": "event_start", "event": {"type": kind, "id": identity}}


def _frames(events: Iterable[Public]) -> bytes:
    return b"".join(
        f"event: {one['type']}\ndata: {json.dumps(one, ensure_ascii=False)}\n\n".encode()
        for one in events
    )


def line(preview: Preview) -> bytes:
    """A preview in the raw log of `cowhand events`: a line without a position."""
    body: dict[str, int | str] = {"start": preview.start, "block": preview.block}
    body |= {"offset": preview.offset, "text": preview.text}
    if preview.kind != "text":
        body["kind"] = preview.kind
    return json.dumps({"preview": body}, ensure_ascii=False).encode() + b"\n"


def text_line(preview: Preview) -> bytes:
    """As `line`, for whoever knows of text alone; nothing of thinking."""
    return line(preview) if preview.kind == "text" else b""


def renderer(
    events: Callable[[Event], bytes], previews: Callable[[Preview], bytes], start: int
) -> Callable[[Event | Preview], bytes]:
    """Renders both, as far as previews fit; the log begins at `start`."""
    gate = Gate(start)

    def render(item: Event | Preview) -> bytes:
        if isinstance(item, Preview):
            return previews(item) if gate.preview(item) else b""
        return events(item) + b"".join(previews(one) for one in gate.event(item))

    return render


async def merged(
    events: AsyncIterator[Event], previews: AsyncIterator[Preview]
) -> AsyncGenerator[Event | Preview, None]:
    """Both as they come, events first; ends with the events. One preview is held at most."""
    sources: tuple[AsyncIterator[Any], ...] = (events, previews)
    pending: list[asyncio.Future[Any] | None] = [None, None]
    try:
        while True:
            for index, source in enumerate(sources):
                if pending[index] is None:
                    pending[index] = upcoming(source)
            await asyncio.wait(
                [one for one in pending if one is not None], return_when=asyncio.FIRST_COMPLETED
            )
            index = next(i for i, one in enumerate(pending) if one is not None and one.done())
            done, pending[index] = pending[index], None
            assert done is not None
            try:
                item = done.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        for future, source in zip(pending, sources, strict=True):
            await leave((future,), source)
