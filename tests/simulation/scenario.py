"""What happens in a simulated session: what Claude says, what people send, and when. Drawn from a seed.

Claude's answer is a function of the request, found by the newest `turn N` message in it and the number of answers
since, so that a repeated request gets the same answer. Input comes at points of the log (`Trigger`), not at
times, so that the outcome of a scenario does not depend on how fast anything is; a `chaotic` scenario adds input
and lost sandboxes at random times, and only invariants can be asked of it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cowhand.session import events as ev

PURE = ("read", "glob", "grep")
EFFECT = ("bash", "write")
ASK = "edit"

Kind = Literal["message", "interrupt", "allow", "deny", "suspend", "resume", "budget", "lose"]
When = Literal["before", "after", "rest", "time", "model"]


@dataclass
class Round:
    """One request of a turn and its answer.

    Attributes:
        uses: tool calls of the answer as (name, input).
        faults: how the first attempts fail.
        hang: the answer never comes.
        stop: stop reason of an answer without tool calls.
    """

    uses: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    hang: bool = False
    stop: str = "end_turn"


@dataclass
class Action:
    """Something that comes from outside.

    Attributes:
        kind: what.
        when: `before` or `after` an event is written, when a request arrives at the `model` that will
            not be answered, at `rest`, or at a `time`.
        event: type of that event.
        match: chooses among events of that type by their data.
        at_s: virtual seconds, for `time`; how long to think, for `rest`.
        mode: `suspended` if the session must rest for that reason.
        data: text of the message, tool_use_id of the answer.
        needs: index of the action that must be done before.
    """

    kind: Kind
    when: When
    event: str = ""
    match: Callable[[Mapping[str, Any]], bool] = lambda _data: True
    at_s: float = 0.0
    data: str = ""
    needs: int | None = None
    done: bool = False
    mode: str = "running"


@dataclass
class Scenario:
    """See the module."""

    seed: int
    turns: list[list[Round]]
    actions: list[Action]
    chaotic: bool
    budget: dict[str, int] = field(default_factory=dict)
    provisioning: str = "Lazy"

    def use_id(self, turn: int, number: int, index: int) -> str:
        return f"t{turn}-{number}-{index}"

    def round(self, turn: int, number: int) -> Round:
        rounds = self.turns[turn] if turn >= 0 else []
        return rounds[number] if number < len(rounds) else Round()


def place(request: Mapping[str, Any]) -> tuple[int, int]:
    """Turn and round that a request belongs to; turn -1 if the turn's message was cut out with a refusal."""
    turn, answers = -1, 0
    for message in request["messages"]:
        if message["role"] == "assistant":
            answers += 1
            continue
        for block in message["content"]:
            found = re.fullmatch(r"turn (\d+)", block.get("text", ""))
            if found:
                turn, answers = int(found[1]), 0
    return turn, answers


def answer(scenario: Scenario, request: Mapping[str, Any]) -> dict[str, Any]:
    """What Claude answers."""
    turn, number = place(request)
    plan = scenario.round(turn, number)
    content: list[dict[str, Any]] = [
        {"type": "thinking", "thinking": "", "signature": f"sig-{turn}-{number}"},
    ]
    for index, (name, data) in enumerate(plan.uses):
        use_id = scenario.use_id(turn, number, index)
        content.append({"type": "tool_use", "id": use_id, "name": name, "input": data})
    stop = "tool_use" if plan.uses else plan.stop
    if not plan.uses:
        content.append({"type": "text", "text": f"answer {turn}.{number}"})
    return {
        "id": f"msg_{turn}_{number}",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": content,
        "stop_reason": stop,
        "usage": {"input_tokens": 10 + number, "output_tokens": 5},
    }


# Drawing.


def draw(seed: int) -> Scenario:
    """The scenario of a seed."""
    rng = random.Random(f"scenario {seed}")
    chaotic = rng.random() < 0.35
    scenario = Scenario(seed, [], [], chaotic)
    if rng.random() < 0.15:
        scenario.provisioning = "Eager"
    plain = [_plain, _asides, _asks, _suspends, _interrupts, _budget]
    style = rng.choice(plain)
    for number in range(rng.choice([1, 1, 2, 2, 3])):
        scenario.turns.append(_rounds(rng))
        if number:
            wait = Action("message", "rest", at_s=rng.uniform(0, 1), data=f"turn {number}")
            scenario.actions.append(wait)
    style(rng, scenario)
    if chaotic:
        _chaos(rng, scenario)
    return scenario


def _input(rng: random.Random) -> dict[str, Any]:
    return {"command": f"c{rng.randrange(100)}"}


def _rounds(rng: random.Random) -> list[Round]:
    rounds = []
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        one = Round(faults=_faults(rng))
        shape = rng.random()
        if shape < 0.35:
            one.uses = [(rng.choice(EFFECT), _input(rng))]
        elif shape < 0.55:
            one.uses = [(rng.choice(EFFECT), _input(rng)) for _ in range(rng.choice([2, 3]))]
        elif shape < 0.75:
            one.uses = [(rng.choice(PURE), _input(rng)) for _ in range(rng.choice([2, 3, 4]))]
        elif shape < 0.95:
            names = [*PURE, *EFFECT, "unknown"]
            one.uses = [(rng.choice(names), _input(rng)) for _ in range(rng.choice([2, 3]))]
        else:
            one.stop = "pause_turn"
        rounds.append(one)
    rounds.append(Round(faults=_faults(rng), stop=rng.choice(["end_turn"] * 5 + ["max_tokens"])))
    return rounds


def _faults(rng: random.Random) -> list[str]:
    kinds = ["429", "529", "error_in_stream", "cut", "eof"]
    return [rng.choice(kinds) for _ in range(rng.choice([0] * 8 + [1, 2]))]


def _plain(rng: random.Random, scenario: Scenario) -> None:
    if rng.random() < 0.2:
        scenario.turns[-1][-1].stop = "refusal"


def _of(use_id: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda data: data.get("tool_use_id") == use_id


def _asides(rng: random.Random, scenario: Scenario) -> None:
    """Messages in mid-turn; those `before` a request land behind its horizon."""
    for number in range(rng.choice([1, 2])):
        kinds = [
            ev.MODEL_REQUEST_START,
            ev.TOOL_STARTED,
            ev.TOOL_RESULT,
            ev.MODEL_RESPONSE,
            ev.STATUS_IDLE,
        ]
        kind = rng.choice(kinds)
        match = _idle("end_turn") if kind == ev.STATUS_IDLE else _nth(rng.randrange(3))
        # After anything else the next step may be decided before the message is known, or not.
        when: When = rng.choice(["before", "after"]) if kind == ev.TOOL_STARTED else "before"
        scenario.actions.append(Action("message", when, kind, match, data=f"aside {number}"))


def _nth(number: int) -> Callable[[Mapping[str, Any]], bool]:
    """The n-th request by its logged number; other events have none, the first of them matches."""
    return lambda data: data.get("n", number + 1) == number + 1 and data.get("attempt", 1) == 1


def _idle(reason: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda data: data["stop_reason"]["type"] == reason


def _asks(rng: random.Random, scenario: Scenario) -> None:
    """Calls that wait for a person."""
    rounds = scenario.turns[0]
    asking = Round([(ASK, _input(rng)) for _ in range(rng.choice([1, 2]))])
    if rng.random() < 0.5:
        asking.uses.insert(rng.choice([0, 1]), (rng.choice(EFFECT), _input(rng)))
    rounds.insert(0, asking)
    for index, (name, _) in enumerate(asking.uses):
        if name != ASK:
            continue
        use_id = scenario.use_id(0, 0, index)
        verdict: Kind = rng.choice(["allow", "allow", "deny"])
        way = rng.random()
        if way < 0.4:
            action = Action(verdict, "after", ev.TOOL_PENDING, _of(use_id), data=use_id)
        elif way < 0.7:
            action = Action(verdict, "rest", at_s=rng.uniform(0, 1), data=use_id)
        else:
            action = Action(verdict, "after", ev.STATUS_IDLE, _asked(use_id), data=use_id)
        scenario.actions.insert(0, action)


def _asked(use_id: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda data: use_id in data["stop_reason"].get("event_ids", ())


def _suspends(rng: random.Random, scenario: Scenario) -> None:
    """Suspended somewhere, resumed when everything stands still."""
    kind = rng.choice(
        [
            ev.MODEL_REQUEST_START,
            ev.MODEL_RESPONSE,
            ev.TOOL_STARTED,
            ev.TOOL_RESULT,
            ev.HAND_REQUESTED,
        ]
    )
    when: When = rng.choice(["before", "after"])
    scenario.actions.insert(0, Action("suspend", when, kind, _nth(rng.randrange(2))))
    resume = Action("resume", "rest", at_s=rng.uniform(0, 3), needs=0, mode="suspended")
    scenario.actions.insert(1, resume)


def _interrupts(rng: random.Random, scenario: Scenario) -> None:
    """A turn that only an interrupt ends, in a stream or in a tool, and then one more."""
    rounds = scenario.turns[-1]
    turn = len(scenario.turns) - 1
    if rng.random() < 0.5:
        rounds[rng.randrange(len(rounds))] = Round(hang=True)
        scenario.actions.append(Action("interrupt", "model"))
    else:
        hanging = [(rng.choice(PURE), {"hang": True}) for _ in range(rng.choice([1, 2, 3]))]
        if rng.random() < 0.5:
            hanging = [(rng.choice(EFFECT), {"hang": True}), (rng.choice(EFFECT), {"hang": True})]
        rounds.insert(0, Round(hanging))
        use_id = scenario.use_id(turn, 0, 0)
        scenario.actions.append(Action("interrupt", "after", ev.TOOL_STARTED, _of(use_id)))
    scenario.turns.append(_rounds(rng))
    scenario.actions.append(
        Action("message", "rest", at_s=rng.uniform(0, 1), data=f"turn {turn + 1}")
    )


def _budget(rng: random.Random, scenario: Scenario) -> None:
    """A budget that is reached, raised, and the session goes on."""
    scenario.budget = {"max_tool_calls": rng.choice([1, 2])}
    raised = Action("budget", "rest", data="")
    scenario.actions.insert(0, raised)
    turn = len(scenario.turns)
    scenario.turns.append(_rounds(rng))
    scenario.actions.append(Action("message", "rest", at_s=0.1, data=f"turn {turn}"))


def _chaos(rng: random.Random, scenario: Scenario) -> None:
    """Input and lost sandboxes at any time."""
    for number in range(rng.randrange(1, 4)):
        kind: Kind = rng.choice(["message", "message", "interrupt", "lose", "suspend"])
        at_s = rng.uniform(0, rng.choice([0.3, 1.5, 4.0]))
        if kind == "message" and rng.random() < 0.3:
            when = rng.choice(["before", "after"])
            event = rng.choice([ev.MODEL_REQUEST_START, ev.TOOL_STARTED, ev.STATUS_IDLE])
            scenario.actions.append(Action(kind, when, event, data=f"chaos {number}"))
            continue
        scenario.actions.append(Action(kind, "time", at_s=at_s, data=f"chaos {number}"))
        if kind == "suspend":
            scenario.actions.append(
                Action("resume", "time", at_s=at_s + rng.uniform(0, 8), data=f"chaos {number}")
            )
