"""Raw accumulation of a streamed response: server-sent events -> the message as the API means it.

The SDK's own helper drops delta types that it does not know, adds nulls and reorders keys; a message
that goes back to the API must keep every block as it came: order of keys, spelling of numbers, blocks
of unknown types. So members are kept as the text of the wire; only strings that arrive in pieces are
written anew, in UTF-8. Pure: `model` feeds it, tests feed it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from cowhand.session import rawjson
from cowhand.session.rawjson import RawObject

MAX_MESSAGE: Final = 2000
"""Characters of an error message that are kept."""

_CONCAT: Final = {
    "text_delta": ("text", "text"),
    "thinking_delta": ("thinking", "thinking"),
}


class ModelError(Exception):
    """A model request that brought no usable response.

    Attributes:
        type: the API's error type, or one of ours: `connection_error`, `timeout_error`,
            `stream_cut`, `proxy_refused`, `proxy_unavailable`.
        status: HTTP status, None if there was no answer.
        retry_after_s: what the server asked for, seconds.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(well_formed(message)[:MAX_MESSAGE])
        self.type = kind
        self.status = status
        self.retry_after_s = retry_after_s

    def data(self) -> dict[str, Any]:
        """The `error` of `span.model_request_end`."""
        data: dict[str, Any] = {"type": self.type, "message": str(self)}
        if self.status is not None:
            data["status"] = self.status
        if self.retry_after_s is not None:
            data["retry_after_s"] = self.retry_after_s
        return data


def well_formed(text: str) -> str:
    """Join surrogate pairs that were split between deltas; replace lone ones, UTF-8 has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _well_formed(value: Any) -> Any:
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, list):
        return [_well_formed(item) for item in value]
    if isinstance(value, dict):
        return {well_formed(key): _well_formed(item) for key, item in value.items()}
    return value


@dataclass
class _Block:
    """A content block under way: text of its members, and the pieces of those that stream."""

    members: dict[str, str]
    strings: dict[str, list[str]] = field(default_factory=dict)
    input: list[str] = field(default_factory=list)


class Accumulator:
    """Builds one message from its stream events.

    Attributes:
        started: the first content block has begun.
        block: index of the block that the newest piece of visible text, or of thinking, belongs to.
        thought: piece of thinking that the newest event brought, mostly empty.
        done: `message_stop` was seen.
    """

    def __init__(self) -> None:
        self.started = False
        self.block = 0
        self.thought = ""
        self.done = False
        self._message: dict[str, str] | None = None
        self._blocks: dict[int, _Block] = {}
        self._open: set[int] = set()
        self._bad_input: set[int] = set()

    def feed(self, data: str) -> str:
        """Take the text of one event; answers what it adds to the visible answer, mostly empty.

        Raises:
            ModelError: an `error` event.
            ValueError, LookupError, TypeError, AttributeError, RecursionError: not an event of the API.
        """
        self.thought = ""
        event = rawjson.decode(data)
        kind = event.get("type")
        if kind == "content_block_delta":
            return self._delta(int(event["index"]), event["delta"], data)
        if kind == "content_block_start":
            self.started = True
            index = int(event["index"])
            self._blocks[index] = _Block(rawjson.members(rawjson.members(data)["content_block"]))
            self._open.add(index)
        elif kind == "content_block_stop":
            self._stop(int(event["index"]))
        elif kind == "message_start":
            self._message = rawjson.members(rawjson.members(data)["message"])
        elif kind == "message_delta":
            self._message_delta(rawjson.members(data))
        elif kind == "message_stop":
            self.done = True
        elif kind == "error":
            error = event.get("error") or {}
            raise ModelError(
                str(error.get("type", "api_error")), str(error.get("message", "error in stream"))
            )
        return ""

    def _message_delta(self, event: dict[str, str]) -> None:
        if self._message is None:
            return
        for key, text in event.items():
            if key == "type":
                continue
            if key == "delta":
                self._message.update(_object(text))
            elif key == "usage":
                old = _object(self._message.get("usage", "null"))
                self._message["usage"] = rawjson.join({**old, **_object(text)})
            else:
                self._message[key] = text

    def _delta(self, index: int, delta: dict[str, Any], data: str) -> str:
        kind, block = delta.get("type"), self._blocks[index]
        if kind in _CONCAT:
            source, target = _CONCAT[kind]
            block.strings.setdefault(target, []).append(delta[source])
            self.block = index
            if kind != "text_delta":
                self.thought = str(delta[source])
                return ""
            return str(delta[source])
        if kind == "input_json_delta":
            block.input.append(delta["partial_json"])
            return ""
        parts = rawjson.members(rawjson.members(data)["delta"])
        if kind == "signature_delta":
            block.members["signature"] = parts["signature"]
        elif kind == "citations_delta":
            old = block.members.get("citations", "null")
            block.members["citations"] = _concat(old, f"[{parts['citation']}]")
        else:
            self._unknown(block.members, parts)
        return ""

    @staticmethod
    def _unknown(block: dict[str, str], delta: dict[str, str]) -> None:
        """A delta type of the future: text grows, lists grow, anything else is replaced."""
        for key, new in delta.items():
            old = block.get(key, "null")
            if key == "type":
                continue
            if old[0] == new[0] == '"':
                block[key] = rawjson.dumps(well_formed(rawjson.decode(old) + rawjson.decode(new)))
            elif old[0] == new[0] == "[":
                block[key] = _concat(old, new)
            else:
                block[key] = new

    def _stop(self, index: int) -> None:
        self._open.discard(index)
        block = self._blocks[index]
        for key, pieces in block.strings.items():
            begun = str(rawjson.decode(block.members.get(key, "null")) or "")
            block.members[key] = rawjson.dumps(well_formed(begun + "".join(pieces)))
        text = "".join(block.input).strip()
        block.strings, block.input = {}, []
        if text:
            try:
                rawjson.decode(text)
                block.members["input"] = well_formed(text)
            except ValueError:
                block.members["input"] = "{}"
                self._bad_input.add(index)

    def message(self) -> RawObject:
        """The whole message, with its text.

        Raises:
            ModelError: `stream_cut`, if the stream ended before `message_stop` or without a stop reason.
        """
        reason = rawjson.decode((self._message or {}).get("stop_reason", "null"))
        if self._message is None or not self.done or reason is None:
            raise ModelError("stream_cut", "the stream ended before the response was complete")
        for index in sorted(self._open):
            self._stop(index)
        order = sorted(self._blocks)
        cutting = reason in ("max_tokens", "model_context_window_exceeded")
        if self._bad_input - ({order[-1]} if cutting and order else set()):
            raise ModelError("stream_cut", "the input of a tool call is not JSON")
        blocks = (rawjson.join(self._blocks[index].members) for index in order)
        self._message["content"] = f"[{','.join(blocks)}]"
        return _storable(rawjson.join(self._message))


def _object(text: str) -> dict[str, str]:
    """Members of an object; none of null."""
    return {} if text == "null" else rawjson.members(text)


def _concat(old: str, new: str) -> str:
    """Two JSON arrays in one; `old` may be null."""
    first = [] if old == "null" else rawjson.items(old)
    return f"[{','.join([*first, *rawjson.items(new)])}]"


def _storable(text: str) -> RawObject:
    """The message as text that every reader can decode and encode again.

    Half a surrogate pair may hide in an escape; UTF-8 has none, so such a message is written anew.
    """
    message = RawObject(text.encode())
    try:
        rawjson.dumps(message).encode()
    except UnicodeEncodeError:
        return RawObject(rawjson.dumps(_well_formed(message)).encode())
    return message
