"""The real transport against a real TLS server: pinning before sending, reuse, and tokens from the proxy."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from cowhand.errors import BrokerUnavailable, Denied
from cowhand.hands import transport as module
from cowhand.hands.transport import (
    Broken,
    Endpoint,
    NotSent,
    PinnedTransport,
    ProxyCredentials,
    Untrusted,
)
from cowhand.proxy.tls import self_signed
from cowhand.wire.keys import SigningKey, dump_keys
from support.store import free_port


class Server:
    """TLS on loopback; counts connections and remembers every decrypted byte."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self._tls = tls
        self.connections = 0
        self.received = b""
        self.hang_up = False
        self.server: asyncio.Server | None = None

    async def start(self) -> int:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        port: int = self.server.sockets[0].getsockname()[1]
        return port

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.received += head
                for line in head.split(b"\r\n"):
                    if line.lower().startswith(b"content-length:"):
                        self.received += await reader.readexactly(int(line.split(b":")[1]))
                if self.hang_up:
                    return
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n" + b'{"ok":true}')
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, Endpoint]]:
    tls, cert = self_signed()
    made = Server(tls)
    port = await made.start()
    yield made, Endpoint(f"127.0.0.1:{port}", cert)
    assert made.server is not None
    made.server.close()


@pytest.fixture
async def transport() -> AsyncIterator[PinnedTransport]:
    made = PinnedTransport()
    yield made
    await made.close()


async def ask(transport: PinnedTransport, endpoint: Endpoint) -> tuple[int, Any]:
    path = "/v1/calls/sesn%2Ftoolu_1?wait_ms=1"
    return await transport.request(
        endpoint, "POST", path, token="secret", body={"a": 1}, timeout=10
    )


async def test_requests_share_one_connection_and_keep_the_path_as_given(
    server: tuple[Server, Endpoint], transport: PinnedTransport
) -> None:
    made, endpoint = server
    for _ in range(5):
        assert await ask(transport, endpoint) == (200, {"ok": True})
    assert made.connections == 1
    assert made.received.count(b"POST /v1/calls/sesn%2Ftoolu_1?wait_ms=1 HTTP/1.1") == 5
    assert made.received.count(b"Authorization: Bearer secret") == 5


async def test_another_certificate_gets_not_one_byte(
    server: tuple[Server, Endpoint], transport: PinnedTransport
) -> None:
    made, endpoint = server
    _, other = self_signed()
    with pytest.raises(Untrusted):
        await ask(transport, Endpoint(endpoint.address, other))
    with pytest.raises(Untrusted):
        await ask(transport, Endpoint(endpoint.address, "not hex"))
    await ask(transport, endpoint)
    assert made.received.count(b"Bearer") == 1, "only the pinned request arrived"


async def test_a_good_connection_is_not_used_for_another_pin(
    server: tuple[Server, Endpoint], transport: PinnedTransport
) -> None:
    made, endpoint = server
    await ask(transport, endpoint)
    _, other = self_signed()
    with pytest.raises(Untrusted):
        await ask(transport, Endpoint(endpoint.address, other))
    assert made.received.count(b"Bearer") == 1


async def test_control_without_the_pin_the_token_leaks(
    server: tuple[Server, Endpoint], transport: PinnedTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aiohttp.Fingerprint, "check", lambda self, transport: None)
    made, endpoint = server
    _, other = self_signed()
    await ask(transport, Endpoint(endpoint.address, other))
    assert b"Bearer secret" in made.received


async def test_refused_and_broken_are_told_apart(
    server: tuple[Server, Endpoint], transport: PinnedTransport
) -> None:
    made, endpoint = server
    with pytest.raises(NotSent):
        await ask(transport, Endpoint(f"127.0.0.1:{free_port()}", endpoint.cert_sha256))
    made.hang_up = True
    with pytest.raises(Broken):
        await ask(transport, endpoint)


class Proxy:
    """`/cowhand/*` of a harness pod's proxy."""

    def __init__(self) -> None:
        self.key = SigningKey.generate()
        self.asked: list[dict[str, Any]] = []
        self.life: float = 300
        self.status = 200

    async def token(self, request: web.Request) -> web.Response:
        self.asked.append(json.loads(await request.text()))
        if self.status != 200:
            body = {"error": {"type": "forbidden", "message": "not your lease"}}
            return web.json_response(body, status=self.status)
        answer = {"token": f"t{len(self.asked)}", "expires_in_s": self.life, "kid": "k"}
        return web.json_response(answer)

    async def keys(self, request: web.Request) -> web.Response:
        return web.json_response(dump_keys([self.key.public]))


@pytest.fixture
async def proxy() -> AsyncIterator[tuple[Proxy, ProxyCredentials]]:
    made, app = Proxy(), web.Application()
    app.router.add_post("/cowhand/hand-token", made.token)
    app.router.add_get("/cowhand/keys", made.keys)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    credentials = ProxyCredentials(f"http://127.0.0.1:{port}/")
    yield made, credentials
    await credentials.close()
    await runner.cleanup()


async def test_a_token_is_asked_for_once_per_lease_and_sandbox(
    proxy: tuple[Proxy, ProxyCredentials],
) -> None:
    made, credentials = proxy
    tokens = await asyncio.gather(*(credentials.token("s", "1:w:n", "sbx") for _ in range(5)))
    assert set(tokens) == {"t1"}
    assert made.asked == [{"session_id": "s", "lease": "1:w:n", "sandbox_uid": "sbx"}]
    assert await credentials.token("s", "2:w:n", "sbx") == "t2"
    assert await credentials.token("s", "1:w:n", "other") == "t3"
    assert await credentials.token("s", "1:w:n", "sbx", fresh=True) == "t4"
    assert await credentials.token("s", "1:w:n", "sbx") == "t4"


async def test_a_token_is_renewed_ahead_of_its_end(
    proxy: tuple[Proxy, ProxyCredentials], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, credentials = proxy
    now = time.monotonic()
    monkeypatch.setattr("cowhand.hands.transport.time.monotonic", lambda: now)
    assert await credentials.token("s", "l", "sbx") == "t1"
    now += 149
    assert await credentials.token("s", "l", "sbx") == "t1"
    now += 2
    assert await credentials.token("s", "l", "sbx") == "t1", (
        "the call does not wait for the new one"
    )
    await asyncio.gather(*credentials._renewals.values())
    assert await credentials.token("s", "l", "sbx") == "t2"
    now += 290
    assert await credentials.token("s", "l", "sbx") == "t3", "too old to be used at all"
    assert len(made.asked) == 3


async def test_old_tokens_are_thrown_out(
    proxy: tuple[Proxy, ProxyCredentials], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cowhand.hands.transport.MAX_TOKENS", 3)
    made, credentials = proxy
    made.life = 0
    for number in range(10):
        await credentials.token("s", f"{number}:w:n", "sbx")
    assert len(credentials._tokens) <= 3


@pytest.mark.parametrize(
    ("status", "error"), [(403, Denied), (503, BrokerUnavailable), (429, BrokerUnavailable)]
)
async def test_refusals_by_status(
    proxy: tuple[Proxy, ProxyCredentials], status: int, error: type[Exception]
) -> None:
    made, credentials = proxy
    made.status = status
    with pytest.raises(error, match="not your lease"):
        await credentials.token("s", "l", "sbx")


async def test_keys_and_a_proxy_that_is_away(proxy: tuple[Proxy, ProxyCredentials]) -> None:
    made, credentials = proxy
    assert list(await credentials.keys()) == [made.key.kid]
    away = ProxyCredentials(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(BrokerUnavailable):
        await away.keys()
    await away.close()


async def test_json_without_end_is_no_json() -> None:
    assert module._json(b"[" * 200_000) is None
