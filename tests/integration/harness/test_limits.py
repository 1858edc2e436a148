"""What a session cannot do: too large, too new, deleted, without a sandbox; and what it says then."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from cowhand.errors import SessionClosed
from cowhand.harness.decide import BACKOFF, OUT_OF_TIME
from cowhand.harness.loop import End
from cowhand.harness.stream import ModelError
from cowhand.session import events as ev
from cowhand.session.events import NewEvent
from cowhand.session.gate import Entry
from support.harness_rig import SID, WORKSPACE, Rig, World, message, text, tool_use, user, world

ACTOR = {"actor": {"user": "u"}}


async def run(made: World, script: Any) -> World:
    assert await Rig(made, script, name=f"w{len(made.events)}").run() is End.PARKED
    return made


async def test_a_response_that_the_log_cannot_hold_ends_the_turn_with_a_reason() -> None:
    made = await run(world(), lambda request: message(text("x" * ev.INLINE_LIMIT)))
    (error,) = made.data(ev.SESSION_ERROR)
    assert error["error"]["type"] == "response_too_large"
    assert error["error"]["retry_status"] == {"type": "terminal"}
    assert made.data(ev.STATUS_IDLE)[-1]["stop_reason"] == {"type": "retries_exhausted"}
    assert len(made.requests) == 1
    made.emit(user("shorter", "m2"))
    await run(made, lambda request: message(text("ok")))
    assert made.data(ev.STATUS_IDLE)[-1]["stop_reason"] == {"type": "end_turn"}


async def test_output_of_any_size_and_kind_fits_the_log() -> None:
    def script(request: dict[str, Any]) -> dict[str, Any]:
        used = len(request["messages"]) > 1
        return message(text("ok")) if used else message(tool_use("t"), stop_reason="tool_use")

    made = world()
    provision = made.provision

    def noisy(hand: str, instance: int) -> None:
        provision(hand, instance)
        for sandbox in made.sandboxes.values():
            sandbox.run = lambda name, data: "\x00\ud800é😀" * 100_000

    made.provision = noisy  # type: ignore[method-assign]
    await run(made, script)
    (result,) = made.data(ev.TOOL_RESULT)
    assert "characters left out" in result["content"]
    assert made.data(ev.STATUS_IDLE)[-1]["stop_reason"] == {"type": "end_turn"}


async def test_retries_are_counted_over_workers_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cowhand.harness.decide.BACKOFF_BASE_S", 0.0001)
    made = await run(world(), lambda request: ModelError("overloaded_error", "busy", status=529))
    assert len(made.requests) == BACKOFF["overloaded_error"].attempts
    assert len(set(made.requests)) == 1, "the same bytes each time"
    retries = [data["error"]["retry_status"]["type"] for data in made.data(ev.SESSION_ERROR)]
    assert retries == ["retrying"] * (BACKOFF["overloaded_error"].attempts - 1) + ["exhausted"]
    assert made.data(ev.MODEL_REQUEST_END)[0]["error"]["status"] == 529


async def test_a_long_wait_gives_the_place_back_until_its_time() -> None:
    answers: list[Any] = [ModelError("overloaded_error", "busy", status=529, retry_after_s=60.0)]
    answers += [message(text("hi")), message(text("hurrying"))]
    made = world()
    script = lambda request: answers.pop(0)  # noqa: E731
    await run(made, script)
    (waits,) = made.data(ev.STATUS_RESCHEDULED)
    assert waits["reason"] == "overloaded_error"
    assert made.timer == waits["wake_at"] > made.events[-1].ts + 50_000
    assert len(made.requests) == 1
    made.emit(user("hurry", "m2"))
    await run(made, script)
    assert made.timer == waits["wake_at"], "input does not shorten the wait"
    assert len(made.requests) == 1
    # Its time has come.
    made.tick = waits["wake_at"]
    await run(made, script)
    assert made.requests[0] == made.requests[1], "the same bytes again"
    assert len(made.requests) == 3, "and then the turn of the message that came meanwhile"
    assert made.types().count(ev.STATUS_RUNNING) == 2, "rescheduled, then running again"
    assert made.data(ev.STATUS_IDLE)[-1]["stop_reason"] == {"type": "end_turn"}
    assert made.timer is None


async def test_a_short_wait_keeps_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cowhand.harness.decide.BACKOFF_BASE_S", 0.0001)
    answers: list[Any] = [ModelError("overloaded_error", "busy"), message(text("hi"))]
    made = await run(world(), lambda request: answers.pop(0))
    assert made.data(ev.STATUS_RESCHEDULED) == []
    assert made.types().count(ev.SESSION_WAKE) == 1


async def test_a_drain_does_not_wait_for_the_line() -> None:
    made, line = world(), Line()
    rig = Rig(made, lambda request: message(text("hi")))
    asked = asyncio.Event()

    async def enter(workspace: str, model: str, *, place: int = 0) -> Entry:
        asked.set()
        return Entry(place=made.events[-1].ts + 4_000)

    line.enter = enter  # type: ignore[method-assign]
    rig.around = replace(rig.around, gate=line)
    work = asyncio.ensure_future(rig.run())
    await asked.wait()
    assert rig.loop is not None
    rig.loop.drain()
    assert await work is End.DRAINED
    assert made.requests == []
    assert made.data(ev.STATUS_RESCHEDULED) == []


class Line:
    """A rate gate that answers what the test says, and open for the rest."""

    def __init__(self, *entries: Entry) -> None:
        self.entries = list(entries)
        self.places: list[int] = []
        self.told: list[Any] = []

    async def enter(self, workspace: str, model: str, *, place: int = 0) -> Entry:
        assert (workspace, model) == (WORKSPACE, "m")
        self.places.append(place)
        return self.entries.pop(0) if self.entries else Entry()

    async def opened(self, workspace: str, model: str, entry: Entry) -> None:
        self.told.append(("opened", entry.round))

    async def shut(self, workspace: str, model: str, entry: Entry, **more: Any) -> None:
        self.told.append(("shut", entry.round, more["kind"], more["retry_after_s"]))


async def gated(made: World, line: Line, script: Any) -> None:
    rig = Rig(made, script, name=f"w{len(made.events)}")
    rig.around = replace(rig.around, gate=line)
    assert await rig.run() is End.PARKED


async def test_a_session_waits_in_the_line_for_its_place() -> None:
    made, line = world(), Line(Entry(place=1), Entry(place=70_000, kind="rate_limit_error"))
    await gated(made, line, lambda request: message(text("hi")))
    assert made.requests == [], "not before the gate lets it through"
    assert made.types().count(ev.SESSION_WAKE) == 1, "the first, short wait was here"
    (waits,) = made.data(ev.STATUS_RESCHEDULED)
    assert waits == {"reason": "rate_limit_error", "wake_at": 70_000}
    assert made.timer == 70_000
    made.tick = 70_000
    await gated(made, line, lambda request: message(text("hi")))
    assert line.places == [0, 1, 70_000], "it comes back with the place that it had"
    assert len(made.requests) == 1
    assert line.told == [], "an open gate wants to hear nothing"


async def test_the_first_request_after_a_pause_opens_the_gate_once() -> None:
    made, line = world(), Line(Entry(round=3, tell=True))
    await gated(made, line, lambda request: message(text("hi")))
    assert line.told == [("opened", 3)]


@pytest.mark.parametrize(
    ("error", "tell", "told"),
    [
        (ModelError("rate_limit_error", "x", retry_after_s=60.0), False, "shut"),
        (ModelError("overloaded_error", "x", retry_after_s=60.0), False, "shut"),
        (ModelError("overloaded_error", "x"), False, None),
        (ModelError("overloaded_error", "x"), True, "shut"),
        (ModelError("api_error", "x"), False, None),
        (ModelError("connection_error", "x"), True, "shut"),
        (ModelError("invalid_request_error", "x"), False, None),
        (ModelError("invalid_request_error", "x"), True, "opened"),
    ],
)
async def test_what_shuts_the_gate(
    monkeypatch: pytest.MonkeyPatch, error: ModelError, tell: bool, told: str | None
) -> None:
    monkeypatch.setattr("cowhand.harness.decide.BACKOFF_BASE_S", 0.0001)
    answers: list[Any] = [error, message(text("hi"))]
    line = Line(Entry(round=3, tell=tell))
    await gated(world(), line, lambda request: answers.pop(0))
    expected = {
        None: [],
        "opened": [("opened", 3)],
        "shut": [("shut", 3, error.type, error.retry_after_s)],
    }
    assert line.told == expected[told]


@pytest.mark.parametrize(
    ("tell", "exhausted_s", "told"),
    [
        (False, 0.0, []),
        (False, 7.5, [("shut", 3, "rate_limit_error", 7.5)]),
        (True, 7.5, [("shut", 3, "rate_limit_error", 7.5)]),
        (True, 0.0, [("opened", 3)]),
    ],
)
async def test_a_limit_that_is_used_up_shuts_the_gate_before_anybody_is_refused(
    tell: bool, exhausted_s: float, told: list[Any]
) -> None:
    made, line = world(), Line(Entry(round=3, tell=tell))
    rig = Rig(made, lambda request: message(text("hi")))

    class Telling:
        """An endpoint whose headers say that this was the last request for now."""

        async def stream(self, body: bytes, *, on_start: Any, **more: Any) -> Any:
            on_start(exhausted_s)
            return await rig_model.stream(body, on_start=lambda *_: None, **more)

    rig_model = rig.around.model
    rig.around = replace(rig.around, gate=line, model=Telling())
    assert await rig.run() is End.PARKED
    assert line.told == told


class Turns:
    """Slots that are given when the test says so."""

    def __init__(self, *answers: bool) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str]] = []
        self.news = asyncio.Event()

    async def reserve(self, session_id: str, lease: str) -> bool:
        self.asked.append((session_id, lease))
        self.news.set()
        if self.answers:
            return self.answers.pop(0)
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_request_is_written_down_when_its_turn_has_come() -> None:
    made, turns = world(), Turns(False, False, True, True)
    rig = Rig(made, lambda request: message(text("hi")))
    rig.around = replace(rig.around, slots=turns)
    seen: list[int] = []
    ask = turns.reserve

    async def reserve(session_id: str, lease: str) -> bool:
        seen.append(made.types().count(ev.MODEL_REQUEST_START))
        return await ask(session_id, lease)

    turns.reserve = reserve  # type: ignore[method-assign]
    assert await rig.run() is End.PARKED
    assert seen == [0, 0, 0, 0], "after a wait the log is looked at again, the slot is kept"
    assert len(made.requests) == 1
    assert made.types().count(ev.MODEL_REQUEST_END) == 1


@pytest.mark.parametrize("how", ["interrupt", "drain"])
async def test_who_waits_for_a_turn_can_be_stopped(how: str) -> None:
    made, turns = world(), Turns(False)
    rig = Rig(made, lambda request: message(text("hi")))
    rig.around = replace(rig.around, slots=turns)
    work = asyncio.ensure_future(rig.run())
    while len(turns.asked) < 2:
        turns.news.clear()
        await turns.news.wait()
    assert rig.loop is not None
    if how == "drain":
        rig.loop.drain()
        assert await work is End.DRAINED
    else:
        made.emit(NewEvent(ev.USER_INTERRUPT, ACTOR, id="i"))
        rig.loop.poke()
        assert await work is End.PARKED
        assert made.data(ev.STATUS_IDLE)[-1]["stop_reason"]["type"] == "interrupted"
    assert made.requests == []
    assert ev.MODEL_REQUEST_START not in made.types()


async def test_a_log_of_a_newer_release_is_refused_and_kept() -> None:
    made = world(assembler=3)
    made.emit(user("more", "m2"))
    before = list(made.events)
    await run(made, lambda request: message(text("never")))
    assert made.requests == []
    assert made.events[: len(before)] == before
    (error,) = made.data(ev.SESSION_ERROR)
    assert error["error"]["type"] == "needs_upgrade"
    assert made.lease == ""


async def test_a_deleted_session_stops_at_once() -> None:
    made = world()

    def script(request: dict[str, Any]) -> dict[str, Any]:
        made.emit(NewEvent(ev.SESSION_DELETED, ACTOR, id="d"))
        return message(tool_use("t"), stop_reason="tool_use")

    with pytest.raises(SessionClosed):
        await Rig(made, script).run()
    assert made.types()[-1] == ev.SESSION_DELETED
    assert made.effects() == []


@pytest.mark.parametrize("state", ["Failed", "Pending"])
async def test_without_a_sandbox_claude_reads_why(state: Any) -> None:
    seen: list[str] = []

    def script(request: dict[str, Any]) -> dict[str, Any]:
        last = request["messages"][-1]["content"][-1]
        if last["type"] == "tool_result":
            seen.append(last["content"])
            return message(text("I cannot"))
        return message(tool_use("t"), stop_reason="tool_use")

    made = world()
    made.hand_state = state
    await run(made, script)
    assert "for a test" in seen[0]
    assert made.data(ev.STATUS_IDLE)[-1]["stop_reason"] == {"type": "end_turn"}


async def test_an_eager_sandbox_that_fails_does_not_stop_the_answer() -> None:
    made = world(provisioning="Eager")
    made.hand_state = "Failed"
    await run(made, lambda request: message(text("hi")))
    kinds = made.types()
    assert kinds.index(ev.HAND_REQUESTED) < kinds.index(ev.MODEL_REQUEST_START)
    assert made.data(ev.STATUS_IDLE)[-1]["stop_reason"] == {"type": "end_turn"}


async def test_visible_text_is_previewed_and_never_logged() -> None:
    # The stream is the model client's; here only that the hook gets what the client hands on.
    made, heard, over = world(), [], []
    rig = Rig(made, lambda request: message(text("hello")))
    inner = rig.around.model

    class Talking:
        async def stream(self, body: bytes, *, on_text: Any, **more: Any) -> Any:
            on_text(1, "qzj")
            on_text(1, "lo")
            on_text(2, "vwk", "thinking")
            return await inner.stream(body, on_text=on_text, **more)

    rig.around = replace(
        rig.around,
        model=Talking(),
        preview=lambda *piece: heard.append(piece),
        preview_end=over.append,
    )
    assert await rig.run() is End.PARKED
    start = made.types().index(ev.MODEL_REQUEST_START) + 1
    assert heard == [
        (SID, start, 1, "qzj", "text"),
        (SID, start, 1, "lo", "text"),
        (SID, start, 2, "vwk", "thinking"),
    ]
    assert over == [SID]
    assert made.data(ev.MODEL_RESPONSE)[0]["start"] == start
    logged = b"".join(event.payload for event in made.events)
    assert b"qzj" not in logged
    assert b"vwk" not in logged


@pytest.mark.parametrize("timed", [True, False])
async def test_running_time_cuts_a_tool_that_runs(timed: bool) -> None:
    """Without the limit the call goes on: the control."""

    def script(request: dict[str, Any]) -> dict[str, Any]:
        return message(tool_use("t"), stop_reason="tool_use")

    made = world(budget={"max_duration_s": 1} if timed else {})
    rig = Rig(made, script)
    begun, cut = asyncio.Event(), asyncio.Event()
    ask = rig.transport.request

    async def hang(endpoint: Any, method: str, path: str, **more: Any) -> Any:
        if method == "DELETE":
            cut.set()
            return 200, {}
        if method != "POST":
            return await ask(endpoint, method, path, **more)
        begun.set()
        return await asyncio.Event().wait()

    rig.transport.request = hang  # type: ignore[method-assign]
    running = asyncio.create_task(rig.run())
    await begun.wait()
    if not timed:
        await asyncio.wait({running}, timeout=1.5)
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return
    assert await running is End.PARKED
    assert cut.is_set(), "the hand was told"
    (result,) = made.data(ev.TOOL_RESULT)
    assert result["content"] == OUT_OF_TIME
    stop = made.data(ev.STATUS_IDLE)[-1]["stop_reason"]
    assert stop == {"type": "budget_reached", "budget": "max_duration_s"}
