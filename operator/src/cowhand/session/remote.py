"""The archive over HTTP, as the roles of the log use it (`blobs.Archive`).

Gateway and operator ask it directly, with a token of their own; the harness asks the proxy of its pod, which adds the
pod's token and the namespace.
"""

from __future__ import annotations

import asyncio
import io
import json
import ssl
from pathlib import Path
from typing import Any, Final

import aiohttp

from cowhand.errors import ArchiveUnavailable, BlobMissing, LogIncompatible, UserError
from cowhand.session.blobs import Archive, Span, sha256

TIMEOUT_S: Final = 30.0
"""For one call, body included."""

MAX_ANSWER: Final = 64 * 1024 * 1024
"""Longest answer that is read, in bytes."""


class HttpArchive(Archive):
    """See `blobs.Archive`.

    Args:
        url: `https://host:port` of the archive, or `http://host:port/cowhand` of a harness pod's proxy.
        ca_file: CA of the archive; empty for the proxy on loopback.
        token_file: our projected token, read for each call; empty where the proxy adds it.
    """

    def __init__(self, url: str, *, ca_file: str = "", token_file: str = "") -> None:
        self._url = url.rstrip("/")
        self._token_file = Path(token_file) if token_file else None
        try:
            self._tls = ssl.create_default_context(cafile=ca_file) if ca_file else None
        except OSError as err:
            text = f"the CA file {ca_file} cannot be read: {err.strerror or err}"
            raise UserError(text, field="CA_FILE") from err
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def check(self) -> None:
        """Raise ArchiveUnavailable unless the archive answers; it does not look at our token."""
        status, answer = await self._call("GET", "/healthz")
        if status != 200:
            raise _refused(status, answer)

    async def put_blob(self, namespace: str, session_id: str, payload: bytes) -> str:
        """See `Archive.put_blob`."""
        digest = await asyncio.to_thread(sha256, payload)
        path = self._path("blobs", namespace, session_id, digest)
        status, answer = await self._call("PUT", path, payload)
        if status not in (200, 201):
            raise _refused(status, answer)
        return digest

    async def get_blob(self, namespace: str, session_id: str, sha256: str) -> bytes:
        """See `Archive.get_blob`."""
        status, answer = await self._call("GET", self._path("blobs", namespace, session_id, sha256))
        if status == 404:
            raise BlobMissing(
                f"the blob {sha256} of {session_id} is gone from the archive: restore the archive's volume"
                " or bucket from a copy"
            )
        if status != 200:
            raise _refused(status, answer)
        return answer

    async def segments(self, namespace: str, session_id: str) -> list[Span]:
        """See `Archive.segments`."""
        status, answer = await self._call("GET", self._path("segments", namespace, session_id))
        if status != 200:
            raise _refused(status, answer)
        try:
            found = json.loads(answer)["segments"]
            return [Span(int(one["first"]), int(one["last"]), int(one["size"])) for one in found]
        except (ValueError, KeyError, TypeError) as err:
            raise ArchiveUnavailable(f"the archive's answer is not one: {err}", after=2.0) from err

    async def segment(self, namespace: str, session_id: str, span: Span) -> bytes:
        """See `Archive.segment`."""
        name = f"{span.first}-{span.last}"
        status, answer = await self._call(
            "GET", self._path("segments", namespace, session_id, name)
        )
        if status == 404:
            raise BlobMissing(f"the segment {name} of {session_id} is gone from the archive")
        if status != 200:
            raise _refused(status, answer)
        return answer

    def _path(self, kind: str, namespace: str, *parts: str) -> str:
        if self._token_file is None:
            return "/".join(("", kind, *parts))
        return "/".join(("", "v1", kind, namespace, *parts))

    async def _call(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """One call; a second try on a connection that broke, since every call may be repeated."""
        try:
            return await self._once(method, path, body)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            pass
        except (aiohttp.ClientError, TimeoutError, OSError) as err:
            raise _unreachable(err) from err
        try:
            return await self._once(method, path, body)
        except (aiohttp.ClientError, TimeoutError, OSError) as err:
            raise _unreachable(err) from err

    async def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        headers = {"accept": "*/*"}
        if body is not None:
            headers["content-type"] = "application/octet-stream"
        if self._token_file is not None:
            token = await asyncio.to_thread(self._token_file.read_text, "utf-8")
            headers["authorization"] = f"Bearer {token.strip()}"
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
            self._session = aiohttp.ClientSession(timeout=timeout, auto_decompress=False)
        async with self._session.request(
            method,
            self._url + path,
            data=None if body is None else io.BytesIO(body),
            headers=headers,
            ssl=self._tls if self._tls is not None else True,
            allow_redirects=False,
        ) as response:
            found = bytearray()
            async for piece in response.content.iter_any():
                found += piece
                if len(found) > MAX_ANSWER:
                    raise aiohttp.ClientPayloadError("the answer is too long")
            return response.status, bytes(found)


def _unreachable(err: Exception) -> ArchiveUnavailable:
    return ArchiveUnavailable(
        f"the archive does not answer: {str(err) or type(err).__name__}", after=1.0
    )


def _refused(status: int, answer: bytes) -> Exception:
    try:
        error: Any = json.loads(answer)["error"]
        message = str(error["message"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {status}"
    if status in (401, 403):
        # Not Denied: the caller did nothing wrong, and what is missing (a tenant that the archive does not know
        # yet, a token) may be there soon. Nobody gives up a session for it.
        return ArchiveUnavailable(f"the archive refuses us: {message}", after=5.0)
    if status == 409:
        return LogIncompatible(f"the archive refuses: {message}")
    if status in (400, 411, 413):
        return UserError(f"the archive refuses: {message}")
    return ArchiveUnavailable(f"the archive fails: {message}", after=2.0)
