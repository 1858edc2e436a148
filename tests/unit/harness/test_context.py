"""Context profiles end to end on the small world: the loop, the log, and what the model is sent."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from cowhand.harness.context import outgoing
from cowhand.harness.fold import fold
from cowhand.harness.profiles import registry
from cowhand.harness.profiles.base import Clear, OldResult, Profile, Thresholds, View
from cowhand.harness.profiles.clearing import Clearing
from cowhand.harness.replay import replay
from cowhand.harness.request import cache_ttl
from cowhand.harness.stream import ModelError
from cowhand.session import events as ev
from cowhand.session.events import Event, NewEvent
from support.harness_rig import SID, Killed, Rig, World, message, text, tool_use, user, world

STEPS = 8
OUTPUT = "x" * 2000
BLOCK = {"type": "compaction", "content": "so far", "signature": "s/1", "odd": 1.0}
BOUND, OLD, TIRED = "claude-opus-5-5", "claude-opus-4-1", "claude-sonnet-4-5-20250929"


def size(body: Mapping[str, Any]) -> int:
    return len(json.dumps(body)) // 4


def asks(body: dict[str, Any]) -> str:
    """What a request is for."""
    if "compaction" in body:
        return "compaction"
    last = body["messages"][-1]["content"][-1]
    return "notes" if "Write notes" in last.get("text", "") else "turn"


class Claude:
    """Calls bash STEPS times, counting by what it is asked; a window that is full ends it."""

    def __init__(self, window: int = 10_000, **side: Any) -> None:
        self.window = window
        self.side = side
        self.done: set[str] = set()
        self.sent: list[str] = []

    def __call__(self, body: dict[str, Any]) -> dict[str, Any] | Exception:
        kind = asks(body)
        self.sent.append(kind)
        usage = {"input_tokens": size(body), "output_tokens": 20}
        if size(body) > self.window:
            return message(stop_reason="model_context_window_exceeded", usage=usage)
        if kind in self.side:
            found = self.side[kind]
            return found(body) if callable(found) else found
        if kind == "compaction":
            iterations = [{"type": "compaction", "input_tokens": 100, "output_tokens": 7}]
            nothing = {"input_tokens": 0, "output_tokens": 0, "iterations": iterations}
            return message(BLOCK, stop_reason="compaction", usage=nothing)
        if kind == "notes":
            return message(text("my notes"), usage=usage)
        answered = {
            block["tool_use_id"]
            for entry in body["messages"]
            for block in entry["content"]
            if block["type"] == "tool_result"
        }
        self.done |= answered
        if len(self.done) >= STEPS:
            return message(text("finished"), usage=usage)
        name = f"t{len(self.done)}"
        return message(tool_use(name), stop_reason="tool_use", usage=usage)


def made(profile: str, model: str = BOUND, **context: Any) -> World:
    here = world(
        user("go, and remember 4711"), model=model, context={"profile": profile, **context}
    )
    return here


async def run(here: World, script: Any) -> Rig:
    rig = Rig(here, script)
    original = here.provision

    def provision(hand: str, instance: int) -> None:
        original(hand, instance)
        for sandbox in here.sandboxes.values():
            sandbox.run = lambda name, data: OUTPUT

    here.provision = provision  # type: ignore[method-assign]
    await rig.run()
    return rig


def checked(here: World) -> None:
    """Every request rebuilt from the log is the one that went out, byte for byte; repeats are equal.

    A worker that died between the start of a request and the request left a start that nobody sent;
    the next one sends the same bytes.
    """
    found = list(replay(SID, here.events))
    assert all(item.matches for item in found)
    rebuilt = [body for body, _ in groupby(item.body for item in found)]
    assert rebuilt == [body for body, _ in groupby(here.requests)]
    first: dict[tuple[str, int], bytes] = {}
    for item in found:
        if item.attempt == 1:
            first[item.purpose, item.n] = item.body
        assert item.body == first[item.purpose, item.n], "a repeat differs"


SMALL = {"window_tokens": 4000, "trigger_tokens": 2600, "clear_at_least_tokens": 0}


async def test_plain_fills_the_window_and_ends() -> None:
    here = made("plain", **SMALL)
    await run(here, Claude(4000))
    (error,) = here.data(ev.SESSION_ERROR)
    assert error["error"]["type"] == "context_window_exceeded"


async def test_compaction_puts_the_block_first_as_it_came_and_the_session_survives() -> None:
    here = made("compaction", **SMALL)
    claude = Claude(4000)
    await run(here, claude)
    assert here.data(ev.STATUS_IDLE)[-1]["stop_reason"]["type"] == "end_turn"
    assert "compaction" in claude.sent
    events = here.data(ev.CONTEXT_COMPACTED)
    assert len(events) == claude.sent.count("compaction")
    assert here.status["usage"]["input_tokens"] > 100 * len(events), "the summaries are counted"
    last = json.loads(here.requests[-1])
    first = last["messages"][0]
    assert first["role"] == "assistant"
    assert {k: v for k, v in first["content"][0].items() if k != "cache_control"} == BLOCK
    side = json.loads(here.requests[claude.sent.index("compaction")])
    assert side["compaction"] == {"type": "summarize"}
    turn = json.loads(here.requests[0])
    assert side["system"] == turn["system"]
    assert side["tools"] == turn["tools"]
    checked(here)


async def test_reset_begins_with_the_first_message_and_the_notes() -> None:
    here = made("reset", TIRED, **SMALL)
    claude = Claude(4000)
    await run(here, claude)
    assert here.data(ev.STATUS_IDLE)[-1]["stop_reason"]["type"] == "end_turn"
    assert "notes" in claude.sent
    after = json.loads(here.requests[claude.sent.index("notes") + 1])
    texts = [block["text"] for block in after["messages"][0]["content"]]
    assert texts[:2] == ["go, and remember 4711", "my notes"]
    assert "search_log" in texts[2]
    checked(here)


async def test_clearing_leaves_the_newest_results_and_says_where_the_others_are() -> None:
    here = made("clearing", OLD, **SMALL, keep_tool_results=2)
    claude = Claude(4000)
    await run(here, claude)
    assert here.data(ev.STATUS_IDLE)[-1]["stop_reason"]["type"] == "end_turn"
    (*_, cleared) = here.data(ev.CONTEXT_CLEARED)
    gone = cleared["tool_use_ids"][0]
    seq = next(
        e.seq for e in here.events if e.type == ev.TOOL_RESULT and e.data["tool_use_id"] == gone
    )
    sent = here.requests[-1].decode()
    assert f"position {seq} of this session's log: read_log with start {seq}" in sent
    assert here.events[seq - 1].data["content"] == OUTPUT, "the log has it all"
    checked(here)


async def test_a_model_with_bound_thinking_is_cleared_by_the_api() -> None:
    here = made("clearing", BOUND, **SMALL)
    rig = Rig(here, lambda body: message(text("hi")))
    await rig.run()
    sent = json.loads(here.requests[0])
    (edit,) = sent["context_management"]["edits"]
    assert edit["type"] == "clear_tool_uses_20250919"
    assert edit["trigger"] == {"type": "input_tokens", "value": 2600}
    (selected,) = here.data(ev.CONTEXT_SELECTED)
    assert selected["betas"] == ["context-management-2025-06-27"]
    checked(here)


async def test_a_session_that_knows_of_no_context_is_left_as_it_was() -> None:
    here = world(user("go"))
    await run(here, Claude(100_000))
    assert not [kind for kind in here.types() if kind.startswith("context.")]
    checked(here)


def recorded() -> tuple[World, list[str]]:
    """A log that a release with assembler 1 alone wrote, and SHA-256 of the requests that it sent."""
    held = json.loads((Path(__file__).parent / "logs" / "assembler-1.json").read_text())
    here = World()
    for kind, event_id, ts, lease, payload in held["events"]:
        here.events.append(Event(len(here.events) + 1, kind, event_id, ts, lease, payload.encode()))
        here.ids[event_id] = len(here.events)
    here.epoch = sum(event.type == ev.SESSION_WAKE for event in here.events)
    return here, held["requests"]


async def test_a_session_of_an_older_release_goes_on_with_the_bytes_of_that_release() -> None:
    here, sent = recorded()
    assert here.events[0].data["assembler"] == 1
    before = [found.body for found in replay(SID, here.events)]
    assert [hashlib.sha256(body).hexdigest() for body in before] == sent
    length = len(here.events)
    here.emit(user("and on", "m3"))
    await Rig(here, lambda body: message(text("yes")), name="w3").run()
    (body,) = here.requests
    old, new = (json.loads(each)["messages"] for each in (before[-1], body))
    plain = json.loads(json.dumps(new).replace(', "cache_control": {"type": "ephemeral"}', ""))
    was = json.loads(json.dumps(old).replace(', "cache_control": {"type": "ephemeral"}', ""))
    assert plain[: len(was)] == was
    assert b'"ttl"' not in body
    added = here.events[length:]
    assert not [event for event in added if event.type.startswith("context.")]
    (start,) = (event.data for event in added if event.type == ev.MODEL_REQUEST_START)
    assert sorted(start) == ["attempt", "horizon", "n", "n_messages", "prefix_sha"]


def test_a_repeat_keeps_the_life_of_the_cache_entries_of_the_first() -> None:
    here = made("plain")
    here.emit(NewEvent(ev.CONTEXT_SELECTED, {"profile": "plain"}))
    for n, minute in enumerate((0, 10, 20), 1):
        out = outgoing(
            fold(SID, here.events), n=n, attempt=1, horizon=len(here.events), max_tokens=1000,
            now_ms=minute * 60_000,
        )  # fmt: skip
        start = here.emit(NewEvent(ev.MODEL_REQUEST_START, out.start, id=f"s{n}"))
        data = {"message": message(text("hm"), stop_reason="pause_turn"), "request_id": ""}
        end = {"start": start, "outcome": "lost"}
        if n < 3:
            here.emit(NewEvent(ev.MODEL_RESPONSE, data, id=f"r{n}"))
            end["outcome"] = "ok"
        here.emit(NewEvent(ev.MODEL_REQUEST_END, end, id=f"e{n}"))
    first = out.render()
    again = outgoing(
        fold(SID, here.events), n=3, attempt=2, horizon=len(here.events), max_tokens=1000,
        now_ms=60 * 60_000,
    )  # fmt: skip
    assert again.render() == first
    starts = fold(SID, here.events).window.starts
    assert cache_ttl((*starts, 60 * 60_000)) == "1h", "the times alone ask for another life"
    assert b'"ttl"' not in first


async def test_a_profile_that_nobody_has_is_an_error_and_no_crash() -> None:
    here = made("of-the-future")
    await run(here, Claude())
    (error,) = here.data(ev.SESSION_ERROR)
    assert error["error"]["type"] == "context_profile_missing"
    assert "compaction" in error["error"]["message"], "says what there is"
    assert here.requests == []
    assert here.types()[-1] == ev.STATUS_IDLE


@pytest.mark.parametrize(
    "answer",
    [
        message(stop_reason="max_tokens", usage={"iterations": [{"input_tokens": 9}]}),
        message(stop_reason="refusal"),
        ModelError("invalid_request_error", "this model does not compact"),
    ],
)
async def test_without_a_summary_the_session_goes_on_and_asks_again_later(answer: Any) -> None:
    here = made("compaction", window_tokens=90_000, trigger_tokens=2600)
    claude = Claude(90_000, compaction=answer)
    await run(here, claude)
    assert here.data(ev.STATUS_IDLE)[-1]["stop_reason"]["type"] == "end_turn"
    asked = [number for number, kind in enumerate(claude.sent) if kind == "compaction"]
    assert len(asked) == 2
    assert asked[1] - asked[0] > 3, "not before every request"
    assert not here.data(ev.CONTEXT_COMPACTED)
    checked(here)


async def test_notes_that_are_a_tool_call_are_no_notes() -> None:
    here = made("reset", TIRED, window_tokens=90_000, trigger_tokens=2600)
    call = message(text("hm"), tool_use("n1"), stop_reason="tool_use")
    claude = Claude(90_000, notes=call)
    await run(here, claude)
    assert not here.data(ev.CONTEXT_RESET)
    assert "bash n1" not in str(here.effects())
    assert here.data(ev.STATUS_IDLE)[-1]["stop_reason"]["type"] == "end_turn"


async def test_a_refused_turn_does_not_take_the_notes_with_it() -> None:
    here = made("reset", TIRED, **SMALL)
    claude = Claude(4000)

    def script(body: dict[str, Any]) -> Any:
        refused = asks(body) == "turn" and "my notes" in str(body)
        return message(stop_reason="refusal") if refused else claude(body)

    await run(here, script)
    assert here.data(ev.STATUS_IDLE)[-1]["stop_reason"]["type"] == "refusal"
    here.emit(user("again", "m2"))
    prompt = fold(SID, here.events).prompt(len(here.events))
    texts = [json.loads(block.raw)["text"] for block in prompt[0].blocks]
    assert texts[:2] == ["go, and remember 4711", "my notes"]
    assert texts[-1] == "again"


@pytest.mark.parametrize(
    ("profile", "model"), [("compaction", BOUND), ("reset", TIRED), ("clearing", OLD)]
)
async def test_a_worker_may_die_anywhere(profile: str, model: str) -> None:
    quiet = made(profile, model, **SMALL)
    await run(quiet, Claude(4000))
    points = quiet.points
    for kill in range(1, points + 1, 3):
        here = made(profile, model, **SMALL)

        def on_point(number: int, name: str, at: int = kill) -> None:
            if number == at:
                raise Killed

        here.on_point = on_point
        claude = Claude(4000)
        await run(here, claude)
        here.on_point = lambda _number, _name: None
        await Rig(here, claude, name="w2").run()
        assert here.data(ev.STATUS_IDLE)[-1]["stop_reason"]["type"] == "end_turn", kill
        assert len(here.effects()) == len(set(here.effects())), kill
        checked(here)


async def test_control_a_worker_that_sends_other_bytes_is_noticed() -> None:
    here = made("compaction", **SMALL)
    await run(here, Claude(4000))
    here.requests[3] = here.requests[3].replace(b"be concise", b"be verbose")
    with pytest.raises(AssertionError):
        checked(here)


async def test_control_a_prompt_that_drifts_is_noticed() -> None:
    here = made("compaction", **SMALL)
    await run(here, Claude(4000))
    at = next(i for i, e in enumerate(here.events) if e.type == ev.CONTEXT_COMPACTED)
    old = here.events[at]
    payload = old.payload.replace(b"so far", b"so fat")
    here.events[at] = type(old)(old.seq, old.type, old.id, old.ts, old.lease, payload)
    assert not all(found.matches for found in replay(SID, here.events))


async def test_the_agent_reads_what_left_its_window() -> None:
    here = made("clearing", OLD, **SMALL)
    calls = iter([("search_log", {"query": "REMEMBER"}), ("read_log", {"start": 1, "end": 2})])

    def script(body: dict[str, Any]) -> dict[str, Any]:
        try:
            name, given = next(calls)
        except StopIteration:
            return message(text("done"))
        return message({**tool_use(name, name), "input": given}, stop_reason="tool_use")

    await Rig(here, script).run()
    found, read = (result["content"] for result in here.data(ev.TOOL_RESULT))
    assert found == "#2 user.message: go, and remember 4711"
    assert read.splitlines()[1] == found
    assert not here.data(ev.HAND_REQUESTED), "no sandbox is made for it"


# The parts.


def chosen(model: str, name: str = "auto") -> str:
    profile = registry.choose(registry.load(), name, model)
    assert profile is not None
    return profile.name


class Fresh(Profile):
    name = "fresh"

    def fitness(self, model: str) -> int:
        return 9 if model == "mine" else 0

    def next(self, view: View) -> None:
        return None


class Thief(Fresh):
    name = "plain"


def broken() -> None:
    raise RuntimeError("for a test")


BUILT_IN = ["clearing", "compaction", "plain", "reset"]


def test_profiles_are_built_in_or_found_by_entry_point_and_a_broken_one_harms_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def installed(**entries: Any) -> None:
        for key, value in entries.items():
            setattr(sys.modules[__name__], key, value)
        found = [EntryPoint(key, f"{__name__}:{key}", registry.GROUP) for key in entries]
        monkeypatch.setattr(registry, "entry_points", lambda group: found)

    installed()
    assert sorted(registry.load()) == BUILT_IN, "the image has no metadata of a distribution"
    installed(fresh=Fresh, plain=Thief, bad=broken, other=Fresh, number=int)
    profiles = registry.load()
    assert sorted(profiles) == sorted([*BUILT_IN, "fresh"])
    assert not isinstance(profiles["plain"], Thief)
    best = registry.choose(profiles, registry.AUTO, "mine")
    assert best is not None
    assert best.name == "fresh"


@pytest.mark.parametrize(
    ("model", "best"),
    [
        (BOUND, "compaction"), ("claude-opus-5", "compaction"), ("claude-sonnet-4-6", "compaction"),
        (TIRED, "reset"), (OLD, "clearing"), ("claude-haiku-4-5", "clearing"),
        ("somebody-elses", "plain"), ("claude-opus-55", "plain"),
    ],
)  # fmt: skip
def test_the_default_is_what_suits_the_model_best(model: str, best: str) -> None:
    assert chosen(model) == best
    assert registry.load()[best].warning(model) == ""


def test_outside_its_models_a_profile_warns() -> None:
    assert "claude-opus-4-1" in registry.load()["compaction"].warning(OLD)


def test_thresholds_leave_room_and_can_be_given() -> None:
    assert Thresholds.resolve(OLD, 8192, {}).trigger_tokens == 150_000
    assert Thresholds.resolve(OLD, 64_000, {}).trigger_tokens == 72_000
    assert Thresholds.resolve(BOUND, 8192, {}).trigger_tokens == 400_000
    given = Thresholds.resolve(BOUND, 10, {"window_tokens": 5000, "trigger_tokens": 9000})
    assert (given.window_tokens, given.trigger_tokens) == (5000, 5000)


def test_clearing_less_than_is_worth_it_waits() -> None:
    old = tuple(OldResult(f"t{n}", "bash", n, 100) for n in range(5))
    limits = Thresholds(1000, 500, keep_tool_results=3, clear_at_least_tokens=200)
    assert Clearing().next(View(OLD, limits, 501, old, True)) == Clear(("t0", "t1"))
    assert Clearing().next(View(OLD, limits, 500, old, True)) is None
    assert Clearing().next(View(OLD, limits, 501, old[:4], True)) is None
    assert Clearing().next(View(OLD, limits, 501, old[:2], True)) is None


@pytest.mark.parametrize(
    ("minutes", "ttl"),
    [
        ([0], "5m"), ([0, 10, 20], "5m"), ([0, 10, 20, 30], "1h"), ([0, 1, 2, 30], "5m"),
        ([0, 4, 8, 12], "5m"), ([0, 10, 20, 30, 31, 32, 33], "5m"),
    ],
)  # fmt: skip
def test_an_hour_is_paid_for_where_requests_are_far_apart(minutes: list[int], ttl: str) -> None:
    assert cache_ttl([minute * 60_000 for minute in minutes]) == ttl
