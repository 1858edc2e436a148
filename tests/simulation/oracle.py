"""What must hold after a simulated run, whatever went wrong in it.

`invariants` asks of any run; `same_story` compares a run with the run of the same scenario in which nothing went
wrong: same answers, same results, same requests byte for byte, each effect as often.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from cowhand.harness.decide import Park, next_step
from cowhand.harness.fold import Conversation
from cowhand.harness.request import body
from cowhand.harness.status import ENDS_TURN
from cowhand.session import events as ev
from cowhand.session.events import Event
from simulation.world import World


def invariants(world: World) -> list[str]:
    """What is wrong with a run that came to its end, as sentences."""
    if world.problems:
        return list(world.problems)
    log = world.log()
    found = [*_order(log), *_results(log), *_input(world, log), *_effects(world, log)]
    return [*found, *_requests(world, log), *_rest(world, log)]


def _order(log: Sequence[Event]) -> list[str]:
    """I1 dense, no event twice; I2 nobody writes after he was taken over."""
    found = []
    if [event.seq for event in log] != list(range(1, len(log) + 1)):
        found.append("positions are not dense")
    twice = [one for one, count in Counter(event.id for event in log).items() if count > 1]
    if twice:
        found.append(f"events stand twice in the log: {twice}")
    holder = ""
    for event in log:
        if event.type == ev.SESSION_WAKE:
            holder = event.lease
        elif event.lease and event.lease != holder:
            found.append(f"event {event.seq} ({event.type}) was written under an old lease")
    return found


def _results(log: Sequence[Event]) -> list[str]:
    """I4: each call has exactly one result, before the request that follows."""
    found, open_calls = [], set()
    results: Counter[str] = Counter()
    for event in log:
        if event.type == ev.MODEL_RESPONSE and event.data["message"]["stop_reason"] != "refusal":
            blocks = event.data["message"]["content"]
            open_calls |= {block["id"] for block in blocks if block["type"] == "tool_use"}
        elif event.type == ev.TOOL_RESULT:
            results[event.data["tool_use_id"]] += 1
            open_calls.discard(event.data["tool_use_id"])
        elif event.type == ev.MODEL_REQUEST_START and open_calls:
            found.append(f"request at {event.seq} while {sorted(open_calls)} have no result")
    found += [f"{use} has {count} results" for use, count in results.items() if count > 1]
    if open_calls:
        found.append(f"{sorted(open_calls)} never got a result")
    return found


def _input(world: World, log: Sequence[Event]) -> list[str]:
    """I3: what was acknowledged is there once, and Claude was shown every message once."""
    there = Counter(event.id for event in log)
    return [
        f"input {one} was acknowledged and is not there" for one in world.acked if there[one] != 1
    ]


def _effects(world: World, log: Sequence[Event]) -> list[str]:
    """I5: nothing ran twice, and what ran was logged before; a denied call did not run."""
    found = [f"{call} ran {count} times" for call, count in Counter(world.ran).items() if count > 1]
    started = {event.data["call_id"] for event in log if event.type == ev.TOOL_STARTED}
    found += [
        f"{call} ran and was never logged as started" for call in world.ran if call not in started
    ]
    denied = {
        event.data["tool_use_id"]
        for event in log
        if event.type == ev.USER_TOOL_CONFIRMATION and event.data["result"] == "deny"
    }
    found += [f"{call} ran and was denied" for call in world.ran if call.split("/")[1] in denied]
    suspended = False
    for event in log:
        if event.type in (ev.SESSION_SUSPENDED, ev.SESSION_RESUMED):
            suspended = event.type == ev.SESSION_SUSPENDED
        elif suspended and event.type in (ev.TOOL_STARTED, ev.MODEL_REQUEST_START):
            found.append(f"event {event.seq} ({event.type}) begins something while suspended")
    return found


def rebuilt(world: World, log: Sequence[Event]) -> tuple[list[bytes], list[str]]:
    """I6: the bytes of each request as the log alone gives them, and where the logged hash differs."""
    conversation, bodies, found = Conversation(world.sid), [], []
    for event in log:
        conversation.apply(event)
        if event.type != ev.MODEL_REQUEST_START:
            continue
        if not conversation.prefix_matches():
            found.append(f"request at {event.seq} cannot be rebuilt from the log")
        request = conversation.request
        assert request is not None
        messages = conversation.messages[: request.n_messages]
        bodies.append(body(conversation.base, world.sid, request.max_tokens, messages))
    return bodies, found


def _requests(world: World, log: Sequence[Event]) -> list[str]:
    """I6, I10: what Claude got is what the log says; every answer in the log was given once."""
    bodies, found = rebuilt(world, log)
    known = set(bodies)
    found += ["Claude got a request that the log does not know"] * sum(
        raw not in known for raw in world.requests
    )
    answers = sum(event.type == ev.MODEL_RESPONSE for event in log)
    if answers > len(world.requests):
        found.append(f"{answers} answers to {len(world.requests)} requests")
    return found


def _rest(world: World, log: Sequence[Event]) -> list[str]:
    """I8: the session rests because there is nothing to do; nobody gave it up without a reason."""
    conversation = Conversation(world.sid)
    for event in log:
        conversation.apply(event)
    found = []
    step = next_step(conversation, provisioned=True)
    kind = (conversation.idle or {}).get("type")
    # A raised budget does not wake a session, the next message does.
    if not isinstance(step, Park) and kind != "budget_reached":
        found.append(f"the session rests, and has to do {type(step).__name__}")
    if kind not in ENDS_TURN and kind != "requires_action":
        found.append(f"the session rests for {kind}")
    for event in log:
        if event.type == ev.SESSION_ERROR:
            error = event.data["error"]
            if error["retry_status"]["type"] != "retrying":
                found.append(f"the turn was given up: {error['type']}: {error['message']}")
    last = world.meta().get(b"st", b"{}")
    if last != b"{}" and _decoded(last) != conversation.status:
        found.append("the status document is not the fold's")
    return found


def _decoded(raw: bytes) -> Any:

    return json.loads(raw)


def story(world: World) -> dict[str, Any]:
    """What a run comes to, without what may be repeated."""
    log = world.log()
    conversation = Conversation(world.sid)
    for event in log:
        conversation.apply(event)
    status = {
        key: value
        for key, value in conversation.status.items()
        if key in ("turns", "tool_calls", "usage", "stop_reason")
    }
    return {
        "answers": [e.data["message"] for e in log if e.type == ev.MODEL_RESPONSE],
        "results": {
            e.data["tool_use_id"]: (e.data["content"], e.data["is_error"])
            for e in log
            if e.type == ev.TOOL_RESULT
        },
        "turns": [
            e.data["stop_reason"]["type"]
            for e in log
            if e.type == ev.STATUS_IDLE and e.data["stop_reason"]["type"] in ENDS_TURN
        ],
        "input": [(e.type, e.data) for e in log if e.type.startswith("user.")],
        "hands": {name: hand.instance for name, hand in conversation.hands.items()},
        "status": status,
        "messages": conversation.messages,
        "requests": list(dict.fromkeys(rebuilt(world, log)[0])),
        "sent": list(dict.fromkeys(world.requests)),
        "effects": sorted(call for call in world.ran if call not in _hanging(world)),
    }


def _hanging(world: World) -> set[str]:
    """Calls that an interrupt ends: whether they had begun by then is left open."""
    return {
        f"{world.sid}/{world.scenario.use_id(turn, number, index)}"
        for turn, rounds in enumerate(world.scenario.turns)
        for number, one in enumerate(rounds)
        for index, (_, data) in enumerate(one.uses)
        if data.get("hang")
    }


def same_story(quiet: dict[str, Any], world: World) -> list[str]:
    """Where a run differs from the run of the same scenario without faults."""
    told = story(world)
    return [
        f"{key} differ: {_first_difference(quiet[key], told[key])}"
        for key in quiet
        if quiet[key] != told[key]
    ]


def _first_difference(one: Any, other: Any) -> str:
    if isinstance(one, list) and isinstance(other, list):
        for at, (left, right) in enumerate(zip(one, other, strict=False)):
            if left != right:
                return f"at {at}: {left!r:.400} and {right!r:.400}"
        return f"{len(one)} and {len(other)} of them"
    return f"{one!r:.400} and {other!r:.400}"
