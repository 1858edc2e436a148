"""What the real API refuses is refused, with the path of the field; what it takes is taken."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from model_server.errors import ApiError
from model_server.signatures import sign
from model_server.validate import merged, validate

Json = dict[str, Any]
USE: Json = {"type": "tool_use", "id": "toolu_1", "name": "bash", "input": {"command": "ls"}}
USE2: Json = {**USE, "id": "toolu_2"}
RESULT: Json = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "a"}
RESULT2: Json = {**RESULT, "tool_use_id": "toolu_2"}
TOOL: Json = {"name": "bash", "input_schema": {"type": "object"}}
MARK = {"type": "ephemeral"}


def text(value: str = "hi", **more: Any) -> Json:
    return {"type": "text", "text": value, **more}


def user(*blocks: Json) -> Json:
    return {"role": "user", "content": list(blocks) or [text()]}


def assistant(*blocks: Json) -> Json:
    return {"role": "assistant", "content": list(blocks) or [text("yes")]}


def body(*messages: Json, **more: Any) -> Json:
    return {"model": "m", "max_tokens": 10, "messages": list(messages) or [user()], **more}


@pytest.mark.parametrize(
    "request_",
    [
        body(),
        body({"role": "user", "content": "plain"}),
        body(user(), user(), assistant(), assistant(text("b")), user()),
        body(user(), assistant(text(), USE, USE2), user(RESULT2, RESULT, text("and"))),
        body(user(), assistant(USE), user(RESULT), user(text("more"))),
        body(user(), assistant(USE), user({**RESULT, "content": [text("a")], "is_error": True})),
        body(user(), assistant(USE), user({"type": "tool_result", "tool_use_id": "toolu_1"})),
        body(user(), {"role": "system", "content": "note"}),
        body(user(), {"role": "system", "content": "note"}, assistant(), user()),
        body(
            user(text(cache_control={**MARK, "ttl": "1h"})),
            system=[text(cache_control=MARK)],
            tools=[TOOL, {**TOOL, "name": "b", "cache_control": MARK}],
            cache_control=MARK,
        ),
        body(
            stream=True,
            metadata={"user_id": "s"},
            stop_sequences=[],
            tool_choice={"type": "auto"},
            thinking={"type": "adaptive"},
        ),
    ],
)
def test_taken(request_: Json) -> None:
    assert validate(request_) is request_


def without(key: str) -> Json:
    request = body()
    del request[key]
    return request


FOUR = [text(cache_control=MARK) for _ in range(4)]


@pytest.mark.parametrize(
    ("request_", "path", "word"),
    [
        ([], "", "JSON object"),
        (without("model"), "model", "required"),
        (without("max_tokens"), "max_tokens", "required"),
        (without("messages"), "messages", "required"),
        (body(max_tokens=0), "max_tokens", "greater"),
        (body(max_tokens="9"), "max_tokens", "integer"),
        (body(temperature=1), "temperature", "no longer"),
        (body(top_p=1), "top_p", "no longer"),
        (body(nonsense=1), "nonsense", "Extra inputs"),
        (body(metadata={"session": "x"}), "metadata.session", "Extra inputs"),
        (body(messages=[]), "messages", "at least one"),
        (body(assistant()), "messages.0.role", "user"),
        (body({"role": "tool", "content": "x"}), "messages.0.role", "user"),
        (body({"role": "user", "content": "x", "name": "y"}), "messages.0.name", "Extra inputs"),
        (body({"role": "user", "content": ""}), "messages.0.content", "non-empty"),
        (body({"role": "user", "content": []}), "messages.0.content", "non-empty"),
        (body(user(text(""))), "messages.0.content.0.text.text", "non-empty"),
        (
            body(user(text("", cache_control=MARK))),
            "messages.0.content.0.text.cache_control",
            "empty text",
        ),
        (body(user({"type": "video"})), "messages.0.content.0.type", "video"),
        (body(user(text(foo=1))), "messages.0.content.0.text.foo", "Extra inputs"),
        (body(user(USE)), "messages.0.content.0.type", "tool_use"),
        (body(user(), assistant(RESULT), user()), "messages.1.content.0.type", "tool_result"),
        (
            body(user(text(cache_control={"type": "x"}))),
            "messages.0.content.0.text.cache_control.type",
            "ephemeral",
        ),
        (body(user(*FOUR), system=[text(cache_control=MARK)]), "", "Found 5"),
        (body(user(*FOUR), cache_control=MARK), "", "Found 5"),
        (body(system=[text("")]), "system.0.text.text", "non-empty"),
        (body(user(), assistant()), "messages.1", "prefill"),
        (body(user(), assistant(USE), user()), "messages.1", "toolu_1"),
        (body(user(), assistant(USE, USE2), user(RESULT)), "messages.1", "toolu_2"),
        (body(user(), assistant(USE), user(text(), RESULT)), "messages.1", "immediately after"),
        (body(user(), assistant(USE), user(RESULT, RESULT)), "messages.2.content.1", "multiple"),
        (body(user(RESULT)), "messages.0.content.0", "unexpected"),
        (
            body(user(), assistant(USE), user(RESULT), assistant(), user(RESULT)),
            "messages.4.content.0",
            "unexpected",
        ),
        (
            body(user(), assistant(USE), user(RESULT), assistant(USE), user(RESULT)),
            "messages",
            "unique",
        ),
        (
            body(user(), assistant({**USE, "input": "ls"}), user(RESULT)),
            "messages.1.content.0.tool_use.input",
            "dict",
        ),
        (
            body(user(), assistant({**USE, "caller": None}), user(RESULT)),
            "messages.1.content.0.tool_use.caller",
            "obj",
        ),
        (
            body(user(), assistant({**USE, "id": "a/b"}), user(RESULT)),
            "messages.1.content.0.tool_use.id",
            "pattern",
        ),
        (body(user(), assistant(), {"role": "system", "content": "n"}), "messages.2", "follow"),
        (body(user(), {"role": "system", "content": "n"}, user()), "messages.1", "precede"),
        (body(tools=[TOOL, TOOL]), "tools", "unique"),
        (body(tools=[{**TOOL, "x": 1}]), "tools.0.custom.x", "Extra inputs"),
        (body(tools=[{"name": "a"}]), "tools.0.custom.input_schema", "required"),
        (body(tools=[{**TOOL, "name": "a b"}]), "tools.0.custom.name", "pattern"),
        (
            body(tools=[{**TOOL, "input_schema": {"type": "array"}}]),
            "tools.0.custom.input_schema.type",
            "object",
        ),
        (
            body(thinking={"type": "enabled", "budget_tokens": 5}),
            "thinking.enabled.budget_tokens",
            "1024",
        ),
    ],
)
def test_refused(request_: Any, path: str, word: str) -> None:
    with pytest.raises(ApiError) as caught:
        validate(copy.deepcopy(request_))
    message = str(caught.value)
    assert (caught.value.status, caught.value.kind) == (400, "invalid_request_error")
    assert message.startswith(f"{path}: " if path else ""), message
    assert word in message


def thought() -> Json:
    """A request with two thinking blocks whose signatures are right."""
    request = body(user(text("q")), system="be good", tools=[TOOL], max_tokens=5)
    first = {
        "type": "thinking",
        "thinking": "hm",
        "signature": sign(request, merged(request["messages"]), [], "hm"),
    }
    request["messages"] += [assistant(first, USE), user(RESULT)]
    turns = merged(request["messages"])
    second = {"type": "thinking", "thinking": "", "signature": sign(request, turns, [], "")}
    request["messages"] += [assistant(second, text("done")), user(text("more", cache_control=MARK))]
    return request


def test_right_signatures_pass_whatever_cache_control_and_form() -> None:
    request = thought()
    validate(request)
    request["messages"][0] = {"role": "user", "content": "q"}
    request["system"] = [text("be good", cache_control=MARK)]
    request["max_tokens"] = 99
    validate(request)


def alter(request: Json, how: str) -> None:
    messages = request["messages"]
    if how == "system":
        request["system"] = "be bad"
    elif how == "tools":
        request["tools"] = []
    elif how == "earlier text":
        messages[0]["content"][0]["text"] = "other"
    elif how == "earlier result":
        messages[2]["content"][0]["content"] = "b"
    elif how == "thinking":
        messages[1]["content"][0]["thinking"] = "hmm"
    elif how == "signature":
        messages[1]["content"][0]["signature"] = "x"
    elif how == "left out":
        del messages[1]["content"][0]
    elif how == "moved":
        messages[3]["content"].reverse()


@pytest.mark.parametrize(
    "how",
    [
        "system",
        "tools",
        "earlier text",
        "earlier result",
        "thinking",
        "signature",
        "left out",
        "moved",
    ],
)
def test_wrong_signatures_are_refused(how: str) -> None:
    request = thought()
    alter(request, how)
    with pytest.raises(
        ApiError, match=r"messages\.\d\.content\.\d\.thinking\.signature: Invalid `signature`"
    ):
        validate(request)
