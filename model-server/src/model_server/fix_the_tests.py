"""The scenario `fix-the-tests`: find the bug that a failing unittest shows, repair it, prove it.

Everything it says and does is taken from tool results: which test fails, in which file, what the assertion said,
which module the test imports, which lines the function has. A result that is not what it needs (a lost sandbox, for
example) makes it look at the tests again, three times at most; then it says so and stops.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from model_server.scripts import Conversation, Turn

Json = dict[str, Any]
MAX_RETRIES = 3
MAX_CALLS = 40

_FAILED = re.compile(r"^(?:FAIL|ERROR): (\w+) \(([\w.]+)\)", re.M)
_RAN = re.compile(r"^Ran (\d+) tests? in", re.M)
_FRAME = re.compile(r'^  File "([^"]+)", line (\d+), in (\w+)\n    (.+)$', re.M)
_ERROR_LINE = re.compile(r"^(\w*(?:Error|Exception)): (.*)$", re.M)


@dataclass(frozen=True)
class Failure:
    """What a test run said of its first failing test."""

    test: str
    file: str
    line: int
    code: str
    message: str


@dataclass(frozen=True)
class Edit:
    """A change of one line, with the reason for it."""

    old: str
    new: str
    why: str


def wants_fix(text: str) -> bool:
    """Whether a message asks for this scenario."""
    return bool(
        re.search(r"\b(fix|pass|repair)\b", text, re.I) and re.search(r"\btests?\b", text, re.I)
    )


def ran(output: str) -> tuple[int, bool] | None:
    """Number of tests and whether all passed; None if this is no output of unittest."""
    match = _RAN.search(output)
    return (int(match.group(1)), bool(re.search(r"^OK\b", output, re.M))) if match else None


def failure(output: str) -> Failure | None:
    """The first failing test in the output of `python3 -m unittest`."""
    head = _FAILED.search(output)
    if head is None:
        return None
    section = output[head.end() :].split("\n======", 1)[0]
    frames = [f for f in _FRAME.finditer(section) if f.group(3) == head.group(1)]
    error = _ERROR_LINE.search(section)
    if not frames or error is None:
        return None
    frame = frames[-1]
    return Failure(
        head.group(1), frame.group(1), int(frame.group(2)), frame.group(4).strip(), error.group(2)
    )


def tested_function(test_source: str, failed: Failure) -> tuple[str, str] | None:
    """Module and name of the imported function that the failing line calls."""
    try:
        tree = ast.parse(test_source)
    except SyntaxError:
        return None
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported.update({a.asname or a.name: node.module for a in node.names})
    # The line of the traceback may be the middle of a statement: take the calls of the whole statement.
    statements = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.Expr | ast.Assign)
        and n.lineno <= failed.line <= (n.end_lineno or n.lineno)
    ]
    for statement in statements:
        for node in ast.walk(statement):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in imported
            ):
                return imported[node.func.id], node.func.id
    return None


def source_path(listing: str, module: str) -> str | None:
    """The path in a glob's output that holds a module."""
    wanted = "/" + module.replace(".", "/") + ".py"
    return next((line for line in listing.splitlines() if line.endswith(wanted)), None)


def function_lines(source: str, name: str) -> list[str]:
    """Lines of the body of a function."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            return source.splitlines()[first.lineno - 1 : node.end_lineno]
    return []


def candidates(source: str, name: str, message: str) -> Iterator[Edit]:
    """Changes of one line of the function that could make the assertion hold, the likeliest first."""
    lines = [line for line in function_lines(source, name) if source.count(line) == 1]
    for pattern, replacement, why in _rules(message):
        for line in lines:
            for match in re.finditer(pattern, line):
                new = line[: match.start()] + match.expand(replacement) + line[match.end() :]
                yield Edit(line, new, why)


def _rules(message: str) -> list[tuple[str, str, str]]:
    """Rewrites as (pattern, replacement, reason), ordered by what the assertion said."""
    less = (r"(?<= )- (?=\w)", "+ ", "it subtracts where it has to add")
    more = (r"(?<= )\+ (?=\w)", "- ", "it adds where it has to subtract")
    strict = [
        (r" > ", " >= ", "it leaves out the case where both sides are equal"),
        (r" < ", " <= ", "it leaves out the case where both sides are equal"),
    ]
    loose = [
        (r" >= ", " > ", "it takes in the case where both sides are equal"),
        (r" <= ", " < ", "it takes in the case where both sides are equal"),
    ]
    offset = [
        (r"\b(\w+) \* (\w+)\b", r"(\1 - 1) * \2", "it counts from 1 and takes that for an offset"),
        (r"\[1:\]", "", "it leaves out the first element"),
    ]
    if message.startswith("False is not true"):
        return [*strict, *loose]
    if message.startswith("True is not false"):
        return [*loose, *strict]
    if message.startswith(("Lists differ", "Tuples differ")):
        return [*offset, *strict, *loose]
    numbers = re.match(r"(-?[\d.]+) != (-?[\d.]+)", message)
    if numbers and float(numbers.group(1)) < float(numbers.group(2)):
        return [less, *strict, *offset, more, *loose]
    return [more, *loose, *offset, less, *strict]


def fix_the_tests(talk: Conversation) -> Turn:
    """The next answer."""
    match = re.search(r"(/workspace(?:/[\w.-]+)*)", talk.text)
    repo = match.group(1).rstrip(".") if match else "/workspace/repo"
    return _Plan(talk.calls, repo).next()


class _Plan:
    """Where the work stands, read from the calls since the user's message."""

    def __init__(self, calls: list[Json], repo: str) -> None:
        self._calls = calls
        self._repo = repo
        # -B: byte code counts as fresh when second and size of its source are the same, so an edit may not show.
        self._command = f"cd {repo} && python3 -B -m unittest -v"

    def next(self) -> Turn:
        if not self._calls:
            return self._run("I'll run the tests first, to see what fails.")
        if len(self._calls) > MAX_CALLS:
            return _stop(f"I stop here: {len(self._calls)} tool calls have not been enough.")
        last = self._calls[-1]
        if last["name"] == "bash":
            return self._after_tests(last)
        since = self._since_tests()
        if any(call["is_error"] for call in since):
            return self._again(next(c for c in since if c["is_error"]))
        if last["name"] == "edit":
            return self._run("The edit is in place. I'll run all the tests again.")
        return self._after_reads(since)

    def _after_tests(self, call: Json) -> Turn:
        counted = ran(call["result"])
        if counted is None:
            return self._again(call)
        count, passed = counted
        if passed:
            return self._report(count)
        failed = failure(call["result"])
        if failed is None:
            return _stop(
                f"{count} tests ran and not all passed, but I cannot read which one failed:\n{_tail(call)}"
            )
        text = (
            f"{count} tests ran, and `{failed.test}` fails: `{failed.message}`. I'll read the test."
        )
        return Turn(
            [
                {"type": "text", "text": text},
                {"type": "tool_use", "name": "read", "input": {"file_path": failed.file}},
                {
                    "type": "tool_use",
                    "name": "glob",
                    "input": {"pattern": "**/*.py", "path": self._repo},
                },
            ]
        )

    def _after_reads(self, since: list[Json]) -> Turn:
        failed = self._failure()
        reads = [c for c in since if c["name"] == "read"]
        listing = next((c["result"] for c in since if c["name"] == "glob"), "")
        if failed is None or not reads:
            return _stop("I have lost the thread: no failing test stands before what I read.")
        target = tested_function(reads[0]["result"], failed)
        if target is None:
            return _stop(
                f"I cannot find in {failed.file} which imported function `{failed.code}` calls."
            )
        path = source_path(listing, target[0])
        if path is None:
            return _stop(f"The test imports `{target[0]}`, but there is no such file:\n{listing}")
        if len(reads) == 1:
            text = f"`{failed.code}` calls `{target[1]}` of `{target[0]}`. I'll read it."
            return Turn(
                [
                    {"type": "text", "text": text},
                    {"type": "tool_use", "name": "read", "input": {"file_path": path}},
                ]
            )
        edit = self._choose(reads[1]["result"], target[1], failed.message)
        if edit is None:
            return _stop(
                f"I see no change of one line in `{target[1]}` that would explain `{failed.message}`."
            )
        text = f"In `{target[1]}`, `{edit.old.strip()}` is wrong: {edit.why}. I'll change it to `{edit.new.strip()}`."
        arguments = {"file_path": path, "old_string": edit.old, "new_string": edit.new}
        return Turn(
            [
                {"type": "text", "text": text},
                {"type": "tool_use", "name": "edit", "input": arguments},
            ]
        )

    def _choose(self, source: str, function: str, message: str) -> Edit | None:
        """The next change to try: an edit that did not help is taken back first."""
        made = [(e["input"]["old_string"], e["input"]["new_string"]) for e in self._edits()]
        for old, new in reversed(made):
            if (new, old) not in made and source.count(new) == 1:
                return Edit(new, old, "my change did not help, so it goes back")
        taken_back = {(old, new) for old, new in made if (new, old) in made}
        for edit in candidates(source, function, message):
            if (edit.old, edit.new) not in taken_back:
                return edit
        return None

    def _report(self, count: int) -> Turn:
        edits = self._edits()
        if not edits:
            return _stop(f"All {count} tests pass already; there is nothing to fix.")
        given = edits[-1]["input"]
        where = given["file_path"].removeprefix(self._repo + "/")
        return _stop(
            f"All {count} tests pass now. The bug was in `{where}`: the line `{given['old_string'].strip()}` is now"
            f" `{given['new_string'].strip()}`."
        )

    def _again(self, call: Json) -> Turn:
        """The call did not do what it should: look at the tests again, or give up."""
        lost = [c for c in self._calls if self._useless(c)]
        if len(lost) > MAX_RETRIES:
            return _stop(
                f"I stop here: {call['name']} did not work, {len(lost)} times. It said:\n{_tail(call)}"
            )
        return self._run(f"That did not work ({_tail(call, 200)}). I'll look at the tests again.")

    @staticmethod
    def _useless(call: Json) -> bool:
        return ran(call["result"]) is None if call["name"] == "bash" else call["is_error"]

    def _edits(self) -> list[Json]:
        return [c for c in self._calls if c["name"] == "edit" and not c["is_error"]]

    def _since_tests(self) -> list[Json]:
        places = [i for i, c in enumerate(self._calls) if c["name"] == "bash"]
        return self._calls[places[-1] + 1 :] if places else self._calls

    def _failure(self) -> Failure | None:
        runs = [c for c in self._calls if c["name"] == "bash"]
        return failure(runs[-1]["result"]) if runs else None

    def _run(self, text: str) -> Turn:
        return Turn(
            [
                {"type": "text", "text": text},
                {"type": "tool_use", "name": "bash", "input": {"command": self._command}},
            ]
        )


def _stop(text: str) -> Turn:
    return Turn([{"type": "text", "text": text}])


def _tail(call: Json, limit: int = 1000) -> str:
    text = str(call["result"]).strip()
    return text if len(text) <= limit else "..." + text[-limit:]
