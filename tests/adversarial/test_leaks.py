"""Where secrets must never show: listeners, logs, errors, tracebacks (threat list D7, D10, D20, G1, G2)."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import signal
import socket
import ssl
import sys
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cowhand.broker.secrets import ModelKeys
from cowhand.telemetry.logging import JsonFormatter
from support.trust import MODEL_KEY, SANDBOX_UID, SESSION, Rig, Upstream, messages, request, rig


@pytest.fixture
async def chain(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig(tmp_path) as made:
        made.world.sandbox_pod()
        yield made


def spellings(secret: str) -> set[str]:
    """A secret as it may stand in a text."""
    raw = secret.encode()
    return {
        secret,
        base64.b64encode(raw).decode().rstrip("="),
        urllib.parse.quote(secret, safe=""),
        raw.hex(),
        json.dumps(secret)[1:-1],
    }


async def test_d20_no_log_line_and_no_answer_holds_a_secret(
    chain: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter("test"))
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.DEBUG)
    root.addHandler(handler)
    answers = []
    try:
        async with Upstream().serving() as sandboxd:
            server, _, tls = await chain.sandbox(sandboxd.port)
            client = await chain.open((await chain.harness()).port)
            answers.append(await client.ask(messages()))
            answers.append(await client.ask(messages(target="/v1/other")))
            chain.world.secret("elsewhere", MODEL_KEY)
            answers.append(await (await chain.open((await chain.harness()).port)).ask(messages()))
            hand = await chain.open(server.port, tls)
            raw = request("POST", "/v1/execute", "authorization: Bearer a.b.c", body=b"{}")
            answers.append(await hand.ask(raw))

        async def broken(*_: object) -> None:
            raise RuntimeError(f"it failed with {MODEL_KEY}")

        monkeypatch.setattr(ModelKeys, "credential", broken)
        answers.append(await (await chain.open((await chain.harness()).port)).ask(messages()))
        assert answers[-1].status == 503
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
    text = stream.getvalue()
    assert '"msg":"refused"' in text
    secrets = [MODEL_KEY, "harness-token", "sandbox-token", "a.b.c"]
    secrets.append(base64.b64encode(chain.keys.signing.private.private_bytes_raw()).decode())
    for secret in secrets:
        for spelling in spellings(secret):
            assert spelling not in text
            assert not any(spelling in str(answer) for answer in answers)


async def test_g1_the_broker_gives_nothing_without_a_pods_token(chain: Rig) -> None:
    calls = {
        "/v1/register": {"port": 1, "cert_sha256": "ab" * 32},
        "/v1/hand-token": {"session_id": SESSION, "lease": "x", "sandbox_uid": SANDBOX_UID},
        "/v1/exec-token": {"namespace": "team", "sandbox_uid": SANDBOX_UID, "actor": "x"},
        "/v1/model-credential": {"session_id": SESSION, "lease": "x"},
    }
    context = ssl.create_default_context(cafile=str(chain.authority.ca_file))
    context.check_hostname = False
    for path, body in calls.items():
        for headers in ((), ("authorization: Bearer invented",), ("authorization: Basic eDp4",)):
            client = await chain.open(chain.broker_port, context)
            raw = request("POST", path, *headers, body=json.dumps(body).encode())
            answer = await client.ask(raw)
            assert (answer.status, answer.json()["error"]["type"]) == (401, "unauthenticated")
    # A sandbox's own token opens nothing but its own registration.
    for path, body in calls.items():
        client = await chain.open(chain.broker_port, context)
        raw = request(
            "POST", path, "authorization: Bearer sandbox-token", body=json.dumps(body).encode()
        )
        assert (await client.ask(raw)).status == (200 if path == "/v1/register" else 403)


def listeners(pid: int) -> tuple[set[str], set[str]]:
    """Ports that a process listens on, and its unix sockets' names."""
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[9] in inodes and words[3] == "0A":
                ports.add(str(int(words[1].rpartition(":")[2], 16)))
    unix = set()
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        words = line.split()
        if words[6] in inodes and len(words) > 7:
            unix.add(words[7])
    return ports, unix


def core_limit(pid: int) -> list[str]:
    """Soft and hard limit of a process's core files."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(line.split()[4:6] for line in lines if line.startswith("Max core file size"))


@pytest.mark.parametrize("mode", ["harness", "sandbox"])
async def test_d7_d10_one_door_no_core_file_and_a_clean_end(
    chain: Rig, tmp_path: Path, mode: str
) -> None:
    ready = tmp_path / "run" / "ready"
    token = tmp_path / "token"
    token.write_text("sandbox-token" if mode == "sandbox" else "harness-token")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with Upstream().serving() as sandboxd:
        env = {
            "PATH": os.environ["PATH"],
            "COWHAND_PROXY_MODE": mode,
            "COWHAND_BROKER_URL": chain.broker_url,
            "COWHAND_CA_FILE": str(chain.authority.ca_file),
            "COWHAND_TOKEN_FILE": str(token),
            "COWHAND_LISTEN_HOST": "127.0.0.1",
            "COWHAND_LISTEN_PORT": str(port),
            "COWHAND_SANDBOXD_PORT": str(sandboxd.port),
            "COWHAND_READY_FILE": str(ready),
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cowhand", "proxy", env=env, stderr=asyncio.subprocess.PIPE
        )
        try:
            async with asyncio.timeout(60):
                while not ready.exists():
                    assert process.returncode is None
                    await asyncio.sleep(0.02)
            assert listeners(process.pid) == ({str(port)}, set())
            if mode == "harness":
                answer = await (await chain.open(port)).ask(messages())
                assert answer.status == 200
            assert core_limit(process.pid) == ["0", "0"]
            process.send_signal(signal.SIGTERM)
            _, errors = await asyncio.wait_for(process.communicate(), 60)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode == 0
    assert not ready.exists()
    lines = [json.loads(line) for line in errors.decode().splitlines()]
    assert "ready" in {line["msg"] for line in lines}
    assert MODEL_KEY not in errors.decode()
