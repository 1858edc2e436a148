"""A message as the API sends it: whole, or as server-sent events. Pure; `app` sends what these functions make."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Iterator
from typing import Any

from model_server.cache import InputUsage, tokens
from model_server.signatures import canonical, sign
from model_server.validate import merged

Json = dict[str, Any]
_ALPHABET = string.ascii_letters + string.digits


def new_id(prefix: str) -> str:
    """An id as the API makes them: `msg_01...`, `toolu_01...`, `req_01...`."""
    return f"{prefix}_01" + "".join(secrets.choice(_ALPHABET) for _ in range(22))


def finish(blocks: list[Json], body: Json) -> list[Json]:
    """The blocks of an answer with ids and signatures."""
    turns = merged(body["messages"])
    done: list[Json] = []
    for block in blocks:
        if block["type"] == "tool_use":
            block = {
                "type": "tool_use",
                "id": block.get("id") or new_id("toolu"),
                **_rest(block, "id"),
            }
            block.setdefault("input", {})
        elif block["type"] == "thinking":
            signature = sign(body, turns, done, block["thinking"])
            block = {"type": "thinking", "thinking": block["thinking"], "signature": signature}
        elif block["type"] == "redacted_thinking":
            block = {"type": "redacted_thinking", "data": sign(body, turns, done, "")}
        done.append(block)
    return done


def _rest(block: Json, *without: str) -> Json:
    return {k: v for k, v in block.items() if k not in ("type", *without)}


def message(
    body: Json,
    content: list[Json],
    stop_reason: str,
    usage: InputUsage,
    applied: list[Json] | None = None,
) -> Json:
    """The whole message.

    Args:
        body: the request.
        content: finished blocks.
        stop_reason: of the message; `compaction` puts its usage into an iteration of its own.
        usage: of the input.
        applied: context edits, if the request asked for any.
    """
    details = None
    if stop_reason == "refusal":
        details = {"type": "refusal", "category": None, "explanation": None}
    counts = {
        **usage.as_json(),
        "output_tokens": max(1, tokens(canonical(content)) if content else 1),
    }
    if stop_reason == "compaction":
        none = {key: 0 for key, value in counts.items() if isinstance(value, int)}
        counts = {**none, "iterations": [{"type": "compaction", **counts}]}
    edits = {} if applied is None else {"context_management": {"applied_edits": applied}}
    return {
        "id": new_id("msg"),
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "stop_details": details,
        "usage": {**counts, "service_tier": "standard"},
        **edits,
    }


def events(whole: Json) -> Iterator[tuple[str, Json]]:
    """The message as (event name, data), in the order of the wire."""
    usage = whole["usage"]
    start = {**whole, "content": [], "stop_reason": None, "stop_details": None}
    start["usage"] = {**usage, "output_tokens": 1}
    start.pop("context_management", None)
    yield "message_start", {"type": "message_start", "message": start}
    for index, block in enumerate(whole["content"]):
        yield (
            "content_block_start",
            {"type": "content_block_start", "index": index, "content_block": _empty(block)},
        )
        if index == 0:
            yield "ping", {"type": "ping"}
        for delta in _deltas(block):
            yield (
                "content_block_delta",
                {"type": "content_block_delta", "index": index, "delta": delta},
            )
        yield "content_block_stop", {"type": "content_block_stop", "index": index}
    delta = {k: whole[k] for k in ("stop_reason", "stop_sequence", "stop_details")}
    counts = {
        k: usage[k]
        for k in (
            "input_tokens",
            "cache_creation_input_tokens",
            "cache_read_input_tokens",
            "output_tokens",
            "iterations",
        )
        if k in usage
    }
    edits = {k: whole[k] for k in ("context_management",) if k in whole}
    yield "message_delta", {"type": "message_delta", "delta": delta, "usage": counts, **edits}
    yield "message_stop", {"type": "message_stop"}


def encode(event: str, data: Json) -> bytes:
    """One server-sent event."""
    return f"event: {event}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def _empty(block: Json) -> Json:
    if block["type"] == "text":
        return {"type": "text", "text": ""}
    if block["type"] == "tool_use":
        return {**block, "input": {}}
    if block["type"] == "thinking":
        return {"type": "thinking", "thinking": "", "signature": ""}
    if block["type"] == "compaction":
        return {"type": "compaction", "content": ""}
    return block


def _deltas(block: Json) -> Iterator[Json]:
    if block["type"] == "text":
        for piece in _pieces(block["text"]):
            yield {"type": "text_delta", "text": piece}
    elif block["type"] == "tool_use":
        yield {"type": "input_json_delta", "partial_json": ""}
        text = json.dumps(block["input"])
        for i in range(0, len(text), 24):
            yield {"type": "input_json_delta", "partial_json": text[i : i + 24]}
    elif block["type"] == "compaction":
        for piece in _pieces(block["content"]):
            yield {"type": "compaction_delta", "content": piece}
        yield {"type": "signature_delta", "signature": block["signature"]}
    elif block["type"] == "thinking":
        for piece in _pieces(block["thinking"]):
            yield {"type": "thinking_delta", "thinking": piece}
        yield {"type": "signature_delta", "signature": block["signature"]}


def _pieces(text: str) -> list[str]:
    """The text in pieces of about three words."""
    return re.findall(r"(?s)(?:\S+\s*|\s+){1,3}", text)
