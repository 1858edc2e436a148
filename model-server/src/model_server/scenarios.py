"""Built-in scenarios: each computes Claude's next answer from the conversation alone. Called by `app`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model_server.fix_the_tests import fix_the_tests, wants_fix
from model_server.scripts import Conversation, Scenario, Turn, plain

Json = dict[str, Any]
COUNT = (
    "n=$(cat /workspace/counter 2>/dev/null || echo 0); echo $((n+1)) > /workspace/counter;"
    " cat /workspace/counter"
)


def held(turn: Turn, talk: Conversation) -> Turn:
    """A summary or notes, at the gate of the mark: `hold=NAME` before it begins, `hold_mid=NAME` in mid-stream."""
    return replace(turn, gate=talk.options.get("hold"), gate_mid=talk.options.get("hold_mid"))


def say(text: str) -> Turn:
    """An answer that ends the turn."""
    return Turn([{"type": "text", "text": text}])


def echo(talk: Conversation) -> Turn:
    """Answers with the text of the newest user message."""
    return say(plain(talk.last_text) or "(nothing to echo)")


def counter(talk: Conversation) -> Turn:
    """Raises the number in /workspace/counter `times` times (default 1), one call a turn, and answers with it."""
    given = talk.options.get("times", "1")
    times = int(given) if given.isdecimal() else 1
    if len(talk.calls) < times:
        return Turn([{"type": "tool_use", "name": "bash", "input": {"command": COUNT}}])
    return say(talk.calls[-1]["result"].strip() if talk.calls else "0")


STEP = "echo step >> /workspace/progress; wc -l < /workspace/progress"
REST = "sleep 6; echo rested"


def slow_steps(talk: Conversation) -> Turn:
    """Adds a line to /workspace/progress, then sleeps in another call, then answers with the number of lines.

    A call that failed (its sandbox was lost) is said so, and made again: the demo kills things meanwhile.
    """
    done = {call["input"].get("command"): call for call in talk.calls if not call["is_error"]}
    failed = bool(talk.calls) and talk.calls[-1]["is_error"]
    text = [{"type": "text", "text": "That call failed; I try again."}] if failed else []
    for command in (STEP, REST):
        if command not in done:
            use = {"type": "tool_use", "name": "bash", "input": {"command": command}}
            return Turn([*text, use])
    return say(f"/workspace/progress has {done[STEP]['result'].strip()} line(s).")


def long_session(talk: Conversation) -> Turn:
    """Takes `steps` steps (default 12) of `size` bytes each (default 2000), then says what it knows of three of them.

    The output of each step holds a fact. What stands in the request no more is looked up with search_log, where there
    is one. Asked for notes, it writes down all facts that it sees, unless the mark says notes=short.
    """
    steps, size = (int(talk.options.get(key, value)) for key, value in LONG.items())
    done = max([0, *(int(number) for number in STEPS.findall(talk.whole))])
    facts = dict(FACTS.findall(talk.whole))
    if "Write notes" in talk.last_text:
        known = [] if talk.options.get("notes") == "short" else sorted(facts.items(), key=_number)
        notes = "\n".join([f"step {done} of {steps} is done", *(_fact(*item) for item in known)])
        return held(say(notes), talk)
    if done < steps:
        k = done + 1
        command = (
            f"echo 'step {k} of {steps}: fact {k} is '$(({k} * 7919 % 10007));"
            f" head -c {size} /dev/zero | tr '\\0' x"
        )
        return Turn([{"type": "tool_use", "name": "bash", "input": {"command": command}}])
    asked = [str(number) for number in (1, steps // 2, steps)]
    tried = [call["input"].get("query") for call in talk.calls if call["name"] == "search_log"]
    for number in asked:
        query = f"fact {number} is"
        if number not in facts and query not in tried and "search_log" in talk.tools:
            return Turn([{"type": "tool_use", "name": "search_log", "input": {"query": query}}])
    said = ", ".join(_fact(number, facts.get(number, "forgotten")) for number in asked)
    return say(f"{said}; looked up: {len(tried)}")


LONG = {"steps": "12", "size": "2000"}
STEPS = re.compile(r"step (\d+) of \d+")
FACTS = re.compile(r"fact (\d+) is (\d+)")


def _number(item: tuple[str, str]) -> int:
    return int(item[0])


def _fact(number: str, value: str) -> str:
    return f"fact {number} is {value}"


def guess(talk: Conversation) -> Turn:
    """Refuses to guess."""
    return say(
        "I am the scripted model server, not Claude: there is no model behind me, and I do not guess. I know the"
        " scenarios fix-the-tests, echo, counter, slow-steps and long-session, and scripts that tests have put here."
        " Begin a message with [[script:echo]] to choose one, or give Cowhand an Anthropic API key to talk to Claude."
    )


BUILT_IN: Mapping[str, Scenario] = {
    "fix-the-tests": fix_the_tests,
    "echo": echo,
    "counter": counter,
    "slow-steps": slow_steps,
    "long-session": long_session,
}


def by_text(talk: Conversation) -> Scenario:
    """The scenario that the text of the first message asks for."""
    return fix_the_tests if wants_fix(talk.text) else guess
