"""Stop reasons and interleavings: one row, one log, one next step."""

from __future__ import annotations

from typing import Any

import pytest

from cowhand.errors import LogIncompatible
from cowhand.harness import decide
from cowhand.harness.calls import CUT_CALL, INTERRUPTED, OTHER_ARGUMENTS
from cowhand.harness.decide import (
    Append,
    Park,
    Provision,
    RunTools,
    SendRequest,
    Stop,
    backoff,
    next_step,
)
from cowhand.harness.fold import CONTINUE, Conversation
from cowhand.harness.request import prefix_sha
from cowhand.session import events as ev
from cowhand.session.events import Event, NewEvent
from support.harness_log import ACTOR, Log
from support.harness_rig import SID, created, text, tool_use


def appended(step: decide.Step) -> list[tuple[str, Any]]:
    """What an Append says, in short."""
    assert isinstance(step, Append), step
    short: list[tuple[str, Any]] = []
    for event in step.events:
        data = event.data
        match event.type:
            case ev.STATUS_IDLE:
                short.append(("idle", data["stop_reason"]["type"]))
            case ev.TOOL_RESULT:
                assert data["is_error"]
                assert data["synthesized"]
                short.append(("result", data["tool_use_id"]))
            case ev.SESSION_ERROR:
                error = data["error"]
                short.append(("error", (error["type"], error["retry_status"]["type"])))
            case ev.TOOL_PENDING:
                short.append(("pending", data["tool_use_id"]))
            case _:
                short.append((event.type, data.get("outcome")))
    return short


def running(step: decide.Step) -> list[str]:
    assert isinstance(step, RunTools), step
    return [call.use.id for call in step.calls]


READ = [tool_use(f"r{n}", "read") for n in (1, 2, 3)]
IDLE = [("idle", "end_turn")]


def test_nothing_to_do() -> None:
    assert Log().step() == Park()
    assert Log().wake().step() == Park()
    assert Log().say().answer(text("hi")).do().step() == Park()
    assert Log().say().put(NewEvent(ev.SESSION_DELETED, ACTOR)).step() == Stop()


def test_a_message_starts_a_request_that_sees_it() -> None:
    log = Log().wake().say()
    assert log.step() == SendRequest(n=1, attempt=1, horizon=3, max_tokens=1000)


def test_a_message_in_mid_turn_stands_after_the_results_in_the_same_message() -> None:
    log = Log().say().tools(tool_use("a"), tool_use("b")).say("and this")
    log.result("b", "2").result("a", "1")
    conversation = log.fold()
    (last,) = conversation.prompt(conversation.last_seq)[-1:]
    kinds = [item.type for item in last.blocks]
    assert kinds == ["tool_result", "tool_result", "text"]
    assert [b'"a"' in last.blocks[0].raw, b'"b"' in last.blocks[1].raw] == [True, True]


def test_a_message_after_the_horizon_waits_for_the_next_request() -> None:
    log = Log().say("one")
    step = log.step()
    assert isinstance(step, SendRequest)
    log.start().say("two").end("lost")
    assert log.step() == SendRequest(n=1, attempt=2, horizon=step.horizon, max_tokens=1000)
    log.answer(text("hi"))
    assert isinstance(log.step(), SendRequest), "the second message still wants an answer"


def test_a_message_between_the_decision_and_the_request_is_not_part_of_it() -> None:
    log = Log().say("one")
    conversation = log.fold()
    prompt = conversation.prompt(conversation.last_seq)
    sha = prefix_sha(conversation.base, SID, 1000, prompt)
    log.say("two")
    data = {"n": 1, "attempt": 1, "horizon": 2, "prefix_sha": sha, "n_messages": 1}
    log.put(NewEvent(ev.MODEL_REQUEST_START, data))
    assert log.fold().prefix_matches()
    assert log.fold().messages == prompt
    assert [item.seq for item in log.fold().queued] == [3]


def test_an_open_request_of_a_dead_worker_is_lost_and_sent_again_with_the_same_bytes() -> None:
    log = Log().say().start().wake()
    assert appended(log.step()) == [(ev.MODEL_REQUEST_END, "lost")]
    before = log.fold().prompt(99)
    log.do()
    step = log.step()
    assert isinstance(step, SendRequest)
    assert (step.n, step.attempt) == (1, 2)
    assert log.fold().prompt(99) == before


@pytest.mark.parametrize(
    ("stop_reason", "content", "expected"),
    [
        ("end_turn", [text("x")], IDLE),
        ("end_turn", [], IDLE),
        ("stop_sequence", [text("x")], IDLE),
        ("reason_of_the_future", [text("x")], IDLE),
        ("refusal", [], [("idle", "refusal")]),
        ("refusal", [tool_use("a")], [("idle", "refusal")]),
        (
            "model_context_window_exceeded",
            [text("x")],
            [("error", ("context_window_exceeded", "exhausted")), ("idle", "retries_exhausted")],
        ),
    ],
)
def test_stop_reasons_that_end_a_turn(
    stop_reason: str, content: list[dict[str, Any]], expected: list[tuple[str, Any]]
) -> None:
    log = Log().say().answer(*content, stop_reason=stop_reason)
    assert appended(log.step()) == expected
    assert log.do().step() == Park()
    assert log.fold().status["turns"] == 1


def test_a_refused_turn_leaves_the_prompt_and_the_turn_before_it_stays_whole() -> None:
    log = Log().say("one").tools(tool_use("a")).interrupt().do()
    log.say("bad").answer(stop_reason="refusal").do().say("good")
    prompt = log.fold().prompt(99)
    assert [item.role for item in prompt] == ["user", "assistant", "user", "user"]
    assert b"bad" not in b"".join(item.raw() for item in prompt)
    assert prompt[2].blocks[0].type == "tool_result"
    assert b"good" in prompt[3].raw()
    assert isinstance(log.step(), SendRequest)


def test_pause_turn_sends_the_answer_back_and_keeps_a_message_waiting() -> None:
    log = Log().say().answer(text("part"), stop_reason="pause_turn").say("later")
    assert isinstance(log.step(), SendRequest)
    prompt = log.fold().prompt(99)
    assert [item.role for item in prompt] == ["user", "assistant"]
    log.answer(text("rest"))
    assert [item.role for item in log.fold().prompt(99)] == [
        "user",
        "assistant",
        "assistant",
        "user",
    ]


def test_text_cut_by_max_tokens_goes_on() -> None:
    log = Log().say().answer(text("part"), stop_reason="max_tokens")
    assert isinstance(log.step(), SendRequest)
    assert CONTINUE.encode() in log.fold().prompt(99)[-1].raw()
    for _ in range(decide.MAX_CONTINUATIONS):
        log.answer(text("part"), stop_reason="max_tokens")
    assert appended(log.step())[0] == ("error", ("max_tokens", "exhausted"))


def test_a_cut_tool_call_is_asked_for_again_with_twice_the_limit_and_then_refused() -> None:
    log = Log().say().start().end("truncated")
    step = log.step()
    assert isinstance(step, SendRequest)
    assert (step.attempt, step.max_tokens, step.accept_cut) == (2, 2000, True)
    log.answer(tool_use("ok"), tool_use("cut"), stop_reason="max_tokens")
    assert appended(log.step()) == [("result", "cut")]
    assert CUT_CALL in str(log.step())
    assert running(log.do().step()) == ["ok"]


def test_a_model_that_refuses_twice_the_limit_gets_the_old_one() -> None:
    log = Log().say().start().end("truncated").fail("invalid_request_error")
    step = log.step()
    assert isinstance(step, SendRequest)
    assert (step.max_tokens, step.accept_cut) == (1000, True)


# Errors.


@pytest.mark.parametrize("kind", sorted(decide.BACKOFF))
def test_a_passing_error_is_tried_again_as_often_as_its_type_says(kind: str) -> None:
    log = Log().say()
    for attempt in range(1, decide.BACKOFF[kind].attempts + 1):
        step = log.step()
        assert isinstance(step, SendRequest)
        assert (step.n, step.attempt) == (1, attempt)
        assert step.backoff == backoff(kind, attempt - 1, None)
        log.fail(kind)
    assert appended(log.step()) == [("error", (kind, "exhausted")), ("idle", "retries_exhausted")]
    assert log.do().step() == Park()
    log.say("again")
    assert isinstance(log.step(), SendRequest), "new input wakes it"


@pytest.mark.parametrize(
    "kind",
    [
        "invalid_request_error", "authentication_error", "permission_error", "proxy_refused",
        "request_too_large", "not_found_error", "response_too_large", "type_of_the_future",
    ],
)  # fmt: skip
def test_an_error_that_no_repeat_cures_ends_the_turn_at_once(kind: str) -> None:
    log = Log().say().fail(kind)
    assert appended(log.step()) == [("error", (kind, "terminal")), ("idle", "retries_exhausted")]
    assert log.do().step() == Park()


def test_a_message_that_waited_during_a_final_error_starts_nothing_but_is_not_lost() -> None:
    log = Log().say("one").start().say("two").end("error", error={"type": "x", "message": "y"})
    assert log.do().step() == Park()
    log.say("three")
    prompt = b"".join(item.raw() for item in log.fold().prompt(99))
    assert all(word in prompt for word in (b"one", b"two", b"three"))


def test_retry_after_is_a_floor_and_backoff_is_capped() -> None:
    assert backoff("api_error", 0, None) == (0, 0)
    assert backoff("api_error", 1, None) == (0, 1)
    assert backoff("api_error", 3, None) == (0, 4)
    assert backoff("api_error", 50, None) == (0, 30)
    assert backoff("rate_limit_error", 50, None) == (0, 60)
    assert backoff("connection_error", 1, None) == (0, 0.5), "a proxy that restarts is back soon"
    assert backoff("overloaded_error", 1, 7) == (7, 8)
    assert backoff("rate_limit_error", 1, 1e6)[0] == decide.RETRY_AFTER_CAP_S
    assert backoff("type_of_the_future", 3, 7) == (0, 0)
    step = Log().say().fail("rate_limit_error", retry_after_s=7).step()
    assert isinstance(step, SendRequest)
    assert step.backoff == (7, 8)


def test_a_rescheduled_session_waits_for_its_time_and_then_sends_at_once() -> None:
    log = Log().say().fail("overloaded_error", retry_after_s=30)
    log.put(NewEvent(ev.STATUS_RESCHEDULED, {"reason": "overloaded_error", "wake_at": 5000}))
    assert next_step(log.fold(), now_ms=4999) == Park(until=5000)
    log.say("more")
    assert next_step(log.fold(), now_ms=4999) == Park(until=5000), "input changes nothing"
    step = next_step(log.fold(), now_ms=5000)
    assert isinstance(step, SendRequest)
    assert (step.attempt, step.backoff) == (2, (0, 0)), "the wait is over"
    log.interrupt()
    assert appended(next_step(log.fold(), now_ms=4000)) == [("idle", "interrupted")]
    log.do()
    assert log.fold().wake_at is None
    log.say("again").fail("overloaded_error")
    assert isinstance(step := log.step(), SendRequest)
    assert step.backoff == backoff("overloaded_error", 1, None), (
        "and the next failure has a wait of its own"
    )


def test_a_prefix_that_cannot_be_rebuilt_stops_the_session() -> None:
    log = Log().say().answer(text("hi")).do()
    start = next(event for event in log.events if event.type == ev.MODEL_REQUEST_START)
    forged = NewEvent(start.type, {**start.data, "prefix_sha": "00"})
    log.events[start.seq - 1] = Event(start.seq, start.type, "", 0, "", forged.payload())
    log.say("next")
    assert appended(log.step()) == [
        ("error", ("prefix_mismatch", "terminal")),
        ("idle", "retries_exhausted"),
    ]
    assert log.do().step() == Park()


def test_control_without_the_prefix_check_the_session_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Conversation, "prefix_matches", lambda self: True)
    with pytest.raises(AssertionError, match="SendRequest"):
        test_a_prefix_that_cannot_be_rebuilt_stops_the_session()


# Tools.


def test_pure_tools_run_together_and_others_one_by_one() -> None:
    assert running(Log().say().tools(*READ).step()) == ["r1", "r2", "r3"]
    log = Log().say().tools(READ[0], tool_use("a"), READ[1])
    assert running(log.step()) == ["r1"]
    assert running(log.result("r1").step()) == ["a"]
    assert running(log.result("a").step()) == ["r2"]


def test_leftover_calls_of_a_dead_worker_are_run_again_by_their_id() -> None:
    log = Log().say().tools(tool_use("a")).started("a").wake()
    assert running(log.step()) == ["a"]


@pytest.mark.parametrize("use", [tool_use("a", "web_search"), tool_use("a", "grep")])
def test_unknown_and_denied_tools_get_an_error(use: dict[str, Any]) -> None:
    log = Log(permissions={"grep": "Deny"}).say().tools(use)
    assert appended(log.step()) == [("result", "a")]
    assert isinstance(log.do().step(), SendRequest)


def test_a_tool_without_a_sandbox_gets_an_error() -> None:
    assert appended(Log(hands=False).say().tools(tool_use("a")).step()) == [("result", "a")]


def test_a_tool_that_asks_waits_for_a_person() -> None:
    log = Log(permissions={"bash": "Ask"}).say().tools(tool_use("a"))
    assert appended(log.step()) == [("pending", "a")]
    assert appended(log.do().step()) == [("idle", "requires_action")]
    assert log.do().step() == Park()
    assert log.fold().idle == {"type": "requires_action", "event_ids": ["a"]}
    (waiting,) = log.fold().status["pending"]
    assert (waiting["tool_use_id"], waiting["kind"]) == ("a", "confirmation")
    assert waiting["input_sha256"] == ev.input_sha256({"command": "a"})
    assert running(log.confirm("a", "allow").step()) == ["a"]


@pytest.mark.parametrize("verdict", ["deny", "", "ALLOW", "maybe"])
def test_only_an_explicit_allow_releases(verdict: str) -> None:
    log = Log(permissions={"bash": "Ask"}).say().tools(tool_use("a"))
    log.confirm("a", verdict, deny_message="not today")
    assert appended(log.step()) == [("result", "a")]
    assert "not today" in str(log.step())


def test_an_unknown_permission_asks() -> None:
    log = Log().say()
    log.events[0] = Event(
        1, ev.SESSION_CREATED, "", 0, "",
        NewEvent(ev.SESSION_CREATED, {**created(), "permissions": {"bash": "Perhaps"}}).payload(),
    )  # fmt: skip
    assert appended(log.tools(tool_use("a")).step()) == [("pending", "a")]


def test_the_first_decision_counts_and_only_for_its_call() -> None:
    log = Log(permissions={"bash": "Ask"}).say().tools(tool_use("a"), tool_use("b")).do().do()
    log.confirm("b", "deny").confirm("b", "allow").confirm("elsewhere", "allow")
    assert appended(log.step()) == [("result", "b")]
    log.do()
    assert appended(log.step()) == [("idle", "requires_action")]
    assert "'a'" in str(log.step())
    assert log.do().step() == Park()


def test_a_decision_may_come_before_the_question_but_not_before_the_call() -> None:
    log = Log(permissions={"bash": "Ask"}).say().confirm("a", "allow").tools(tool_use("a"))
    assert appended(log.step()) == [("pending", "a")]
    log.confirm("a", "allow")
    assert running(log.step()) == ["a"]


def test_a_call_that_asks_holds_back_those_after_it() -> None:
    log = Log(permissions={"write": "Ask"}).say()
    log.tools(tool_use("a"), tool_use("w", "write"), tool_use("b"))
    assert appended(log.step()) == [("pending", "w")]
    assert running(log.do().step()) == ["a"]
    assert appended(log.result("a").step()) == [("idle", "requires_action")]
    assert running(log.do().confirm("w", "allow").step()) == ["w"]
    assert running(log.result("w").step()) == ["b"]


def test_a_message_does_not_answer_a_question() -> None:
    log = Log(permissions={"bash": "Ask"}).say().tools(tool_use("a")).do().do().say("well?")
    assert log.step() == Park()


# Interrupts, suspension, limits.


def test_an_interrupt_answers_every_open_call_and_ends_the_turn() -> None:
    log = Log().say().tools(tool_use("a"), tool_use("b")).started("a").interrupt()
    step = log.step()
    assert appended(step) == [("result", "a"), ("result", "b"), ("idle", "interrupted")]
    assert INTERRUPTED in str(step)
    assert log.do().step() == Park()
    log.say("instead")
    assert isinstance(log.step(), SendRequest)
    kinds = [item.type for item in log.fold().prompt(99)[-1].blocks]
    assert kinds == ["tool_result", "tool_result", "text"]


def test_an_interrupt_while_asking_closes_the_question() -> None:
    log = Log(permissions={"bash": "Ask"}).say().tools(tool_use("a")).do().do().interrupt()
    assert appended(log.step()) == [("result", "a"), ("idle", "interrupted")]
    assert log.do().fold().status["pending"] == []


def test_an_interrupt_of_an_idle_session_is_nothing() -> None:
    assert Log().say().answer(text("x")).do().interrupt().step() == Park()
    assert Log().interrupt().step() == Park()


def test_an_interrupt_silences_what_came_before_it_and_not_what_comes_after() -> None:
    log = Log().say("one").start().say("two").interrupt().end("interrupted").do()
    assert log.step() == Park()
    log.say("three")
    prompt = b"".join(item.raw() for item in log.fold().prompt(99))
    assert isinstance(log.step(), SendRequest)
    assert b"two" in prompt
    redirect = Log().say("one").start().interrupt().say("rather this").end("interrupted").do()
    assert isinstance(redirect.step(), SendRequest)


def test_a_suspended_session_stops_and_goes_on_where_it_was() -> None:
    log = Log().say().tools(tool_use("a")).started("a").result("a")
    log.put(NewEvent(ev.SESSION_SUSPENDED, ACTOR))
    assert appended(log.step()) == [("idle", "suspended")]
    assert log.do().step() == Park()
    assert log.say("while away").step() == Park()
    log.put(NewEvent(ev.SESSION_RESUMED, ACTOR))
    step = log.step()
    assert isinstance(step, SendRequest)
    assert step.n == 2


def test_suspending_an_idle_session_adds_nothing() -> None:
    log = Log().say().answer(text("x")).do().put(NewEvent(ev.SESSION_SUSPENDED, ACTOR))
    assert log.step() == Park()
    assert log.fold().idle == {"type": "end_turn"}


@pytest.mark.parametrize("budget", [{"max_tool_calls": 1}])
def test_a_budget_is_checked_before_each_request(budget: dict[str, int]) -> None:
    log = Log(budget=budget).say().tools(tool_use("a")).started("a").result("a")
    assert appended(log.step()) == [("idle", "budget_reached")]
    assert log.do().step() == Park()
    assert appended(log.say("more").step()) == [("idle", "budget_reached")]
    assert log.do().step() == Park()
    roomy = Log(budget={key: value + 1 for key, value in budget.items()})
    roomy.say().tools(tool_use("a")).started("a").result("a")
    assert isinstance(roomy.step(), SendRequest)


def updated(budget: dict[str, int] | None) -> NewEvent:
    return NewEvent(ev.SESSION_UPDATED, {"budget": budget, **ACTOR})


def test_the_newest_budget_counts() -> None:
    log = Log(budget={"max_tool_calls": 1}).say().tools(tool_use("a")).started("a")
    log.put(updated({"max_tool_calls": 2})).result("a")
    assert isinstance(log.step(), SendRequest)
    assert appended(log.put(updated({"max_tool_calls": 1})).step()) == [("idle", "budget_reached")]
    assert isinstance(log.put(updated(None)).step(), SendRequest)
    assert log.fold().budget == {}


def test_a_raised_budget_alone_starts_nothing_and_the_next_message_gets_all_that_waits() -> None:
    log = Log(budget={"max_tool_calls": 1}).say().tools(tool_use("a")).started("a").result("a").do()
    assert log.put(updated({"max_tool_calls": 9})).step() == Park()
    step = log.say("go on").step()
    assert isinstance(step, SendRequest)
    last = log.fold().prompt(step.horizon)[-1]
    assert [block.type for block in last.blocks] == ["tool_result", "text"]


def test_tokens_of_iterations_count() -> None:
    usage = {"input_tokens": 1, "iterations": [{"input_tokens": 1000}, {"output_tokens": 1000}]}
    log = Log(budget={"max_tokens": 3000}).say().answer(text("x"), usage=usage).do().say()
    assert appended(log.step()) == [("idle", "budget_reached")]


def test_a_session_that_kills_its_workers_is_given_up() -> None:
    log = Log().say().tools(tool_use("a")).started("a").wake(decide.MAX_WAKES)
    assert running(log.step()) == ["a"]
    log.wake()
    assert appended(log.step()) == [
        ("result", "a"),
        ("error", ("wakes_exhausted", "exhausted")),
        ("idle", "retries_exhausted"),
    ]
    assert log.do().step() == Park()
    assert isinstance(log.say().step(), SendRequest)


def test_a_first_message_that_kills_its_workers_is_given_up_and_not_taken_up_again() -> None:
    log = Log().say()
    for _ in range(decide.MAX_WAKES + 1):
        log.wake()
        if log.fold().open_request:
            log.do()
        step = log.step()
        if isinstance(step, SendRequest):
            log.start()
    assert appended(log.step())[-1] == ("idle", "retries_exhausted")
    assert log.do().step() == Park()


def test_wakes_with_nothing_to_do_are_no_poison() -> None:
    assert Log().say().answer(text("x")).do().wake(50).step() == Park()


def test_an_eager_hand_comes_first_and_only_once() -> None:
    log = Log(provisioning="Eager").say()
    assert log.step() == Provision("main")
    assert isinstance(next_step(log.fold(), provisioned=True), SendRequest)
    hand = {"hand": "main", "instance": 1}
    log.put(NewEvent(ev.HAND_REQUESTED, {**hand, "reason": "eager"}))
    assert log.step() == Provision("main")
    log.put(
        NewEvent(ev.HAND_PROVISIONED, {**hand, "sandbox": "s", "sandbox_uid": "u", "pod_uid": "p"})
    )
    assert isinstance(log.step(), SendRequest)


# What cannot be read.


@pytest.mark.parametrize("payload", [b'{"v":2,"th":"main","c":"","d":{}}', b'{"v":1,"ref":{}}'])
def test_an_unknown_version_of_a_known_type_is_refused(payload: bytes) -> None:
    log = Log()
    log.events.append(Event(2, ev.USER_MESSAGE, "m", 0, "", payload))
    with pytest.raises(LogIncompatible):
        log.fold()
    log.events[1] = Event(2, "type.of.the.future", "m", 0, "", payload)
    assert log.fold().last_seq == 2


def test_another_assembler_is_refused() -> None:
    with pytest.raises(LogIncompatible, match="assembler 3"):
        Log(assembler=3).fold()


# Answers from outside: custom tools, approvals, system messages.


def custom_log(*uses: dict[str, Any]) -> Log:
    """A log of an agent with the custom tool `lookup`, whose newest response holds these calls."""
    return Log(custom=["lookup"]).say().tools(*uses)


def custom_answer(log: Log, use_id: str, content: str, **more: Any) -> Log:
    data = {
        "custom_tool_use_id": use_id, "content": [text(content)], "is_error": False, **more, **ACTOR,
    }  # fmt: skip
    return log.put(NewEvent(ev.USER_CUSTOM_TOOL_RESULT, data, id=f"result:{use_id}"))


def stop(step: decide.Step) -> Any:
    assert isinstance(step, Append)
    (event,) = step.events
    return event.data["stop_reason"]


def test_custom_tools_wait_for_their_client_and_partial_answers_leave_the_rest() -> None:
    log = custom_log(tool_use("t1", "lookup"), tool_use("t2", "lookup"))
    asked = log.step()
    assert isinstance(asked, Append)
    assert [event.data["kind"] for event in asked.events] == ["custom_tool"] * 2
    log.do()
    assert stop(log.step()) == {"type": "requires_action", "event_ids": ["t1", "t2"]}
    log.do()
    assert log.step() == Park()
    custom_answer(log, "t2", "two")
    log.do()
    assert stop(log.step()) == {"type": "requires_action", "event_ids": ["t1"]}
    log.do()
    assert log.step() == Park()
    custom_answer(log, "t1", "one", is_error=True)
    log.do()
    assert isinstance(log.step(), SendRequest)
    last = log.fold().prompt(99)[-1]
    assert [block.raw.count(b'"is_error":true') for block in last.blocks] == [1, 0]
    assert b'"content":[{"type":"text","text":"one"}]' in last.blocks[0].raw


def test_a_custom_tool_holds_back_no_other_call() -> None:
    log = custom_log(tool_use("t1", "lookup"), tool_use("t2"))
    log.do()
    step = log.step()
    assert isinstance(step, RunTools)
    assert [call.use.id for call in step.calls] == ["t2"]


def test_an_answer_before_the_question_is_not_lost() -> None:
    log = custom_log(tool_use("t1", "lookup"))
    custom_answer(log, "t1", "early")
    log.do()
    assert isinstance(log.step(), SendRequest)
    log = Log(permissions={"bash": "Ask"}).say().tools(tool_use("t1")).confirm("t1", "allow")
    assert isinstance(log.step(), RunTools)


def test_the_first_answer_of_a_custom_tool_counts() -> None:
    log = custom_answer(
        custom_answer(custom_log(tool_use("t1", "lookup")), "t1", "one"), "t1", "two"
    )
    log.do()
    assert b"one" in log.fold().results["t1"].raw


def test_an_interrupted_custom_tool_takes_no_late_answer() -> None:
    log = custom_log(tool_use("t1", "lookup")).do().do().interrupt()
    log.do()
    custom_answer(log, "t1", "late")
    assert log.step() == Park()
    assert b"interrupted" in log.fold().results["t1"].raw


@pytest.mark.parametrize("order", [("allow", "deny"), ("deny", "allow")])
def test_any_deny_wins(order: tuple[str, str]) -> None:
    log = Log(permissions={"bash": "Ask"}).say().tools(tool_use("t1"))
    for result in order:
        log.confirm("t1", result)
    assert appended(log.step())[0][0] == "result"


def test_a_call_that_runs_is_not_denied_any_more() -> None:
    log = Log(permissions={"bash": "Ask"}).say().tools(tool_use("t1")).do().confirm("t1", "allow")
    log.started("t1").confirm("t1", "deny")
    assert isinstance(log.step(), RunTools)


@pytest.mark.parametrize("verdict", ["maybe", "Allow", ""])
def test_an_unknown_verdict_is_a_deny(verdict: str) -> None:
    log = Log(permissions={"bash": "Ask"}).say().tools(tool_use("t1")).do().confirm("t1", verdict)
    assert appended(log.step())[0][0] == "result"


def test_an_approval_of_other_arguments_does_not_count() -> None:
    log = Log(permissions={"bash": "Ask"}).say().tools(tool_use("t1", command="ls")).do()
    wrong = ev.input_sha256({"command": "rm -rf /"})
    step = log.confirm("t1", "allow", input_sha256=wrong).step()
    assert isinstance(step, Append)
    assert step.events[0].data["content"] == OTHER_ARGUMENTS
    log = Log(permissions={"bash": "Ask"}).say().tools(tool_use("t1", command="ls")).do()
    right = ev.input_sha256({"command": "ls"})
    assert isinstance(log.confirm("t1", "allow", input_sha256=right).step(), RunTools)


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert ev.input_sha256({"a": 1, "b": {"c": 2, "d": 3}}) == ev.input_sha256(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )


def system(log: Log, said: str) -> Log:
    return log.put(NewEvent(ev.SYSTEM_MESSAGE, {"content": [text(said)], **ACTOR}, id=said))


def roles(log: Log) -> list[str]:
    return [message.role for message in log.fold().prompt(99)]


def test_a_system_message_comes_behind_the_newest_user_message() -> None:
    log = system(Log().say(), "frozen")
    assert roles(log) == ["user", "system"]
    log.answer(text("hi"))
    assert roles(log.say()) == ["user", "system", "assistant", "user"]


def test_a_system_message_alone_starts_nothing_and_waits_for_the_next_user_message() -> None:
    log = system(Log().say().answer(text("hi")).do(), "frozen")
    assert log.step() == Park()
    assert roles(log) == ["user", "assistant"]
    assert roles(log.say()) == ["user", "assistant", "user", "system"]


def test_a_system_message_in_mid_turn_follows_the_tool_results() -> None:
    log = Log().say().tools(tool_use("t1")).started("t1")
    system(log, "frozen").result("t1")
    assert roles(log) == ["user", "assistant", "user", "system"]


def test_a_system_message_without_an_answer_moves_behind_the_next_user_message() -> None:
    log = system(Log().say(), "frozen").fail("invalid_request_error").do()
    assert roles(log.say("again")) == ["user", "user", "system"]
    log.start()
    assert roles(log.end("lost")) == ["user", "user", "system"]


def test_a_refused_turn_does_not_take_a_system_message_with_it() -> None:
    log = system(Log().say(), "frozen").answer(stop_reason="refusal").do()
    assert roles(log.say("again")) == ["user", "system"]
