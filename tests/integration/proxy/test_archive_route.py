"""The harness's way to the archive: its proxy, the real archive, TLS, tokens; and that nothing else gets through."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cowhand.archive import layout
from cowhand.errors import ArchiveUnavailable, BlobMissing, LogIncompatible, UserError
from cowhand.proxy.archive import ArchiveRelay
from cowhand.proxy.server import Server
from cowhand.session import archive
from cowhand.session.blobs import Span
from cowhand.session.events import EVENT_LIMIT, Event
from cowhand.session.remote import HttpArchive
from support.archive_rig import ArchiveRig, archive_rig
from support.trust import (
    NAMESPACE,
    OTHER_NAMESPACE,
    OTHER_SESSION,
    SESSION,
    Answer,
    Rig,
    reply,
    request,
    rig,
)

DATA = b"payload" * 20_000
DIGEST = hashlib.sha256(DATA).hexdigest()
BLOB = f"/cowhand/blobs/{SESSION}/{DIGEST}"


@dataclass
class Chain:
    """A harness's proxy and the archive behind it."""

    near: Rig
    far: ArchiveRig
    server: Server

    def harness(self) -> HttpArchive:
        """What the harness holds."""
        made = HttpArchive(f"http://127.0.0.1:{self.server.port}/cowhand")
        self.near.stack.push_async_callback(made.close)
        return made

    async def ask(self, data: bytes) -> Answer:
        return await (await self.near.open(self.server.port)).ask(data)

    async def proxy(self, token: str, *, namespace: str = NAMESPACE, url: str = "") -> Server:
        """A proxy with this token."""
        relay = ArchiveRelay(
            url or self.far.url,
            str(self.far.authority.ca_file),
            self.far.token_file(token),
            namespace,
        )
        return await self.near.harness(archive=relay)


@pytest.fixture
async def chain(tmp_path: Path) -> AsyncIterator[Chain]:
    (tmp_path / "near").mkdir()
    (tmp_path / "far").mkdir()
    async with rig(tmp_path / "near") as near, archive_rig(tmp_path / "far") as far:
        made = Chain(near, far, None)  # type: ignore[arg-type]
        made.server = await made.proxy("harness")
        yield made


async def test_blobs_and_segments_pass_in_the_name_of_the_pod(chain: Chain) -> None:
    client = chain.harness()
    largest = b"y" * EVENT_LIMIT
    for data in (DATA, DATA, largest):
        digest = await client.put_blob("whatever-the-harness-says", SESSION, data)
        assert await client.get_blob("whatever-the-harness-says", SESSION, digest) == data
    stored = await chain.far.objects.entries(f"{NAMESPACE}/{SESSION}")
    assert sorted(entry.size for entry in stored) == [len(DATA), len(largest)]
    assert await client.segments(NAMESPACE, SESSION) == []
    events = [Event(n, "t", f"e{n}", n, "", b"{}") for n in range(1, 11)]
    path = layout.segment_path(NAMESPACE, SESSION, Span(1, 10))
    await chain.far.objects.create(path, archive.encode(events))
    (span,) = await client.segments(NAMESPACE, SESSION)
    assert archive.decode(await client.segment(NAMESPACE, SESSION, span)) == events
    with pytest.raises(BlobMissing):
        await client.get_blob(NAMESPACE, SESSION, "0" * 64)


async def test_another_tenants_blob_is_not_there(chain: Chain) -> None:
    await chain.far.client("rival").put_blob(OTHER_NAMESPACE, SESSION, DATA)
    with pytest.raises(BlobMissing):
        await chain.harness().get_blob(OTHER_NAMESPACE, SESSION, DIGEST)
    # The control: its own harness gets it on the same path.
    server = await chain.proxy("rival", namespace=OTHER_NAMESPACE)
    other = HttpArchive(f"http://127.0.0.1:{server.port}/cowhand")
    assert await other.get_blob(NAMESPACE, SESSION, DIGEST) == DATA
    await other.close()


@pytest.mark.parametrize(
    "target",
    [
        f"/cowhand/blobs/../{OTHER_NAMESPACE}/{SESSION}/{DIGEST}",
        f"/cowhand/blobs/{SESSION}/../../{OTHER_NAMESPACE}/{SESSION}/{DIGEST}",
        f"/cowhand/blobs/..%2f{OTHER_NAMESPACE}%2f{SESSION}/{DIGEST}",
        f"/cowhand/blobs/{OTHER_NAMESPACE}/{SESSION}/{DIGEST}",
        f"/cowhand/blobs/{SESSION}/{DIGEST}/../{DIGEST}",
        f"/cowhand/blobs/{SESSION}/{DIGEST}?x=1",
        f"/cowhand/blobs/{SESSION}/{DIGEST}#x",
        f"/cowhand/blobs/{SESSION}/{DIGEST.upper()}",
        f"/cowhand/blobs/{SESSION}%00/{DIGEST}",
        f"/cowhand/blobs/{SESSION}/{DIGEST}%0d%0aX-A:b",
        "/cowhand/blobs/",
        f"/cowhand/blobs/{SESSION}",
        f"/cowhand/segments/../blobs/{SESSION}/{DIGEST}",
        f"/cowhand/segments/{SESSION}/0-1",
        f"/cowhand/segments/{SESSION}/1-2/..",
        f"/cowhand/segments/{SESSION}/1-9999999999999",
        f"/cowhand//blobs/{SESSION}/{DIGEST}",
        f"/cowhand/blobs/../../healthz#{SESSION}",
        f"/v1/blobs/{NAMESPACE}/{SESSION}/{DIGEST}",
    ],
)
async def test_no_target_leads_elsewhere(chain: Chain, target: str) -> None:
    await chain.far.client("harness").put_blob(NAMESPACE, SESSION, DATA)
    await chain.far.client("rival").put_blob(OTHER_NAMESPACE, SESSION, DATA)
    reviews = chain.far.world.reviews
    for method in ("GET", "PUT"):
        body = b"x" if method == "PUT" else b""
        answer = await chain.ask(request(method, target, body=body))
        assert answer.status in (400, 403), (method, answer)
        assert b"payload" not in answer.body
    assert chain.far.world.reviews == reviews, "the archive was not asked"
    assert (await chain.ask(request("GET", BLOB))).body == DATA, "the control: the right one passes"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request("DELETE", BLOB), 405),
        (request("POST", BLOB, body=b"x"), 405),
        (request("PUT", f"/cowhand/segments/{SESSION}", body=b"x"), 405),
        (request("PUT", BLOB), 411),
        (request("PUT", BLOB, "transfer-encoding: chunked") + b"1\r\nx\r\n0\r\n\r\n", 411),
        (request("PUT", BLOB, f"content-length: {EVENT_LIMIT + 1}"), 413),
        (request("PUT", BLOB, body=b"not what its name says"), 400),
    ],
)
async def test_other_requests_are_refused(chain: Chain, data: bytes, status: int) -> None:
    answer = await chain.ask(data)
    assert answer.status == status, answer
    assert answer.json()["error"]["message"]
    assert await chain.far.objects.entries(NAMESPACE) == []


async def test_only_the_pods_own_token_goes_to_the_archive_and_nothing_comes_back_but_bytes(
    chain: Chain,
) -> None:
    async def answer(up: object, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(200, b"bytes", "set-cookie: a=b", "x-internal: 1"))

    upstream = chain.near.upstream
    upstream.answer = answer
    upstream.tls = chain.far.authority.server("localhost")
    async with type(upstream)(upstream.tls, answer=answer).serving() as recording:
        server = await chain.proxy("harness", url=f"https://localhost:{recording.port}")
        client = await chain.near.open(server.port)
        said = ("authorization: Bearer mine", "x-forwarded-for: 1", "Cookie: a=b", "x-a: b")
        got = await client.ask(request("GET", BLOB, *said))
        ((head, _),) = recording.requests
    lines = head.decode().lower().split("\r\n")
    assert lines[0] == f"get /v1/blobs/{NAMESPACE}/{SESSION}/{DIGEST} http/1.1"
    assert "authorization: bearer harness" in lines
    assert not [x for x in lines if "mine" in x or x.startswith(("cookie", "x-"))]
    assert got.body == b"bytes"
    assert not {"set-cookie", "x-internal"} & set(got.headers)


@pytest.mark.parametrize("token", ["rival", "for-the-broker", "unbound", "sandbox", "nobody"])
async def test_a_token_of_another_kind_is_unavailable_and_not_missing(
    chain: Chain, token: str
) -> None:
    """A missing blob ends a session's turn; a refusal must not look like one."""
    await chain.far.client("harness").put_blob(NAMESPACE, SESSION, DATA)
    server = await chain.proxy(token)
    client = HttpArchive(f"http://127.0.0.1:{server.port}/cowhand")
    for call in (
        client.get_blob(NAMESPACE, SESSION, DIGEST),
        client.put_blob(NAMESPACE, OTHER_SESSION, DATA),
        client.segments(NAMESPACE, SESSION),
    ):
        with pytest.raises(ArchiveUnavailable, match="refuses us"):
            await call
    await client.close()


async def test_an_archive_that_is_away_restarts_or_is_another_one(
    chain: Chain, tmp_path: Path
) -> None:
    gone = await chain.proxy("harness", url="https://localhost:1")
    client = HttpArchive(f"http://127.0.0.1:{gone.port}/cowhand")
    with pytest.raises(ArchiveUnavailable, match="cannot be reached"):
        await client.put_blob(NAMESPACE, SESSION, DATA)
    await client.close()
    (chain.far.folder / "harness.token").unlink()
    with pytest.raises(ArchiveUnavailable, match="cannot be read"):
        await chain.harness().get_blob(NAMESPACE, SESSION, DIGEST)


async def test_a_kept_connection_that_died_is_no_failure(chain: Chain) -> None:
    """The archive was restarted: the proxy still holds a connection to the old one."""
    cut = False

    async def answer(up: object, writer: asyncio.StreamWriter) -> None:
        nonlocal cut
        if cut:
            cut = False
            writer.transport.abort()
            return
        writer.write(reply(200, b"{}"))

    from support.trust import Upstream

    tls = chain.far.authority.server("localhost")
    async with Upstream(tls, answer=answer).serving() as restarting:
        server = await chain.proxy("harness", url=f"https://localhost:{restarting.port}")
        client = HttpArchive(f"http://127.0.0.1:{server.port}/cowhand")
        assert await client.get_blob(NAMESPACE, SESSION, DIGEST) == b"{}"
        cut = True
        assert await client.get_blob(NAMESPACE, SESSION, DIGEST) == b"{}"
        assert restarting.connections == 2
        await client.put_blob(NAMESPACE, SESSION, DATA)
        assert restarting.connections == 3, "a body goes over a new connection"
        await client.close()


async def test_without_an_archive_there_is_no_such_route(chain: Chain) -> None:
    server = await chain.near.harness()
    client = await chain.near.open(server.port)
    answer = await client.ask(request("GET", BLOB))
    assert (answer.status, answer.json()["error"]["type"]) == (403, "permission_error")


async def test_a_sandboxes_proxy_has_no_such_route(chain: Chain) -> None:
    chain.near.world.sandbox_pod()
    server, _, tls = await chain.near.sandbox(1, register=False)
    for method in ("GET", "PUT"):
        client = await chain.near.open(server.port, tls)
        answer = await client.ask(request(method, BLOB, body=b"x" if method == "PUT" else b""))
        assert answer.status in (401, 404), answer


def test_settings_that_cannot_work_are_refused(chain: Chain) -> None:
    ca = str(chain.far.authority.ca_file)
    for url, file, namespace, text in (
        ("http://x", ca, NAMESPACE, "https://"),
        ("https://x", "/nowhere", NAMESPACE, "cannot be read"),
        ("https://x", ca, "", "COWHAND_NAMESPACE"),
        ("https://x", ca, "../x", "COWHAND_NAMESPACE"),
    ):
        with pytest.raises(UserError, match=text):
            ArchiveRelay(url, file, "t", namespace)


async def test_a_damaged_blob_is_said_to_be_damaged(chain: Chain) -> None:
    client = chain.harness()
    await client.put_blob(NAMESPACE, SESSION, DATA)
    file = chain.far.root / NAMESPACE / SESSION / "blobs" / DIGEST
    file.write_bytes(DATA[:-1])
    with pytest.raises(LogIncompatible, match="damaged"):
        await client.put_blob(NAMESPACE, SESSION, DATA)
