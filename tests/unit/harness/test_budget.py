"""Limits of tokens, cost, tool calls and running time: each stops the session before it is passed."""

from __future__ import annotations

from typing import Any

import pytest

from cowhand.harness import budget, decide
from cowhand.harness.calls import NO_CALLS_LEFT
from cowhand.harness.decide import Append, Park, RunTools, SendRequest, next_step
from cowhand.session import events as ev
from cowhand.session.events import NewEvent
from support.harness_log import Log
from support.harness_rig import text, tool_use

PRICES = {
    "input": 2000,
    "output": 10_000,
    "cache_read": 200,
    "cache_write_5m": 2500,
    "cache_write_1h": 4000,
}
USAGE = {"input_tokens": 3000, "output_tokens": 1000, "cache_read_input_tokens": 6000}


def used(**options: Any) -> Log:
    """A session whose first response took 10 000 tokens, with a second message."""
    log = Log(max_tokens=4000, **options).say().answer(text("x"), usage=USAGE)
    return log.put(decide.idle("end_turn")).say()


def reached(step: decide.Step) -> str:
    assert isinstance(step, Append), step
    return str(step.events[-1].data["stop_reason"]["budget"])


def known(log: Log) -> int:
    return budget.known_input(log.fold())


def test_a_request_is_sent_only_if_all_of_it_fits() -> None:
    fits = 10_000 + known(used()) + 4000
    step = used(budget={"max_tokens": fits}).step()
    assert isinstance(step, SendRequest)
    assert step.max_tokens == 4000


def test_the_output_limit_is_lowered_where_that_suffices_and_stays_in_the_log() -> None:
    log = used(budget={"max_tokens": 10_000 + known(used()) + 1500})
    step = log.step()
    assert isinstance(step, SendRequest)
    assert (step.max_tokens, step.accept_cut) == (1500, True)
    log.start()
    request = log.fold().request
    assert request is not None
    assert request.max_tokens == 1500
    log.end("error", error={"type": "overloaded_error", "message": "busy"})
    again = log.step()
    assert isinstance(again, SendRequest)
    assert (again.max_tokens, again.attempt) == (1500, 2)
    assert log.fold().prefix_matches()


def test_no_request_is_sent_for_a_few_tokens() -> None:
    log = used(budget={"max_tokens": 10_000 + known(used()) + budget.MIN_OUTPUT - 1})
    assert reached(log.step()) == "max_tokens"
    assert log.do().step() == Park()


def test_what_the_newest_response_counted_is_not_estimated_again() -> None:
    conversation = used().fold()
    assert conversation.context_tokens == 10_000
    assert 10_000 < known(used()) < 10_100
    assert 0 < known(Log().say("x" * 300)) - known(Log().say("")) <= 150


def test_cost_counts_each_kind_of_token_and_every_iteration() -> None:
    assert budget.cost_nanousd({"input_tokens": 2, "output_tokens": 3}, PRICES) == 34_000
    split = {
        "cache_creation_input_tokens": 10,
        "cache_creation": {"ephemeral_1h_input_tokens": 4},
        "cache_read_input_tokens": 100,
    }
    assert budget.cost_nanousd(split, PRICES) == 4 * 4000 + 6 * 2500 + 100 * 200
    parts = {"input_tokens": 9, "iterations": [{"input_tokens": 1}, {"output_tokens": 1}]}
    assert budget.cost_nanousd(parts, PRICES) == 12_000


def spent(log: Log, nanousd: int) -> Log:
    """As if that response had cost so much."""
    for i, event in enumerate(log.events):
        if event.type == ev.MODEL_RESPONSE:
            data = {**event.data, "cost_nanousd": nanousd}
            log.events[i] = type(event)(
                event.seq, event.type, "", 0, "", NewEvent(event.type, data).payload()
            )
    return log


@pytest.mark.parametrize(("left_micro", "sent"), [(70_000, 4000), (50_000, True), (30_000, None)])
def test_a_request_that_may_pass_the_cost_is_not_sent(left_micro: int, sent: Any) -> None:
    made = used(prices=PRICES, budget={"max_cost_microusd": 1_000_000 + left_micro})
    log = spent(made, 1_000_000_000)
    step = log.step()
    if sent is None:
        assert reached(step) == "max_cost_microusd"
        return
    assert isinstance(step, SendRequest)
    most = known(log) * PRICES["cache_write_5m"] + step.max_tokens * PRICES["output"]
    assert most <= left_micro * 1000
    assert (step.max_tokens == 4000) == (sent == 4000)


def test_a_limit_of_cost_without_a_price_sends_nothing() -> None:
    assert reached(Log(budget={"max_cost_microusd": 10**12}).say().step()) == "max_cost_microusd"


def test_a_truncated_response_counts() -> None:
    log = Log().say().start()
    log.end("truncated", usage=USAGE, cost_nanousd=7)
    status = log.fold().status
    assert status["usage"]["output_tokens"] == 1000
    assert status["cost_nanousd"] == 7


def test_calls_beyond_the_limit_do_not_run() -> None:
    log = Log(budget={"max_tool_calls": 2}).say().tools(*(tool_use(c) for c in "abc"))
    step = log.step()
    assert isinstance(step, Append)
    assert [(e.data["tool_use_id"], e.data["content"]) for e in step.events] == [
        ("c", NO_CALLS_LEFT)
    ]
    for call in "ab":
        step = log.do().step() if call == "a" else log.step()
        assert isinstance(step, RunTools)
        assert [item.use.id for item in step.calls] == [call]
        log.started(call).result(call)
    assert reached(log.step()) == "max_tool_calls"


def test_a_call_that_runs_is_not_taken_back_by_a_lower_limit() -> None:
    log = Log(budget={"max_tool_calls": 5}).say().tools(tool_use("a")).started("a")
    log.put(NewEvent(ev.SESSION_UPDATED, {"budget": {"max_tool_calls": 1}}))
    assert isinstance(log.step(), RunTools)


# Running time, from the times in the log.


def at(log: Log, now_ms: int) -> Log:
    log.now = now_ms
    return log


def test_only_running_time_counts() -> None:
    log = at(Log(), 1000).say()
    at(log, 2000).put(NewEvent(ev.STATUS_RUNNING, {}))
    at(log, 5000).answer(text("x")).put(decide.idle("end_turn"))
    assert log.fold().running_ms(99_000) == 3000
    at(log, 60_000).say()
    at(log, 61_000).start()
    assert log.fold().running_ms(62_500) == 4500


def test_running_time_ends_the_turn_and_stops_what_runs() -> None:
    log = at(Log(budget={"max_duration_s": 10}), 1000).say()
    at(log, 1000).tools(tool_use("a")).started("a")
    assert isinstance(next_step(log.fold(), now_ms=10_999), RunTools)
    step = next_step(log.fold(), now_ms=11_000)
    assert isinstance(step, Append)
    result, stop = step.events
    assert result.data["content"] == decide.OUT_OF_TIME
    assert stop.data["stop_reason"] == {"type": "budget_reached", "budget": "max_duration_s"}
    at(log, 11_000).put(*step.events)
    assert next_step(log.fold(), now_ms=11_000) == Park()
    log.say("more")
    assert reached(next_step(log.fold(), now_ms=11_000)) == "max_duration_s"
