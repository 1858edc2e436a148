"""The model server as the real `anthropic` SDK sees it."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx2
import pytest

from support.model_rig import TOOLS, ModelRig

WORDS = "The quick brown fox jumps over the lazy dog, and nobody is surprised."
ANSWER: dict[str, Any] = {
    "content": [
        {"type": "thinking", "thinking": "let me think about it"},
        {"type": "text", "text": WORDS},
        {
            "type": "tool_use",
            "name": "bash",
            "input": {"command": "echo 'é' | wc -c", "timeout_ms": 5},
        },
        {"type": "tool_use", "name": "read", "input": {"file_path": "/x"}},
    ]
}


@pytest.fixture
async def model() -> AsyncIterator[ModelRig]:
    async with ModelRig() as rig:
        yield rig


def say(text: str, **more: Any) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text}], **more}


async def test_stream_has_the_events_of_the_api_in_pieces(model: ModelRig) -> None:
    await model.script("s", ANSWER)
    raw = await model.client.messages.create(
        model="claude-x",
        max_tokens=100,
        stream=True,
        tools=TOOLS,
        messages=[{"role": "user", "content": "[[script:s]]"}],
    )
    seen = [event async for event in raw]
    kinds = [e.type for e in seen]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert [e.index for e in seen if e.type == "content_block_start"] == [0, 1, 2, 3]
    deltas = [e.delta.type for e in seen if e.type == "content_block_delta"]
    assert deltas.count("text_delta") > 2
    assert deltas.count("input_json_delta") > 3
    assert "signature_delta" in deltas


@pytest.mark.parametrize("streaming", [True, False])
async def test_message_and_its_way_back(model: ModelRig, streaming: bool) -> None:
    await model.script("s", ANSWER, say("{{result:0}} and {{result:-1}}"))
    messages: list[Any] = [{"role": "user", "content": "[[script:s]]"}]

    async def ask() -> Any:
        if streaming:
            return await model.answer(messages, tools=TOOLS)
        return await model.client.messages.create(
            model="claude-x", max_tokens=100, tools=TOOLS, messages=messages
        )

    first = await ask()
    assert (first.stop_reason, first.role, first.model) == ("tool_use", "assistant", "claude-x")
    assert first.id.startswith("msg_")
    assert [b.type for b in first.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert first.content[1].text == WORDS
    assert first.content[2].input == ANSWER["content"][2]["input"]
    assert first.content[2].id != first.content[3].id
    assert first.usage.output_tokens > 10
    results = [
        {"type": "tool_result", "tool_use_id": b.id, "content": b.name} for b in first.content[2:]
    ]
    content = [b.to_dict() for b in first.content]
    messages += [{"role": "assistant", "content": content}, {"role": "user", "content": results}]
    second = await ask()
    assert (second.stop_reason, second.content[0].text) == ("end_turn", "bash and read")
    messages[1]["content"] = content[
        1:
    ]  # what the harness must not do: drop the thinking ... is allowed,
    await ask()
    messages[1]["content"] = [{**content[0], "thinking": "altered"}, *content[1:]]
    with pytest.raises(anthropic.BadRequestError, match=r"messages\.1\.content\.0.*signature"):
        await ask()


async def test_errors_have_the_envelope_of_the_api(model: ModelRig) -> None:
    with pytest.raises(anthropic.BadRequestError) as refused:
        await model.answer(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        )
    assert refused.value.type == "invalid_request_error"
    assert "prefill" in str(refused.value)
    assert (refused.value.request_id or "").startswith("req_")
    with pytest.raises(anthropic.AuthenticationError):
        await model.client.with_options(api_key="wrong").messages.create(
            model="m", max_tokens=1, messages=[{"role": "user", "content": "x"}]
        )
    bearer = anthropic.AsyncAnthropic(base_url=model.url, auth_token="test-key", max_retries=0)
    async with bearer:
        answer = await bearer.messages.create(
            model="m", max_tokens=1, messages=[{"role": "user", "content": "[[script:echo]] hi"}]
        )
        assert answer.content[0].type == "text"


async def test_plain_http_refusals(model: ModelRig) -> None:
    good = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
    async with model.http.post(
        "/v1/messages", json=good, headers={"anthropic-version": ""}
    ) as answer:
        assert answer.status == 400
        assert "anthropic-version" in (await answer.json())["error"]["message"]
    for path in ("/_control/requests", "/_control/gates"):
        async with model.http.get(path, headers={"x-api-key": "no"}) as answer:
            assert answer.status == 401
    async with model.http.post("/v1/complete", json=good) as answer:
        assert (answer.status, (await answer.json())["error"]["type"]) == (404, "not_found_error")
    async with model.http.post("/v1/messages", data=io.BytesIO(b"x" * (33 << 20))) as answer:
        assert (answer.status, (await answer.json())["error"]["type"]) == (413, "request_too_large")
    async with model.http.get("/healthz", headers={"x-api-key": ""}) as answer:
        assert answer.status == 200


async def test_status_faults_then_success(model: ModelRig) -> None:
    await model.script(
        "s", say("ok", fault={"kind": "529", "times": 2}), say("done", fault={"kind": "429"})
    )
    for _ in range(2):
        with pytest.raises(anthropic.OverloadedError):
            await model.answer("[[script:s]]")
    assert (await model.answer("[[script:s]]")).content[0].text == "ok"
    talk = [
        {"role": "user", "content": "[[script:s]]"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "go on"},
    ]
    with pytest.raises(anthropic.RateLimitError) as limited:
        await model.answer(talk)
    assert limited.value.response.headers["retry-after"] == "1"
    assert (await model.answer(talk)).content[0].text == "done"
    # Another session meets the fault anew.
    with pytest.raises(anthropic.OverloadedError):
        await model.answer("[[script:s]]", session="sesn_2")


async def test_faults_inside_the_stream(model: ModelRig) -> None:
    for kind in ("error_in_stream", "cut", "eof", "refusal"):
        await model.script(f"s-{kind}", say(WORDS, fault={"kind": kind}))
    with pytest.raises(anthropic.APIStatusError) as broken:
        await model.answer("[[script:s-error_in_stream]]")
    assert broken.value.status_code == 200
    assert broken.value.type == "overloaded_error"
    with pytest.raises((anthropic.APIConnectionError, httpx2.HTTPError)):
        await model.answer("[[script:s-cut]]")
    async with model.stream("[[script:s-eof]]") as stream:
        seen = [event.type async for event in stream]
    assert "content_block_delta" in seen
    assert "message_stop" not in seen
    refusal = await model.answer("[[script:s-refusal]]")
    assert (refusal.stop_reason, refusal.content) == ("refusal", [])
    for kind in ("error_in_stream", "cut", "eof", "refusal"):
        assert (await model.answer(f"[[script:s-{kind}]]")).content[0].text == WORDS


async def waiting(model: ModelRig, gate: str | None) -> dict[str, Any]:
    """Who waits at a gate, as soon as somebody does; for None, as soon as nobody waits anywhere."""
    while True:
        found: list[dict[str, Any]] = (await model.control("GET", "/gates"))["waiting"]
        if [w["gate"] for w in found] == ([] if gate is None else [gate]):
            return found[0] if found else {}
        await asyncio.sleep(0.01)


async def test_gate_before_the_first_byte_and_in_mid_stream(model: ModelRig) -> None:
    await model.script("s", say(WORDS, gate="first", gate_mid="mid"))
    pieces: list[str] = []

    async def ask() -> None:
        async with model.stream("[[script:s]]") as stream:
            async for piece in stream.text_stream:
                pieces.append(piece)  # noqa: PERF401  read while it grows

    task = asyncio.create_task(ask())
    found = await waiting(model, "first")
    assert (found["gate"], found["place"], found["session"], found["turn"]) == (
        "first",
        "first_byte",
        "sesn_1",
        0,
    )
    assert pieces == []
    assert (await model.control("POST", "/release/first"))["released"] == 1
    assert (await waiting(model, "mid"))["place"] == "mid_stream"
    await model.control("POST", "/release/mid?once=1")
    await task
    assert "".join(pieces) == WORDS
    # `first` is open for good, `mid` let one through.
    again = asyncio.create_task(ask())
    await waiting(model, "mid")
    again.cancel()
    await asyncio.gather(again, return_exceptions=True)
    await waiting(model, None)  # who went away does not wait
    outcomes = [
        r["outcome"] for r in (await model.control("GET", "/requests?session=sesn_1"))["requests"]
    ]
    assert outcomes[0] == "ok"


async def test_recorder_keeps_each_body_as_received(model: ModelRig) -> None:
    raw = (
        b'{ "model":"m","max_tokens":1,\n "messages":[{"role":"user","content":"\\u00e9 [[script:echo]]"}],'
        b'"metadata":{"user_id":"sesn_a"} }'
    )
    headers = {"content-type": "application/json"}
    async with model.http.post("/v1/messages", data=raw, headers=headers) as answer:
        assert answer.status == 200
    async with model.http.post(
        "/v1/messages", data=raw.replace(b"1,", b"0,"), headers=headers
    ) as answer:
        assert answer.status == 400
    await model.answer("[[script:echo]]", session="sesn_b")
    found = (await model.control("GET", "/requests?session=sesn_a"))["requests"]
    assert found[0]["body"].encode() == raw
    assert [(r["status"], r["outcome"]) for r in found] == [(200, "ok"), (400, "refused")]
    assert found[0]["received_at"] <= found[1]["received_at"]
    assert "x-api-key" not in json.dumps(found)
    assert len((await model.control("GET", "/requests"))["requests"]) == 3
    short = (await model.control("GET", "/requests?session=sesn_a&bodies=0"))["requests"]
    assert short == [{**one, "body": None} for one in found]
    await model.control("DELETE", "")
    assert (await model.control("GET", "/requests"))["requests"] == []


async def test_recorder_is_bounded() -> None:
    async with ModelRig(record_mb=1) as model:
        for _ in range(5):
            await model.answer("[[script:echo]] " + "x" * 400_000)
        found = await model.control("GET", "/requests")
        assert (len(found["requests"]), found["dropped"]) == (2, 3)


async def test_cache_usage_over_a_tool_loop(model: ModelRig) -> None:
    """Nearly all of a growing conversation is read from the cache, as with the real API."""
    messages: list[Any] = [
        {"role": "user", "content": "[[script:counter times=8]]" + " context" * 1000}
    ]
    for i in range(8):
        message = await model.answer(messages, tools=TOOLS, cache_control={"type": "ephemeral"})
        results = [
            {"type": "tool_result", "tool_use_id": b.id, "content": str(i)}
            for b in message.content
            if b.type == "tool_use"
        ]
        messages += [
            {"role": "assistant", "content": [b.to_dict() for b in message.content]},
            {"role": "user", "content": results},
        ]
        usage = message.usage
        total = (
            usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
        )
        if i:
            assert usage.cache_read_input_tokens / total > 0.9
        else:
            assert usage.cache_read_input_tokens == 0


async def test_a_summary_streams_as_the_api_sends_it_and_takes_the_place_of_the_messages(
    model: ModelRig,
) -> None:
    betas = {"anthropic-beta": "compact-2026-09-04"}
    more = {"tools": TOOLS, "system": "short", "extra_headers": betas}
    asked = [{"role": "user", "content": "[[script:echo]] hello"}]
    body = {"compaction": {"type": "summarize"}}
    made: Any = await model.client.messages.create(
        model="claude-x", max_tokens=100, messages=asked, **more, extra_body=body
    )
    assert made.stop_reason == "compaction"
    assert made.usage.input_tokens == 0
    (block,) = made.content
    assert "hello" in block.content
    raw = await model.client.messages.create(
        model="claude-x", max_tokens=100, stream=True, messages=asked, **more, extra_body=body,
    )  # fmt: skip
    kinds = [event.delta.type async for event in raw if event.type == "content_block_delta"]
    assert set(kinds) == {"compaction_delta", "signature_delta"}
    signed = {"type": "compaction", "content": block.content, "signature": ""}
    then = [{"role": "assistant", "content": [signed]}, {"role": "user", "content": "and?"}]
    with pytest.raises(anthropic.BadRequestError, match="signature"):
        await model.answer(then, **more)


async def test_a_prompt_longer_than_the_window_is_refused(model: ModelRig) -> None:
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        await model.answer("[[script:echo window=50]] " + "long " * 100)
    short = await model.answer("[[script:echo window=80]] " + "word " * 40)
    assert short.stop_reason == "model_context_window_exceeded"
