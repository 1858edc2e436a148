from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from cowhand.harness.request import (
    Message,
    block,
    body,
    breakpoints,
    canonical,
    content_blocks,
    prefix_sha,
    tool_result_block,
)

BASE: dict[str, Any] = {
    "model": "m",
    "max_tokens": 10,
    "system": [{"type": "text", "text": "s"}],
    "tools": [{"name": "bash"}],
}


def user(*texts: str) -> Message:
    return Message("user", tuple(block({"type": "text", "text": item}) for item in texts))


def assistant(*types: str) -> Message:
    return Message("assistant", tuple(block({"type": item, "text": "x"}) for item in types))


def test_the_body_is_what_the_api_wants() -> None:
    sent = json.loads(body(BASE, "sesn_1", 20, [user("hi")]))
    assert sent == {
        "model": "m",
        "max_tokens": 20,
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        "tools": [{"name": "bash"}],
        "metadata": {"user_id": "sesn_1"},
        "stream": True,
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}],
            }
        ],
    }


def test_the_hash_covers_the_body_without_stream_and_breakpoints() -> None:
    sent = json.loads(body(BASE, "sesn_1", 10, [user("hi")]))
    del sent["stream"], sent["system"][0]["cache_control"]
    del sent["messages"][0]["content"][0]["cache_control"]
    raw = json.dumps(sent, ensure_ascii=False, separators=(",", ":")).encode()
    assert canonical(BASE, "sesn_1", 10, [user("hi")]) == raw
    assert prefix_sha(BASE, "sesn_1", 10, [user("hi")]) == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("change", ["session", "limit", "text", "base"])
def test_the_hash_sees_every_change(change: str) -> None:
    base = {**BASE, "model": "other"} if change == "base" else BASE
    messages = [user("HI" if change == "text" else "hi")]
    session_id = "sesn_2" if change == "session" else "sesn_1"
    changed = prefix_sha(base, session_id, 11 if change == "limit" else 10, messages)
    assert changed != prefix_sha(BASE, "sesn_1", 10, [user("hi")])


def test_one_request_is_a_byte_prefix_of_the_next() -> None:
    one = canonical(BASE, "s", 10, [user("a")])
    two = canonical(BASE, "s", 10, [user("a"), assistant("text"), user("b")])
    assert two.startswith(one.removesuffix(b"]}"))


def test_bytes_of_a_block_are_kept_in_their_order_and_without_a_foreign_breakpoint() -> None:
    made = block({"z": 1, "type": "new_kind", "a": None, "cache_control": {"type": "ephemeral"}})
    assert made.raw == b'{"z":1,"type":"new_kind","a":null}'


def test_empty_text_is_left_out_but_not_empty_thinking() -> None:
    content = [{"type": "text", "text": ""}, {"type": "thinking", "thinking": "", "signature": "s"}]
    assert [item.type for item in content_blocks(content)] == ["thinking"]
    assert content_blocks("") == ()
    assert content_blocks("hi")[0].raw == b'{"type":"text","text":"hi"}'


def test_is_error_stands_only_in_errors() -> None:
    assert b"is_error" not in tool_result_block("t", "x", False).raw
    assert json.loads(tool_result_block("t", "", True).raw)["is_error"] is True


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user("a")], [0]),
        ([user("a", "b")], [0, 1]),
        ([user("a"), assistant("text"), user("b")], [0, 2]),
        ([user("a"), assistant("thinking", "text"), user("b")], [0, 3]),
        ([user(*"abcdefghijklmnopqrst")], [0, 15, 19]),
        ([user(*"abcdefghijklmnopqrstuvwxyz"), assistant(*["text"] * 20), user("z")], [30, 45, 46]),
        # Block 15 is a thinking block: it hands its breakpoint to the block before it.
        ([user(*"abcdefghijklmno"), assistant("thinking", "text"), user("z")], [0, 14, 17]),
        ([], []),
    ],
)
def test_breakpoints(messages: list[Message], expected: list[int]) -> None:
    assert breakpoints(messages) == expected


@pytest.mark.parametrize("system", [True, False])
def test_never_more_than_four_breakpoints_and_none_on_thinking(system: bool) -> None:
    base = BASE if system else {key: BASE[key] for key in ("model", "max_tokens", "tools")}
    messages = [user("a")]
    for _ in range(30):
        messages += [assistant("thinking", "text", "tool_use"), user("r")]
        sent = json.loads(body(base, "s", 10, messages))
        assert json.dumps(sent).count("cache_control") <= 4
        for entry in sent["messages"]:
            for item in entry["content"]:
                assert item["type"] != "thinking" or "cache_control" not in item
        assert "cache_control" in sent["messages"][-1]["content"][-1]


def test_the_lookback_of_twenty_blocks_reaches_the_entry_before() -> None:
    """Whatever one turn adds up to 35 blocks, an older breakpoint stays within 20 blocks of a new one."""
    for before in range(1, 60):
        for added in range(1, 36):
            earlier = [user(*["x"] * before)]
            later = [*earlier, assistant(*["text"] * (added - 1)), user("y")] if added > 1 else []
            if not later:
                continue
            old, new = breakpoints(earlier), breakpoints(later)
            assert any(0 <= mark - entry < 20 for mark in new for entry in old), (before, added)
