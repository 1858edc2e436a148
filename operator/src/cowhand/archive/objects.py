"""Where the archive keeps its objects: a folder on a volume, or a bucket.

Objects are created once and never changed, so that two archivers, or one that was killed and came back, cannot
overwrite each other's work: a create of what exists raises Exists. Called by everything else in this package; the
only importer of `obstore`, and that only for buckets.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import unquote, urlsplit

from cowhand.errors import ArchiveUnavailable, CowhandError, UserError

BUCKETS: Final = ("s3", "gs", "az")

_PATH: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


class Exists(CowhandError):
    """An object with this path was created before."""


class Missing(CowhandError):
    """There is no object with this path."""


@dataclass(frozen=True)
class Entry:
    """An object in a listing: path, size in bytes, time of its creation in seconds since the epoch."""

    path: str
    size: int
    created_s: float


class Objects(Protocol):
    """Objects by path (`/` between its parts). Every method raises ArchiveUnavailable besides what stands with it."""

    async def create(self, path: str, data: bytes) -> None:
        """Store a new object, durably when this returns. Raises Exists."""

    async def get(self, path: str) -> bytes:
        """The whole object. Raises Missing."""

    async def entries(self, folder: str) -> list[Entry]:
        """Every object below a folder, by path; empty if there is none."""

    async def delete(self, paths: Sequence[str]) -> None:
        """Delete objects; those that are not there are no error."""


def open_objects(url: str, options: Mapping[str, str] | None = None) -> Objects:
    """The objects behind a URL.

    Args:
        url: `file:///folder`, `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`.
        options: of a bucket, as obstore names them (`region`, `endpoint`, `access_key_id`, ...).

    Raises:
        UserError: another URL, or an option that it does not know.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc and len(parts.path) > 1:
        return FolderObjects(Path(unquote(parts.path)))
    if parts.scheme in BUCKETS and parts.netloc:
        return BucketObjects.open(url, options or {})
    raise UserError(
        f"{url!r} is no place for an archive: file:///folder, s3://bucket/prefix, gs://bucket/prefix"
        " or az://container/prefix (COWHAND_OBJECTS_URL, chart value archive.url)",
        field="OBJECTS_URL",
    )


def checked(path: str) -> str:
    """The path, if it leads nowhere else; raises ValueError."""
    if not _PATH.fullmatch(path) or ".." in path:
        raise ValueError(f"{path!r} is not the path of an object")
    return path


class FolderObjects:
    """Objects as files below a folder; a create is written, synced and linked, so that no crash leaves half of it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._incoming = root / ".incoming"

    async def create(self, path: str, data: bytes) -> None:
        """See `Objects.create`."""
        await self._run(self._create, checked(path), data)

    async def get(self, path: str) -> bytes:
        """See `Objects.get`."""
        found: bytes = await self._run(self._get, checked(path))
        return found

    async def entries(self, folder: str) -> list[Entry]:
        """See `Objects.entries`."""
        found: list[Entry] = await self._run(self._entries, checked(folder))
        return found

    async def delete(self, paths: Sequence[str]) -> None:
        """See `Objects.delete`."""
        await self._run(self._delete, [checked(path) for path in paths])

    async def _run(self, work: Any, *args: Any) -> Any:
        try:
            return await asyncio.to_thread(work, *args)
        except OSError as err:
            raise ArchiveUnavailable(
                f"the archive's volume fails: {err.strerror or err}", after=2.0
            ) from err

    def _create(self, path: str, data: bytes) -> None:
        target = self._root / path
        self._make_folder(target.parent)
        self._make_folder(self._incoming)
        temporary = self._incoming / secrets.token_hex(16)
        try:
            with temporary.open("xb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            try:
                os.link(temporary, target)
            except FileExistsError:
                raise Exists(f"{path} is there already") from None
        finally:
            temporary.unlink(missing_ok=True)
        _sync(target.parent)

    def _make_folder(self, folder: Path) -> None:
        """As mkdir -p, with every new entry synced."""
        if folder.is_dir():
            return
        if folder != self._root:
            self._make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        _sync(folder.parent)

    def _get(self, path: str) -> bytes:
        try:
            return (self._root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise Missing(f"there is no {path}") from None

    def _entries(self, folder: str) -> list[Entry]:
        found = []
        for place, _, names in os.walk(self._root / folder):
            for name in names:
                file = Path(place) / name
                with contextlib.suppress(FileNotFoundError):
                    stat = file.stat()
                    path = file.relative_to(self._root).as_posix()
                    found.append(Entry(path, stat.st_size, stat.st_mtime))
        return sorted(found, key=lambda entry: entry.path)

    def _delete(self, paths: list[str]) -> None:
        for path in paths:
            file = self._root / path
            file.unlink(missing_ok=True)
            for folder in file.relative_to(self._root).parents:
                if folder.name:
                    try:
                        (self._root / folder).rmdir()
                    except OSError:
                        break  # not empty, or somebody writes into it
        for folder in {(self._root / path).parent for path in paths}:
            with contextlib.suppress(FileNotFoundError):
                _sync(folder)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class BucketObjects:
    """Objects in S3, Google Cloud Storage or Azure Blob Storage; creates are conditional puts."""

    def __init__(self, store: Any) -> None:
        """`store` is an obstore store."""
        import obstore

        self._obstore = obstore
        self._store = store

    @classmethod
    def open(cls, url: str, options: Mapping[str, str]) -> BucketObjects:
        """See `open_objects`."""
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        opener: Any = from_url
        try:
            return cls(opener(url, config=dict(options)))
        except (BaseError, ValueError, TypeError) as err:
            raise UserError(f"the archive's bucket {url} cannot be used: {err}") from err

    async def create(self, path: str, data: bytes) -> None:
        """See `Objects.create`."""
        try:
            await self._obstore.put_async(
                self._store, checked(path), data, mode="create", use_multipart=False
            )
        except (FileExistsError, self._obstore.exceptions.AlreadyExistsError):
            raise Exists(f"{path} is there already") from None
        except (self._obstore.exceptions.BaseError, OSError) as err:
            raise _unavailable(err) from err

    async def get(self, path: str) -> bytes:
        """See `Objects.get`."""
        try:
            found = await self._obstore.get_async(self._store, checked(path))
            return bytes(await found.bytes_async())
        except FileNotFoundError:
            raise Missing(f"there is no {path}") from None
        except (self._obstore.exceptions.BaseError, OSError) as err:
            raise _unavailable(err) from err

    async def entries(self, folder: str) -> list[Entry]:
        """See `Objects.entries`."""
        found = []
        try:
            async for page in self._obstore.list(self._store, prefix=checked(folder)):
                found += [
                    Entry(item["path"], item["size"], item["last_modified"].timestamp())
                    for item in page
                ]
        except (self._obstore.exceptions.BaseError, OSError) as err:
            raise _unavailable(err) from err
        return sorted(found, key=lambda entry: entry.path)

    async def delete(self, paths: Sequence[str]) -> None:
        """See `Objects.delete`."""
        for path in paths:
            try:
                await self._obstore.delete_async(self._store, checked(path))
            except FileNotFoundError:
                continue
            except (self._obstore.exceptions.BaseError, OSError) as err:
                raise _unavailable(err) from err


def _unavailable(err: Exception) -> ArchiveUnavailable:
    """The first line only: the rest of obstore's texts repeats the request."""
    text = (str(err).splitlines() or [type(err).__name__])[0]
    return ArchiveUnavailable(f"the archive's bucket fails: {text[:300]}", after=2.0)
