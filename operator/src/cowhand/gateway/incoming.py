"""What a client may send to `POST /v1/sessions/{id}/events`: the body as valid events, or an error.

Pure. Errors begin with the path of the field, as in `events.0.content.1.text: must be a string`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cowhand.errors import UserError
from cowhand.gateway.projection import tool_use_of
from cowhand.session import events as ev

MAX_EVENTS: Final = 50
"""Events of one request."""

SUPPORTED: Final = (
    ev.USER_MESSAGE,
    ev.USER_INTERRUPT,
    ev.USER_TOOL_CONFIRMATION,
    ev.USER_CUSTOM_TOOL_RESULT,
    ev.SYSTEM_MESSAGE,
)
_OFFICIAL: Final = ("user.tool_result", "user.define_outcome")
# A colon is left to ids that Cowhand makes (`msg:0`, `mode:3`): no client can take one of those.
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_MEDIA: Final = ("image/jpeg", "image/png", "image/gif", "image/webp")
_BEFORE_SYSTEM: Final = (ev.USER_MESSAGE, ev.USER_CUSTOM_TOOL_RESULT)


@dataclass(frozen=True)
class Incoming:
    """A valid event from a client.

    Attributes:
        type: one of those that clients may send.
        data: payload without the actor.
        id: the client's id, or empty.
        path: where it stands in the request, for messages.
    """

    type: str
    data: Mapping[str, Any]
    id: str
    path: str

    @property
    def call(self) -> str:
        """The tool use that this answers, empty for other events."""
        return str(self.data.get("tool_use_id") or self.data.get("custom_tool_use_id") or "")

    @property
    def answer_id(self) -> str:
        """The event id of an answer: a call gets one of each kind, and any deny wins over an allow."""
        if self.type == ev.USER_CUSTOM_TOOL_RESULT:
            return f"result:{self.call}"
        return f"{'confirm' if self.data['result'] == 'allow' else 'deny'}:{self.call}"


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
    found = [_event(raw, f"events.{i}", session_id) for i, raw in enumerate(events)]
    _check_system(found)
    return found


def _check_system(events: Sequence[Incoming]) -> None:
    """A system message is the last event, directly behind something of the user's."""
    for i, item in enumerate(events):
        if item.type != ev.SYSTEM_MESSAGE:
            continue
        if i != len(events) - 1 or i == 0 or events[i - 1].type not in _BEFORE_SYSTEM:
            raise _bad(
                item.path,
                "a system.message must be the last event of a request and directly follow a "
                f"{' or '.join(_BEFORE_SYSTEM)}",
            )


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
            f"{path}.type", f"{kind} is not supported yet; supported are {', '.join(SUPPORTED)}"
        )
    if kind not in SUPPORTED:
        raise _bad(f"{path}.type", f"{kind!r} is not one of {', '.join(SUPPORTED)}")
    identity = event.get("id", "")
    if identity and not (isinstance(identity, str) and _ID.fullmatch(identity)):
        raise _bad(f"{path}.id", "must be 1 to 64 letters, digits, '.', '_' or '-'")
    match kind:
        case ev.USER_MESSAGE:
            data = _message(event, path)
        case ev.USER_INTERRUPT:
            data = _interrupt(event, path)
        case ev.SYSTEM_MESSAGE:
            data = _system(event, path)
        case ev.USER_CUSTOM_TOOL_RESULT:
            data = _custom_result(event, path, session_id)
        case _:
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
    known = ("type", "id", "tool_use_id", "result", "deny_message", "input_sha256")
    _known(event, known, path)
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
    if (digest := event.get("input_sha256")) is not None:
        if not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
            raise _bad(f"{path}.input_sha256", "must be 64 lower-case hex digits")
        data["input_sha256"] = digest
    return data


def _custom_result(event: Mapping[str, Any], path: str, session_id: str) -> dict[str, Any]:
    _known(event, ("type", "id", "custom_tool_use_id", "content", "is_error"), path)
    is_error = event.get("is_error")
    if is_error is not None and not isinstance(is_error, bool):
        raise _bad(f"{path}.is_error", "must be true or false")
    content = event.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}] if content else []
    if content is not None and not isinstance(content, list):
        raise _bad(f"{path}.content", "must be a list of content blocks")
    return {
        "custom_tool_use_id": tool_use_of(session_id, _text(event, "custom_tool_use_id", path)),
        "content": [_block(one, f"{path}.content.{i}") for i, one in enumerate(content or ())],
        "is_error": bool(is_error),
    }


def _system(event: Mapping[str, Any], path: str) -> dict[str, Any]:
    data = _message(event, path)
    for i, block in enumerate(data["content"]):
        if block["type"] != "text":
            raise _bad(f"{path}.content.{i}.type", "a system message takes text only")
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
