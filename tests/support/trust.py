"""A whole chain of trust on loopback: CA, the real broker on an in-memory Kubernetes and log, the real
proxies, a recording upstream. Used by tests/integration/{proxy,broker} and tests/adversarial.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import datetime
import ipaddress
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cowhand.broker.app import Broker, Names, Sharing
from cowhand.broker.keys import KeyStore
from cowhand.errors import SessionNotFound
from cowhand.proxy import harness, sandbox
from cowhand.proxy.brokerclient import BrokerClient
from cowhand.proxy.http1 import Limits
from cowhand.proxy.server import Server
from cowhand.proxy.tls import self_signed
from cowhand.session.log import ControlLog, HandRecord, SessionLog, SessionMeta, SessionState
from support.memory_kube import MemoryKube

NAMESPACE = "team"
OTHER_NAMESPACE = "rivals"
GATEWAY = "system:serviceaccount:cowhand-system:cowhand-gateway"
SESSION = "sesn_" + "a" * 32
OTHER_SESSION = "sesn_" + "b" * 32
HARNESS_POD = "harness-pod-uid"
LEASE = f"7:{HARNESS_POD}.00c0ffee:nonce"
MODEL_KEY = "sk-ant-api03-THE-KEY-THAT-MUST-NOT-LEAK"
SANDBOX = "aaaaaaaaaaaa-main-1"
SANDBOX_UID = "sandbox-uid-1"


@dataclass
class Authority:
    """A CA in a directory of its own."""

    folder: Path
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"CA {self.folder.name}")])
        self.ca_file = self.folder / "ca.crt"
        public = self.key.public_key()
        identifier = x509.SubjectKeyIdentifier.from_public_key(public)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = (
            self._builder(self.name, public)
            .add_extension(x509.BasicConstraints(True, None), True)
            .add_extension(identifier, False)
            .add_extension(usage, True)
        )
        self.ca_file.write_bytes(self._pem(builder))

    def server(self, *names: str) -> ssl.SSLContext:
        """A server context with a certificate for these names."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        alternatives: list[x509.GeneralName] = []
        for name in names:
            try:
                alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                alternatives.append(x509.DNSName(name))
        builder = self._builder(subject, key.public_key()).add_extension(
            x509.SubjectAlternativeName(alternatives), False
        )
        cert, private = self.folder / f"{names[0]}.crt", self.folder / f"{names[0]}.key"
        cert.write_bytes(self._pem(builder))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, private)
        return context

    def _builder(
        self, subject: x509.Name, public: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(authority, False)
        )

    def _pem(self, builder: x509.CertificateBuilder) -> bytes:
        signed = builder.sign(self.key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)


class Logs:
    """The two sides of the log that the broker uses, in memory."""

    def __init__(self) -> None:
        self.sessions: dict[tuple[str, str], SessionState] = {}
        self.records: dict[tuple[str, str], HandRecord] = {}

    def of(self, namespace: str) -> SessionLog:
        return cast(SessionLog, _Tenant(self, namespace))

    async def put_hand(self, namespace: str, record: HandRecord) -> None:
        old = self.records.get((namespace, record.sandbox_uid))
        if old is None or old.state != "Lost":
            self.records[namespace, record.sandbox_uid] = record

    async def get_sandbox(self, namespace: str, sandbox_uid: str) -> HandRecord | None:
        return self.records.get((namespace, sandbox_uid))


@dataclass
class _Tenant:
    logs: Logs
    namespace: str

    async def get_session(self, session_id: str) -> SessionState:
        found = self.logs.sessions.get((self.namespace, session_id))
        if found is None:
            raise SessionNotFound("no such session")
        return found


def session_state(
    base_url: str, *, session_id: str = SESSION, lease: str = LEASE, namespace: str = NAMESPACE
) -> SessionState:
    model = {"base_url": base_url, "secret": {"name": "cowhand-model", "key": "api-key"}}
    meta = SessionMeta(session_id, namespace, "demo", "uid", model)
    epoch = int(lease.partition(":")[0]) if lease else 0
    return SessionState(meta, "running", "running", lease, epoch, 5, {}, 0)


class World:
    """The broker's surroundings: tokens by text, pods, Secrets, sessions."""

    def __init__(self) -> None:
        self.kube = MemoryKube()
        self.logs = Logs()
        self.tokens: dict[str, dict[str, Any]] = {}
        self.reviews = 0
        self.kube.review = self._review

    def token(
        self,
        text: str,
        account: str,
        *,
        namespace: str = NAMESPACE,
        uid: str = "",
        name: str = "",
        audience: str = "cowhand-broker",
    ) -> str:
        """Make a token that the API server knows."""
        extra = {}
        if uid:
            extra["authentication.kubernetes.io/pod-uid"] = [uid]
            extra["authentication.kubernetes.io/pod-name"] = [name or uid]
        user = {"username": f"system:serviceaccount:{namespace}:{account}", "extra": extra}
        self.tokens[text] = {
            "authenticated": True,
            "audiences": [audience],
            "user": user,
        }
        return text

    def secret(self, hosts: str, value: str = MODEL_KEY, *, namespace: str = NAMESPACE) -> None:
        self.kube.put(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {
                    "namespace": namespace,
                    "name": "cowhand-model",
                    "annotations": {"cowhand.dev/allowed-hosts": hosts},
                },
                "data": {"api-key": base64.b64encode(value.encode()).decode()},
            }
        )

    def sandbox_pod(self, *, ip: str = "127.0.0.1", name: str = SANDBOX, **meta: Any) -> None:
        """A Sandbox held by SESSION and its pod."""
        holder = {"sessionID": SESSION, "hand": "main", "instance": 1}
        self.kube.put(
            {
                "apiVersion": "cowhand.dev/v1alpha1",
                "kind": "Sandbox",
                "metadata": {"namespace": NAMESPACE, "name": SANDBOX, "uid": SANDBOX_UID},
                "spec": {"holder": holder},
            }
        )
        owner = {
            "apiVersion": "cowhand.dev/v1alpha1",
            "kind": "Sandbox",
            "name": SANDBOX,
            "uid": SANDBOX_UID,
            "controller": True,
        }
        self.kube.put(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "namespace": NAMESPACE,
                    "name": name,
                    "uid": "sandbox-pod-uid",
                    "labels": {
                        "cowhand.dev/session-id": SESSION,
                        "cowhand.dev/hand": "main",
                        "cowhand.dev/instance": "1",
                    },
                    "ownerReferences": [owner],
                    **meta,
                },
                "spec": {"serviceAccountName": "cowhand-sandbox"},
                "status": {"podIP": ip, "podIPs": [{"ip": ip}]},
            }
        )
        self.token("sandbox-token", "cowhand-sandbox", uid="sandbox-pod-uid", name=name)

    def _review(self, manifest: dict[str, Any]) -> dict[str, Any]:
        self.reviews += 1
        return self.tokens.get(manifest["spec"]["token"], {"authenticated": False})


@dataclass
class Upstream:
    """A server that records raw requests and answers with raw bytes.

    Attributes:
        requests: head and body of each request, as received.
        answer: writes the answer to a request; `reply` makes one.
        connections: how many connections were made.
        hold: while not set, answers wait.
    """

    tls: ssl.SSLContext | None = None
    requests: list[tuple[bytes, bytes]] = field(default_factory=list)
    connections: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    received: asyncio.Event = field(default_factory=asyncio.Event)
    answer: Callable[[Upstream, asyncio.StreamWriter], Awaitable[None]] | None = None
    port: int = 0

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Upstream]:
        tasks: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            self.connections += 1
            try:
                await self._talk(reader, writer)
            except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass
            finally:
                self.closed.set()
                tasks.discard(task)
                writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", self.port, ssl=self.tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                return
            body = b""
            lower = head.lower()
            if b"content-length:" in lower:
                size = int(lower.split(b"content-length:")[1].split(b"\r\n")[0])
                body = await reader.readexactly(size)
            elif b"transfer-encoding: chunked" in lower:
                while size := int(await reader.readline(), 16):
                    body += await reader.readexactly(size)
                    await reader.readexactly(2)
                await reader.readline()
            self.requests.append((head, body))
            self.received.set()
            if self.answer is None:
                writer.write(reply(200, b'{"ok":true}'))
            else:
                await self.answer(self, writer)
            await writer.drain()


def reply(status: int, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", "content-type: application/json", *headers]
    lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass
class Answer:
    """An HTTP answer as a client sees it; status 0 means the connection was cut."""

    status: int
    headers: dict[str, str]
    body: bytes
    closed: bool = False

    def json(self) -> Any:
        return json.loads(self.body)


class RawClient:
    """Sends any bytes; reads whole answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int, tls: ssl.SSLContext | None = None) -> RawClient:
        name = "cowhand-sandbox" if tls else None
        return cls(*await asyncio.open_connection("127.0.0.1", port, ssl=tls, server_hostname=name))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def ask(self, data: bytes) -> Answer:
        with contextlib.suppress(ConnectionError):
            await self.send(data)
        return await self.read()

    async def read(self) -> Answer:
        try:
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except (asyncio.IncompleteReadError, ConnectionError):
            return Answer(0, {}, b"", True)
        status, *lines = head.split("\r\n")
        headers = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if colon:
                headers[name.lower()] = value.strip()
        body = b""
        cut = False
        try:
            if "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            elif headers.get("transfer-encoding") == "chunked":
                while size := int((await self.reader.readline()) or b"-1", 16):
                    if size < 0:
                        cut = True
                        break
                    body += await self.reader.readexactly(size)
                    await self.reader.readexactly(2)
                else:
                    await self.reader.readline()
        except (asyncio.IncompleteReadError, ConnectionError, ValueError):
            cut = True
        return Answer(int(status.split(" ")[1]), headers, body, cut)

    async def at_end(self) -> bool:
        """Whether the server closes the connection."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.writer.close()


def request(method: str, target: str, *headers: str, body: bytes = b"", host: str = "x") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *headers]
    if body:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def messages(*headers: str, body: bytes = b"{}", target: str = "/v1/messages") -> bytes:
    """A model request as the harness sends it."""
    ours = (f"x-cowhand-session: {SESSION}", f"x-cowhand-lease: {LEASE}")
    return request("POST", target, *ours, *headers, body=body)


@dataclass
class Rig:
    """Everything that runs; see `rig`."""

    world: World
    folder: Path
    authority: Authority
    keys: KeyStore
    broker: Broker
    broker_port: int
    upstream: Upstream
    stack: contextlib.AsyncExitStack

    @property
    def broker_url(self) -> str:
        return f"https://localhost:{self.broker_port}"

    def client(self, token: str, **options: Any) -> BrokerClient:
        path = self.folder / f"{token}.token"
        path.write_text(token + "\n")
        client = BrokerClient(self.broker_url, str(self.authority.ca_file), str(path), **options)
        self.stack.callback(client.close)
        return client

    async def harness(
        self, *, limits: Limits | None = None, token: str = "harness-token", **options: Any
    ) -> Server:
        """A harness proxy that serves on loopback."""
        proxy = harness.HarnessProxy(
            self.client(token), ca_file=str(self.authority.ca_file), **options
        )
        server = Server(proxy.app, harness.render, limits=limits)
        await server.start("127.0.0.1", 0)
        self.stack.callback(proxy.close)
        self.stack.push_async_callback(server.close)
        return server

    async def sandbox(
        self, sandboxd_port: int, *, limits: Limits | None = None, register: bool = True
    ) -> tuple[Server, sandbox.SandboxProxy, ssl.SSLContext]:
        """A sandbox proxy, registered at the broker, and a client context that trusts it."""
        tls, digest = self_signed()
        proxy = sandbox.SandboxProxy(self.client("sandbox-token"), sandboxd_port)
        server = Server(proxy.app, sandbox.render, limits=limits, tls=tls)
        await server.start("127.0.0.1", 0)
        self.stack.callback(proxy.close)
        self.stack.push_async_callback(server.close)
        if register:
            await proxy.become_ready(server.port, digest)
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return server, proxy, context

    async def open(self, port: int, tls: ssl.SSLContext | None = None) -> RawClient:
        client = await RawClient.open(port, tls)
        self.stack.callback(client.close)
        return client

    def set_session(self, **changes: Any) -> None:
        """Replace parts of SESSION's state, for example `lease`."""
        key = (NAMESPACE, SESSION)
        self.world.logs.sessions[key] = dataclasses.replace(
            self.world.logs.sessions[key], **changes
        )


@contextlib.asynccontextmanager
async def rig(
    folder: Path, *, upstream_tls: bool = False, sharing: Sharing | None = None
) -> AsyncIterator[Rig]:
    """A broker with one tenant, one session under lease, one model Secret, and an upstream."""
    authority = Authority(folder / "ca")
    async with contextlib.AsyncExitStack() as stack:
        tls = authority.server("localhost") if upstream_tls else None
        upstream = await stack.enter_async_context(Upstream(tls).serving())
        world = World()
        scheme = "https" if upstream_tls else "http"
        base_url = f"{scheme}://localhost:{upstream.port}"
        world.logs.sessions[NAMESPACE, SESSION] = session_state(base_url)
        world.secret(f"localhost:{upstream.port}")
        world.token("harness-token", "cowhand-harness", uid=HARNESS_POD)
        world.token("gateway-token", "cowhand-gateway", namespace="cowhand-system", uid="gw")
        keys = KeyStore(world.kube, "cowhand-system", "cowhand-broker-keys")
        await keys.load()
        broker = Broker(
            kube=world.kube,
            sessions=world.logs.of,
            control=cast(ControlLog, world.logs),
            keys=keys,
            names=Names(
                (NAMESPACE, OTHER_NAMESPACE), GATEWAY, "cowhand-harness", "cowhand-sandbox"
            ),
            sharing=sharing,
        )
        runner = web.AppRunner(broker.application(), access_log=None, shutdown_timeout=1)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(
            runner, "127.0.0.1", 0, ssl_context=authority.server("localhost", "127.0.0.1")
        )
        await site.start()
        server = site._server
        assert isinstance(server, asyncio.Server)
        port = server.sockets[0].getsockname()[1]
        yield Rig(world, folder, authority, keys, broker, port, upstream, stack)
