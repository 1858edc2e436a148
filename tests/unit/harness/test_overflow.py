"""What does not fit the window all the same: estimates were too low, or one message is too large."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from cowhand.harness.fold import fold
from cowhand.harness.profiles.base import Profile
from cowhand.harness.profiles.compaction import Compaction
from cowhand.harness.stream import ModelError
from cowhand.harness.verify import verify
from cowhand.harness.window import too_long
from cowhand.session import events as ev
from support.exports import export_of
from support.harness_rig import SID, Killed, Rig, World, message, text, tool_use, user
from unit.harness.test_context import BLOCK, BOUND, OLD, TIRED, asks, checked, made, size

WINDOW = 4000
HUGE = "x" * 24_000
"""6000 tokens as the endpoint counts: more than the window."""

LIMITS = {"window_tokens": WINDOW, "trigger_tokens": 3900, "clear_at_least_tokens": 0}
PROFILES = [("compaction", BOUND), ("reset", TIRED), ("clearing", OLD), ("clearing", BOUND)]
RENEWING = PROFILES[:2]


def refused(tokens: int) -> ModelError:
    text = f"prompt is too long: {tokens} tokens > {WINDOW} maximum"
    return ModelError("invalid_request_error", text, status=400)


class Strict:
    """An endpoint that refuses what is too long, and answers turns from a list."""

    def __init__(self, *turns: Any) -> None:
        self.turns = list(turns)
        self.sent: list[str] = []
        self.bodies: list[Mapping[str, Any]] = []

    def __call__(self, body: dict[str, Any]) -> Any:
        kind, tokens = asks(body), size(body)
        self.bodies.append(body)
        usage = {"input_tokens": tokens, "output_tokens": 20}
        if tokens > WINDOW:
            self.sent.append(f"{kind} refused")
            return refused(tokens)
        self.sent.append(kind)
        if kind == "compaction":
            return message(BLOCK, stop_reason="compaction", usage=usage)
        if kind == "notes":
            return message(text("my notes"), usage=usage)
        turn = self.turns.pop(0) if self.turns else text("finished")
        if callable(turn):
            return turn(body)
        reason = "tool_use" if turn["type"] == "tool_use" else "end_turn"
        return message(turn, stop_reason=reason, usage=usage)


async def run(here: World, script: Any, output: str = "ok", name: str = "w1") -> None:
    rig = Rig(here, script, name=name)
    original = here.provision

    def provision(hand: str, instance: int) -> None:
        original(hand, instance)
        for sandbox in here.sandboxes.values():
            sandbox.run = lambda name, data: output

    here.provision = provision  # type: ignore[method-assign]
    await rig.run()


def sound(here: World) -> None:
    """Every request follows from the log byte for byte, and the log keeps its promises."""
    checked(here)
    assert verify(export_of(here.events)).violations == ()


def ended(here: World) -> str:
    return str(here.data(ev.STATUS_IDLE)[-1]["stop_reason"]["type"])


@pytest.mark.parametrize(("profile", "model"), PROFILES)
async def test_a_tool_result_larger_than_the_window_is_named_instead_of_shown(
    profile: str, model: str
) -> None:
    here, claude = made(profile, model, **LIMITS), Strict(tool_use("t0"))
    await run(here, claude, HUGE)
    assert ended(here) == "end_turn"
    assert not here.data(ev.SESSION_ERROR)
    (cleared,) = here.data(ev.CONTEXT_CLEARED)
    assert cleared == {"tool_use_ids": ["t0"], "profile": profile}
    seq = next(e.seq for e in here.events if e.type == ev.TOOL_RESULT)
    assert f"position {seq} of this session's log" in here.requests[-1].decode()
    assert claude.sent.count("turn refused") == 1
    sound(here)


def test_the_words_of_the_api() -> None:
    for found in (
        {"type": "invalid_request_error", "message": "prompt is too long: 9 tokens > 8 maximum"},
        {
            "type": "invalid_request_error",
            "message": "input length and `max_tokens` exceed context limit: 9 + 2 > 8",
        },
        {"type": "request_too_large", "message": "Request exceeds the maximum size"},
    ):
        assert too_long(found)
    for other in (
        {"type": "invalid_request_error", "message": "messages.0: too long"},
        {"type": "api_error", "message": "prompt is too long"},
        {"type": "rate_limit_error"},
    ):
        assert not too_long(other)


async def with_history(profile: str, model: str, more: str, script: Strict) -> World:
    """A session with a first turn that fills a half of the window, and then this message."""
    here = made(profile, model, **LIMITS)
    await run(here, script)
    here.emit(user(more, "m2"))
    await run(here, script, name="w2")
    return here


@pytest.mark.parametrize(("profile", "model"), RENEWING)
async def test_a_message_that_does_not_fit_beside_the_rest_follows_the_renewed_window(
    profile: str, model: str
) -> None:
    # Half of a window in ASCII counts less by the estimate than the endpoint says.
    claude = Strict(text("y" * 8000), text("second"))
    here = await with_history(profile, model, "z" * 7400 + "KEEP", claude)
    assert ended(here) == "end_turn"
    assert not here.data(ev.SESSION_ERROR)
    assert len(here.data(ev.CONTEXT_COMPACTED)) + len(here.data(ev.CONTEXT_RESET)) == 1
    side = next(body for body in claude.bodies if asks(body) != "turn")
    assert "KEEP" not in json.dumps(side), "the summary is asked for without what did not fit"
    last = json.loads(here.requests[-1])
    assert last["messages"][-1]["content"][-1]["text"].endswith("KEEP"), "word for word, at the end"
    assert "y" * 8000 not in here.requests[-1].decode()
    assert claude.sent.count("turn refused") <= 1
    sound(here)


@pytest.mark.parametrize(("profile", "model"), [*RENEWING, ("clearing", OLD), ("plain", BOUND)])
async def test_a_message_larger_than_the_window_ends_the_turn_and_the_session_can_go_on(
    profile: str, model: str
) -> None:
    claude = Strict(text("first"), text("third"))
    here = await with_history(profile, model, "z" * 4 * (WINDOW + 100), claude)
    assert ended(here) == "retries_exhausted"
    (error,) = here.data(ev.SESSION_ERROR)
    assert "prompt is too long" in error["error"]["message"]
    assert len(claude.sent) <= 5, "no endless loop"
    sound(here)


async def test_control_without_a_rescue_the_turn_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compaction, "rescue", Profile.rescue)
    here, claude = made("compaction", BOUND, **LIMITS), Strict(tool_use("t0"))
    await run(here, claude, HUGE)
    assert ended(here) == "retries_exhausted"
    assert "prompt is too long" in here.data(ev.SESSION_ERROR)[0]["error"]["message"]


def cut(*blocks: dict[str, Any]) -> Any:
    """A response that the window ended, though the prompt was small enough."""
    return lambda body: message(
        *blocks, stop_reason="model_context_window_exceeded", usage={"input_tokens": size(body)}
    )


@pytest.mark.parametrize(("profile", "model"), RENEWING)
async def test_an_answer_that_the_window_cut_goes_on_in_a_renewed_one(
    profile: str, model: str
) -> None:
    here, claude = made(profile, model, **LIMITS), Strict(cut(text("partly")), text("whole"))
    await run(here, claude)
    assert ended(here) == "end_turn"
    assert not here.data(ev.SESSION_ERROR)
    assert claude.sent == ["turn", "compaction" if profile == "compaction" else "notes", "turn"]
    sound(here)


@pytest.mark.parametrize(("profile", "model"), [*RENEWING, ("clearing", OLD)])
async def test_a_call_that_the_window_cut_is_not_run_and_the_others_are(
    profile: str, model: str
) -> None:
    turns = (tool_use("t0"), cut(tool_use("t1"), tool_use("t2")), text("whole"))
    here, claude = made(profile, model, **LIMITS), Strict(*turns)
    await run(here, claude)
    assert ended(here) == "end_turn"
    results = {data["tool_use_id"]: data["is_error"] for data in here.data(ev.TOOL_RESULT)}
    assert results == {"t0": False, "t1": False, "t2": True}
    assert "t2" not in str(here.effects())
    sound(here)


async def test_plain_ends_with_an_answer_that_the_window_cut() -> None:
    here, claude = made("plain", BOUND, **LIMITS), Strict(cut(text("partly")))
    await run(here, claude)
    assert ended(here) == "retries_exhausted"
    (error,) = here.data(ev.SESSION_ERROR)
    assert error["error"]["type"] == "context_window_exceeded"
    assert claude.sent == ["turn"]


@pytest.mark.parametrize(("profile", "model"), PROFILES)
async def test_a_window_that_is_always_full_ends_the_turn(profile: str, model: str) -> None:
    here, claude = made(profile, model, **LIMITS), Strict(*[cut(text("partly"))] * 50)
    await run(here, claude)
    assert ended(here) == "retries_exhausted"
    (error,) = here.data(ev.SESSION_ERROR)
    assert error["error"]["type"] == "context_window_exceeded"
    assert len(claude.sent) <= 3, "one renewal, no second one without an answer"
    here.emit(user("again", "m2"))
    claude.turns = [text("better now")]
    await run(here, claude, name="w2")
    assert ended(here) == "end_turn", "it is not lost for good"
    sound(here)


async def test_a_renewal_that_fails_ends_the_turn() -> None:
    here, claude = made("compaction", BOUND, **LIMITS), Strict(cut(text("partly")))

    def script(body: dict[str, Any]) -> Any:
        if asks(body) == "compaction":
            claude.sent.append("compaction")
            return ModelError("invalid_request_error", "this model does not compact", status=400)
        return claude(body)

    await run(here, script)
    assert ended(here) == "retries_exhausted"
    assert claude.sent == ["turn", "compaction"]
    assert here.data(ev.SESSION_ERROR)[-1]["error"]["type"] == "context_window_exceeded"


async def test_a_renewal_is_tried_again_as_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cowhand.harness.decide.BACKOFF_BASE_S", 0.0001)
    here, claude = made("compaction", BOUND, **LIMITS), Strict(cut(text("partly")))
    failures = [ModelError("overloaded_error", "busy", status=529)] * 2

    def script(body: dict[str, Any]) -> Any:
        return failures.pop() if asks(body) == "compaction" and failures else claude(body)

    await run(here, script)
    assert ended(here) == "end_turn"
    assert len(here.data(ev.CONTEXT_COMPACTED)) == 1
    sound(here)


@pytest.mark.parametrize(("profile", "model"), RENEWING)
async def test_a_worker_may_die_anywhere_on_the_way(profile: str, model: str) -> None:
    def script() -> Strict:
        return Strict(text("y" * 8000), tool_use("t0"), text("second"))

    async def session(kill: int) -> World:
        here, claude = made(profile, model, **LIMITS), script()
        await run(here, claude)
        here.emit(user("z" * 7400 + "KEEP", "m2"))
        begun = here.points

        def on_point(number: int, name: str) -> None:
            if number == begun + kill:
                raise Killed

        here.on_point = on_point
        await run(here, claude, HUGE, name="w2")
        here.on_point = lambda _number, _name: None
        await run(here, claude, HUGE, name="w3")
        here.points -= begun
        return here

    quiet = await session(0)
    for kill in range(1, quiet.points + 1, 7):
        here = await session(kill)
        assert ended(here) == "end_turn", kill
        assert len(here.effects()) == len(set(here.effects())), kill
        assert fold(SID, here.events).queued == []
        sound(here)
