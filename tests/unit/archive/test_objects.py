"""Objects in a folder and in a bucket (obstore's own memory and folder stores): create-only, durable, exact."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from obstore.store import LocalStore, MemoryStore

from cowhand.archive import objects
from cowhand.archive.objects import (
    BucketObjects,
    Exists,
    FolderObjects,
    Missing,
    Objects,
    checked,
    open_objects,
)
from cowhand.errors import ArchiveUnavailable, UserError

KINDS: dict[str, Callable[[Path], Objects]] = {
    "folder": FolderObjects,
    "memory": lambda _: BucketObjects(MemoryStore()),
    "local": lambda folder: BucketObjects(LocalStore(folder)),
}


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    return KINDS[request.param](tmp_path)


async def test_an_object_is_created_once_and_never_changed(store: Objects) -> None:
    await store.create("ns/a/x", b"one")
    for data in (b"one", b"two"):
        with pytest.raises(Exists):
            await store.create("ns/a/x", data)
    assert await store.get("ns/a/x") == b"one"


async def test_listing_and_deleting_are_exact(store: Objects) -> None:
    for path in ("ns/a/x", "ns/a/y/z", "ns/ab/x", "other/a/x"):
        await store.create(path, path.encode())
    assert [(e.path, e.size) for e in await store.entries("ns/a")] == [
        ("ns/a/x", 6),
        ("ns/a/y/z", 8),
    ]
    assert await store.entries("ns/nothing") == []
    await store.delete(["ns/a/x", "ns/a/y/z", "ns/a/never"])
    assert await store.entries("ns/a") == []
    assert await store.get("ns/ab/x") == b"ns/ab/x"
    with pytest.raises(Missing):
        await store.get("ns/a/x")
    await store.create("ns/a/x", b"again")
    assert (await store.entries("ns"))[0].created_s > 1_600_000_000


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", "a/", ".incoming/x", "a/b\0c", "ä"],
)
async def test_a_path_that_leads_elsewhere_is_refused(store: Objects, path: str) -> None:
    for work in (
        store.create(path, b""),
        store.get(path),
        store.entries(path),
        store.delete([path]),
    ):
        with pytest.raises(ValueError, match="is not the path of an object"):
            await work
    with pytest.raises(ValueError, match="not the path"):
        checked(path)


async def test_a_folder_holds_nothing_half_written_and_no_empty_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderObjects(tmp_path)
    link = os.link

    def die(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(objects.os, "link", die)
    with pytest.raises(ArchiveUnavailable, match="No space left"):
        await store.create("ns/a/x", b"data")
    assert await store.entries("ns") == []
    monkeypatch.setattr(objects.os, "link", link)
    await store.create("ns/a/x", b"data")
    assert list((tmp_path / ".incoming").iterdir()) == []
    await store.delete(["ns/a/x"])
    assert not (tmp_path / "ns").exists()


async def test_what_is_created_is_synced_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def watch(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(objects.os, "fsync", watch)
    await FolderObjects(tmp_path).create("ns/a/x", b"data")
    file = next(index for index, name in enumerate(synced) if ".incoming/" in name)
    # The file before it gets its name, then the folder with the name; and every folder that is new.
    assert synced[file:] == [synced[file], str(tmp_path / "ns/a")]
    assert {str(tmp_path), str(tmp_path / "ns")} <= set(synced[:file])


def test_urls(tmp_path: Path) -> None:
    assert isinstance(open_objects(f"file://{tmp_path}"), FolderObjects)
    options = {"region": "eu-1", "access_key_id": "a", "secret_access_key": "b"}
    assert isinstance(open_objects("s3://bucket/prefix", options), BucketObjects)
    for url in ("", "file://", "file://host/x", "/data", "ftp://x/y", "s3://", "http://x"):
        with pytest.raises(UserError, match="file:///folder"):
            open_objects(url)
    with pytest.raises(UserError, match="cannot be used"):
        open_objects("s3://bucket", {"no_such_option": "x"})
