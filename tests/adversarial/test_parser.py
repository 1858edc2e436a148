"""Parser tricks and exhaustion (threat list C) against a serving proxy; the full table is in tests/unit/proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cowhand.proxy.http1 import Limits
from support.trust import RawClient, Rig, messages, request, rig


@pytest.fixture
async def chain(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig(tmp_path) as made:
        yield made


SMUGGLED = b"POST /v1/organizations/api_keys HTTP/1.1\r\nHost: x\r\n\r\n"
BASE = messages(body=b"").removesuffix(b"\r\n")

HEADS: dict[str, tuple[bytes, int]] = {
    "C1 length and chunked": (
        BASE + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        400,
    ),
    "C1 chunked twice": (
        BASE + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        400,
    ),
    "C2 equal lengths": (BASE + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
    "C3 folded": (BASE + b"X-A: 1\r\n X-B: 2\r\n\r\n", 400),
    "C3 bare LF": (BASE.replace(b"\r\n", b"\n") + b"\n", 400),
    "C3 one bare LF": (BASE + b"X-A: 1\nContent-Length: 2\r\n\r\n{}", 400),
    "C4 bad chunk": (BASE + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n", 400),
    "C4 chunk too long": (BASE + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n", 400),
    "C4 chunk without end": (BASE + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\n", 400),
    "C5 1.0": (BASE.replace(b"HTTP/1.1", b"HTTP/1.0") + b"\r\n", 505),
    "C5 no host": (BASE.replace(b"Host: x\r\n", b"") + b"\r\n", 400),
    "C5 two hosts": (BASE + b"Host: y\r\n\r\n", 400),
    "C5 0.9": (b"GET /\r\n\r\n", 400),
    "C6 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "C10 long head": (BASE + b"X-A: " + b"a" * (70 << 10) + b"\r\n\r\n", 431),
    "C10 many headers": (BASE + b"X-A: 1\r\n" * 200 + b"\r\n", 431),
    "C10 long target": (request("POST", "/" + "a" * (20 << 10)), 414),
    "C17 TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 40 + b"\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", HEADS)
async def test_refused_with_a_reason_and_closed(chain: Rig, name: str) -> None:
    raw, status = HEADS[name]
    client = await chain.open((await chain.harness()).port)
    async with asyncio.timeout(60):
        answer = await client.ask(raw)
        assert answer.status == status
        assert answer.json()["error"]["message"]
        assert await client.at_end()
    assert not [head for head, _ in chain.upstream.requests if b"api_keys" in head]


async def test_c9_a_slow_head_is_cut_off(chain: Rig) -> None:
    server = await chain.harness(limits=Limits(head_s=0.05))
    client = await chain.open(server.port)
    async with asyncio.timeout(60):
        assert (await client.ask(b"POST /v1/mess")).status == 408
        assert await client.at_end()


async def test_c9_a_slow_body_is_cut_off(chain: Rig) -> None:
    server = await chain.harness(limits=Limits(body_idle_s=0.05))
    client = await chain.open(server.port)
    async with asyncio.timeout(60):
        await client.send(messages("content-length: 100", body=b""))
        assert (await client.read()).status in (0, 502)
        assert await client.at_end()


async def test_c9_an_idle_connection_is_closed(chain: Rig) -> None:
    server = await chain.harness(limits=Limits(idle_s=0.05))
    client = await chain.open(server.port)
    async with asyncio.timeout(60):
        assert await client.at_end()


async def test_c9_a_client_that_never_reads_is_cut_off(chain: Rig) -> None:
    async def flood(_: object, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            await writer.drain()

    chain.upstream.answer = flood
    server = await chain.harness(limits=Limits(write_s=0.1))
    client = await chain.open(server.port)
    await client.send(messages())
    async with asyncio.timeout(60):
        await chain.upstream.closed.wait()


async def test_c9_too_many_connections_are_closed_at_once(chain: Rig) -> None:
    server = await chain.harness(limits=Limits(connections=2))
    first = [await chain.open(server.port) for _ in range(2)]
    for client in first:
        assert (await client.ask(messages())).status == 200
    async with asyncio.timeout(60):
        assert await (await chain.open(server.port)).at_end()
    assert (await first[0].ask(messages())).status == 200


async def test_c9_a_silent_tls_handshake_is_cut_off(chain: Rig) -> None:
    chain.world.sandbox_pod()
    server, _, _ = await chain.sandbox(1, limits=Limits(handshake_s=0.05), register=False)
    client = await RawClient.open(server.port)
    async with asyncio.timeout(60):
        assert await client.at_end()
    client.close()


async def test_c17_plain_http_on_the_tls_port_is_closed(chain: Rig) -> None:
    chain.world.sandbox_pod()
    server, _, _ = await chain.sandbox(1, register=False)
    client = await chain.open(server.port)
    async with asyncio.timeout(60):
        assert (await client.ask(request("GET", "/v1/health"))).status == 0


async def test_c18_what_a_client_writes_does_not_break_the_log(
    chain: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    client = await chain.open((await chain.harness()).port)
    await client.ask(messages("X-A: \x1b[31m{'level':'fake'}", target="/v1/%0d%0afake"))
    assert "fake" not in caplog.text
