from __future__ import annotations

import json

import pytest

from cowhand.errors import UserError
from cowhand.hands.toolset import ALL_TOOLS, request_base, tool_class

ALLOW_ALL = dict.fromkeys(ALL_TOOLS, "Allow")


def test_all_tools_are_the_six_of_the_agent_toolset_and_two_for_the_log() -> None:
    assert ALL_TOOLS == (
        "bash", "edit", "glob", "grep", "read", "read_log", "search_log", "write",
    )  # fmt: skip


def test_equal_arguments_give_equal_bytes_whatever_the_order_of_tools() -> None:
    one = request_base(model="m", max_tokens=9, system="s", tools=ALLOW_ALL)
    other = request_base(
        model="m", max_tokens=9, system="s", tools=dict(reversed(ALLOW_ALL.items()))
    )
    assert json.dumps(one) == json.dumps(other)
    assert [tool["name"] for tool in one["tools"]] == sorted(ALL_TOOLS)
    assert one["system"] == [{"type": "text", "text": "s"}]


def test_denied_and_unnamed_tools_are_left_out() -> None:
    base = request_base(
        model="m", max_tokens=9, system=None, tools={"bash": "Ask", "read": "Deny", "grep": "Allow"}
    )
    assert [tool["name"] for tool in base["tools"]] == ["bash", "grep"]
    assert "system" not in base
    assert "tools" not in request_base(model="m", max_tokens=9, system="", tools={"bash": "Deny"})


@pytest.mark.parametrize(
    ("name", "properties", "required"),
    [
        ("bash", {"command", "restart", "timeout_ms"}, []),
        ("read", {"file_path", "view_range"}, ["file_path"]),
        ("write", {"file_path", "content"}, ["file_path", "content"]),
        (
            "edit",
            {"file_path", "old_string", "new_string", "replace_all"},
            ["file_path", "old_string", "new_string"],
        ),
        ("glob", {"pattern", "path"}, ["pattern"]),
        ("grep", {"pattern", "path"}, ["pattern"]),
    ],
)
def test_input_schema(name: str, properties: set[str], required: list[str]) -> None:
    tools = request_base(model="m", max_tokens=9, system=None, tools=ALLOW_ALL)["tools"]
    schema = next(tool for tool in tools if tool["name"] == name)["input_schema"]
    assert set(schema["properties"]) == properties
    assert schema["required"] == required
    assert schema["type"] == "object"


def test_the_definitions_cannot_be_changed_through_an_answer() -> None:
    base = request_base(model="m", max_tokens=9, system=None, tools=ALLOW_ALL)
    base["tools"][0]["input_schema"]["properties"].clear()
    again = request_base(model="m", max_tokens=9, system=None, tools=ALLOW_ALL)
    assert again["tools"][0]["input_schema"]["properties"]


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [
        ({"model": ""}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tools": {"web_search": "Allow"}}, "tools.web_search"),
        ({"tools": {"bash": "allow"}}, "tools.bash"),
    ],
)
def test_bad_input_names_the_field(kwargs: dict[str, object], field: str) -> None:
    good: dict[str, object] = {"model": "m", "max_tokens": 9, "system": None, "tools": {}}
    with pytest.raises(UserError) as err:
        request_base(**(good | kwargs))  # type: ignore[arg-type]
    assert err.value.field == field


def test_classes() -> None:
    pure = {name for name in ALL_TOOLS if tool_class(name) == "pure"}
    assert pure == {"read", "glob", "grep", "read_log", "search_log"}
    assert tool_class("unheard_of") == "effect"
