"""A model endpoint that answers with anything: each answer is a ModelError that the loop knows."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from cowhand.harness.model import AnthropicModel
from cowhand.harness.stream import ModelError

SID = "sesn_" + "ab" * 16


def sse(*events: object) -> bytes:
    return b"".join(b"event: x\ndata: " + json.dumps(event).encode() + b"\n\n" for event in events)


START = {"type": "message_start", "message": {"role": "assistant", "content": [], "usage": {}}}
BLOCK = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}

ANSWERS = {
    "list": sse([1]),
    "text": sse("x"),
    "null": sse(None),
    "delta-without-block": sse(START, {"type": "content_block_delta", "index": 7, "delta": {}}),
    "delta-null": sse(START, BLOCK, {"type": "content_block_delta", "index": 0, "delta": None}),
    "index": sse(START, {**BLOCK, "index": "x"}),
    "block-null": sse({**BLOCK, "content_block": None}),
    "message-null": sse({"type": "message_start", "message": None}),
    "error-text": sse({"type": "error", "error": "x"}),
    "deep": b"data: " + b"[" * 200_000 + b"\n\n",
    "deep-input": sse(
        START,
        {**BLOCK, "content_block": {"type": "tool_use", "id": "t", "name": "bash", "input": {}}},
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "input_json_delta", "partial_json": "[" * 200_000},
        },
        {"type": "content_block_stop", "index": 0},
    ),
    "bytes": b"data: \xff\xfe\n\n",
    "nothing": b"",
}


@pytest.fixture
async def endpoint() -> AsyncIterator[tuple[str, dict[str, web.Response]]]:
    answers: dict[str, web.Response] = {}

    async def answer(_: web.Request) -> web.Response:
        return answers["next"]

    app = web.Application()
    app.router.add_post("/v1/messages", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    yield f"http://127.0.0.1:{port}", answers
    await runner.cleanup()


async def asked(url: str) -> ModelError:
    model = AnthropicModel(url)
    try:
        with pytest.raises(ModelError) as caught:
            await model.stream(b"{}", session_id=SID, lease="l", on_text=lambda *_: None)
    finally:
        await model.close()
    return caught.value


@pytest.mark.parametrize("name", ANSWERS)
async def test_a_malformed_stream(endpoint: tuple[str, dict[str, web.Response]], name: str) -> None:
    url, answers = endpoint
    answers["next"] = web.Response(body=ANSWERS[name], content_type="text/event-stream")
    assert (await asked(url)).type == "stream_cut"


@pytest.mark.parametrize("value", ["inf", "nan", "-inf", "1e999"])
async def test_a_pause_that_json_cannot_hold(
    endpoint: tuple[str, dict[str, web.Response]], value: str
) -> None:
    url, answers = endpoint
    answers["next"] = web.Response(status=529, headers={"retry-after": value}, text="{}")
    assert (await asked(url)).retry_after_s is None
