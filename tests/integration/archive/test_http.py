"""The archive's API over TLS: who may, what is checked, and that nobody leaves their own tenant's sessions."""

from __future__ import annotations

import hashlib
import io
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from cowhand.archive import layout
from cowhand.errors import (
    ArchiveUnavailable,
    BlobMissing,
    LogIncompatible,
    UserError,
)
from cowhand.kube import kinds
from cowhand.kube.errors import KubeUnavailable
from cowhand.session import archive
from cowhand.session.blobs import Span
from cowhand.session.events import EVENT_LIMIT, Event
from cowhand.session.remote import HttpArchive
from support.archive_rig import ArchiveRig, archive_rig
from support.trust import NAMESPACE, OTHER_NAMESPACE, OTHER_SESSION, SESSION, Authority

DATA = b"payload" * 20_000
DIGEST = hashlib.sha256(DATA).hexdigest()
BLOB = f"/v1/blobs/{NAMESPACE}/{SESSION}/{DIGEST}"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[ArchiveRig]:
    async with archive_rig(tmp_path) as made:
        yield made


async def ask(
    rig: ArchiveRig, method: str, path: str, token: str = "harness", **options: object
) -> tuple[int, str]:
    """Any request, byte for byte as given; answers status and error type (or text)."""
    tls = ssl.create_default_context(cafile=str(rig.authority.ca_file))
    headers = {"authorization": f"Bearer {token}"} if token else {}
    from yarl import URL

    async with (
        aiohttp.ClientSession() as client,
        client.request(
            method, URL(rig.url + path, encoded=True), ssl=tls, headers=headers, **options
        ) as response,
    ):
        text = await response.text(errors="replace")
        return response.status, text


async def test_blobs_come_back_as_they_were_and_twice_is_once(rig: ArchiveRig) -> None:
    for token in ("harness", "gateway", "operator"):
        client = rig.client(token)
        assert await client.put_blob(NAMESPACE, SESSION, DATA) == DIGEST
        assert await client.get_blob(NAMESPACE, SESSION, DIGEST) == DATA
    assert [e.size for e in await rig.objects.entries(f"{NAMESPACE}/{SESSION}")] == [len(DATA)]
    with pytest.raises(BlobMissing, match="is gone from the archive"):
        await rig.client("harness").get_blob(NAMESPACE, SESSION, "0" * 64)
    assert rig.world.reviews == 3


async def test_a_manifest_says_how_far_the_archive_goes(rig: ArchiveRig) -> None:
    client = rig.client("gateway")
    assert await client.segments(NAMESPACE, SESSION) == []
    assert (await ask(rig, "GET", f"/v1/segments/{NAMESPACE}/{SESSION}"))[1] == (
        '{"segments": [], "last": 0}'
    )
    events = [Event(n, "t", f"e{n}", n, "", b"{}") for n in range(1, 31)]
    for first, last in ((1, 10), (11, 20), (25, 30)):
        span = Span(first, last)
        data = archive.encode(events[first - 1 : last])
        await rig.objects.create(layout.segment_path(NAMESPACE, SESSION, span), data)
    found = await client.segments(NAMESPACE, SESSION)
    assert [(span.first, span.last) for span in found] == [(1, 10), (11, 20)], "no gap"
    assert archive.decode(await client.segment(NAMESPACE, SESSION, found[1])) == events[10:20]
    with pytest.raises(BlobMissing):
        await client.segment(NAMESPACE, SESSION, Span(11, 21))


@pytest.mark.parametrize(
    ("token", "namespace", "status"),
    [
        ("", NAMESPACE, 401),
        ("nobody", NAMESPACE, 401),
        ("for-the-broker", NAMESPACE, 401),
        ("unbound", NAMESPACE, 403),
        ("sandbox", NAMESPACE, 403),
        ("stranger", "elsewhere", 403),
        ("rival", NAMESPACE, 403),
        ("harness", OTHER_NAMESPACE, 403),
        ("false-gateway", NAMESPACE, 403),
        ("gateway", "elsewhere", 403),
        ("gateway", "cowhand-system", 403),
    ],
)
async def test_who_may_not(rig: ArchiveRig, token: str, namespace: str, status: int) -> None:
    await rig.client("operator").put_blob(NAMESPACE, SESSION, DATA)
    await rig.client("operator").put_blob(OTHER_NAMESPACE, SESSION, DATA)
    before = await rig.objects.entries(NAMESPACE)
    path = f"/v1/blobs/{namespace}/{SESSION}/{DIGEST}"
    other = f"/v1/blobs/{namespace}/{OTHER_SESSION}/{DIGEST}"
    segments = f"/v1/segments/{namespace}/{SESSION}"
    for method, target in (
        ("GET", path),
        ("PUT", other),
        ("GET", segments),
        ("GET", segments + "/1-2"),
    ):
        body = {"data": DATA} if method == "PUT" else {}
        found, text = await ask(rig, method, target, token, **body)
        assert found == status, (target, text)
        assert '"error"' in text
        assert "payload" not in text
    assert await rig.objects.entries(NAMESPACE) == before


@pytest.mark.parametrize(
    "path",
    [
        f"/v1/blobs/{NAMESPACE}/../{OTHER_NAMESPACE}/{SESSION}/{DIGEST}",
        f"/v1/blobs/{NAMESPACE}/..%2f{OTHER_NAMESPACE}%2f{SESSION}/{DIGEST}",
        f"/v1/blobs/{NAMESPACE}%2f..%2f{OTHER_NAMESPACE}/{SESSION}/{DIGEST}",
        f"/v1/blobs/{NAMESPACE}/{SESSION}/..%2f..%2f..%2f{OTHER_NAMESPACE}%2f{SESSION}%2fblobs%2f{DIGEST}",
        f"/v1/blobs/{NAMESPACE}/{SESSION}%00/{DIGEST}",
        f"/v1/blobs/{NAMESPACE}/{SESSION.upper()}/{DIGEST}",
        f"/v1/blobs/{NAMESPACE}/{SESSION}/{DIGEST.upper()}",
        f"/v1/blobs/{NAMESPACE}/{SESSION}/{DIGEST}%0a",
        f"/v1/blobs/{NAMESPACE}/sesn_x/{DIGEST}",
        f"/v1/blobs/{NAMESPACE}//{DIGEST}",
        f"/v1/segments/{NAMESPACE}/..%2f{OTHER_NAMESPACE}",
        f"/v1/segments/{NAMESPACE}/{SESSION}/..%2f..%2f..%2fsecret",
        f"/v1/segments/{NAMESPACE}/{SESSION}/0-1",
        f"/v1/segments/{NAMESPACE}/{SESSION}/1-2-3",
        f"/v1/segments/{NAMESPACE}/{SESSION}/1-9999999999999",
        f"/v1/blobs/{NAMESPACE}/{SESSION}",
        "/v1/",
        "/etc/passwd",
    ],
)
async def test_no_path_leads_out_of_a_session(rig: ArchiveRig, path: str) -> None:
    await rig.client("rival").put_blob(OTHER_NAMESPACE, SESSION, DATA)
    (rig.root / "secret").write_bytes(b"payload")
    files = sorted(str(file) for file in rig.folder.rglob("*"))
    for method in ("GET", "PUT"):
        status, text = await ask(rig, method, path, **({"data": DATA} if method == "PUT" else {}))
        assert status in (400, 403, 404, 405), (method, status)
        assert "payload" not in text
    assert sorted(str(file) for file in rig.folder.rglob("*")) == files


async def test_a_body_must_have_its_hash_and_a_bearable_size(rig: ArchiveRig) -> None:
    status, text = await ask(rig, "PUT", BLOB, data=DATA + b"!")
    assert (status, "does not have this SHA-256" in text) == (400, True)
    big = b"x" * (EVENT_LIMIT + 1)
    path = f"/v1/blobs/{NAMESPACE}/{SESSION}/{hashlib.sha256(big).hexdigest()}"
    status, text = await ask(rig, "PUT", path, data=io.BytesIO(big))
    assert (status, str(EVENT_LIMIT) in text) == (413, True)

    async def pieces() -> AsyncIterator[bytes]:
        yield DATA

    status, text = await ask(rig, "PUT", BLOB, data=pieces())
    assert (status, "content-length" in text) == (411, True)
    assert await rig.objects.entries(NAMESPACE) == []
    largest = b"y" * EVENT_LIMIT
    digest = await rig.client("harness").put_blob(NAMESPACE, SESSION, largest)
    assert await rig.client("harness").get_blob(NAMESPACE, SESSION, digest) == largest


async def test_a_damaged_blob_is_not_taken_for_the_same(rig: ArchiveRig) -> None:
    await rig.client("harness").put_blob(NAMESPACE, SESSION, DATA)
    file = rig.root / NAMESPACE / SESSION / "blobs" / DIGEST
    file.write_bytes(DATA[:-1])
    with pytest.raises(LogIncompatible, match="damaged"):
        await rig.client("harness").put_blob(NAMESPACE, SESSION, DATA)


async def test_what_is_away_or_refuses_us_is_unavailable(
    rig: ArchiveRig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client = rig.client("harness")
    await client.put_blob(NAMESPACE, SESSION, DATA)
    with pytest.raises(ArchiveUnavailable, match="may not ask for sessions of"):
        await client.get_blob(OTHER_NAMESPACE, SESSION, DIGEST)
    with pytest.raises(UserError):
        await client.get_blob(NAMESPACE, "sesn_x", DIGEST)
    rig.world.kube.fail("create", kinds.TOKEN_REVIEW, KubeUnavailable("the API server is away"))
    with pytest.raises(ArchiveUnavailable, match="away"):
        await rig.client("operator").get_blob(NAMESPACE, SESSION, DIGEST)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cowhand.archive.objects.FolderObjects._create", full)
    with pytest.raises(ArchiveUnavailable, match="No space left"):
        await client.put_blob(NAMESPACE, SESSION, DATA + b"2")
    stranger = Authority(tmp_path / "stranger")
    for url, ca in (("https://localhost:1", rig.authority), (rig.url, stranger)):
        other = HttpArchive(url, ca_file=str(ca.ca_file), token_file=rig.token_file("harness"))
        with pytest.raises(ArchiveUnavailable, match="does not answer"):
            await other.get_blob(NAMESPACE, SESSION, DIGEST)
        await other.close()
    with pytest.raises(UserError, match="CA file"):
        HttpArchive("https://x", ca_file=str(tmp_path / "none"), token_file="x")


async def test_health_needs_no_token(rig: ArchiveRig) -> None:
    assert await ask(rig, "GET", "/healthz", "") == (200, '{"status": "ok"}')
