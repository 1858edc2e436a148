"""The Messages request as a pure, versioned function of the log (`assembler` 1).

Whoever wakes a session must send byte for byte the prefix that the worker before it sent: prompt
cache and signed thinking blocks depend on it. So a message is kept as the JSON bytes of its blocks,
made once, and a request is those bytes joined; nothing is parsed or re-serialised on the way out.
`fold` makes the messages, `loop` sends the body.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Final, Literal

from cowhand.session import rawjson

ASSEMBLERS: Final = (1, 2)
"""Versions of the rules in this module, in `fold` and in `window` that this release has; pinned in
`session.created`. 2 knows `context`: a release that does not would send another prompt, so it must refuse."""

ROLLING: Final = 15
"""Distance of the rolling cache breakpoints in blocks; the API looks back 20."""

MAX_BREAKPOINTS: Final = 4
"""Most cache breakpoints that the API takes in one request."""

Ttl = Literal["5m", "1h"]
"""Life of a cache entry; the API's default is 5 minutes."""

LONG_GAP_MS: Final = 4 * 60 * 1000
"""Where requests are mostly further apart than this, entries of 5 minutes die before they are read."""

_MARKS: Final[Mapping[str, bytes]] = {
    "5m": b',"cache_control":{"type":"ephemeral"}}',
    "1h": b',"cache_control":{"type":"ephemeral","ttl":"1h"}}',
}
_MARKABLE: Final = frozenset({"text", "tool_use", "tool_result", "image", "document", "compaction"})


def cache_ttl(times: Sequence[int]) -> Ttl:
    """Life of the cache entries of a request, from the times of the newest requests and its own.

    One hour if the median of the last five gaps is over four minutes; with fewer than three gaps
    nobody knows, and five minutes cost less.

    Args:
        times: milliseconds, oldest first, the new request's last.
    """
    gaps = [later - earlier for earlier, later in pairwise(times)][-5:]
    return "1h" if len(gaps) >= 3 and median(gaps) > LONG_GAP_MS else "5m"


def dumps(value: Any) -> bytes:
    """Compact JSON, UTF-8, keys in the order given."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Block:
    """One content block: its type and its JSON bytes, without `cache_control`."""

    type: str
    raw: bytes


@dataclass(frozen=True, slots=True)
class Message:
    """One message of the prompt; `blocks` is never empty."""

    role: str
    blocks: tuple[Block, ...]

    def raw(self) -> bytes:
        """JSON bytes without cache breakpoints."""
        return _message(self.role, [block.raw for block in self.blocks])


def _message(role: str, blocks: Sequence[bytes]) -> bytes:
    return b'{"role":"%s","content":[%s]}' % (role.encode(), b",".join(blocks))


def block(value: Mapping[str, Any]) -> Block:
    """A block from its JSON object; a `cache_control` of the sender is dropped, we place our own."""
    kept = {key: item for key, item in value.items() if key != "cache_control"}
    return Block(type=str(kept.get("type", "")), raw=dumps(kept))


def content_blocks(content: Any) -> tuple[Block, ...]:
    """Blocks of a `content` (string or list of blocks); empty text is left out, the API refuses it."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    return tuple(
        block(item) for item in content if not (item.get("type") == "text" and not item.get("text"))
    )


def response_blocks(payload: bytes) -> tuple[Block, ...]:
    """Content blocks of a `model.response`, each as the text that came; empty text is left out.

    Args:
        payload: of the event.

    Raises:
        ValueError, KeyError: not such a payload.
    """
    message = rawjson.members(rawjson.members(rawjson.members(payload.decode())["d"])["message"])
    content = message.get("content", "null")
    blocks = []
    for text in rawjson.items(content) if content != "null" else ():
        parts = rawjson.members(text)
        kind = str(rawjson.decode(parts.get("type", '""')))
        if kind == "text" and parts.get("text", '""') in ('""', "null"):
            continue
        if parts.pop("cache_control", None) is not None:
            text = rawjson.join(parts)
        blocks.append(Block(kind, text.encode()))
    return tuple(blocks)


def tool_result_block(
    tool_use_id: str, content: str | list[dict[str, Any]], is_error: bool
) -> Block:
    """The `tool_result` block of one call; `content` is text or content blocks."""
    value: dict[str, Any] = {
        "type": "tool_result",
        "tool_use_id": tool_use_id,
        "content": content,
    }
    if is_error:
        value["is_error"] = True
    return block(value)


def _head(base: Mapping[str, Any], session_id: str, max_tokens: int, mark: bytes = b"") -> bytes:
    """Everything before the messages, with the opening brace and a trailing comma."""
    parts = []
    for key, value in base.items():
        if key in ("messages", "metadata", "stream"):
            continue
        if key == "max_tokens":
            value = max_tokens
        raw = dumps(value)
        if key == "system" and mark and isinstance(value, list) and value:
            raw = raw[:-2] + mark + b"]"
        parts.append(dumps(key) + b":" + raw)
    parts.append(b'"metadata":' + dumps({"user_id": session_id}))
    return b"{" + b",".join(parts) + b","


def canonical(
    base: Mapping[str, Any], session_id: str, max_tokens: int, messages: Sequence[Message]
) -> bytes:
    """The request body without `stream` and without cache breakpoints; messages come last."""
    head = _head(base, session_id, max_tokens)
    return head + b'"messages":[' + b",".join(message.raw() for message in messages) + b"]}"


def prefix_sha(
    base: Mapping[str, Any], session_id: str, max_tokens: int, messages: Sequence[Message]
) -> str:
    """Hex SHA-256 of `canonical`, as logged in `span.model_request_start`."""
    return hashlib.sha256(canonical(base, session_id, max_tokens, messages)).hexdigest()


def _markable(item: Block) -> bool:
    return item.type in _MARKABLE


def breakpoints(messages: Sequence[Message], limit: int = MAX_BREAKPOINTS - 1) -> list[int]:
    """Flat indices of the blocks that carry a cache breakpoint, ascending.

    The last block of the last user message, and the newest multiples of 15 before it: those stay in
    place while the conversation grows, so that a turn of many blocks still finds an older entry.
    Blocks that may not carry one (thinking, unknown types) hand it to the nearest one before them.
    """
    flat = [item for message in messages for item in message.blocks]
    last = 0
    position = 0
    for message in messages:
        position += len(message.blocks)
        if message.role == "user":
            last = position
    chosen: list[int] = []
    wanted = [last - 1] if last else []
    wanted += range((last - 2) // ROLLING * ROLLING, -1, -ROLLING) if last > 1 else []
    for index in wanted:
        while index >= 0 and not _markable(flat[index]):
            index -= 1
        if index >= 0 and index not in chosen:
            chosen.append(index)
        if len(chosen) == limit:
            break
    return sorted(chosen)


def body(
    base: Mapping[str, Any],
    session_id: str,
    max_tokens: int,
    messages: Sequence[Message],
    ttl: Ttl = "5m",
) -> bytes:
    """The bytes that go out: `canonical` with `stream` and the cache breakpoints."""
    mark = _MARKS[ttl]
    has_system = bool(base.get("system"))
    marks = set(breakpoints(messages, MAX_BREAKPOINTS - has_system))
    raws: list[bytes] = []
    position = 0
    for message in messages:
        blocks = []
        for item in message.blocks:
            blocks.append(item.raw[:-1] + mark if position in marks else item.raw)
            position += 1
        raws.append(_message(message.role, blocks))
    head = _head(base, session_id, max_tokens, mark)
    return head + b'"stream":true,"messages":[' + b",".join(raws) + b"]}"
