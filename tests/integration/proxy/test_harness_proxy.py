"""The harness proxy with the real broker and a recording upstream, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cowhand.kube import kinds
from cowhand.kube.errors import KubeUnavailable
from support.trust import (
    HARNESS_POD,
    LEASE,
    MODEL_KEY,
    SANDBOX_UID,
    SESSION,
    Rig,
    Upstream,
    messages,
    reply,
    request,
    rig,
)


@pytest.fixture
async def chain(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig(tmp_path) as made:
        yield made


@pytest.fixture
async def tls_chain(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig(tmp_path, upstream_tls=True) as made:
        yield made


async def test_the_key_is_added_and_the_clients_own_are_dropped(chain: Rig) -> None:
    client = await chain.open((await chain.harness()).port)
    answer = await client.ask(
        messages(
            "authorization: Bearer dummy",
            "x-api-key: dummy",
            "Cookie: a=b",
            "anthropic-version: 2023-06-01",
            "x-cowhand-anything: 1",
            body=b'{"model":"m"}',
        )
    )
    assert (answer.status, answer.json()) == (200, {"ok": True})
    head, body = chain.upstream.requests[0]
    assert body == b'{"model":"m"}'
    lines = head.lower().decode().split("\r\n")
    assert lines[0] == "post /v1/messages http/1.1"
    assert f"x-api-key: {MODEL_KEY.lower()}" in lines
    assert "anthropic-version: 2023-06-01" in lines
    assert f"host: localhost:{chain.upstream.port}" in lines
    assert not [x for x in lines if "dummy" in x or x.startswith(("cookie", "x-cowhand"))]
    assert MODEL_KEY not in str(answer)


async def test_https_upstream_is_verified_and_kept_alive(tls_chain: Rig) -> None:
    client = await tls_chain.open((await tls_chain.harness()).port)
    for _ in range(3):
        assert (await client.ask(messages())).status == 200
    assert tls_chain.upstream.connections == 1
    assert tls_chain.world.reviews == 1


async def test_a_certificate_for_another_name_gets_nothing(tls_chain: Rig) -> None:
    server = await tls_chain.harness()
    state = tls_chain.world.logs.sessions["team", SESSION]
    state.meta.model["base_url"] = f"https://127.0.0.1:{tls_chain.upstream.port}"
    tls_chain.world.secret("127.0.0.1")
    answer = await (await tls_chain.open(server.port)).ask(messages())
    assert answer.status == 502
    assert "not trusted" in answer.json()["error"]["message"]
    assert tls_chain.upstream.requests == []


async def test_an_event_stream_passes_piece_by_piece(chain: Rig) -> None:
    gate = asyncio.Event()

    async def stream(_: Upstream, writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
        writer.write(head + b"transfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        await gate.wait()
        writer.write(b"6\r\nsecond\r\n0\r\n\r\n")

    chain.upstream.answer = stream
    client = await chain.open((await chain.harness()).port)
    await client.send(messages())
    head = await client.reader.readuntil(b"\r\n\r\n")
    assert b"text/event-stream" in head
    assert await client.reader.readexactly(10) == b"5\r\nfirst\r\n"
    gate.set()
    assert await client.reader.readexactly(16) == b"6\r\nsecond\r\n0\r\n\r\n"
    assert (await client.ask(messages())).status == 200


async def test_a_stream_that_is_cut_upstream_is_cut_here(chain: Rig) -> None:
    async def stream(_: Upstream, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n")
        await writer.drain()
        writer.transport.abort()

    chain.upstream.answer = stream
    answer = await (await chain.open((await chain.harness()).port)).ask(messages())
    assert answer.closed


async def test_when_the_client_goes_the_upstream_call_ends(chain: Rig) -> None:
    async def quiet(up: Upstream, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n")

    chain.upstream.answer = quiet
    client = await chain.open((await chain.harness()).port)
    await client.send(messages())
    await client.reader.readuntil(b"first")
    client.writer.transport.abort()
    async with asyncio.timeout(60):
        await chain.upstream.closed.wait()


async def test_a_large_body_goes_through_without_being_kept(chain: Rig) -> None:
    client = await chain.open((await chain.harness()).port)
    body = b"x" * (8 << 20)
    assert (await client.ask(messages(body=body))).status == 200
    assert chain.upstream.requests[0][1] == body


async def test_a_chunked_body_stays_chunked(chain: Rig) -> None:
    client = await chain.open((await chain.harness()).port)
    head = messages("transfer-encoding: chunked", body=b"")
    assert (await client.ask(head + b"3\r\nabc\r\n0\r\nx-trailer: 1\r\n\r\n")).status == 200
    got_head, got = chain.upstream.requests[0]
    assert got == b"abc"
    assert b"transfer-encoding: chunked" in got_head.lower()
    assert b"x-trailer" not in got_head.lower()


async def test_early_answer_while_the_body_is_still_coming(chain: Rig) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply(413, b'{"error":"big"}'))
        await writer.drain()
        writer.close()

    early = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = early.sockets[0].getsockname()[1]
    state = chain.world.logs.sessions["team", SESSION]
    state.meta.model["base_url"] = f"http://localhost:{port}"
    chain.world.secret(f"localhost:{port}")
    client = await chain.open((await chain.harness()).port)
    await client.send(messages("content-length: 1000000", body=b"") + b"x" * 1000)
    answer = await client.read()
    assert answer.status == 413
    assert await client.at_end()
    early.close()


@pytest.mark.parametrize("name", ["lease", "session", "pod"])
async def test_what_the_broker_refuses_is_refused_here(chain: Rig, name: str) -> None:
    if name == "lease":
        chain.set_session(lease=f"8:{HARNESS_POD}.00c0ffee:other")
    elif name == "session":
        chain.world.logs.sessions.clear()
    else:
        chain.set_session(lease="7:another-pod.00c0ffee:nonce")
    answer = await (await chain.open((await chain.harness()).port)).ask(messages())
    assert answer.status == (404 if name == "session" else 403)
    assert answer.headers["x-cowhand-proxy"] == "refused"
    kind = "not_found_error" if name == "session" else "permission_error"
    assert answer.json() == {
        "type": "error",
        "error": {"type": kind, "message": answer.json()["error"]["message"]},
    }
    assert chain.upstream.requests == []


async def test_a_host_that_the_secret_does_not_list_gets_nothing(chain: Rig) -> None:
    chain.world.secret("api.anthropic.com")
    answer = await (await chain.open((await chain.harness()).port)).ask(messages())
    assert answer.status == 403
    assert "cowhand.dev/allowed-hosts" in answer.json()["error"]["message"]
    assert chain.upstream.requests == []


async def test_kubernetes_down_is_503_with_retry_after(chain: Rig) -> None:
    chain.world.kube.fail("create", kinds.TOKEN_REVIEW, KubeUnavailable("away"))
    answer = await (await chain.open((await chain.harness()).port)).ask(messages())
    assert answer.status == 503
    assert answer.json()["error"]["type"] == "api_error"
    assert "retry-after" in answer.headers


async def test_a_401_fetches_the_key_again_once(chain: Rig) -> None:
    async def judge(up: Upstream, writer: asyncio.StreamWriter) -> None:
        good = b"x-api-key: new-key-0123456789" in up.requests[-1][0].lower()
        writer.write(reply(200, b"{}") if good else reply(401, b'{"type":"error"}'))

    chain.upstream.answer = judge
    client = await chain.open((await chain.harness()).port)
    first = await client.ask(messages())
    assert (first.status, first.headers["retry-after"]) == (503, "1")
    assert "cowhand-model/api-key@" in first.json()["error"]["message"]
    # The same key again: now the endpoint's own answer is passed on.
    second = await (await chain.open((await chain.harness()).port)).ask(messages())
    assert second.status == 503  # another proxy, its first 401
    third = await client.ask(messages())
    assert (third.status, third.json()) == (401, {"type": "error"})


async def test_hand_tokens_and_keys_come_through(chain: Rig) -> None:
    chain.world.sandbox_pod()
    sandboxd = Upstream()
    async with sandboxd.serving():
        await chain.sandbox(sandboxd.port)
        client = await chain.open((await chain.harness()).port)
        body = (
            f'{{"session_id":"{SESSION}","lease":"{LEASE}","sandbox_uid":"{SANDBOX_UID}"}}'.encode()
        )
        answer = await client.ask(request("POST", "/cowhand/hand-token", body=body))
        assert answer.status == 200
        assert answer.json()["expires_in_s"] == 300
        keys = await client.ask(request("GET", "/cowhand/keys"))
        assert answer.json()["kid"] in {key["kid"] for key in keys.json()["keys"]}
        wrong = await client.ask(request("POST", "/cowhand/hand-token", body=b"[]"))
        assert wrong.status == 400


async def test_a_broker_that_is_gone_is_503_and_cached_keys_go_on(chain: Rig) -> None:
    server = await chain.harness()
    client = await chain.open(server.port)
    assert (await client.ask(messages())).status == 200
    chain.world.tokens.clear()
    chain.set_session(lease="")
    assert (await client.ask(messages())).status == 200
    other = messages().replace(LEASE.encode(), LEASE.replace("7:", "9:").encode())
    assert (await client.ask(other)).status == 403


async def test_sigterm_drain_lets_a_stream_end(chain: Rig) -> None:
    gate = asyncio.Event()

    async def slow(_: Upstream, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        writer.write(reply(200, b"{}"))

    chain.upstream.answer = slow
    server = await chain.harness()
    client = await chain.open(server.port)
    idle = await chain.open(server.port)
    await client.send(messages())
    await chain.upstream.received.wait()
    closing = asyncio.create_task(server.close(10))
    assert await idle.at_end()
    gate.set()
    assert (await client.read()).status == 200
    await closing
