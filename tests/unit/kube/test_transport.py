"""Both ways to the API server send the same requests; a pod's way renews its token and trusts its CA alone."""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import yaml
from aiohttp import web

from cowhand.errors import UserError
from cowhand.kube import kinds, transport
from cowhand.kube.client import AioKube
from cowhand.kube.errors import Invalid, KubeUnavailable, Unauthorized
from cowhand.kube.transport import TOKEN_S, PodTransport
from support import tls_rig
from support.store import free_port


@dataclass
class FakeServer:
    """Keeps what it is asked, and answers the next of `answers` (status, headers, body), else what was sent."""

    ca: Path
    port: int
    seen: list[dict[str, Any]] = field(default_factory=list)
    answers: list[tuple[int, dict[str, str], Any]] = field(default_factory=list)
    runner: web.AppRunner | None = None

    async def handle(self, request: web.Request) -> web.Response:
        text = await request.text()
        self.seen.append(
            {
                "method": request.method,
                "path": request.raw_path,
                "token": request.headers.get("Authorization"),
                "type": request.headers.get("Content-Type") if text else None,
                "body": json.loads(text) if text else None,
            }
        )
        default: tuple[int, dict[str, str], Any] = (200, {}, self.seen[-1]["body"] or {})
        status, headers, body = self.answers.pop(0) if self.answers else default
        return web.json_response(body, status=status, headers=headers)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeServer]:
    certificates = tls_rig.make(tmp_path)
    fake = FakeServer(certificates.ca, free_port())
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.handle)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.cert, certificates.key)
    runner = fake.runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", fake.port, ssl_context=context).start()
    yield fake
    await runner.cleanup()


def account(folder: Path, server: FakeServer, token: str = "first") -> tuple[dict[str, str], Path]:
    """Environment and folder of a pod."""
    place = folder / "account"
    place.mkdir()
    (place / "ca.crt").write_bytes(server.ca.read_bytes())
    (place / "token").write_text(token)
    return {
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": str(server.port),
    }, place


def kubeconfig(folder: Path, server: FakeServer) -> str:
    ca = base64.b64encode(server.ca.read_bytes()).decode()
    where = {"server": f"https://127.0.0.1:{server.port}", "certificate-authority-data": ca}
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": where}],
        "users": [{"name": "c", "user": {"token": "first"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
    }  # fmt: skip
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.fixture(params=["pod", "kubeconfig"])
async def kube(
    request: pytest.FixtureRequest,
    server: FakeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[AioKube]:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # must not be used
    if request.param == "pod":
        environ, place = account(tmp_path, server)
        pod = transport.in_pod(environ=environ, account=place)
        assert pod is not None
        client = AioKube(pod)
    else:
        client = AioKube(await transport.by_kubeconfig(kubeconfig(tmp_path, server)))
    yield client
    await client.close()


async def test_requests_are_the_same(kube: AioKube, server: FakeServer) -> None:
    manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"namespace": "a", "name": "b"},
    }
    await kube.get(kinds.CONFIG_MAP, "a", "b")
    await kube.apply(manifest, manager="me & you")
    await kube.patch(kinds.CONFIG_MAP, "a", "b", {"data": {"k": "\u00e9"}})
    await kube.create(manifest)
    await kube.delete(kinds.CONFIG_MAP, "a", "b", uid="u1")
    one, many = "/api/v1/namespaces/a/configmaps/b", "/api/v1/namespaces/a/configmaps"
    options = {
        "apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background",
        "preconditions": {"uid": "u1"},
    }  # fmt: skip
    expected = [
        ("GET", one, None, None),
        ("PATCH", f"{one}?fieldManager=me+%26+you&force=true", "application/apply-patch+yaml", manifest),
        ("PATCH", one, "application/merge-patch+json", {"data": {"k": "\u00e9"}}),
        ("POST", many, "application/json", manifest),
        ("DELETE", one, "application/json", options),
    ]  # fmt: skip
    assert [(x["method"], x["path"], x["type"], x["body"]) for x in server.seen] == expected
    assert {x["token"].lower() for x in server.seen} == {"bearer first"}


async def test_pages_are_asked_for_with_the_servers_token(
    kube: AioKube, server: FakeServer
) -> None:
    page = {"metadata": {"continue": "a+b/c=="}, "items": [{"metadata": {"name": "x"}}]}
    server.answers += [(200, {}, page), (200, {}, {"items": []})]
    found = await kube.list(kinds.POD, "a", label_selector="x=y,z")
    assert [one["metadata"]["name"] for one in found] == ["x"]
    query = [("limit", "500"), ("labelSelector", "x=y,z")]
    asked = [urlsplit(one["path"]) for one in server.seen]
    assert {one.path for one in asked} == {"/api/v1/namespaces/a/pods"}
    assert [parse_qsl(one.query) for one in asked] == [query, [*query, ("continue", "a+b/c==")]]


async def test_refusals_come_with_what_the_server_said(kube: AioKube, server: FakeServer) -> None:
    said = {"kind": "Status", "message": "slow down", "code": 429}
    server.answers.append((429, {"Retry-After": "7"}, said))
    with pytest.raises(KubeUnavailable, match="slow down") as raised:
        await kube.get(kinds.POD, "a", "b")
    assert raised.value.after == 7
    assert len(server.seen) == 1, "the caller's queue tries again, not the client"


async def test_no_answer_is_unavailable(kube: AioKube, server: FakeServer) -> None:
    assert server.runner is not None
    await server.runner.cleanup()
    with pytest.raises(KubeUnavailable, match="does not answer"):
        await kube.get(kinds.POD, "a", "b")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextlib.asynccontextmanager
async def as_pod(server: FakeServer, place: Path, clock: Clock) -> AsyncIterator[AioKube]:
    url = f"https://127.0.0.1:{server.port}"
    client = AioKube(PodTransport(url, place / "ca.crt", place / "token", clock=clock))
    try:
        yield client
    finally:
        await client.close()


async def test_a_renewed_token_is_read(server: FakeServer, tmp_path: Path) -> None:
    _, place = account(tmp_path, server)
    clock = Clock()
    async with as_pod(server, place, clock) as kube:
        await kube.get(kinds.POD, "a", "b")
        (place / "token").write_text("second\n")
        clock.now += TOKEN_S - 1
        await kube.get(kinds.POD, "a", "b")
        clock.now += 1
        await kube.get(kinds.POD, "a", "b")
    assert [one["token"] for one in server.seen] == [
        "Bearer first",
        "Bearer first",
        "Bearer second",
    ]


async def test_a_refused_token_is_read_again(server: FakeServer, tmp_path: Path) -> None:
    _, place = account(tmp_path, server)
    async with as_pod(server, place, Clock()) as kube:
        server.answers.append((401, {}, {"kind": "Status", "message": "expired"}))
        with pytest.raises(Unauthorized):
            await kube.get(kinds.POD, "a", "b")
        (place / "token").write_text("second")
        await kube.get(kinds.POD, "a", "b")
    assert [one["token"] for one in server.seen] == ["Bearer first", "Bearer second"]


async def test_a_token_that_is_gone_is_no_crash(server: FakeServer, tmp_path: Path) -> None:
    _, place = account(tmp_path, server)
    clock = Clock()
    async with as_pod(server, place, clock) as kube:
        (place / "token").write_text("")
        clock.now += TOKEN_S
        with pytest.raises(KubeUnavailable, match="token is empty"):
            await kube.get(kinds.POD, "a", "b")
    assert not server.seen


async def test_another_ca_is_refused(server: FakeServer, tmp_path: Path) -> None:
    """No token goes to a server that the pod's CA does not vouch for."""
    _, place = account(tmp_path, server)
    other = tmp_path / "other"
    other.mkdir()
    (place / "ca.crt").write_bytes(tls_rig.make(other).ca.read_bytes())
    async with as_pod(server, place, Clock()) as kube:
        with pytest.raises(KubeUnavailable, match=r"(?i)certificate"):
            await kube.get(kinds.POD, "a", "b")
    assert not server.seen


async def test_a_redirect_takes_no_token_along(server: FakeServer, tmp_path: Path) -> None:
    _, place = account(tmp_path, server)
    async with as_pod(server, place, Clock()) as kube:
        server.answers.append((302, {"Location": "/elsewhere"}, {}))
        with pytest.raises(Invalid):
            await kube.get(kinds.POD, "a", "b")
    assert [one["path"] for one in server.seen] == ["/api/v1/namespaces/a/pods/b"]


def test_outside_a_pod_there_is_no_such_way(tmp_path: Path) -> None:
    inside = {"KUBERNETES_SERVICE_HOST": "h", "KUBERNETES_SERVICE_PORT": "1"}
    assert transport.in_pod(environ=inside, account=tmp_path) is None, "no token is mounted"
    (tmp_path / "token").write_text("t")
    assert transport.in_pod(environ={}, account=tmp_path) is None
    with pytest.raises(UserError, match="not usable"):
        transport.in_pod(environ=inside, account=tmp_path)


async def test_no_kubeconfig_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="KUBECONFIG"):
        await transport.by_kubeconfig(str(tmp_path / "none"))
