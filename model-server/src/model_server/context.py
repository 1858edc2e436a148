"""The context window as the API keeps it: its limit, clearing of old results, summaries on demand.

Pure; called by `app`. There is no model here, so a summary is made by rule: the text of the first user message,
word for word, and the newest tool call. Like a real one it leaves out most of what the tools answered.
"""

from __future__ import annotations

from typing import Any

from model_server.cache import tokens
from model_server.errors import invalid
from model_server.scripts import Conversation
from model_server.signatures import canonical, sign_summary, without_cache_control

Json = dict[str, Any]
CLEARED = "[cleared to save context]"
SUMMARY = "Summary of the conversation so far. The user began with: "
NEWEST = "\nThe newest tool call: "


def size(body: Json) -> int:
    """Estimated input tokens of a request."""
    parts = [body.get(key) or [] for key in ("tools", "system", "messages")]
    return tokens(canonical(without_cache_control(parts)))


def fits(body: Json, window: int) -> int:
    """Room for the answer, tokens; no limit is a large number.

    Args:
        body: the request as the model sees it.
        window: size of the context window, 0 for none.

    Raises:
        ApiError: 400, the prompt alone is too long.
    """
    if not window:
        return 1 << 30
    taken = size(body)
    if taken > window:
        raise invalid("", f"prompt is too long: {taken} tokens > {window} maximum")
    return window - taken


def cut(blocks: list[Json], room: int) -> tuple[list[Json], bool]:
    """The blocks of an answer that fit the room, and whether any was cut."""
    kept: list[Json] = []
    for block in blocks:
        need = tokens(canonical(block))
        if need <= room:
            kept.append(block)
            room -= need
            continue
        if block["type"] == "text" and room > 0:
            kept.append({**block, "text": block["text"][: room * 4]})
        return kept, True
    return kept, False


def edited(body: Json) -> tuple[Json, list[Json]]:
    """The request as the model sees it after `context_management`, and what was applied."""
    edits = (body.get("context_management") or {}).get("edits") or []
    applied: list[Json] = []
    for edit in edits:
        body, done = _clear(body, edit)
        applied += done
    return body, applied


def _clear(body: Json, edit: Json) -> tuple[Json, list[Json]]:
    trigger = edit.get("trigger") or {"type": "input_tokens", "value": 100_000}
    results = [
        block["tool_use_id"]
        for message in body["messages"]
        for block in _blocks(message)
        if block["type"] == "tool_result"
    ]
    before = size(body) if trigger["type"] == "input_tokens" else len(results)
    keep = (edit.get("keep") or {"value": 3})["value"]
    old = set(results[: max(0, len(results) - keep)])
    if before <= trigger["value"] or not old:
        return body, []
    messages = [{**message, "content": _without(message, old)} for message in body["messages"]]
    smaller = {**body, "messages": messages}
    freed = size(body) - size(smaller)
    if freed < (edit.get("clear_at_least") or {"value": 0})["value"]:
        return body, []
    done = {
        "type": edit["type"],
        "cleared_tool_uses": len(old),
        "cleared_input_tokens": freed,
    }
    return smaller, [done]


def _blocks(message: Json) -> list[Json]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _without(message: Json, old: set[str]) -> list[Json]:
    return [
        {**block, "content": CLEARED} if block.get("tool_use_id") in old else block
        for block in _blocks(message)
    ]


def summary(body: Json, talk: Conversation) -> Json:
    """The signed block that takes the place of the messages."""
    begun, _, newest = talk.text.removeprefix(SUMMARY).partition(NEWEST)
    content = f"{SUMMARY}{begun}{NEWEST}{talk.newest or newest}"
    return {"type": "compaction", "content": content, "signature": sign_summary(body, content)}
