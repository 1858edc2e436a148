"""The sandbox proxy: registration, token, fence, pass-through; with a recording sandboxd and the real one."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import pytest

from cowhand.errors import HandUnavailable
from cowhand.hands.transport import Endpoint, PinnedTransport
from cowhand.proxy.sandbox import SandboxProxy
from cowhand.wire.keys import SigningKey
from cowhand.wire.records import verify_record
from cowhand.wire.tokens import HandClaims, sign
from support.trust import (
    NAMESPACE,
    OTHER_SESSION,
    SANDBOX_UID,
    SESSION,
    RawClient,
    Rig,
    Upstream,
    reply,
    request,
    rig,
)

SANDBOXD = Path(__file__).parents[3] / "sandbox-image" / "src"


@pytest.fixture
async def chain(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig(tmp_path) as made:
        made.world.sandbox_pod()
        yield made


@pytest.fixture
async def sandboxd() -> AsyncIterator[Upstream]:
    async with Upstream().serving() as made:
        yield made


def claims(**changes: object) -> HandClaims:
    now = int(time.time())
    plain = HandClaims(SANDBOX_UID, SESSION, 1, 7, now, now + 300)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def call(token: str, target: str = "/v1/execute", method: str = "POST") -> bytes:
    body = b'{"call_id":"c"}' if method == "POST" else b""
    return request(method, target, f"authorization: Bearer {token}", body=body)


async def test_the_proxy_registers_and_the_record_is_signed(chain: Rig, sandboxd: Upstream) -> None:
    server, _, _ = await chain.sandbox(sandboxd.port)
    record = chain.world.logs.records[NAMESPACE, SANDBOX_UID]
    assert record.address == f"127.0.0.1:{server.port}"
    assert (record.owner, record.owner_epoch, record.state) == (SESSION, 1, "Ready")
    verify_record(record, chain.keys.public, namespace=NAMESPACE)


async def test_a_good_token_passes_and_never_reaches_sandboxd(
    chain: Rig, sandboxd: Upstream
) -> None:
    server, _, tls = await chain.sandbox(sandboxd.port)
    client = await chain.open(server.port, tls)
    token = sign(claims(), chain.keys.signing)
    answer = await client.ask(call(token))
    assert (answer.status, answer.json()) == (200, {"ok": True})
    head, body = sandboxd.requests[-1]
    assert body == b'{"call_id":"c"}'
    assert token.encode() not in head
    assert b"authorization" not in head.lower()
    target = f"/v1/calls/{quote(SESSION + '/toolu_1', safe='')}?wait_ms=100"
    assert (await client.ask(call(token, target, "GET"))).status == 200
    assert sandboxd.requests[-1][0].decode().startswith(f"GET {target} HTTP/1.1")
    assert (await client.ask(call(token, "/v1/calls/c", "DELETE"))).status == 200


@pytest.mark.parametrize(
    ("changes", "status", "kind"),
    [
        ({"sandbox_uid": "another"}, 403, "wrong_sandbox"),
        ({"session_id": OTHER_SESSION}, 403, "not_owner"),
        ({"epoch": 6}, 409, "fenced"),
        ({"owner_epoch": 0}, 409, "fenced"),
        ({"issued_at": int(time.time()) - 900, "expires_at": int(time.time()) - 600}, 401, ""),
    ],
    ids=["another-sandbox", "another-session", "older-lease", "older-owner", "expired"],
)
async def test_tokens_that_are_good_but_not_for_this(
    chain: Rig, sandboxd: Upstream, changes: dict[str, object], status: int, kind: str
) -> None:
    server, _, tls = await chain.sandbox(sandboxd.port)
    client = await chain.open(server.port, tls)
    assert (await client.ask(call(sign(claims(), chain.keys.signing)))).status == 200
    asked = len(sandboxd.requests)
    answer = await client.ask(call(sign(claims(**changes), chain.keys.signing)))
    assert answer.status == status
    assert answer.json()["error"]["type"] == (kind or "unauthenticated")
    assert len(sandboxd.requests) == asked


async def test_no_token_and_foreign_tokens_are_401(chain: Rig, sandboxd: Upstream) -> None:
    server, _, tls = await chain.sandbox(sandboxd.port)
    client = await chain.open(server.port, tls)
    asked = len(sandboxd.requests)
    for header in ((), ("authorization: Basic x",), ("authorization: Bearer x.y.z",)):
        body = b"{}"
        raw = request("POST", "/v1/execute", *header, body=body)
        assert (await (await chain.open(server.port, tls)).ask(raw)).status == 401
    foreign = sign(claims(), SigningKey.generate())
    assert (await client.ask(call(foreign))).status == 401
    assert len(sandboxd.requests) == asked


async def test_a_rotated_key_is_fetched_when_a_token_names_it(
    chain: Rig, sandboxd: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cowhand.proxy.keyring.KEYS_MIN_INTERVAL_S", 0.0)
    server, _, tls = await chain.sandbox(sandboxd.port)
    await chain.keys.rotate()
    client = await chain.open(server.port, tls)
    assert (await client.ask(call(sign(claims(), chain.keys.signing)))).status == 200


async def test_exec_tokens_pass_and_leave_the_fence_alone(chain: Rig, sandboxd: Upstream) -> None:
    server, _, tls = await chain.sandbox(sandboxd.port)
    gateway = chain.client("gateway-token")
    asked = {"namespace": NAMESPACE, "sandbox_uid": SANDBOX_UID, "actor": "ada"}
    token = (await gateway.post("/v1/exec-token", asked))["token"]
    client = await chain.open(server.port, tls)
    assert (await client.ask(call(sign(claims(epoch=9), chain.keys.signing)))).status == 200
    assert (await client.ask(call(token))).status == 200
    assert (await client.ask(call(sign(claims(epoch=9), chain.keys.signing)))).status == 200


async def test_health_needs_no_token_and_follows_sandboxd(chain: Rig) -> None:
    sandboxd = Upstream()
    async with sandboxd.serving():
        server, _, tls = await chain.sandbox(sandboxd.port)
        client = await chain.open(server.port, tls)
        assert (await client.ask(request("GET", "/v1/health"))).status == 200
    assert (await client.ask(request("GET", "/v1/health"))).status == 503
    answer = await client.ask(call(sign(claims(), chain.keys.signing)))
    assert (answer.status, answer.json()["error"]["type"]) == (502, "hand_unavailable")


async def test_before_it_is_registered_nothing_passes(chain: Rig, sandboxd: Upstream) -> None:
    server, _, tls = await chain.sandbox(sandboxd.port, register=False)
    client = await chain.open(server.port, tls)
    answer = await client.ask(call(sign(claims(), chain.keys.signing)))
    assert answer.status == 503
    assert sandboxd.requests == []


async def test_registration_waits_for_sandboxd_and_for_the_broker(
    chain: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    chain.world.tokens["sandbox-token"]["audiences"] = []
    _, proxy, _ = await chain.sandbox(port, register=False)
    ready = asyncio.create_task(proxy.become_ready(8443, "ab" * 32))
    async with Upstream(port=port).serving() as sandboxd:
        await asyncio.wait_for(sandboxd.received.wait(), 60)
        while "not registered yet" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert not ready.done()
        # As the kubelet does: the token is another one now.
        chain.world.token(
            "fresh", "cowhand-sandbox", uid="sandbox-pod-uid", name="aaaaaaaaaaaa-main-1"
        )
        (chain.folder / "sandbox-token.token").write_text("fresh")
        await asyncio.wait_for(ready, 60)


async def test_an_answer_without_end_is_cut(
    chain: Rig, sandboxd: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cowhand.proxy.sandbox.MAX_ANSWER", 1000)
    server, _, tls = await chain.sandbox(sandboxd.port)

    async def endless(_: Upstream, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(200, b"x" * 5000, "set-cookie: a=b"))

    sandboxd.answer = endless
    client = await chain.open(server.port, tls)
    answer = await client.ask(call(sign(claims(), chain.keys.signing)))
    assert answer.closed
    assert "set-cookie" not in answer.headers


async def test_the_hands_client_reaches_it_and_pins_the_certificate(
    chain: Rig, sandboxd: Upstream
) -> None:
    await chain.sandbox(sandboxd.port)
    record = chain.world.logs.records[NAMESPACE, SANDBOX_UID]
    token = sign(claims(), chain.keys.signing)
    transport = PinnedTransport()
    try:
        endpoint = Endpoint(record.address, record.cert_sha256)
        body = {"call_id": "c"}
        status, answer = await transport.request(
            endpoint, "POST", "/v1/execute", token=token, body=body, timeout=60
        )
        assert (status, answer) == (200, {"ok": True})
        asked = len(sandboxd.requests)
        other = Endpoint(record.address, "00" * 32)
        with pytest.raises(HandUnavailable):
            await transport.request(
                other, "POST", "/v1/execute", token=token, body=body, timeout=60
            )
        assert len(sandboxd.requests) == asked
    finally:
        await transport.close()


@contextlib.asynccontextmanager
async def real_sandboxd(folder: Path) -> AsyncIterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("work", "state", "home"):
        (folder / name).mkdir(parents=True)
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder / "home"),
        "PYTHONPATH": str(SANDBOXD),
        "SANDBOXD_PORT": str(port),
        "SANDBOXD_WORKDIR": str(folder / "work"),
        "SANDBOXD_STATE": str(folder / "state"),
    }
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "sandboxd", env=env)
    try:
        yield port
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.skipif(not SANDBOXD.is_dir(), reason="sandbox-image/ is not there")
async def test_commands_run_in_the_real_sandboxd(chain: Rig, tmp_path: Path) -> None:
    async with real_sandboxd(tmp_path / "sandbox") as port:
        server, proxy, tls = await chain.sandbox(port)
        assert isinstance(proxy, SandboxProxy)
        client: RawClient = await chain.open(server.port, tls)
        token = sign(claims(), chain.keys.signing)
        call_id = f"{SESSION}/toolu_1"
        body = json.dumps(
            {
                "call_id": call_id,
                "name": "bash",
                "input": {"command": "echo $((6*7)) | tee out"},
                "timeout_ms": 20000,
            }
        ).encode()
        bearer = f"authorization: Bearer {token}"
        answer = await client.ask(request("POST", "/v1/execute", bearer, body=body))
        assert answer.status == 200
        assert answer.json()["result"]["content"].strip() == "42"
        target = f"/v1/calls/{quote(call_id, safe='')}"
        again = await client.ask(request("GET", target, bearer))
        assert again.json()["result"] == answer.json()["result"]
        assert (tmp_path / "sandbox" / "work" / "out").read_text() == "42\n"
