"""Sessions longer than the model's window, on everything real but Kubernetes and Claude, under each context profile."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cowhand.harness.replay import replay
from cowhand.session import events as ev
from cowhand.session.events import Event
from support.harness_rig import user
from support.harness_stack import Stack, stack

pytestmark = pytest.mark.timeout(240)  # process starts, on a busy machine

WINDOW, TRIGGER = 9000, 5000
LONG = f"[[script:long-session steps=12 size=4000 window={WINDOW}]] Take the steps."
FACTS = "fact 1 is 7919, fact 6 is 7486, fact 12 is 4965"
CONTEXT = {"window_tokens": WINDOW, "trigger_tokens": TRIGGER, "clear_at_least_tokens": 500}


RENEWING = [("compaction", "claude-opus-5-5"), ("reset", "claude-sonnet-4-5")]


@pytest.fixture
async def here(store_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with stack(store_url, tmp_path) as made:
        yield made


def said(events: list[Event]) -> str:
    response = [event.data["message"] for event in events if event.type == ev.MODEL_RESPONSE][-1]
    return "".join(block.get("text", "") for block in response["content"])


async def long_session(here: Stack, profile: str, model: str) -> tuple[str, list[Event]]:
    sid = await here.create(LONG, model=model, context={"profile": profile, **CONTEXT})
    return sid, await here.settled(sid)


async def replayed(here: Stack, sid: str, events: list[Event]) -> list[dict[str, Any]]:
    """Every request rebuilt from the log is what the server got, in order."""
    rebuilt = [json.loads(found.body) for found in replay(sid, events)]
    sent = await here.requests(sid)
    assert rebuilt == sent
    return sent


@pytest.mark.parametrize(
    ("profile", "model", "event", "looked_up"),
    [
        ("compaction", "claude-opus-5-5", ev.CONTEXT_COMPACTED, True),
        ("reset", "claude-sonnet-4-5", ev.CONTEXT_RESET, False),
        ("clearing", "claude-opus-4-1", ev.CONTEXT_CLEARED, True),
    ],
)
async def test_a_session_longer_than_the_window_goes_on_and_knows_how_it_began(
    here: Stack, profile: str, model: str, event: str, looked_up: bool
) -> None:
    await here.local_worker()
    sid, events = await long_session(here, profile, model)
    facts, searches = said(events).split("; looked up: ")
    assert facts == FACTS
    assert (searches != "0") == looked_up, (
        "the notes hold all facts, a summary and a cleared result do not"
    )
    assert any(found.type == event for found in events)
    assert not [found for found in events if found.type == ev.SESSION_ERROR]
    sent = await replayed(here, sid, events)
    assert len([body for body in sent if "tools" in body]) == len(sent) > 12
    await here.emit(sid, user("and again?", "m2"))
    assert said(await here.settled(sid, turns=2)).startswith("fact 1 is 7919"), "it goes on"


def held_up(hold: str) -> str:
    return LONG.replace(" window", f" {hold}=summary window")


def renewals(events: list[Event]) -> list[Event]:
    return [e for e in events if e.type in (ev.CONTEXT_COMPACTED, ev.CONTEXT_RESET)]


def sides(events: list[Event]) -> list[Mapping[str, Any]]:
    starts = (event.data for event in events if event.type == ev.MODEL_REQUEST_START)
    return [data for data in starts if "purpose" in data]


async def killed_in_a_summary(here: Stack, profile: str, model: str, hold: str) -> str:
    """A session whose harness process was killed (SIGKILL) while its first summary was being written."""
    one = await here.worker()
    context = {"profile": profile, **CONTEXT}
    sid = await here.create(held_up(hold), model=model, context=context)
    await here.at_gate("summary")
    await here.kill_worker(one)
    events = await here.events(sid)
    assert len(sides(events)) == 1
    assert not renewals(events)
    return sid


@pytest.mark.parametrize(
    ("profile", "model", "hold"), [(*RENEWING[0], "hold"), (*RENEWING[1], "hold_mid")]
)
async def test_killed_while_a_summary_is_written_it_is_asked_for_again(
    here: Stack, profile: str, model: str, hold: str
) -> None:
    sid = await killed_in_a_summary(here, profile, model, hold)
    before = await here.events(sid)
    await here.release("summary")
    await here.local_worker()
    events = await here.settled(sid)
    assert events[: len(before)] == before, "nothing is lost"
    first, again, *_ = sides(events)
    assert (again["n"], again["attempt"]) == (first["n"], 2)
    assert again["prefix_sha"] == first["prefix_sha"], "the same question"
    lost = [
        e.data for e in events if e.type == ev.MODEL_REQUEST_END and e.data["outcome"] == "lost"
    ]
    assert len(lost) == 1
    assert renewals(events)
    assert said(events).startswith(FACTS), "it goes on and knows how it began"
    used = [e.data["tool_use_id"] for e in events if e.type == ev.TOOL_STARTED]
    assert len(used) == len(set(used)), "no call is made twice"
    sent = await replayed(here, sid, events)
    twice = [json.dumps(body) for body in sent]
    assert len(twice) - len(set(twice)) == 1, "the lost one, byte for byte"


async def test_control_a_worker_that_gives_a_lost_summary_up_is_noticed(
    here: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    sid = await killed_in_a_summary(here, *RENEWING[0], "hold")
    await here.release("summary")
    monkeypatch.setattr("cowhand.harness.decide._side_again", lambda conversation: None)
    await here.local_worker()
    events = await here.settled(sid)
    first, *others = sides(events)
    assert not [data for data in others if data["n"] == first["n"]]


async def test_the_api_clears_for_a_model_with_bound_thinking(here: Stack) -> None:
    await here.local_worker()
    sid, events = await long_session(here, "clearing", "claude-opus-5-5")
    facts, searches = said(events).split("; looked up: ")
    assert facts == FACTS
    assert searches != "0"
    sent = await replayed(here, sid, events)
    assert "step 1 of 12: fact 1 is 7919" in json.dumps(sent[-1]), "the prompt stays whole"
    applied = [
        found.data["message"]["context_management"]["applied_edits"]
        for found in events
        if found.type == ev.MODEL_RESPONSE
    ]
    assert any(applied)


@pytest.mark.parametrize(
    ("profile", "model"),
    [
        ("compaction", "claude-opus-5-5"),
        ("reset", "claude-sonnet-4-5"),
        ("clearing", "claude-opus-4-1"),
    ],
)
async def test_a_window_that_is_smaller_than_was_believed_is_made_room_in(
    here: Stack, profile: str, model: str
) -> None:
    """The endpoint refuses what the profile held for small enough; the session goes on and knows how it began."""
    await here.local_worker()
    wrong = {"window_tokens": 4 * WINDOW, "trigger_tokens": 4 * WINDOW}
    sid = await here.create(LONG, model=model, context={"profile": profile, **wrong})
    events = await here.settled(sid)
    assert events[-1].data["stop_reason"]["type"] == "end_turn"
    assert said(events).startswith(FACTS)
    outcomes = [
        (event.data.get("error") or {}).get("message", "")
        for event in events
        if event.type == ev.MODEL_REQUEST_END
    ]
    short = [
        event
        for event in events
        if event.type == ev.MODEL_RESPONSE
        and event.data["message"]["stop_reason"] == "model_context_window_exceeded"
    ]
    assert short or any("prompt is too long" in text for text in outcomes)
    await replayed(here, sid, events)


async def test_control_without_a_profile_the_window_ends_the_session(here: Stack) -> None:
    await here.local_worker()
    _, events = await long_session(here, "plain", "claude-opus-5-5")
    error = next(found.data["error"] for found in events if found.type == ev.SESSION_ERROR)
    assert "prompt is too long" in error["message"]
    assert events[-1].data["stop_reason"]["type"] == "retries_exhausted"
