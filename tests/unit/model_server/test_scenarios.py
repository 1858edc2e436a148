"""Scripts and scenarios as functions of a request."""

from __future__ import annotations

from typing import Any

import pytest

from model_server.errors import ApiError
from model_server.fix_the_tests import candidates, failure, fix_the_tests, ran
from model_server.scenarios import by_text, counter, echo, guess
from model_server.scripts import conversation, parse_script, script_name, scripted, stop_reason

Json = dict[str, Any]
RUN = """test_a (tests.test_m.T.test_a) ... FAIL

======================================================================
FAIL: test_a (tests.test_m.T.test_a)
----------------------------------------------------------------------
Traceback (most recent call last):
  File "/w/repo/tests/test_m.py", line 5, in test_a
    self.assertEqual(add(1, 2) - 3, 0)
AssertionError: -4 != 0

----------------------------------------------------------------------
Ran 4 tests in 0.001s

FAILED (failures=1)
"""
PASS = "Ran 4 tests in 0.001s\n\nOK\n"
TEST = """import unittest
from shop.m import add
class T(unittest.TestCase):
    def test_a(self):
        self.assertEqual(add(1, 2) - 3, 0)
"""
SOURCE = (
    "def other(a, b):\n    return a - b\n\n\ndef add(a, b):\n    low = a - 0\n    return low - b\n"
)


def talk(*pairs: tuple[str, Json, str, bool], text: str = "fix the tests in /w") -> Any:
    messages: list[Json] = [{"role": "user", "content": text}]
    for i, (name, given, result, is_error) in enumerate(pairs):
        use = {"type": "tool_use", "id": f"t{i}", "name": name, "input": given}
        messages.append({"role": "assistant", "content": [use]})
        answer = {
            "type": "tool_result",
            "tool_use_id": f"t{i}",
            "content": result,
            "is_error": is_error,
        }
        messages.append({"role": "user", "content": [answer]})
    return conversation({"messages": messages})


FAIL_RUN = ("bash", {"command": "x"}, RUN, True)
READ_TEST = ("read", {"file_path": "/w/repo/tests/test_m.py"}, TEST, False)
GLOB = ("glob", {"pattern": "**/*.py"}, "/w/repo/shop/m.py\n/w/repo/tests/test_m.py", False)


def read_source(source: str) -> tuple[str, Json, str, bool]:
    return ("read", {"file_path": "/w/repo/shop/m.py"}, source, False)


def edit(old: str, new: str) -> tuple[str, Json, str, bool]:
    return (
        "edit",
        {"file_path": "/w/repo/shop/m.py", "old_string": old, "new_string": new},
        "edited",
        False,
    )


def tool(turn: Any) -> Json:
    return next(b for b in turn.content if b["type"] == "tool_use")


def test_reading_of_a_test_run() -> None:
    failed = failure(RUN)
    assert failed is not None
    assert (failed.test, failed.file, failed.line) == ("test_a", "/w/repo/tests/test_m.py", 5)
    assert (failed.code, failed.message) == ("self.assertEqual(add(1, 2) - 3, 0)", "-4 != 0")
    assert ran(RUN) == (4, False)
    assert ran(PASS) == (4, True)
    assert ran("bash: python3: command not found") is None


def test_change_is_looked_for_in_the_tested_function_only() -> None:
    edits = list(candidates(SOURCE, "add", "-4 != 0"))
    assert [e.new for e in edits[:2]] == ["    low = a + 0", "    return low + b"]
    assert all("other" not in e.old and e.old != "    return a - b" for e in edits)


def test_change_that_did_not_help_is_taken_back_and_the_next_one_tried() -> None:
    wrong = ("    low = a - 0", "    low = a + 0")
    history = [FAIL_RUN, READ_TEST, GLOB, read_source(SOURCE), edit(*wrong)]
    assert tool(fix_the_tests(talk(*history)))["name"] == "bash"
    broken = SOURCE.replace(*wrong)
    history += [FAIL_RUN, READ_TEST, GLOB, read_source(broken)]
    back = tool(fix_the_tests(talk(*history)))["input"]
    assert (back["old_string"], back["new_string"]) == (wrong[1], wrong[0])
    history += [edit(wrong[1], wrong[0]), FAIL_RUN, READ_TEST, GLOB, read_source(SOURCE)]
    following = tool(fix_the_tests(talk(*history)))["input"]
    assert following["new_string"] == "    return low + b"
    history += [
        edit("    return low - b", "    return low + b"),
        ("bash", {"command": "x"}, PASS, False),
    ]
    assert "All 4 tests pass now" in fix_the_tests(talk(*history)).content[0]["text"]


def test_edit_that_a_lost_sandbox_took_with_it_is_made_again() -> None:
    first = ("    low = a - 0", "    low = a + 0")
    history = [FAIL_RUN, READ_TEST, GLOB, read_source(SOURCE), edit(*first)]
    history += [("bash", {"command": "x"}, "the sandbox was lost", True), FAIL_RUN, READ_TEST, GLOB]
    again = tool(fix_the_tests(talk(*history, read_source(SOURCE))))["input"]
    assert (again["old_string"], again["new_string"]) == first


def test_useless_results_end_in_a_text() -> None:
    lost = ("bash", {"command": "x"}, "the sandbox was lost", True)
    assert tool(fix_the_tests(talk(lost)))["name"] == "bash"
    final = fix_the_tests(talk(lost, lost, lost, lost))
    assert stop_reason(final) == "end_turn"
    assert "the sandbox was lost" in final.content[0]["text"]
    constant = ("bash", {"command": "x"}, "ok", False)
    said = fix_the_tests(talk(constant, constant, constant, constant)).content[0]["text"]
    assert "pass" not in said


@pytest.mark.parametrize(
    ("listing", "test", "word"),
    [
        ("no matches", TEST, "no such file"),
        (GLOB[2], "def broken(", "cannot find"),
        (GLOB[2], "x = 1", "cannot find"),
    ],
)
def test_missing_facts_are_named(listing: str, test: str, word: str) -> None:
    history = [FAIL_RUN, ("read", {}, test, False), ("glob", {}, listing, False)]
    assert word in fix_the_tests(talk(*history)).content[0]["text"]


def test_choice_by_text() -> None:
    assert by_text(talk(text="Please make the failing tests pass")) is fix_the_tests
    assert by_text(talk(text="Write a poem")) is guess
    assert "no model behind me" in guess(talk()).content[0]["text"]


def test_echo_and_counter() -> None:
    assert echo(talk(text="[[script:echo]] hello")).content[0]["text"] == "hello"
    twice = "[[script:counter times=2]]"
    assert tool(counter(talk(text=twice)))["name"] == "bash"
    one = ("bash", {}, "1\n", False)
    assert tool(counter(talk(one, text=twice)))["name"] == "bash"
    assert counter(talk(one, ("bash", {}, "2\n", False), text=twice)).content[0]["text"] == "2"


def test_counter_counts_for_each_user_message() -> None:
    body = {
        "messages": [
            {"role": "user", "content": "[[script:counter]]"},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "a", "name": "bash", "input": {}}],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "a", "content": "1"}],
            },
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": "again"},
        ]
    }
    assert tool(counter(conversation(body)))["name"] == "bash"


def test_script_fills_in_results_and_ends() -> None:
    assert script_name("do it [[script:my.one x=1]] now") == "my.one"
    turns = parse_script(
        {
            "turns": [
                {"content": []},
                {"content": [{"type": "text", "text": "{{result:-1}} {{result:0}}"}]},
            ]
        }
    )
    one = ("bash", {}, "first", False)
    assert scripted(turns, "s", talk(one)).content[0]["text"] == "first first"
    assert "no turn 2" in scripted(turns, "s", talk(one, one)).content[0]["text"]
    bad = parse_script({"turns": [{"content": [{"type": "text", "text": "{{result:3}}"}]}]})
    with pytest.raises(ApiError, match="there are 0 results"):
        scripted(bad, "s", talk())


@pytest.mark.parametrize(
    ("script", "path"),
    [
        ([], ""),
        ({"turns": [{}]}, "turns.0.content"),
        ({"turns": [{"content": [{"type": "image"}]}]}, "turns.0.content.0"),
        ({"turns": [{"content": [], "gates": "x"}]}, "turns.0.gates"),
        ({"turns": [{"content": [], "fault": {"kind": "x"}}]}, "turns.0.fault.kind"),
        ({"turns": [{"content": [], "delay_ms": -1}]}, "turns.0.delay_ms"),
    ],
)
def test_bad_scripts_are_refused(script: Any, path: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_script(script)
    assert str(caught.value).startswith(path)
