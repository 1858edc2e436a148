"""A gateway on loopback: TLS with a test certificate, a real log, people from a table, real HTTP."""

from __future__ import annotations

import asyncio
import signal
import ssl
import sys
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from anthropic import AsyncAnthropic, DefaultAsyncHttpxClient

from cowhand.gateway.app import Gateway, build
from cowhand.gateway.auth import Authority
from cowhand.gateway.exec import Executor, PinnedHands
from cowhand.session import connect
from cowhand.session import events as ev
from cowhand.session.events import NewEvent
from cowhand.session.log import Lease, SessionMeta, StoreConfig
from cowhand.wire.keys import SigningKey
from cowhand.wire.tls import ServerCertificate
from support import tls_rig
from support.fake_kubectl import FakeKubectl
from support.gateway_rig import ACTOR, SID, PeopleKube, created, turn, user_message


class TestBroker:
    """Hands out exec tokens and keys, and notes for whom."""

    __test__ = False

    def __init__(self):
        self.key = SigningKey.generate()
        self.asked = []
        self.up = True

    async def exec_token(self, namespace, sandbox_uid, actor):
        self.asked.append((namespace, sandbox_uid, actor))
        return "exec-token"

    async def keys(self):
        return {self.key.kid: self.key.public}

    async def healthy(self):
        return self.up


@dataclass
class Rig:
    """The gateway under test and what stands around it."""

    url: str
    tls: ssl.SSLContext
    kube: PeopleKube
    broker: TestBroker
    gateway: Gateway
    store: Any
    certificates: tls_rig.Certificates
    logs: dict[str, Any]
    http: aiohttp.ClientSession
    _lease: Lease | None = None
    _worker: Any = None
    _clients: list[Any] = field(default_factory=list)

    def sdk(self, token="jane-token", **options):
        """The official client, strict."""
        client = AsyncAnthropic(
            api_key=token,
            base_url=self.url,
            max_retries=options.pop("max_retries", 0),
            _strict_response_validation=True,
            http_client=DefaultAsyncHttpxClient(verify=self.tls),
            **options,
        )
        self._clients.append(client)
        return client

    async def call(self, method, path, *, token="jane-token", **options):
        """One plain request: (status, decoded body, headers)."""
        headers = {**({"authorization": f"Bearer {token}"} if token else {})}
        headers |= options.pop("headers", {})
        async with self.http.request(method, self.url + path, headers=headers, **options) as got:
            return got.status, await got.json(content_type=None), got.headers

    async def create(self, namespace="default", *, custom_tools=()):
        """A session with its first message."""
        meta = SessionMeta(SID, namespace, "fix", "u", {})
        await self.logs[namespace].create_session(
            meta,
            [
                NewEvent(
                    ev.SESSION_CREATED,
                    {**created(custom_tools=custom_tools), "namespace": namespace},
                    id="created",
                ),
                NewEvent(ev.USER_MESSAGE, user_message("Fix the tests"), id="msg:0"),
            ],
        )

    async def work(self, *rows, status=None):
        """Append as the harness that holds the session."""
        if self._worker is None:
            self._worker = self.store.worker_log("pod", "default")
            await self._worker.beat()
        if self._lease is None:
            self._lease = await self._worker.claim(SID)
            assert isinstance(self._lease, Lease), self._lease
        await self._worker.append(
            self._lease, [NewEvent(kind, data) for kind, data in rows], status=status
        )

    async def run_turn(self):
        """Append a whole turn (`turn()` without the external events and the wake)."""
        await self.work(*turn()[3:])

    async def finish(self):
        """End the log."""
        control = self.store.control_log()
        deleted = NewEvent(ev.SESSION_DELETED, {"actor": ACTOR}, id="deleted")
        await control.close("default", SID, deleted, retain_s=3600)


@pytest.fixture
async def rig(store_url, tmp_path):
    certificates = tls_rig.make(tmp_path, "cowhand-gateway.cowhand-system.svc")
    trust = ssl.create_default_context(cafile=str(certificates.ca))
    kube, broker, hands = PeopleKube(), TestBroker(), PinnedHands()
    async with connect(StoreConfig(store_url)) as store:
        logs = {name: store.session_log(name) for name in ("default", "team-a")}
        executor = Executor(kube, store.control_log(), logs, broker, hands)
        previews = {name: store.previews(name) for name in logs}
        gateway = Gateway(Authority(kube), logs, executor, broker, previews=previews)
        runner = web.AppRunner(build(gateway), access_log=None, shutdown_timeout=1)
        await runner.setup()
        tls = ServerCertificate(str(certificates.cert), str(certificates.key)).context
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        port = runner.addresses[0][1]
        connector = aiohttp.TCPConnector(ssl=trust)
        async with aiohttp.ClientSession(connector=connector) as http:
            url = f"https://127.0.0.1:{port}"
            made = Rig(url, trust, kube, broker, gateway, store, certificates, logs, http)
            yield made
            for client in made._clients:
                await client.close()
        gateway.stopping.set()
        await runner.cleanup()
        await hands.close()


class Cli:
    """Runs `python -m cowhand` with the fake kubectl on PATH."""

    def __init__(self, rig, kubectl):
        self.rig = rig
        self.kubectl = kubectl

    async def start(self, *arguments, stdin=None):
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "cowhand",
            *arguments,
            stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": f"{self.kubectl.bin}", "PYTHONIOENCODING": "utf-8"},
            # A test run in the background of a shell ignores SIGINT, and its children would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        )

    async def __call__(self, *arguments, code=0, stdin=None):
        process = await self.start(*arguments, stdin=stdin)
        raw = await asyncio.wait_for(process.communicate(stdin), 40)
        out, err = (text.decode() for text in raw)
        assert process.returncode == code, f"{process.returncode}: {out}\n{err}"
        return out if code == 0 else out + err


@pytest.fixture
async def cli(rig, tmp_path):
    folder = tmp_path / "kubectl"
    folder.mkdir()
    kubectl = FakeKubectl(folder)
    kubectl.write("token", "jane-token")
    kubectl.write("port", rig.url.rsplit(":", 1)[1])
    ca = {"data": {"ca.crt": rig.certificates.ca.read_text()}}
    kubectl.put("configmap", "cowhand-ca", ca, "cowhand-system")
    kubectl.put("agentsession", "fix", {"status": {"sessionID": SID, "state": "idle", "turns": 1}})
    return Cli(rig, kubectl)
