"""Faults that other agent runtimes had in the field, one named test for each.

`COVERED` names the test where another folder already has it; `test_the_table_names_tests_that_exist` keeps that true.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cowhand.harness.fold import fold
from cowhand.harness.loop import End
from cowhand.session import events as ev
from simulation import oracle
from simulation.loop import Process
from simulation.scenario import Action, Round, Scenario
from simulation.world import World as SimWorld
from support.harness_rig import (
    SID,
    Killed,
    Rig,
    World,
    check_request,
    message,
    text,
    tool_use,
    user,
    world,
)

TESTS = Path(__file__).parents[1]

COVERED: dict[str, tuple[str, str]] = {
    "a crash between two writes leaves a result without its call, or a pointer beside the log": (
        "chaos/test_faults.py",
        "test_a_turn_survives_a_broken_connection_at_every_phase",
    ),
    "a refusal is dropped or poisons the conversation": (
        "integration/harness/test_stack.py",
        "test_a_refusal_ends_the_turn_and_leaves_the_prompt",
    ),
    "a resumed session is hidden because positions do not fit": (
        "integration/session/test_histories.py",
        "test_histories_keep_every_promise",
    ),
    "a call runs again because two workers decide about it": (
        "integration/harness/test_crashes.py",
        "test_a_worker_that_comes_back_after_a_takeover_does_nothing",
    ),
}


@pytest.mark.parametrize("fault", COVERED)
def test_the_table_names_tests_that_exist(fault: str) -> None:
    path, name = COVERED[fault]
    tree = ast.parse((TESTS / path).read_text())
    assert name in {getattr(node, "name", "") for node in tree.body}


# Blocks of thinking come back without their signature, or changed: the API refuses the session for ever.

THINKING: tuple[dict[str, Any], ...] = (
    {"type": "thinking", "thinking": "hm", "signature": "sig/+=="},
    {"type": "thinking", "thinking": "", "signature": "empty"},
    {"type": "redacted_thinking", "data": "opaque+/=="},
)


def thinks(request: dict[str, Any]) -> dict[str, Any]:
    """Two rounds with thinking of each kind, then an answer."""
    rounds = sum(entry["role"] == "assistant" for entry in request["messages"])
    if rounds < 2:
        return message(*THINKING, tool_use(f"t{rounds}"), stop_reason="tool_use")
    return message(*THINKING, text("done"))


async def killed(
    made: World, script: Callable[[dict[str, Any]], Any], number: int, between: Callable[[], None]
) -> None:
    """Run to the end with one worker killed at this point; `between` happens before the next one comes."""

    def on_point(at: int, _name: str) -> None:
        if at == number:
            raise Killed

    made.on_point = on_point
    if await Rig(made, script, name="w1").run() is End.PARKED:
        return
    between()
    assert await Rig(made, script, name="w2").run() is End.PARKED


async def points(script: Callable[[dict[str, Any]], Any]) -> int:
    made = world()
    assert await Rig(made, script).run() is End.PARKED
    return made.points


async def test_thinking_signature_lost() -> None:
    for number in range(1, await points(thinks) + 1):
        made = world()
        await killed(made, thinks, number, lambda: None)
        made.emit(user("again", "m2"))
        assert await Rig(made, thinks, name="w3").run() is End.PARKED
        last = json.loads(made.requests[-1])["messages"]
        said = [entry["content"] for entry in last if entry["role"] == "assistant"]
        assert len(said) == 3
        for content in said:
            assert tuple(content[: len(THINKING)]) == THINKING, f"killed at {number}"


# A tool use in the middle of the history has no result, because only the tail was repaired.


def reads(request: dict[str, Any]) -> dict[str, Any]:
    """Three calls that run at the same time, then an answer."""
    if not any(entry["role"] == "assistant" for entry in request["messages"]):
        uses = [tool_use(f"t{n}", "read", file_path=f"f{n}") for n in (1, 2, 3)]
        return message(text("look"), *uses, stop_reason="tool_use")
    return message(text("done"))


async def test_orphan_tool_use_in_mid_history() -> None:
    """The worker dies with some of the results, the sandbox with it, and the user goes on talking."""
    partly = 0
    for number in range(1, await points(reads) + 1):
        made = world()

        def between(made: World = made) -> None:
            nonlocal partly
            partly += 0 < len(made.data(ev.TOOL_RESULT)) < 3
            if ("main", 1) in made.records:
                made.lose()
            made.emit(user("are you there?", "m2"))

        # `check_request` of the rig refuses what the API refuses: each use has its result behind it.
        await killed(made, reads, number, between)
        results = [data["tool_use_id"] for data in made.data(ev.TOOL_RESULT)]
        assert sorted(results) == ["t1", "t2", "t3"], f"killed at {number}"
        assert fold(SID, made.events).idle == {"type": "end_turn"}
    assert partly, "no worker died between two results"


def test_control_the_rig_refuses_an_orphan() -> None:
    """Without the repair the request would be refused: the check of the rig can fail."""
    messages = [
        {"role": "user", "content": [text("go")]},
        {"role": "assistant", "content": [tool_use("t1")]},
        {"role": "user", "content": [text("are you there?")]},
    ]
    with pytest.raises(AssertionError, match="tool results"):
        check_request({"messages": messages})


# A worker that died: its lease, its session, its tool. In virtual time.

TAKEOVER_S = 20.0
"""Heartbeat (10 s), the next sweep, and the restart of the container."""


class SamePod(SimWorld):
    """A container that starts again in the same pod, and an operator that sees no pod go."""

    def start_worker(self) -> Process:
        process = super().start_worker()
        process.name = "pod-1"
        self.hint = 0.0
        return process


def one_tool(**data: Any) -> Scenario:
    turns = [[Round([("bash", {"command": "make", **data})]), Round()]]
    return Scenario(1, turns, [], chaotic=False)


def run_killed(step: int, scenario: Scenario | None = None) -> SamePod:
    """A scenario (one tool) whose worker is killed before that step (0: never)."""
    made = SamePod(scenario or one_tool(), 1)

    def kill(world: SimWorld) -> None:
        world.workers[0].kill_at = step

    made.run(workers=1, faults=kill)
    return made


def all_steps() -> range:
    made = run_killed(0)
    steps = made.workers[0].steps
    made.close()
    return range(2, steps, 11)


def test_own_stale_lease() -> None:
    """A restarted worker gets its sessions back when its heartbeat has run out, not its lease's 20 minutes."""
    waited = []
    for step in all_steps():
        made = run_killed(step)
        try:
            assert not oracle.invariants(made), f"killed before step {step}"
            wakes = [event for event in made.log() if event.type == ev.SESSION_WAKE]
            if len(wakes) == 2:
                before = made.log()[wakes[1].seq - 2]
                waited.append((wakes[1].ts - before.ts) / 1000)
        finally:
            made.close()
    assert len(waited) > 5
    assert max(waited) < TAKEOVER_S


def test_stuck_running_after_unclean_stop() -> None:
    """Whenever the worker is killed, the session comes to rest, and its status says so."""
    for step in all_steps():
        made = run_killed(step)
        try:
            assert not oracle.invariants(made), f"killed before step {step}"
            meta = made.meta()
            assert (meta[b"state"], meta[b"lease"]) == (b"idle", b""), f"killed before step {step}"
            stop = json.loads(meta[b"st"])["stop_reason"]
            assert stop == {"type": "end_turn"}
        finally:
            made.close()


@pytest.mark.parametrize("step", [0, 110, 200, 9000])
def test_long_tool_reexecuted(step: int) -> None:
    """A command of 400 s runs once, whether or not its worker is killed while it runs."""
    made = run_killed(step, one_tool(hang=True, timeout_ms=400_000))
    try:
        assert not made.problems
        assert made.ran == [f"{made.sid}/t0-0-0"]
        started, result = (
            next(event for event in made.log() if event.type == kind)
            for kind in (ev.TOOL_STARTED, ev.TOOL_RESULT)
        )
        assert result.ts - started.ts >= 400_000
        assert "late" in result.data["content"]
        wakes = [event.seq for event in made.log() if event.type == ev.SESSION_WAKE]
        if step:
            assert started.seq < wakes[-1] < result.seq, "the worker was not killed while it ran"
    finally:
        made.close()


def test_resume_hides_session() -> None:
    """Killed anywhere, then a message: the same session goes on at the next position, and nothing is missing."""
    for step in list(all_steps())[::4]:
        scenario = one_tool()
        scenario.turns.append([Round()])
        scenario.actions.append(Action("message", "rest", data="turn 1"))
        made = run_killed(step, scenario)
        try:
            assert not oracle.invariants(made), f"killed before step {step}"
            log = made.log()
            assert [event.seq for event in log] == list(range(1, len(log) + 1))
            said = [e.data["message"]["id"] for e in log if e.type == ev.MODEL_RESPONSE]
            assert said == ["msg_0_0", "msg_0_1", "msg_1_0"]
            assert b"turn 0" in made.requests[-1]
            assert b"turn 1" in made.requests[-1]
        finally:
            made.close()
