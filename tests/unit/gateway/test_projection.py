"""Log events become public events; every public event is one that the official SDK's strict parser takes."""

from __future__ import annotations

import json

import httpx2
import pytest
from anthropic import Anthropic, APIResponseValidationError, DefaultHttpxClient

from cowhand.gateway.projection import (
    Context,
    event_id,
    project,
    rfc3339,
    stop_reason,
    tool_use_event_id,
    tool_use_of,
)
from cowhand.session import events as ev
from support.gateway_rig import (
    ACTOR,
    HEX,
    SID,
    T0,
    at,
    created,
    events_of,
    response,
    tool_use,
    turn,
    user_message,
)


def projected(rows):
    events = events_of(rows)
    context = Context(SID)
    for event in events:
        context.feed(event)
    return [public for event in events for public in project(event, context)]


def strict(publics):
    """What the official SDK reads, with its own validation on."""

    def serve(request):
        return httpx2.Response(200, json={"data": publics, "next_page": None})

    client = Anthropic(
        api_key="k",
        base_url="http://gateway.test",
        max_retries=0,
        _strict_response_validation=True,
        http_client=DefaultHttpxClient(transport=httpx2.MockTransport(serve)),
    )
    with client:
        return list(client.beta.sessions.events.list(SID))


def test_a_turn_reads_as_the_official_sequence():
    assert [public["type"] for public in projected(turn())] == [
        "user.message",
        "session.status_running",
        "span.model_request_start",
        "agent.thinking",
        "agent.message",
        "agent.tool_use",
        "span.model_request_end",
        "agent.tool_result",
        "span.model_request_start",
        "agent.message",
        "span.model_request_end",
        "session.status_idle",
    ]


def test_the_strict_sdk_takes_every_event():
    rows = [
        *turn(),
        (ev.USER_INTERRUPT, {"actor": ACTOR}),
        (
            ev.USER_TOOL_CONFIRMATION,
            {"tool_use_id": "toolu_9", "result": "deny", "deny_message": "no"},
        ),
        (ev.STATUS_IDLE, {"stop_reason": {"type": "requires_action", "event_ids": ["toolu_9"]}}),
        (ev.STATUS_IDLE, {"stop_reason": {"type": "interrupted"}}),
        (ev.STATUS_IDLE, {"stop_reason": {"type": "suspended"}}),
        (ev.STATUS_IDLE, {"stop_reason": {"type": "refusal"}}),
        (ev.STATUS_IDLE, {"stop_reason": {"type": "budget_reached"}}),
        (ev.STATUS_IDLE, {"stop_reason": {"type": "retries_exhausted"}}),
        (ev.STATUS_RESCHEDULED, {}),
        (ev.SESSION_ERROR, {"error": {"type": "overloaded_error", "message": "busy"}}),
        (ev.SESSION_ERROR, {"error": {"type": "something_new", "message": "?"}}),
        (ev.STATUS_TERMINATED, {}),
        (ev.SESSION_UPDATED, {"budget": {"max_tokens": 9}, "actor": ACTOR}),
        (ev.SESSION_UPDATED, {"budget": None, "actor": ACTOR}),
        (ev.SESSION_DELETED, {"actor": ACTOR}),
    ]
    publics = projected(rows)
    parsed = strict(publics)
    assert [event.type for event in parsed] == [public["type"] for public in publics]
    assert len({event.id for event in parsed}) == len(parsed)


def test_the_strict_sdk_would_notice_a_wrong_field():
    broken = projected(turn())
    broken[-1]["stop_reason"] = {"type": "interrupted"}
    with pytest.raises(APIResponseValidationError):
        strict(broken)


def test_a_renewed_window_is_one_official_event_with_its_usage():
    used = {"input_tokens": 7, "output_tokens": 3}
    rows = [
        (ev.SESSION_CREATED, created()),
        (ev.CONTEXT_SELECTED, {"profile": "reset"}),
        (ev.MODEL_REQUEST_START, {"n": 3, "attempt": 1, "horizon": 2, "purpose": "notes"}),
        (ev.CONTEXT_RESET, {"notes": "n", "continue": "c", "usage": used}),
        (ev.MODEL_REQUEST_END, {"start": 3, "outcome": "ok"}),
        (ev.CONTEXT_COMPACTED, {"block": {}, "continue": "c", "usage": used}),
        (ev.CONTEXT_CLEARED, {"tool_use_ids": ["t"]}),
    ]
    publics = projected(rows)
    assert [public["type"] for public in publics] == [
        "span.model_request_start",
        "agent.thread_context_compacted",
        "span.model_request_end",
        "agent.thread_context_compacted",
    ]
    assert publics[2]["model_usage"]["output_tokens"] == 3
    assert len(strict(publics)) == 4


def test_ids_are_derived_and_results_point_at_their_use():
    by_type = {public["type"]: public for public in projected(turn())}
    use, result = by_type["agent.tool_use"], by_type["agent.tool_result"]
    assert use["id"] == f"sevt_{HEX}_toolu_1" == result["tool_use_id"]
    assert by_type["user.message"]["id"] == f"sevt_{HEX}_2_0"
    assert by_type["agent.message"]["id"] == f"sevt_{HEX}_11_0"
    assert tool_use_of(SID, use["id"]) == "toolu_1"
    assert tool_use_of(SID, "toolu_1") == "toolu_1"
    assert tool_use_of(SID, "sevt_other_toolu_1") == "sevt_other_toolu_1"


def test_the_projection_of_an_event_does_not_depend_on_where_reading_began():
    events = events_of(turn())
    whole, part = Context(SID), Context(SID)
    for event in events:
        whole.feed(event)
    for event in [events[0], *events[4:]]:
        part.feed(event)
    for event in events[4:]:
        assert project(event, whole) == project(event, part)


def test_internal_and_unknown_events_are_not_shown():
    for kind in (ev.SESSION_CREATED, ev.SESSION_WAKE, ev.SESSION_SUSPENDED, ev.SESSION_EXEC):
        assert project(at(1, kind, created()), Context(SID)) == []
    for kind in (ev.TOOL_PENDING, ev.TOOL_STARTED, ev.HAND_LOST, "some.future_type"):
        assert project(at(1, kind, {"tool_use_id": "t"}), Context(SID)) == []


def test_permissions_are_those_of_the_frozen_agent():
    rows = [
        (ev.SESSION_CREATED, created({"bash": "Ask", "read": "Allow"})),
        (
            ev.MODEL_RESPONSE,
            response(tool_use("a", "bash"), tool_use("b", "read"), tool_use("c", "rm")),
        ),
    ]
    uses = projected(rows)
    assert [use["evaluated_permission"] for use in uses] == ["ask", "allow", "deny"]
    assert [use.get("evaluation") for use in uses] == [
        {"type": "always_ask"},
        {"type": "always_allow"},
        None,
    ]


def test_neighbouring_text_blocks_are_one_message_and_empty_ones_none():
    text = [{"type": "text", "text": part} for part in ("a", "", "b")]
    rows = [(ev.MODEL_RESPONSE, response(*text, tool_use("t"), {"type": "text", "text": "c"}))]
    publics = projected(rows)
    assert [public["type"] for public in publics] == [
        "agent.message",
        "agent.tool_use",
        "agent.message",
    ]
    assert [block["text"] for block in publics[0]["content"]] == ["a", "b"]
    assert len({public["id"] for public in publics}) == 3


def test_a_user_event_is_processed_when_the_harness_takes_it_up():
    rows = [
        (ev.SESSION_CREATED, created()),
        (ev.MODEL_REQUEST_START, {"horizon": 1}),
        (ev.USER_MESSAGE, user_message("while it thinks")),
        (ev.MODEL_RESPONSE, response({"type": "text", "text": "x"})),
        (ev.MODEL_REQUEST_END, {"start": 2, "outcome": "ok"}),
    ]
    message = next(public for public in projected(rows) if public["type"] == "user.message")
    assert message["processed_at"] is None
    rows.append((ev.MODEL_REQUEST_START, {"horizon": 5}))
    message = next(public for public in projected(rows) if public["type"] == "user.message")
    assert message["processed_at"] == rfc3339(T0 + 6000)


def test_interrupt_and_confirmation_are_processed_by_what_follows_from_them():
    context = Context(SID)
    interrupt = at(1, ev.USER_INTERRUPT, {})
    confirmation = at(2, ev.USER_TOOL_CONFIRMATION, {"tool_use_id": "t2", "result": "allow"})
    for event in (interrupt, confirmation, at(3, ev.TOOL_STARTED, {"tool_use_id": "t1"})):
        assert context.feed(event) == []
    assert context.feed(at(4, ev.TOOL_STARTED, {"tool_use_id": "t2"})) == [confirmation]
    assert context.feed(at(5, ev.STATUS_IDLE, {"stop_reason": {"type": "interrupted"}})) == [
        interrupt
    ]


def test_feeding_an_event_twice_changes_nothing():
    context = Context(SID)
    message = at(2, ev.USER_MESSAGE, user_message("x"))
    start = at(3, ev.MODEL_REQUEST_START, {"horizon": 2})
    for event in (message, start, message, start):
        context.feed(event)
    assert context.processed == {2: T0 + 3000}
    assert not context.waiting_before(9)


def test_usage_comes_from_the_response_of_the_request():
    ends = [public for public in projected(turn()) if public["type"] == "span.model_request_end"]
    assert [end["model_usage"]["input_tokens"] for end in ends] == [10, 20]
    assert ends[0]["model_request_start_id"] == event_id(SID, 5)
    assert ends[0]["model_usage"]["cache_creation_input_tokens"] == 0
    assert ends[0]["is_error"] is False


def test_stop_reasons_that_clients_do_not_know_keep_their_name():
    assert stop_reason(SID, {"type": "interrupted"}) == {
        "type": "end_turn",
        "cowhand_type": "interrupted",
    }
    assert stop_reason(SID, {"type": "requires_action", "event_ids": ["toolu_1"]}) == {
        "type": "requires_action",
        "event_ids": [tool_use_event_id(SID, "toolu_1")],
    }


def test_times_are_rfc3339():
    assert rfc3339(0) == "1970-01-01T00:00:00.000Z"
    assert json.dumps(projected(turn()))
