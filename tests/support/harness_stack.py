"""The harness as a process, with everything around it real but Kubernetes: store, proxies, sandboxd, model server.

The broker is a stub that signs with a real key, and `Stack.operate` plays the operator: it answers each
`hand.requested` with a sandboxd and its proxy, on loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from cowhand import session
from cowhand.errors import StoreUnavailable
from cowhand.hands.sandbox import SandboxSettings
from cowhand.hands.transport import PinnedTransport, ProxyCredentials
from cowhand.harness.model import AnthropicModel
from cowhand.harness.run import surroundings
from cowhand.harness.worker import Worker, WorkerSettings
from cowhand.proxy import harness as harness_proxy
from cowhand.proxy import sandbox as sandbox_proxy
from cowhand.proxy.server import Server
from cowhand.proxy.tls import self_signed
from cowhand.session import events as ev
from cowhand.session.events import Event, NewEvent
from cowhand.session.log import HandRecord, SessionMeta, SessionState, StoreConfig
from cowhand.wire.keys import SigningKey, dump_keys
from cowhand.wire.records import sign_record
from cowhand.wire.tokens import HandClaims, sign
from support.harness_rig import NAMESPACE, created, user
from support.store import free_port

ROOT = Path(__file__).parents[2]
API_KEY = "model-key-for-tests"


@dataclass
class StubBroker:
    """Stands where a proxy expects its `BrokerClient`; believes everybody."""

    key: SigningKey
    model_url: str = ""
    sandbox_uid: str = ""
    session_id: str = ""
    tokens: int = 0
    available: bool = True

    async def keys(self) -> dict[str, Any]:
        return dump_keys([self.key.public])

    async def register(self, port: int, cert_sha256: str) -> dict[str, Any]:
        return {"sandbox_uid": self.sandbox_uid, "session_id": self.session_id, "owner_epoch": 1}

    async def post(self, target: str, body: Mapping[str, Any]) -> dict[str, Any]:
        if target == "/v1/model-credential":
            headers = {"x-api-key": API_KEY}
            return {
                "base_url": self.model_url, "headers": headers, "expires_in_s": 3600,
                "credential_id": "c",
            }  # fmt: skip
        now = int(time.time())
        epoch = int(body["lease"].split(":")[0])
        claims = HandClaims(body["sandbox_uid"], body["session_id"], 1, epoch, now, now + 300)
        self.tokens += 1
        return {"token": sign(claims, self.key), "expires_in_s": 300, "kid": self.key.kid}

    def close(self) -> None:
        return None


async def start_process(
    *argv: str, env: Mapping[str, str], log: Path
) -> asyncio.subprocess.Process:
    """A child with its output in a file."""
    with log.open("ab") as out:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", *argv, env={**os.environ, **env}, stdout=out, stderr=out
        )


async def until(what: str, check: Callable[[], Any], seconds: float = 90.0) -> Any:
    """The first true answer of `check`; fails with `what` after a generous while."""
    deadline = time.monotonic() + seconds
    while True:
        found = check()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        await asyncio.sleep(0.02)


@dataclass
class SandboxPod:
    """A sandboxd process and its proxy.

    Attributes:
        start: starts sandboxd on the same port with the same files, as a kubelet does with a container that ended.
    """

    process: asyncio.subprocess.Process
    server: Server
    proxy: sandbox_proxy.SandboxProxy
    record: HandRecord
    workdir: Path
    start: Callable[[], Awaitable[asyncio.subprocess.Process]]

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        await self.server.close()
        self.proxy.close()


@dataclass
class Stack:
    """See the module."""

    store: session.Store  # type: ignore[name-defined]
    url: str
    folder: Path
    key: SigningKey
    model_url: str
    proxy_url: str
    http: aiohttp.ClientSession
    model: asyncio.subprocess.Process
    broker: StubBroker
    pods: dict[tuple[str, str, int], SandboxPod] = field(default_factory=dict)
    workers: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    follows: list[asyncio.Task[None]] = field(default_factory=list)
    local: list[asyncio.Task[None]] = field(default_factory=list)
    closing: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    way_to_sandboxd: Callable[[int], Awaitable[int]] | None = None

    # Sessions.

    async def create(self, text: str, *, name: str = "", **options: Any) -> str:
        """A session with this first message; the operator's part begins to watch it."""
        uid = uuid.uuid4().hex
        session_id = f"sesn_{uid}"
        model = {"base_url": self.model_url, "secret": None}
        meta = SessionMeta(session_id, NAMESPACE, name, uid, model)
        data = created(**options)
        await self.store.session_log().create_session(
            meta, [NewEvent(ev.SESSION_CREATED, data, id="created"), user(text, "msg:0")]
        )
        self.follows.append(asyncio.create_task(self.operate(session_id)))
        return session_id

    async def events(self, session_id: str) -> list[Event]:
        return await self.store.session_log().get_events(session_id)

    async def of(self, session_id: str, kind: str) -> list[Mapping[str, Any]]:
        return [event.data for event in await self.events(session_id) if event.type == kind]

    async def state(self, session_id: str) -> SessionState:
        return await self.store.session_log().get_session(session_id)

    async def emit(self, session_id: str, event: NewEvent) -> None:
        await self.store.session_log().emit_event(session_id, event)

    async def settled(
        self, session_id: str, *, turns: int = 1, seconds: float = 90.0
    ) -> list[Event]:
        """The log, once the session is parked after so many turns."""

        async def done() -> bool:
            state = await self.state(session_id)
            return state.lease == "" and state.status.get("turns", 0) >= turns

        await until(f"end of turn {turns} of {session_id}", done, seconds)
        return await self.events(session_id)

    async def reaches(self, session_id: str, kind: str, count: int = 1) -> None:
        async def there() -> bool:
            return len(await self.of(session_id, kind)) >= count

        await until(f"{count} x {kind}", there)

    # The operator's and the broker's part.

    async def operate(self, session_id: str) -> None:
        position = 1
        while True:
            # A store that is away for a while ends the iteration.
            with contextlib.suppress(StoreUnavailable):
                async for event in self.store.session_log().follow(session_id, position):
                    if event.type == ev.HAND_REQUESTED:
                        await self.provision(session_id, event.data["hand"], event.data["instance"])
                    position = event.seq + 1
                return
            await asyncio.sleep(0.1)

    async def provision(self, session_id: str, hand: str, instance: int) -> SandboxPod:
        uid = f"{session_id[5:17]}-{hand}-{instance}"
        port = free_port()
        workdir, state = self.folder / uid / "work", self.folder / uid / "state"
        workdir.mkdir(parents=True)
        state.mkdir()

        def sandboxd(port: int = port) -> Awaitable[asyncio.subprocess.Process]:
            return start_process(
                "sandboxd",
                env={
                    "PYTHONPATH": str(ROOT / "sandbox-image" / "src"), "SANDBOXD_PORT": str(port),
                    "SANDBOXD_WORKDIR": str(workdir), "SANDBOXD_STATE": str(state),
                },
                log=self.folder / f"{uid}.log",
            )  # fmt: skip

        process = await sandboxd()
        tls, cert = self_signed()
        if self.way_to_sandboxd is not None:
            port = await self.way_to_sandboxd(port)
        broker = StubBroker(self.key, sandbox_uid=uid, session_id=session_id)
        proxy = sandbox_proxy.SandboxProxy(broker, port)  # type: ignore[arg-type]
        server = Server(proxy.app, sandbox_proxy.render, tls=tls)
        await server.start("127.0.0.1", 0)
        await proxy.become_ready(server.port, cert)
        record = HandRecord(
            session_id, hand, instance, "Ready", sandbox=uid, sandbox_uid=uid, pod_uid=f"pod-{uid}",
            address=f"127.0.0.1:{server.port}", cert_sha256=cert, owner=session_id, owner_epoch=1,
        )  # fmt: skip
        signature = sign_record(record, self.key, namespace=NAMESPACE)
        record = HandRecord(**{**record.__dict__, "signature": signature})
        pod = SandboxPod(process, server, proxy, record, workdir, sandboxd)
        self.pods[session_id, hand, instance] = pod
        while True:
            with contextlib.suppress(StoreUnavailable):
                await self.store.control_log().put_hand(NAMESPACE, record)
                return pod
            await asyncio.sleep(0.1)

    async def lose(self, session_id: str, instance: int = 1) -> None:
        """The sandbox pod is gone, and the operator says so."""
        pod = self.pods[session_id, "main", instance]
        await pod.kill()
        lost = HandRecord(
            **{**pod.record.__dict__, "state": "Lost", "reason": "PodGone", "signature": ""}
        )
        await self.store.control_log().put_hand(NAMESPACE, lost)

    # Workers.

    async def worker(self, *, prelude: str = "", **settings: str) -> str:
        """Start `cowhand harness`; answers its pod uid once it is ready. `prelude`: Python that it runs first."""
        pod_uid = f"pod-{uuid.uuid4().hex[:8]}"
        code = (
            f"import asyncio, os, sys\n{prelude}\n"
            "from cowhand import settings\nfrom cowhand.harness.run import run\n"
            "from cowhand.telemetry import logging\n"
            "logging.setup('harness')\n"
            "asyncio.run(run(settings.harness(), ready_file=sys.argv[1]))\n"
        )
        ready = self.folder / pod_uid
        env = {
            "COWHAND_STORE_URL": self.url, "COWHAND_NAMESPACE": NAMESPACE,
            "COWHAND_POD_UID": pod_uid, "COWHAND_PROXY_URL": self.proxy_url,
            "COWHAND_STORE_PARTITIONS": str(self.store.config.partitions), **settings,
        }  # fmt: skip
        with (self.folder / f"{pod_uid}.log").open("ab") as out:
            self.workers[pod_uid] = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, str(ready),
                env={**os.environ, **env}, stdout=out, stderr=out,
            )  # fmt: skip
        await until("the worker is ready", ready.exists)
        return pod_uid

    async def local_worker(self, store: session.Store | None = None) -> Worker:  # type: ignore[name-defined]
        """A worker in this process: quick to start, for tests that kill nobody. `store`: its own way to the store."""
        model = AnthropicModel(self.proxy_url)
        transport, credentials = PinnedTransport(), ProxyCredentials(self.proxy_url)
        ready = asyncio.Event()
        store = store or self.store
        worker = Worker(
            store.worker_log(f"pod-{uuid.uuid4().hex[:8]}"),
            store.session_log(),
            surroundings(model, transport, credentials, SandboxSettings(wait_s=30)),
            WorkerSettings(NAMESPACE),
            on_ready=ready.set,
        )
        self.local.append(asyncio.create_task(worker.run()))
        self.closing += [model.close, transport.close, credentials.close]
        await ready.wait()
        return worker

    async def stop_worker(self, pod_uid: str) -> int:
        """SIGTERM; answers the exit code."""
        process = self.workers.pop(pod_uid)
        process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(process.wait(), 30)

    async def kill_worker(self, pod_uid: str) -> None:
        """SIGKILL, and what the operator does when it sees the pod gone."""
        process = self.workers.pop(pod_uid)
        process.kill()
        await process.wait()
        await self.store.control_log().drop_worker(NAMESPACE, pod_uid)

    # The model server.

    async def control(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"x-api-key": API_KEY}
        url = f"{self.model_url}/_control/{path}"
        async with self.http.request(method, url, json=body, headers=headers) as answer:
            text = await answer.text()
            assert answer.status < 300, f"{method} {path}: {answer.status} {text}"
            return json.loads(text) if text else None

    async def script(self, name: str, *turns: dict[str, Any]) -> None:
        await self.control("PUT", f"scripts/{name}", {"turns": list(turns)})

    async def release(self, gate: str) -> None:
        await self.control("POST", f"release/{gate}")

    async def at_gate(self, gate: str) -> None:
        async def waits() -> bool:
            found = await self.control("GET", "gates")
            return any(item["gate"] == gate for item in found["waiting"])

        await until(f"somebody at gate {gate}", waits)

    async def requests(self, session_id: str) -> list[dict[str, Any]]:
        found = await self.control("GET", f"requests?session={session_id}")
        return [json.loads(item["body"]) for item in found["requests"]]

    async def close(self) -> None:
        for task in (*self.follows, *self.local):
            task.cancel()
        await asyncio.gather(*self.follows, *self.local, return_exceptions=True)
        for close in self.closing:
            await close()
        for process in self.workers.values():
            if process.returncode is None:
                process.kill()
            await process.wait()
        for pod in self.pods.values():
            await pod.kill()


@contextlib.asynccontextmanager
async def stack(
    store_url: str,
    folder: Path,
    *,
    partitions: int = 2,
    way_to_model: Callable[[int], Awaitable[int]] | None = None,
    way_to_proxy: Callable[[StubBroker], Awaitable[str]] | None = None,
) -> AsyncIterator[Stack]:
    """Everything but workers, which a test (or a benchmark) starts itself.

    Args:
        store_url: of the store.
        folder: for logs and for the files of sandboxes.
        partitions: of the store.
        way_to_model: gets the port of the model server, answers the one by which the harness's proxy reaches it.
        way_to_proxy: starts another proxy of the harness than one in this process, and answers its URL.
    """
    key, port = SigningKey.generate(), free_port()
    model = await start_process(
        "model_server",
        env={
            "PYTHONPATH": str(ROOT / "model-server" / "src"), "MODEL_SERVER_API_KEY": API_KEY,
            "MODEL_SERVER_HOST": "127.0.0.1", "MODEL_SERVER_PORT": str(port),
            "MODEL_SERVER_DELTA_MS": "0",
        },
        log=folder / "model.log",
    )  # fmt: skip
    model_url = f"http://127.0.0.1:{port}"
    way = f"http://127.0.0.1:{await way_to_model(port)}" if way_to_model else model_url
    broker = StubBroker(key, model_url=way)
    proxy = harness_proxy.HarnessProxy(broker)  # type: ignore[arg-type]
    server = Server(proxy.app, harness_proxy.render)
    await server.start("127.0.0.1", 0)
    proxy_url = f"http://127.0.0.1:{server.port}"
    if way_to_proxy is not None:
        proxy_url = await way_to_proxy(broker)
    config = StoreConfig(url=store_url, partitions=partitions)
    async with (
        aiohttp.ClientSession() as http,
        session.connect(config, namespace=NAMESPACE) as store,
    ):
        made = Stack(
            store, store_url, folder, key, model_url, proxy_url, http, model, broker,
        )  # fmt: skip

        async def answers() -> bool:
            with contextlib.suppress(aiohttp.ClientError):
                async with http.get(f"{model_url}/healthz") as answer:
                    return answer.status == 200
            return False

        try:
            await until("the model server answers", answers)
            yield made
        finally:
            await made.close()
            await server.close()
            proxy.close()
            model.kill()
            await model.wait()
