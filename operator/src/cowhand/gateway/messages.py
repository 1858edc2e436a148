"""`POST /v1/sessions/{id}/events`: write what a client sends once, with the actor in it.

All events of a request are checked (`incoming`, `answers`) before the first is written. The log deduplicates by
event id; official clients send none and repeat a request whose answer was lost, so a repetition
(`x-stainless-retry-count`) gets the ids that its first attempt got here. A client that wants this across
gateways sends an `id`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cowhand.gateway.auth import Caller, Clock, Expiring
from cowhand.gateway.errors import Conflict, TooLarge
from cowhand.gateway.incoming import Incoming
from cowhand.gateway.projection import Context, project
from cowhand.session import events as ev
from cowhand.session.events import INLINE_LIMIT, NewEvent
from cowhand.session.log import SessionLog

RETRY_TTL_S: Final = 900.0
"""How long a repetition gets the ids of its first attempt: longer than a client's 600 s time-out."""

RESULT_ROOM: Final = 1024
"""Bytes by which a custom tool's result must be smaller: its content goes into the log again, as `tool.result`."""


def uuid7() -> str:
    """A UUIDv7 (RFC 9562): 48 bits of milliseconds, then random bits; sorts by time."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    text = f"{value:032x}"
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


@dataclass
class Ids:
    """The ids that requests got, so that a repeated request gets them again."""

    clock: Clock = time.monotonic
    make: Callable[[], str] = uuid7
    _seen: Expiring[list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self._seen = Expiring(self.clock)

    def of(self, caller: Caller, session_id: str, body: bytes, count: int, retry: int) -> list[str]:
        """Ids for the `count` events of a request; `retry` is the client's count of repetitions."""
        key = (caller.user, session_id, hashlib.sha256(body).digest())
        known = self._seen.get(key) if retry > 0 else None
        ids = known if known is not None else [self.make() for _ in range(count)]
        self._seen.put(key, ids, RETRY_TTL_S)
        return ids


def compose(
    incoming: Sequence[Incoming],
    caller: Caller,
    ids: Sequence[str],
    event_limit: int = INLINE_LIMIT,
) -> list[NewEvent]:
    """The events to write: with actor and id; `event_limit` is what the log takes, in bytes. Raises TooLarge."""
    events = []
    for item, made in zip(incoming, ids, strict=True):
        # One call has one answer: the id makes the log refuse a second one.
        key = item.answer_id if item.call else item.id or made
        event = NewEvent(item.type, {**item.data, "actor": caller.actor()}, id=key)
        room = RESULT_ROOM if item.type == ev.USER_CUSTOM_TOOL_RESULT else 0
        limit = event_limit - room
        if (size := len(event.payload())) > limit:
            raise TooLarge(
                f"{item.path}: {size} bytes; an event may have {limit}. Put large text into "
                "a file of the session instead",
                field=item.path,
            )
        events.append(event)
    return events


async def write(
    log: SessionLog, session_id: str, events: Sequence[NewEvent]
) -> tuple[list[dict[str, Any]], int]:
    """Write events; answers the public echoes in the order given, and the position of the first event.

    A system message is written before what it follows, so that no model request sees the one without
    the other.

    Raises:
        Conflict: an id is taken by another event: a second, different answer to one call, for example.
        SessionNotFound, SessionClosed, StoreUnavailable.
    """
    echoes: dict[int, list[dict[str, Any]]] = {}
    first = 0
    order = sorted(range(len(events)), key=lambda i: events[i].type != ev.SYSTEM_MESSAGE)
    for i in order:
        event = events[i]
        seq = await log.emit_event(session_id, event)
        stored = (await log.get_events(session_id, seq, seq))[0]
        if stored.type != event.type or _said(stored.data) != _said(event.data):
            what = "answered" if event.id.startswith(_ANSWERS) else "used for other content"
            said = f" with {stored.data['result']}" if "result" in stored.data else ""
            raise Conflict(f"event id {event.id}: already {what}{said} at position {seq}")
        echoes[i] = project(stored, Context(session_id))
        first = first or seq
    return [echo for i in sorted(echoes) for echo in echoes[i]], first


_ANSWERS: Final = ("confirm:", "deny:", "result:")


def _said(data: Mapping[str, Any]) -> dict[str, Any]:
    """The payload without the actor: what a repetition has in common with its first attempt."""
    return {name: value for name, value in data.items() if name != "actor"}
