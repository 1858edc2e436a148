from __future__ import annotations

import json
from typing import Any

import pytest

from cowhand.harness.request import response_blocks
from cowhand.harness.stream import Accumulator, ModelError
from cowhand.session import events as ev
from cowhand.session.events import NewEvent


def start(**usage: int) -> dict[str, Any]:
    message = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 3, **usage},
    }  # fmt: skip
    return {"type": "message_start", "message": message}


def block(index: int, value: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": value},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def end(reason: str | None = "end_turn", **more: Any) -> list[dict[str, Any]]:
    delta = {"stop_reason": reason, "stop_sequence": None, **more}
    return [
        {"type": "message_delta", "delta": delta, "usage": {"output_tokens": 7}},
        {"type": "message_stop"},
    ]


def gather(*events: dict[str, Any]) -> dict[str, Any]:
    gathered = Accumulator()
    for event in events:
        gathered.feed(json.dumps(event))
    return gathered.message()


def text(value: str) -> dict[str, Any]:
    return {"type": "text_delta", "text": value}


def json_part(value: str) -> dict[str, Any]:
    return {"type": "input_json_delta", "partial_json": value}


TOOL = {"type": "tool_use", "id": "t", "name": "bash", "input": {}}


def test_blocks_of_every_kind_are_kept_whole_and_in_order() -> None:
    message = gather(
        start(),
        *block(
            0,
            {"type": "thinking", "thinking": "", "signature": ""},
            {"type": "thinking_delta", "thinking": "hm"},
            {"type": "thinking_delta", "thinking": "m"},
            {"type": "signature_delta", "signature": "sig"},
        ),
        *block(1, {"type": "redacted_thinking", "data": "xyz"}),
        *block(2, {"type": "text", "text": ""}, text("he"), text("llo")),
        *block(3, TOOL, json_part('{"b": [1, '), json_part('2], "a": 1.5}')),
        *block(
            4,
            {"type": "future", "body": "a", "list": [1]},
            {"type": "future_delta", "body": "b", "list": [2], "extra": {"k": None}},
        ),
        {"type": "ping"},
        {"type": "event_of_the_future"},
        *end("tool_use", stop_details=None),
    )
    assert message["content"] == [
        {"type": "thinking", "thinking": "hmm", "signature": "sig"},
        {"type": "redacted_thinking", "data": "xyz"},
        {"type": "text", "text": "hello"},
        {"type": "tool_use", "id": "t", "name": "bash", "input": {"b": [1, 2], "a": 1.5}},
        {"type": "future", "body": "ab", "list": [1, 2], "extra": {"k": None}},
    ]
    assert list(message["content"][3]["input"]) == ["b", "a"]
    assert message["stop_reason"] == "tool_use"
    assert message["stop_details"] is None
    assert message["usage"] == {"input_tokens": 3, "output_tokens": 7}


def test_feed_answers_visible_text_only() -> None:
    gathered = Accumulator()
    events = [
        start(),
        *block(
            0, {"type": "thinking", "thinking": ""}, {"type": "thinking_delta", "thinking": "h"}
        ),
        *block(1, {"type": "text", "text": ""}, text("a"), text("b")),
    ]
    seen = []
    for event in events:
        answer = gathered.feed(json.dumps(event))
        if answer or gathered.thought:
            seen.append((answer, gathered.thought, gathered.block))
    assert seen == [("", "h", 0), ("a", "", 1), ("b", "", 1)]


@pytest.mark.parametrize("keep", range(6))
def test_a_stream_that_ends_early_is_no_response(keep: int) -> None:
    events = [start(), *block(0, {"type": "text", "text": ""}, text("a")), *end()]
    with pytest.raises(ModelError) as err:
        gather(*events[:keep])
    assert err.value.type == "stream_cut"


def test_a_stop_without_a_reason_is_no_response() -> None:
    with pytest.raises(ModelError):
        gather(start(), *block(0, {"type": "text", "text": ""}, text("a")), *end(None))


def test_an_error_event_keeps_its_type() -> None:
    with pytest.raises(ModelError) as err:
        gather(
            start(), {"type": "error", "error": {"type": "overloaded_error", "message": "later"}}
        )
    assert (err.value.type, str(err.value)) == ("overloaded_error", "later")


def test_max_tokens_inside_a_tool_call_leaves_its_input_empty() -> None:
    message = gather(start(), *block(0, TOOL, json_part('{"command": "rm -')), *end("max_tokens"))
    assert message["content"][0]["input"] == {}


def test_bad_json_elsewhere_is_no_response() -> None:
    with pytest.raises(ModelError) as err:
        gather(start(), *block(0, TOOL, json_part('{"command": "rm -')), *end("tool_use"))
    assert err.value.type == "stream_cut"


def test_a_surrogate_pair_split_between_deltas_is_joined_and_a_lone_one_replaced() -> None:
    message = gather(
        start(),
        *block(0, {"type": "text", "text": ""}, text("\ud83d"), text("\ude00"), text(" \ud83d")),
        *end(),
    )
    assert message["content"][0]["text"] == "😀 �"


def test_a_refusal_may_be_empty() -> None:
    assert gather(start(), *end("refusal"))["content"] == []


def test_a_long_error_message_is_cut() -> None:
    assert len(str(ModelError("api_error", "x" * 10_000))) == 2000


WIRE = r"""{"type":"message_start","message":{"id":"m","content":[],"stop_reason":null,"usage":{"input":3,"odd":1.50}}}
{"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":"","signature":""}}
{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"h\u00e9 \ud83d"}}
{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"\ude00"}}
{"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":"a\/b+c=="}}
{"type":"content_block_stop","index":0}
{"type":"content_block_start","index":1,"content_block":{"type":"of_the_future","z":1.0,"a":{"y":1e5,"b":[0.10,-0,12345678901234567890123]},"u":"\u00fc"}}
{"type":"content_block_stop","index":1}
{"type":"content_block_start","index":2,"content_block":{"type":"tool_use","id":"t","name":"bash","input":{},"caller":{"type":"direct"}}}
{"type":"content_block_delta","index":2,"delta":{"type":"input_json_delta","partial_json":"{\"z\": 1.0, \"a\""}}
{"type":"content_block_delta","index":2,"delta":{"type":"input_json_delta","partial_json":": 1E+2,\"é\": \"\\u00e9\"}"}}
{"type":"content_block_stop","index":2}
{"type":"message_delta","delta":{"stop_reason":"tool_use"},"usage":{"output_tokens":7.0},"extra":[ 1.0 ]}
{"type":"message_stop"}"""

KEPT = (
    '{"id":"m","content":['
    '{"type":"thinking","thinking":"hé 😀","signature":"a\\/b+c=="},'
    '{"type":"of_the_future","z":1.0,"a":{"y":1e5,"b":[0.10,-0,12345678901234567890123]},"u":"\\u00fc"},'
    '{"type":"tool_use","id":"t","name":"bash","input":{"z": 1.0, "a": 1E+2,"é": "\\u00e9"},'
    '"caller":{"type":"direct"}}],'
    '"stop_reason":"tool_use","usage":{"input":3,"odd":1.50,"output_tokens":7.0},"extra":[ 1.0 ]}'
)


def test_the_text_of_the_wire_is_kept_byte_for_byte_and_goes_back_so() -> None:
    gathered = Accumulator()
    for line in WIRE.splitlines():
        gathered.feed(line)
    message = gathered.message()
    assert message.raw.decode() == KEPT
    assert message == json.loads(KEPT)
    payload = NewEvent(ev.MODEL_RESPONSE, {"message": message, "request_id": "r"}).payload()
    sent = b",".join(item.raw for item in response_blocks(payload))
    assert sent.decode() == KEPT[KEPT.index("[") + 1 : KEPT.index('],"stop_reason')]


def test_control_decoding_and_encoding_again_loses_spelling() -> None:
    again = json.dumps(json.loads(KEPT), ensure_ascii=False, separators=(",", ":"))
    assert json.loads(again) == json.loads(KEPT)
    assert again != KEPT


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_what_python_takes_for_a_number_and_json_does_not_is_refused(number: str) -> None:
    with pytest.raises(ValueError):
        Accumulator().feed(f'{{"type":"message_start","message":{{"usage":{number}}}}}')
    gathered = Accumulator()
    for event in (start(), *block(0, TOOL, json_part(f'{{"x":{number}}}')), *end("tool_use")):
        gathered.feed(json.dumps(event))
    with pytest.raises(ModelError):
        gathered.message()


def test_half_a_surrogate_pair_in_an_escape_is_replaced_everywhere() -> None:
    gathered = Accumulator()
    for event in (start(), *block(0, {"type": "future", "a": "\ud83d", "n": 1}), *end()):
        gathered.feed(json.dumps(event))
    message = gathered.message()
    assert message["content"][0]["a"] == "�"
    assert message == json.loads(message.raw.decode())
