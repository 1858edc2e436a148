"""Raw accumulation of a streamed response: server-sent events -> the message as the API means it.

The SDK's own helper drops delta types that it does not know, adds nulls and reorders keys; a message
that goes back to the API must keep every block as it came. Pure: `model` feeds it, tests feed it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

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


class Accumulator:
    """Builds one message from its stream events.

    Attributes:
        started: the first content block has begun.
        done: `message_stop` was seen.
    """

    def __init__(self) -> None:
        self.started = False
        self.done = False
        self._message: dict[str, Any] | None = None
        self._blocks: dict[int, dict[str, Any]] = {}
        self._parts: dict[int, dict[str, list[str]]] = {}
        self._open: set[int] = set()
        self._bad_input: set[int] = set()

    def feed(self, event: Mapping[str, Any]) -> str:
        """Take one event; answers the text that it adds to the visible answer, mostly empty.

        Raises:
            ModelError: an `error` event.
        """
        kind = event.get("type")
        if kind == "content_block_delta":
            return self._delta(int(event["index"]), event["delta"])
        if kind == "content_block_start":
            self.started = True
            index = int(event["index"])
            self._blocks[index] = dict(event["content_block"])
            self._parts[index] = {}
            self._open.add(index)
        elif kind == "content_block_stop":
            self._stop(int(event["index"]))
        elif kind == "message_start":
            self._message = dict(event["message"])
        elif kind == "message_delta":
            self._message_delta(event)
        elif kind == "message_stop":
            self.done = True
        elif kind == "error":
            error = event.get("error") or {}
            raise ModelError(
                str(error.get("type", "api_error")), str(error.get("message", "error in stream"))
            )
        return ""

    def _message_delta(self, event: Mapping[str, Any]) -> None:
        if self._message is None:
            return
        for key, value in event.items():
            if key == "type":
                continue
            if key == "delta":
                self._message.update(value or {})
            elif key == "usage":
                self._message["usage"] = {**(self._message.get("usage") or {}), **(value or {})}
            else:
                self._message[key] = value

    def _delta(self, index: int, delta: Mapping[str, Any]) -> str:
        kind, parts, block = delta.get("type"), self._parts[index], self._blocks[index]
        if kind in _CONCAT:
            source, target = _CONCAT[kind]
            parts.setdefault(target, []).append(delta[source])
            return str(delta[source]) if kind == "text_delta" else ""
        if kind == "input_json_delta":
            parts.setdefault("input", []).append(delta["partial_json"])
        elif kind == "signature_delta":
            block["signature"] = delta["signature"]
        elif kind == "citations_delta":
            block["citations"] = [*(block.get("citations") or []), delta["citation"]]
        else:
            self._unknown(block, delta)
        return ""

    @staticmethod
    def _unknown(block: dict[str, Any], delta: Mapping[str, Any]) -> None:
        """A delta type of the future: text grows, lists grow, anything else is replaced."""
        for key, value in delta.items():
            old = block.get(key)
            if key == "type":
                continue
            if isinstance(old, str) and isinstance(value, str):
                block[key] = old + value
            elif isinstance(old, list) and isinstance(value, list):
                block[key] = [*old, *value]
            else:
                block[key] = value

    def _stop(self, index: int) -> None:
        self._open.discard(index)
        block = self._blocks[index]
        for key, parts in self._parts.pop(index, {}).items():
            text = "".join(parts)
            if key != "input":
                block[key] = str(block.get(key) or "") + text
            elif text:
                try:
                    block["input"] = json.loads(text)
                except ValueError:
                    block["input"] = {}
                    self._bad_input.add(index)

    def message(self) -> dict[str, Any]:
        """The whole message.

        Raises:
            ModelError: `stream_cut`, if the stream ended before `message_stop` or without a stop reason.
        """
        if self._message is None or not self.done or self._message.get("stop_reason") is None:
            raise ModelError("stream_cut", "the stream ended before the response was complete")
        for index in sorted(self._open):
            self._stop(index)
        order = sorted(self._blocks)
        cutting = self._message["stop_reason"] in ("max_tokens", "model_context_window_exceeded")
        if self._bad_input - ({order[-1]} if cutting and order else set()):
            raise ModelError("stream_cut", "the input of a tool call is not JSON")
        self._message["content"] = [self._blocks[index] for index in order]
        message: dict[str, Any] = _well_formed(self._message)
        return message
