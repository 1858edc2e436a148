"""`verify` and `replay`: a whole log passes, and each promise that is broken in it is named with its position."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cowhand.harness.fold import Conversation
from cowhand.harness.replay import replay
from cowhand.harness.request import canonical
from cowhand.harness.verify import INVARIANTS, NOT_CHECKABLE, verify
from cowhand.session import events as ev
from cowhand.session.events import Event, NewEvent
from cowhand.session.export import Export
from support.exports import NOW, export_of, ran, two_tools
from support.harness_log import Log
from support.harness_rig import SID, Rig, World, message, text, tool_use, user, world

OTHER = "sesn_" + "9" * 32


@pytest.fixture
async def done() -> World:
    return await ran("one", "two", "three")


def broken(export: Export) -> set[tuple[str, int]]:
    return {(item.invariant, item.seq) for item in verify(export).violations}


def first(export: Export, kind: str, number: int = 0) -> Event:
    return [event for event in export.events if event.type == kind][number]


def swap(export: Export, old: Event, *new: Event) -> Export:
    """The export with one event replaced, positions dense again."""
    listed = [one for event in export.events for one in (new if event is old else (event,))]
    dense = tuple(replace(event, seq=seq) for seq, event in enumerate(listed, 1))
    return replace(export, header=replace(export.header, last_seq=len(dense)), events=dense)


def edit(event: Event, change: Callable[[dict[str, Any]], None]) -> Event:
    body = json.loads(event.payload)
    change(body["d"])
    return replace(event, payload=json.dumps(body, separators=(",", ":")).encode())


async def test_a_log_of_three_workers_is_whole(done: World) -> None:
    report = verify(export_of(done.events))
    assert report.violations == ()
    assert set(report.checked) == set(INVARIANTS)
    assert set(report.unchecked) == set(NOT_CHECKABLE)
    assert (report.checked["I6"], report.checked["I4"]) == (len(done.requests), 6)


async def test_replay_makes_the_bytes_that_the_model_got(done: World) -> None:
    made = list(replay(SID, done.events))
    assert [one.body for one in made] == done.requests
    assert all(one.matches for one in made)


async def test_a_lost_event_is_found(done: World) -> None:
    export = export_of(done.events)
    gone = replace(export, events=export.events[:6] + export.events[7:])
    report = verify(gone)
    assert {item.invariant for item in report.violations} >= {"I1"}
    assert {"I6", "I7", "I8", "I10"} <= set(report.unchecked)
    short = replace(export, events=export.events[:-1])
    assert ("I1", len(export.events) - 1) in broken(short)


async def test_a_repeated_event_id_is_found(done: World) -> None:
    export = export_of(done.events)
    old = export.events[4]
    again = replace(export.events[8], id=old.id)
    assert ("I1", 9) in broken(swap(export, export.events[8], again))


async def test_a_write_under_an_old_lease_is_found(done: World) -> None:
    export = export_of(done.events)
    wakes = [event for event in export.events if event.type == ev.SESSION_WAKE]
    late = next(event for event in export.events if event.seq > wakes[1].seq and event.lease)
    zombie = replace(export.events[wakes[1].seq], lease=wakes[0].lease)
    assert broken(swap(export, export.events[wakes[1].seq], zombie)) == {("I2", late.seq)}


async def test_a_call_without_or_with_two_results_is_found(done: World) -> None:
    export = export_of(done.events)
    result = first(export, ev.TOOL_RESULT)
    start = first(export, ev.MODEL_REQUEST_START, 1)
    assert ("I4", start.seq - 1) in broken(swap(export, result))
    twice = swap(export, result, result, replace(result, id="again"))
    assert ("I4", result.seq + 1) in broken(twice)
    stranger = edit(result, lambda data: data.update(tool_use_id="toolu_other"))
    assert ("I4", result.seq) in broken(swap(export, result, stranger))


async def test_a_changed_word_is_found_from_its_request_on(done: World) -> None:
    export = export_of(done.events)
    said = first(export, ev.USER_MESSAGE, 1)
    other = edit(said, lambda data: data["content"][0].update(text="something else"))
    later = {
        ("I6", event.seq)
        for event in export.events
        if event.type == ev.MODEL_REQUEST_START and event.seq > said.seq
    }
    assert broken(swap(export, said, other)) == later
    assert len(later) == 6


async def test_messages_that_vanish_from_the_prompt_are_found(
    done: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I7 has no corrupted log of its own: a fold that forgets is what it is there for."""
    export = export_of(done.events)
    second = first(export, ev.MODEL_REQUEST_START, 3)
    commit = Conversation._commit

    def forgetful(self: Conversation, horizon: int) -> None:
        if self.n == 3:
            del self.messages[0]
        commit(self, horizon)

    monkeypatch.setattr(Conversation, "_commit", forgetful)
    assert ("I7", second.seq) in broken(export)


def unanswered_system_message() -> Export:
    """A failed turn with a system message, then another user message: the system message moves behind it."""
    log = Log().say()
    log.put(NewEvent(ev.SYSTEM_MESSAGE, {"content": [text("frozen")], "actor": {"user": "u"}}))
    log.fail("invalid_request_error").do()
    log.put(user("again", "m1")).answer(text("hi")).do()
    return export_of(log.events)


def test_a_system_message_that_moves_behind_the_next_message_is_no_violation() -> None:
    assert verify(unanswered_system_message()).violations == ()


def test_a_system_message_that_does_not_arrive_there_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grown = Conversation._grown

    def careless(self: Conversation, horizon: int) -> Any:
        kept, added = grown(self, horizon)
        if len(added) == 2 and self.n >= 1:
            added = [added[0]]
        return kept, added

    export = unanswered_system_message()
    monkeypatch.setattr(Conversation, "_grown", careless)
    second = first(export, ev.MODEL_REQUEST_START, 1)
    assert ("I7", second.seq) in broken(export)


async def test_a_refusal_takes_its_turn_out_and_is_no_violation() -> None:
    def script(request: dict[str, Any]) -> dict[str, Any]:
        if "bad" in str(request["messages"][-1]):
            return message(stop_reason="refusal")
        return two_tools(request)

    made = await ran("one", "bad", "three", script=script)
    assert broken(export_of(made.events)) == set()


async def test_input_that_nobody_saw_is_found_when_it_is_old(done: World) -> None:
    done.emit(user("four", "m4"))
    last = len(done.events)
    assert broken(export_of(done.events)) == set()
    old = {"exported_ms": NOW + 40_000}
    assert broken(export_of(done.events, **old)) == {("I8", last)}
    assert broken(export_of(done.events, state="running", **old)) == set()
    assert broken(export_of(done.events, mode="suspended", **old)) == set()


async def test_a_wrong_sum_is_found(done: World) -> None:
    right = export_of(done.events).header.status
    wrong = {**right, "usage": {**right["usage"], "output_tokens": 1}}
    assert broken(export_of(done.events, status=wrong)) == {("I10", len(done.events))}


async def test_a_missing_blob_is_found(done: World) -> None:
    export = export_of(done.events)
    sha = "ab" * 32
    body = {"v": 1, "th": "main", "c": "", "ref": {"sha256": sha, "n": 9}, "d": {"x": 1}}
    event = Event(1, "from.the.future", "big", NOW, "", json.dumps(body).encode())
    last = export.events[-1]
    grown = swap(export, last, last, event)
    assert "I11" in verify(grown).unchecked
    assert verify(grown, blobs=lambda found: found == sha).ok
    report = verify(grown, blobs=lambda _: False)
    assert [(item.invariant, item.seq) for item in report.violations] == [
        ("I11", len(grown.events))
    ]


async def test_a_log_that_cannot_be_read_is_a_violation_with_its_position(done: World) -> None:
    export = export_of(done.events)
    said = first(export, ev.USER_MESSAGE, 1)
    report = verify(swap(export, said, replace(said, payload=b'{"v":9,"th":"main","d":{}}')))
    assert ("I6", said.seq) in {(item.invariant, item.seq) for item in report.violations}
    report = verify(swap(export, said, replace(said, payload=b"{")))
    assert ("I6", said.seq) in {(item.invariant, item.seq) for item in report.violations}


def forked(events: list[Event], at: int, *new: NewEvent) -> World:
    """A world forked from these events at a position, as the operator makes it."""
    made = world()
    body = json.loads(events[0].payload)
    body["d"] |= {"lineage": [{"session": OTHER, "position": at}]}
    made.events = [replace(events[0], payload=json.dumps(body).encode()), *events[1:at]]
    data = {"session": OTHER, "position": at, "budget": {}}
    for event in (NewEvent(ev.SESSION_FORKED, data, id="forked"), *new):
        made.emit(event)
    return made


async def test_a_fork_at_any_position_goes_on_and_verifies() -> None:
    """Requests that were copied name the source; leftovers of the source are closed, its hands are gone."""
    source = await ran("one", "two")
    for at in range(2, len(source.events) + 1):
        events = under(source.events, OTHER)
        made = forked(events, at, user("and now this", "fork-message"))
        await Rig(made, two_tools, name="fork").run()
        report = verify(export_of(made.events))
        assert report.violations == (), at
        assert made.types()[-1] == ev.STATUS_IDLE, at
        assert b"and now this" in made.requests[-1]
        used = export_of(made.events).header.status
        assert used["requests"] == len(made.requests), at
        assert "inherited" in used


def under(events: list[Event], sid: str) -> list[Event]:
    """The same log as session `sid` would have written it."""
    folded = Conversation(SID)
    out = []
    for event in events:
        folded.apply(event)
        if event.type == ev.MODEL_REQUEST_START:
            assert folded.request is not None
            request = folded.request
            raw = canonical(folded.base, sid, request.max_tokens, folded.messages)
            sha = hashlib.sha256(raw).hexdigest()
            event = edit(event, lambda data, sha=sha: data.update(prefix_sha=sha))  # type: ignore[misc]
        out.append(event)
    return out


async def test_control_without_the_lineage_a_fork_stops_at_its_first_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = await ran("one", "two")
    events = under(source.events, OTHER)
    monkeypatch.setattr(Conversation, "writer_of", lambda self, seq: self.session_id)
    made = forked(events, len(events), user("more", "x"))
    await Rig(made, lambda _: message(text("ok")), name="fork").run()
    assert made.requests == []
    assert "prefix_mismatch" in str(made.events[-2].payload)


@pytest.mark.parametrize("notes", ["my notes", ""])
async def test_a_log_with_a_new_window_is_whole_whether_notes_came_or_not(notes: str) -> None:
    context = {"profile": "reset", "window_tokens": 9000, "trigger_tokens": 1}
    here = world(user("go"), model="claude-sonnet-4-5", context=context)
    turns = 0

    def script(body: dict[str, Any]) -> dict[str, Any]:
        nonlocal turns
        if "Write notes" in str(body["messages"][-1]):
            return message(text(notes), usage={"input_tokens": 5, "output_tokens": 1})
        turns += 1
        done = turns == 3
        return (
            message(text("done"))
            if done
            else message(tool_use(f"t{turns}"), stop_reason="tool_use")
        )

    await Rig(here, script).run()
    assert bool(here.data(ev.CONTEXT_RESET)) == bool(notes)
    assert verify(export_of(here.events)).violations == ()
