"""`POST /v1/sessions/{id}/events`: validate what a client sends, write it once, with the actor in it.

All events of a request are checked before the first is written. The log deduplicates by event id; official
clients send none and repeat a request whose answer was lost, so a repetition (`x-stainless-retry-count`)
gets the ids that its first attempt got here. A client that wants this across gateways sends an `id`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cowhand.errors import UserError
from cowhand.gateway.auth import Caller, Clock, Expiring
from cowhand.gateway.errors import Conflict, TooLarge
from cowhand.gateway.projection import Context, project, tool_use_event_id, tool_use_of
from cowhand.gateway.window import chunks
from cowhand.session import events as ev
from cowhand.session.events import INLINE_LIMIT, NewEvent
from cowhand.session.log import SessionLog, SessionState

MAX_EVENTS: Final = 50
"""Events of one request."""

RETRY_TTL_S: Final = 900.0
"""How long a repetition gets the ids of its first attempt: longer than a client's 600 s time-out."""

APPROVAL_LOOK_BACK: Final = 200
"""Events in which a tool use is looked for that the status does not list as pending yet."""

_SUPPORTED: Final = (ev.USER_MESSAGE, ev.USER_INTERRUPT, ev.USER_TOOL_CONFIRMATION)
_OFFICIAL: Final = (
    "user.custom_tool_result",
    "user.tool_result",
    "user.define_outcome",
    "system.message",
)
# A colon is left to ids that Cowhand makes (`msg:0`, `mode:3`): no client can take one of those.
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MEDIA: Final = ("image/jpeg", "image/png", "image/gif", "image/webp")


@dataclass(frozen=True)
class Incoming:
    """A valid event from a client.

    Attributes:
        type: one of the three that clients may send.
        data: payload without the actor.
        id: the client's id, or empty.
        path: where it stands in the request, for messages.
    """

    type: str
    data: Mapping[str, Any]
    id: str
    path: str


def parse(body: bytes, session_id: str) -> list[Incoming]:
    """The events of a request body `{"events": [...]}`.

    Raises:
        UserError: not valid; the message begins with the path of the field, as in
            `events.0.content.1.text: must be a string`.
    """
    try:
        document = json.loads(body)
    except ValueError as err:
        raise UserError(f"the body is not JSON: {err}") from None
    events = _object(document, "body").get("events")
    if not isinstance(events, list) or not events:
        raise _bad("events", "must be a list with at least one event")
    if len(events) > MAX_EVENTS:
        raise _bad("events", f"has {len(events)} events; at most {MAX_EVENTS}")
    return [_event(raw, f"events.{i}", session_id) for i, raw in enumerate(events)]


def _bad(path: str, message: str) -> UserError:
    return UserError(f"{path}: {message}", field=path)


def _object(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(path, "must be an object")
    return value


def _known(value: Mapping[str, Any], allowed: Sequence[str], path: str) -> None:
    for name in value:
        if name not in allowed:
            raise _bad(f"{path}.{name}", f"is not known here; allowed are {', '.join(allowed)}")


def _text(value: Mapping[str, Any], name: str, path: str, *, empty: bool = False) -> str:
    found = value.get(name)
    if not isinstance(found, str):
        raise _bad(f"{path}.{name}", "must be a string")
    if not found.strip() and not empty:
        raise _bad(f"{path}.{name}", "must not be empty")
    return found


def _event(raw: Any, path: str, session_id: str) -> Incoming:
    event = _object(raw, path)
    kind = event.get("type")
    if kind in _OFFICIAL:
        raise _bad(
            f"{path}.type", f"{kind} is not supported yet; supported are {', '.join(_SUPPORTED)}"
        )
    if kind not in _SUPPORTED:
        raise _bad(f"{path}.type", f"{kind!r} is not one of {', '.join(_SUPPORTED)}")
    identity = event.get("id", "")
    if identity and not (isinstance(identity, str) and _ID.fullmatch(identity)):
        raise _bad(f"{path}.id", "must be 1 to 64 letters, digits, '.', '_' or '-'")
    if kind == ev.USER_MESSAGE:
        data = _message(event, path)
    elif kind == ev.USER_INTERRUPT:
        data = _interrupt(event, path)
    else:
        data = _confirmation(event, path, session_id)
    return Incoming(str(kind), data, identity or "", path)


def _message(event: Mapping[str, Any], path: str) -> dict[str, Any]:
    _known(event, ("type", "id", "content"), path)
    content = event.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise _bad(f"{path}.content", "must be a list with at least one content block")
    return {"content": [_block(block, f"{path}.content.{i}") for i, block in enumerate(content)]}


def _interrupt(event: Mapping[str, Any], path: str) -> dict[str, Any]:
    _known(event, ("type", "id", "session_thread_id"), path)
    if event.get("session_thread_id") is not None:
        raise _bad(f"{path}.session_thread_id", "this session has no threads; leave it out")
    return {}


def _confirmation(event: Mapping[str, Any], path: str, session_id: str) -> dict[str, Any]:
    _known(event, ("type", "id", "tool_use_id", "result", "deny_message"), path)
    result = event.get("result")
    if result not in ("allow", "deny"):
        raise _bad(f"{path}.result", f"{result!r} is not allow or deny")
    data = {
        "tool_use_id": tool_use_of(session_id, _text(event, "tool_use_id", path)),
        "result": result,
    }
    if event.get("deny_message") is not None:
        if result != "deny":
            raise _bad(f"{path}.deny_message", "is only allowed with result deny")
        data["deny_message"] = _text(event, "deny_message", path)
    return data


def _block(raw: Any, path: str) -> dict[str, Any]:
    block = _object(raw, path)
    kind = block.get("type")
    if kind == "text":
        _known(block, ("type", "text"), path)
        return {"type": "text", "text": _text(block, "text", path)}
    if kind == "image":
        _known(block, ("type", "source"), path)
        return {"type": "image", "source": _source(block, path, media=_MEDIA)}
    if kind == "document":
        _known(block, ("type", "source", "title", "context"), path)
        source = _source(block, path, media=("application/pdf",), text=True)
        extra = {
            name: _text(block, name, path)
            for name in ("title", "context")
            if block.get(name) is not None
        }
        return {"type": "document", "source": source, **extra}
    raise _bad(f"{path}.type", f"{kind!r} is not one of text, image, document")


def _source(
    block: Mapping[str, Any], path: str, *, media: Sequence[str], text: bool = False
) -> dict[str, Any]:
    path = f"{path}.source"
    source = _object(block.get("source"), path)
    kind = source.get("type")
    if kind == "url":
        _known(source, ("type", "url"), path)
        url = _text(source, "url", path)
        if not url.startswith("https://"):
            raise _bad(f"{path}.url", "must begin with https://")
        return {"type": "url", "url": url}
    if kind == "base64" or (kind == "text" and text):
        _known(source, ("type", "media_type", "data"), path)
        allowed = media if kind == "base64" else ("text/plain",)
        if source.get("media_type") not in allowed:
            raise _bad(f"{path}.media_type", f"must be one of {', '.join(allowed)}")
        return {
            "type": kind,
            "media_type": source["media_type"],
            "data": _text(source, "data", path),
        }
    kinds = "base64, url, text" if text else "base64, url"
    if kind == "file":
        raise _bad(f"{path}.type", f"file sources are not supported yet; supported are {kinds}")
    raise _bad(f"{path}.type", f"{kind!r} is not one of {kinds}")


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


def compose(incoming: Sequence[Incoming], caller: Caller, ids: Sequence[str]) -> list[NewEvent]:
    """The events to write: with actor and id. Raises TooLarge."""
    events = []
    for item, made in zip(incoming, ids, strict=True):
        # One call has one answer: the id makes the log refuse a second one.
        key = f"confirm:{item.data['tool_use_id']}" if _is_confirmation(item) else item.id or made
        event = NewEvent(item.type, {**item.data, "actor": caller.actor()}, id=key)
        if (size := len(event.payload())) > INLINE_LIMIT:
            raise TooLarge(
                f"{item.path}: {size} bytes; an event may have {INLINE_LIMIT}. Put large text into "
                "a file of the session instead",
                field=item.path,
            )
        events.append(event)
    return events


def _is_confirmation(item: Incoming) -> bool:
    return item.type == ev.USER_TOOL_CONFIRMATION


async def check_pending(log: SessionLog, state: SessionState, incoming: Sequence[Incoming]) -> None:
    """Check that each confirmation answers a call that waits for one, or has been answered before.

    Raises:
        UserError: no such call; the message lists the ones that wait.
    """
    for item in incoming:
        if not _is_confirmation(item):
            continue
        wanted = item.data["tool_use_id"]
        waiting = [call["tool_use_id"] for call in state.status.get("pending") or ()]
        if wanted in waiting or await _asked(log, state, wanted):
            continue
        session_id = state.meta.session_id
        listed = ", ".join(tool_use_event_id(session_id, call) for call in waiting) or "none"
        raise _bad(
            f"{item.path}.tool_use_id",
            f"no call with this id waits for approval; waiting: {listed}",
        )


async def _asked(log: SessionLog, state: SessionState, tool_use_id: str) -> bool:
    """Whether the log shows the call as one that needs approval (the status may be a moment behind)."""
    start = max(1, state.next_seq - APPROVAL_LOOK_BACK)
    async for found in chunks(log, state.meta.session_id, start):
        for event in found:
            if event.type == ev.TOOL_PENDING and event.data.get("tool_use_id") == tool_use_id:
                return event.data.get("permission") == "Ask"
    return False


async def write(
    log: SessionLog, session_id: str, events: Sequence[NewEvent]
) -> tuple[list[dict[str, Any]], int]:
    """Write events in order; answers the public echoes and the position of the first event.

    Raises:
        Conflict: an id is taken by another event: a second, different answer to one call, for example.
        SessionNotFound, SessionClosed, StoreUnavailable.
    """
    echoes: list[dict[str, Any]] = []
    first = 0
    for event in events:
        seq = await log.emit_event(session_id, event)
        stored = (await log.get_events(session_id, seq, seq))[0]
        if stored.type != event.type or _said(stored.data) != _said(event.data):
            what = (
                "answered" if event.type == ev.USER_TOOL_CONFIRMATION else "used for other content"
            )
            said = f" with {stored.data['result']}" if "result" in stored.data else ""
            raise Conflict(f"event id {event.id}: already {what}{said} at position {seq}")
        echoes += project(stored, Context(session_id))
        first = first or seq
    return echoes, first


def _said(data: Mapping[str, Any]) -> dict[str, Any]:
    """The payload without the actor: what a repetition has in common with its first attempt."""
    return {name: value for name, value in data.items() if name != "actor"}
