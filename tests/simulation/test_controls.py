"""The simulation without one defence at a time: each must be found.

Some show at once: their seeds run with every `make unit`. The others are looked for where many seeds are run
(`make soak`). A seed that shows nothing any more, because the code takes other steps now, is no failure: the
first seeds are searched instead, and the message says which one to write down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cowhand.hands.sandbox import SandboxHand
from cowhand.harness import decide
from cowhand.harness.fold import Conversation
from cowhand.harness.loop import SessionLoop
from cowhand.harness.request import Message
from cowhand.session import scripts as lua
from simulation.run import SEEDS, Runner
from simulation.world import Defences

WITHIN = 1200
"""Seeds within which a missing defence must show."""

soak = pytest.mark.skipif(SEEDS < WITHIN, reason="takes minutes: `make soak` runs it")
pytestmark = pytest.mark.timeout(1800)


def found(known: int, **changed: Any) -> list[str]:
    """The problems of the known seed, else of the first one that has any."""
    runner = Runner(**changed)
    for seed in (known, *range(WITHIN)):
        problems = runner.check(seed)
        if problems:
            if seed != known:
                print(f"seed {known} shows nothing any more, {seed} does: write that down")
            return problems
    raise AssertionError(f"{WITHIN} histories hide that the defence is missing")


def without(script: str, line: str, put: str = "") -> dict[str, lua.Script]:
    """The scripts with one line taken out of one of them."""
    scripts = lua.load()
    source = scripts[script].source
    assert source.count(line) == 1, f"{script}.lua does not hold {line!r} once"
    scripts[script] = lua.Script(script, source.replace(line, put))
    return scripts


SCRIPTS: dict[str, Callable[[], dict[str, lua.Script]]] = {
    "fence of append": lambda: without(
        "append", "if m[2] ~= lease then return {'FENCED', m[2]} end\n"
    ),
    "dedupe of append": lambda: without(
        "append",
        "if wseq == last then return {'DUP', tonumber(m[4])} end\nif wseq ~= last + 1 then return {'GAP', last} end\n",
    ),
    "dedupe of ingest": lambda: without(
        "ingest", "if dup then return {'DUP', tonumber(dup)} end\n"
    ),
    "check of park": lambda: without(
        "park", "if m[3] ~= ARGV[4] then return {'NEW', tonumber(m[3])} end\n"
    ),
    "suspension in append": lambda: without("append", "then return {'NOTRUNNING'} end", "then end"),
    "requeue of the dead": lambda: without("requeue", "\nenqueue(META, READY)\n", "\n"),
}


@pytest.mark.parametrize(
    ("defence", "seed"),
    [
        ("dedupe of append", 7),
        ("check of park", 28),
        ("suspension in append", 21),
        ("requeue of the dead", 0),
        pytest.param("dedupe of ingest", 213, marks=soak),
        pytest.param("fence of append", 539, marks=soak),
    ],
)
def test_a_script_without_its_defence_is_found(defence: str, seed: int) -> None:
    assert found(seed, scripts=SCRIPTS[defence]())


def test_a_hand_that_is_not_asked_before_a_call_is_sent_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def attach(hand: SandboxHand, call: Any) -> Any:
        return await hand.execute(call)

    monkeypatch.setattr(SandboxHand, "attach", attach)
    problems = found(15, defences=Defences(journal=False))
    assert any("ran 2 times" in problem for problem in problems)


@soak
def test_a_hand_without_its_fence() -> None:
    """The call of a replaced worker arrives late; the same seed is good where the fence refuses it."""
    bare = Defences(journal=False, hand_fence=False, no_late_calls=False)
    assert any("ran 2 times" in problem for problem in found(125, defences=bare))
    assert not Runner(defences=replace(bare, hand_fence=True)).check(125)


@soak
def test_results_in_the_order_in_which_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Conversation.pending_messages

    def unordered(conversation: Conversation, horizon: int) -> list[Message]:
        done = list(conversation.results.values())
        return [
            Message(one.role, (*done, *[b for b in one.blocks if b not in done]))
            if done and done[0] in one.blocks
            else one
            for one in real(conversation, horizon)
        ]

    monkeypatch.setattr(Conversation, "pending_messages", unordered)
    assert found(0)


@soak
def test_a_request_that_ignores_its_horizon(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Conversation.pending_messages
    monkeypatch.setattr(
        Conversation, "pending_messages", lambda conversation, _horizon: real(conversation, 1 << 60)
    )
    assert found(216)


@soak
def test_a_takeover_that_forgets_what_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that treats every call as fresh sends it without asking."""
    real = SessionLoop._delivery

    def fresh(loop: SessionLoop, call: decide.ToolCall) -> Any:
        loop._fresh.add(call.use.id)
        return real(loop, call)

    monkeypatch.setattr(SessionLoop, "_delivery", fresh)
    assert found(0, defences=Defences(journal=False))


def test_the_seeds_of_the_controls_are_good_with_all_defences() -> None:
    """What the controls find is the missing defence, not something else."""
    runner = Runner()
    assert not [seed for seed in (0, 7, 15, 21, 28) if runner.check(seed)]
