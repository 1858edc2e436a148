"""The transport under the SDK: bytes as they are, errors as the SDK knows them, connections kept or closed."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator

import httpx2
import pytest

from cowhand.harness.http import AiohttpTransport
from cowhand.harness.model import AnthropicModel
from cowhand.harness.stream import ModelError


class Endpoint:
    """A server that says what a test wants, byte by byte."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-one: 1\r\nx-one: 2\r\n\r\nok"
        self.gate = asyncio.Event()
        self.gate.set()
        self.received = asyncio.Event()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                length = next(
                    int(line.split(b":")[1])
                    for line in head.lower().split(b"\r\n")
                    if line.startswith(b"content-length")
                )
                self.bodies.append(await reader.readexactly(length))
                self.received.set()
                await self.gate.wait()
                writer.write(self.answer)
                await writer.drain()
                if b"content-length" not in self.answer and b"chunked" not in self.answer:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    made = Endpoint()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield made
    made.gate.set()
    server.close()


def client() -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=AiohttpTransport(), timeout=30)


async def test_a_request_goes_out_as_the_client_made_it(endpoint: Endpoint) -> None:
    async with client() as http:
        headers = {"X-Mixed": "a", "user-agent": "me", "accept-encoding": "identity"}
        answer = await http.post(f"{endpoint.url}/p%2Fq?a=%20b", content=b"body", headers=headers)
    assert endpoint.bodies == [b"body"]
    head = endpoint.heads[0].lower()
    assert head.startswith(b"post /p%2fq?a=%20b http/1.1\r\n")
    for name in (b"user-agent: me", b"accept-encoding: identity", b"x-mixed: a"):
        assert head.count(name.split(b":")[0] + b":") == 1
        assert name in head
    assert b"transfer-encoding" not in head
    assert (answer.status_code, answer.text) == (200, "ok")
    assert answer.headers.get_list("x-one") == ["1", "2"]


async def test_a_connection_whose_answer_was_read_is_used_again(endpoint: Endpoint) -> None:
    async with client() as http:
        for _ in range(3):
            assert (await http.post(endpoint.url, content=b"x")).text == "ok"
    assert endpoint.connections == 1


async def test_a_connection_whose_answer_was_not_read_is_closed(endpoint: Endpoint) -> None:
    endpoint.answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n"
    async with client() as http:
        async with http.stream("POST", endpoint.url, content=b"x"):
            pass
        endpoint.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
        assert (await http.post(endpoint.url, content=b"x")).text == "ok"
    assert endpoint.connections == 2


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", httpx2.RemoteProtocolError),
        (b"nonsense\r\n\r\n", httpx2.RemoteProtocolError),
        (b"", httpx2.RemoteProtocolError),
    ],
)  # fmt: skip
async def test_errors_are_those_of_the_sdks_client(
    endpoint: Endpoint, answer: bytes, kind: type[Exception]
) -> None:
    endpoint.answer = answer
    async with client() as http:
        with pytest.raises(kind):
            await http.post(endpoint.url, content=b"x")


async def test_nobody_there_is_a_connect_error() -> None:
    async with client() as http:
        with pytest.raises(httpx2.ConnectError):
            await http.post("http://127.0.0.1:1", content=b"x")


async def test_silence_is_a_read_timeout(endpoint: Endpoint) -> None:
    endpoint.gate.clear()
    async with client() as http:
        with pytest.raises(httpx2.ReadTimeout):
            await http.post(endpoint.url, content=b"x", timeout=httpx2.Timeout(30, read=0.05))
    model = AnthropicModel(endpoint.url, read_timeout_s=0.05)
    with pytest.raises(ModelError) as caught:
        await model.stream(b"{}", session_id="s", lease="l", on_text=lambda *_: None)
    assert caught.value.type == "timeout_error"
    await model.close()


async def test_a_request_that_was_sent_is_not_kept(endpoint: Endpoint) -> None:
    """A thousand sessions wait for their answers at the same time."""
    size = 8_000_000
    endpoint.gate.clear()
    model = AnthropicModel(endpoint.url)
    tracemalloc.start()
    try:
        # The only name of the bytes is the argument.
        task = asyncio.create_task(
            model.stream(bytes(size), session_id="s", lease="l", on_text=lambda *_: None)
        )
        await endpoint.received.wait()
        assert len(endpoint.bodies.pop()) == size
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < size / 2
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await model.close()


async def test_the_model_client_tells_when_a_limit_is_used_up(endpoint: Endpoint) -> None:
    stream = (
        b'event: message_start\ndata: {"type":"message_start","message":{"role":"assistant"}}\n\n'
        b'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
        b'"content_block":{"type":"text","text":""}}\n\n'
        b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"}}\n\n'
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n%s"
        b"date: Thu, 21 Aug 2025 12:41:00 GMT\r\ncontent-length: %d\r\n\r\n"
    )
    limit = (
        b"anthropic-ratelimit-input-tokens-remaining: 0\r\n"
        b"anthropic-ratelimit-input-tokens-reset: 2025-08-21T12:41:09Z\r\n"
    )
    model = AnthropicModel(endpoint.url)
    for extra, expected in ((b"", 0.0), (limit, 9.0)):
        endpoint.answer = head % (extra, len(stream)) + stream
        told: list[float] = []
        await model.stream(
            b"{}", session_id="s", lease="l", on_text=lambda *_: None, on_start=told.append
        )
        assert told == [expected]
    await model.close()
