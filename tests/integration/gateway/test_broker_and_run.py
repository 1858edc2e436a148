"""The gateway's client of the broker over real HTTPS, and the process itself: start, SIGTERM, exit 0."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys

import aiohttp
import pytest
from aiohttp import web

from cowhand.errors import BrokerUnavailable, Denied, UserError
from cowhand.gateway.broker import HttpBroker
from cowhand.gateway.errors import NotFound
from cowhand.wire.keys import SigningKey, dump_keys
from cowhand.wire.tls import ServerCertificate
from support import tls_rig
from support.store import free_port


@pytest.fixture
async def served(tmp_path):
    """A broker's HTTP side: notes the calls, answers what the test sets."""
    certificates = tls_rig.make(tmp_path)
    calls, answers = [], {}

    async def handle(request):
        body = await request.json() if request.can_read_body else None
        calls.append((request.path, request.headers.get("authorization"), body))
        status, document = answers.get(request.path, (404, {}))
        return web.json_response(document, status=status)

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    context = ServerCertificate(str(certificates.cert), str(certificates.key)).context
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    token = tmp_path / "token"
    token.write_text("projected-1\n")
    url = f"https://localhost:{runner.addresses[0][1]}"
    broker = HttpBroker(url, str(certificates.ca), str(token))
    yield broker, calls, answers, token, url
    await broker.close()
    await runner.cleanup()


async def test_the_broker_is_asked_with_the_token_of_the_moment(served):
    broker, calls, answers, token, _ = served
    answers["/v1/exec-token"] = (200, {"token": "t1", "expires_in_s": 60, "kid": "k"})
    assert await broker.exec_token("default", "uid", "jane") == "t1"
    token.write_text("projected-2")
    await broker.exec_token("default", "uid", "jane")
    assert [call[1] for call in calls] == ["Bearer projected-1", "Bearer projected-2"]
    assert calls[0][2] == {"namespace": "default", "sandbox_uid": "uid", "actor": "jane"}
    key = SigningKey.generate()
    answers["/v1/keys"] = (200, dump_keys([key.public]))
    assert list(await broker.keys()) == [key.kid]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, Denied), (403, Denied), (404, NotFound), (400, UserError), (503, BrokerUnavailable)],
)
async def test_refusals_of_the_broker(served, status, kind):
    broker, _, answers, _, _ = served
    answers["/v1/exec-token"] = (status, {"error": {"type": "x", "message": "because"}})
    with pytest.raises(kind, match="because"):
        await broker.exec_token("default", "uid", "jane")


async def test_a_broker_under_another_ca_is_not_asked(served, tmp_path):
    _, calls, _, token, url = served
    other = tmp_path / "other"
    other.mkdir()
    stranger = HttpBroker(url, str(tls_rig.make(other).ca), str(token))
    with pytest.raises(BrokerUnavailable, match="certificate"):
        await stranger.exec_token("default", "uid", "jane")
    assert not await stranger.healthy()
    await stranger.close()
    assert calls == []


async def test_health_of_the_broker(served):
    broker, _, answers, _, _ = served
    assert not await broker.healthy()
    answers["/healthz"] = (200, {})
    assert await broker.healthy()


KUBECONFIG = {
    "apiVersion": "v1",
    "kind": "Config",
    "current-context": "c",
    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
    "users": [{"name": "u", "user": {}}],
}


async def test_the_process_serves_and_ends_cleanly(store_url, tmp_path):
    certificates = tls_rig.make(tmp_path)
    port = free_port()
    (tmp_path / "token").write_text("t")
    (tmp_path / "kubeconfig").write_text(json.dumps(KUBECONFIG))
    environment = {
        "PATH": os.defpath,
        "KUBECONFIG": str(tmp_path / "kubeconfig"),
        "COWHAND_STORE_URL": store_url,
        "COWHAND_TENANTS": "default,team-a",
        "COWHAND_LISTEN_PORT": str(port),
        "COWHAND_TLS_CERT": str(certificates.cert),
        "COWHAND_TLS_KEY": str(certificates.key),
        "COWHAND_BROKER_URL": "https://127.0.0.1:1",
        "COWHAND_CA_FILE": str(certificates.ca),
        "COWHAND_TOKEN_FILE": str(tmp_path / "token"),
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cowhand", "gateway"),
        env=environment,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        while b'"serving"' not in (await asyncio.wait_for(process.stderr.readline(), 30)):
            assert process.returncode is None
        trust = ssl.create_default_context(cafile=str(certificates.ca))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as http:
            url = f"https://127.0.0.1:{port}"
            async with http.get(f"{url}/healthz") as response:
                body = await response.json()
                assert (response.status, body["store"], body["broker"]) == (200, "ok", "no answer")
            headers = {"authorization": "Bearer x"}
            async with http.get(f"{url}/v1/sessions/sesn_{'0' * 32}", headers=headers) as response:
                # The API server is away: nobody is let in, and the client is told to come back.
                assert response.status == 503
                assert "retry-after" in response.headers
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 20) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
