"""Signatures of thinking blocks: a hash over everything that stands before the block.

The real API binds thinking to the conversation that it was made in; a block fails when `system`, `tools` or an earlier
message has changed, or a thinking block before it was altered or left out. `cache_control` does not count. Called by
`stream` to sign and by `validate` to check.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

Json = dict[str, Any]


def without_cache_control(value: Any) -> Any:
    """The value without any `cache_control` outside of tool inputs."""
    if isinstance(value, list):
        return [without_cache_control(v) for v in value]
    if isinstance(value, dict):
        return {
            k: v if k in ("input", "input_schema") else without_cache_control(v)
            for k, v in value.items()
            if k != "cache_control"
        }
    return value


def canonical(value: Any) -> bytes:
    """One byte string per JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
        "utf-8", "replace"
    )


def sign_summary(body: Json, content: str) -> str:
    """The signature of a compaction block: it holds for the system prompt and the tools that it was made with."""
    system = body.get("system")
    if isinstance(system, str):
        system = [{"type": "text", "text": system}] if system else None
    tools = [t for t in body.get("tools") or [] if not t.get("defer_loading")]
    bound = without_cache_control([system or [], tools, content])
    return base64.b64encode(
        hashlib.sha256(b"model-server compaction\0" + canonical(bound)).digest()
    ).decode()


def sign(body: Json, turns: list[Json], before: list[Json], thinking: str) -> str:
    """The signature of a thinking block.

    Args:
        body: the request (system and tools are taken from it).
        turns: the merged turns before the one that holds the block.
        before: the blocks of the same turn before it.
        thinking: its text; empty for a redacted block.
    """
    system = body.get("system")
    if isinstance(system, str):
        system = [{"type": "text", "text": system}] if system else None
    tools = [t for t in body.get("tools") or [] if not t.get("defer_loading")]
    bound = without_cache_control([system or [], tools, turns, before, thinking])
    return base64.b64encode(
        hashlib.sha256(b"model-server thinking\0" + canonical(bound)).digest()
    ).decode()
