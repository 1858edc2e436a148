"""The context window: what is too long, what is cleared, and what a summary must be."""

from __future__ import annotations

from typing import Any

import pytest

from model_server.context import CLEARED, cut, edited, fits, size, summary
from model_server.errors import ApiError
from model_server.scripts import conversation
from model_server.validate import COMPACTION_BETA, MANAGEMENT_BETA, validate

Json = dict[str, Any]
BETA = frozenset({COMPACTION_BETA})
TOOL: Json = {"name": "bash", "input_schema": {"type": "object"}}
ASK = {"type": "summarize"}


def text(value: str = "hi") -> Json:
    return {"type": "text", "text": value}


def body(*messages: Json, **more: Any) -> Json:
    return {"model": "m", "max_tokens": 10, "messages": list(messages), "tools": [TOOL], **more}


def called(count: int, result: str = "r" * 400) -> list[Json]:
    """A first message and so many tool calls with their results."""
    out: list[Json] = [{"role": "user", "content": [text("[[script:x]] go")]}]
    for n in range(count):
        use = {"type": "tool_use", "id": f"t{n}", "name": "bash", "input": {"command": f"c{n}"}}
        answer = {"type": "tool_result", "tool_use_id": f"t{n}", "content": result}
        out += [{"role": "assistant", "content": [use]}, {"role": "user", "content": [answer]}]
    return out


def compacted(**more: Any) -> tuple[Json, Json]:
    """A compaction block as the server makes it, and a request that begins with it."""
    old = body(*called(3), compaction=ASK)
    block = summary(old, conversation(old))
    first = {"role": "assistant", "content": [block]}
    return block, body(first, {"role": "user", "content": [text("go on")]}, **more)


def test_a_summary_is_taken_in_place_of_what_it_summarizes() -> None:
    block, request = compacted()
    assert validate(request, BETA) is request
    assert "[[script:x]] go" in block["content"]
    assert '{"command": "c2"}' in block["content"]
    again = body(*request["messages"], compaction=ASK)
    second = summary(again, conversation(validate(again, BETA)))
    assert second == block, "a summary of a summary does not nest"


def test_a_conversation_that_ends_with_the_assistant_can_be_summarized() -> None:
    messages = [*called(1), {"role": "assistant", "content": [text("done")]}]
    validate(body(*messages, compaction=ASK), BETA)
    with pytest.raises(ApiError, match="prefill"):
        validate(body(*messages), BETA)


@pytest.mark.parametrize("what", ["beta", "altered", "system", "tools", "second", "role"])
def test_a_summary_that_does_not_fit_is_refused(what: str) -> None:
    block, request = compacted()
    betas, messages = BETA, request["messages"]
    if what == "beta":
        betas = frozenset()
    elif what == "altered":
        messages[0]["content"] = [{**block, "content": "another"}]
    elif what == "system":
        request["system"] = "new"
    elif what == "tools":
        request["tools"] = []
    elif what == "second":
        messages += [{"role": "assistant", "content": [block]}, messages[1]]
    else:
        messages.insert(0, {"role": "user", "content": [text()]})
    with pytest.raises(ApiError, match="compaction"):
        validate(request, betas)


@pytest.mark.parametrize(
    ("more", "betas", "path"),
    [
        ({"compaction": ASK}, frozenset(), "compaction"),
        ({"compaction": {"type": "auto"}}, BETA, "compaction.type"),
        ({"compaction": {**ASK, "max": 1}}, BETA, "compaction.max"),
        (
            {"compaction": ASK, "context_management": {"edits": []}},
            frozenset({COMPACTION_BETA, MANAGEMENT_BETA}),
            "combined",
        ),
        ({"context_management": {"edits": []}}, BETA, "context_management"),
        (
            {"context_management": {"edits": [{"type": "compact_20260112"}]}},
            frozenset({MANAGEMENT_BETA}),
            "edits.0.type",
        ),
    ],
)
def test_what_the_betas_do_not_allow_is_refused(more: Json, betas: Any, path: str) -> None:
    with pytest.raises(ApiError, match=path):
        validate(body(*called(1), **more), betas)


def edit(**more: Any) -> Json:
    clear = {
        "type": "clear_tool_uses_20250919",
        "trigger": {"type": "input_tokens", "value": 300},
        "keep": {"type": "tool_uses", "value": 2},
        **more,
    }
    return {"context_management": {"edits": [clear]}}


def test_old_results_are_cleared_for_the_model_and_counted() -> None:
    request = validate(body(*called(5), **edit()), frozenset({MANAGEMENT_BETA}))
    seen, applied = edited(request)
    contents = [m["content"][0].get("content") for m in seen["messages"][2::2]]
    assert contents == [CLEARED] * 3 + ["r" * 400] * 2
    (done,) = applied
    assert done["cleared_tool_uses"] == 3
    assert done["cleared_input_tokens"] == size(request) - size(seen) > 200
    assert request["messages"][2]["content"][0]["content"] == "r" * 400, "what was sent stays whole"


@pytest.mark.parametrize(
    "more",
    [
        {"trigger": {"type": "input_tokens", "value": 5000}},
        {"keep": {"type": "tool_uses", "value": 5}},
        {"clear_at_least": {"type": "input_tokens", "value": 5000}},
    ],
)
def test_nothing_is_cleared_before_it_is_worth_it(more: Json) -> None:
    request = body(*called(5), **edit(**more))
    assert edited(request) == (request, [])


def test_the_window_ends_prompts_and_answers() -> None:
    request = body(*called(5))
    room = fits(request, size(request) + 20)
    assert room == 20
    with pytest.raises(ApiError, match="prompt is too long"):
        fits(request, size(request) - 1)
    assert fits(request, 0) > 1_000_000
    assert cut([text("a" * 400)], room) == ([text("a" * 80)], True)
    assert cut([text("a")], room) == ([text("a")], False)
    assert cut([text("a"), {"type": "tool_use", "name": "n" * 99}], room) == ([text("a")], True)
