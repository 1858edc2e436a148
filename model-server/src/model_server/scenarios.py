"""Built-in scenarios: each computes Claude's next answer from the conversation alone. Called by `app`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_server.fix_the_tests import fix_the_tests, wants_fix
from model_server.scripts import Conversation, Scenario, Turn, plain

Json = dict[str, Any]
COUNT = (
    "n=$(cat /workspace/counter 2>/dev/null || echo 0); echo $((n+1)) > /workspace/counter;"
    " cat /workspace/counter"
)


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


def guess(talk: Conversation) -> Turn:
    """Refuses to guess."""
    return say(
        "I am the scripted model server, not Claude: there is no model behind me, and I do not guess. I know the"
        " scenarios fix-the-tests, echo, counter and slow-steps, and scripts that tests have put here."
        " Begin a message with [[script:echo]] to choose one, or give Cowhand an Anthropic API key to talk to Claude."
    )


BUILT_IN: Mapping[str, Scenario] = {
    "fix-the-tests": fix_the_tests,
    "echo": echo,
    "counter": counter,
    "slow-steps": slow_steps,
}


def by_text(talk: Conversation) -> Scenario:
    """The scenario that the text of the first message asks for."""
    return fix_the_tests if wants_fix(talk.text) else guess
