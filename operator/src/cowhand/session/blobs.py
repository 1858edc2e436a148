"""Large payloads: what stands in the log instead of them, and how readers get the original bytes back.

The store runs one script at a time, so an entry of a megabyte makes every session of the server wait. A payload over
`INLINE_WITH_BLOBS` is therefore put into the archive first, and the log holds a reference with its hash; nobody above
`cowhand.session` sees the difference. Without an archive payloads stand inline up to `INLINE_LIMIT`
(docs/adr/0008). Used by the roles of the log on Redis; `Archive` is what they need of an archive, implemented over
HTTP in `remote.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from cowhand.errors import ArchiveUnavailable, LogIncompatible, UserError
from cowhand.session.events import (
    EVENT_LIMIT,
    INLINE_LIMIT,
    INLINE_WITH_BLOBS,
    PAYLOAD_VERSION,
    Event,
    NewEvent,
)

CACHE_BYTES: Final = 32 * 1024 * 1024
"""Blobs that a process keeps in memory: a session's prompt is folded from the same large events at each wake."""

FETCHES: Final = 4
"""Blobs that one read fetches at a time."""

_MARK: Final = b'{"v":1,"ref":{'
"""How every reference begins and no inline payload does: those have `th` second."""

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Span:
    """An archived segment: positions `first..last` of a session, both inclusive; `size` in bytes as stored."""

    first: int
    last: int
    size: int = 0


class Archive(Protocol):
    """Blobs and archived segments of sessions, as the roles of the log need them.

    Every method raises ArchiveUnavailable (no answer, or we are refused; it may be repeated), besides what stands
    with it.
    """

    async def put_blob(self, namespace: str, session_id: str, payload: bytes) -> str:
        """Store a payload durably; answers its hex SHA-256. The same payload again changes nothing."""

    async def get_blob(self, namespace: str, session_id: str, sha256: str) -> bytes:
        """The payload with this hash. Raises BlobMissing."""

    async def segments(self, namespace: str, session_id: str) -> list[Span]:
        """The archived segments of a session in order of `first`; empty if there are none."""

    async def segment(self, namespace: str, session_id: str, span: Span) -> bytes:
        """A segment as stored (`archive.decode` reads it). Raises BlobMissing."""


def sha256(data: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(data).hexdigest()


def reference(payload: bytes, cause: str) -> bytes:
    """The payload that stands in the log for a blob.

    Args:
        payload: the whole payload as it would stand inline.
        cause: its `c`.
    """
    ref = {
        "sha256": sha256(payload),
        "n": len(payload),
        "codec": "none",
        "ct": "application/json",
    }
    body = {"v": PAYLOAD_VERSION, "ref": ref, "th": "main", "c": cause, "pre": {}}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def reference_of(payload: bytes) -> tuple[str, int] | None:
    """SHA-256 and length of the blob that a stored payload refers to, or None if it is inline.

    Raises:
        LogIncompatible: it is a reference that this release cannot follow.
    """
    if not payload.startswith(_MARK):
        return None
    try:
        ref: Any = json.loads(payload)["ref"]
        digest, size, codec = ref["sha256"], ref["n"], ref["codec"]
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise LogIncompatible(f"a reference to a blob is not valid: {err}") from err
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest) or type(size) is not int:
        raise LogIncompatible("a reference to a blob is not valid: sha256 or n is malformed")
    if codec != "none":
        raise LogIncompatible(f"a blob has the encoding {codec!r}, which this release cannot read")
    return digest, size


def too_big(kind: str, size: int, limit: int) -> str:
    """Message for a payload over the limit."""
    return (
        f"payload of {kind} has {size} bytes, the limit is {limit}: split it into several events,"
        " or put the content into a file in the sandbox and refer to it"
    )


def checked(found: bytes, digest: str, size: int) -> bytes:
    """A blob's bytes if they are those that the log refers to; raises LogIncompatible."""
    if len(found) != size or sha256(found) != digest:
        raise LogIncompatible(
            f"the blob {digest} is damaged: it has {len(found)} bytes of {size}, or another hash;"
            " restore it from a copy of the archive"
        )
    return found


class Payloads:
    """Packs payloads for the log of a process, and resolves references when it is read.

    Args:
        archive: where blobs live, or None: then all payloads are inline.
    """

    def __init__(self, archive: Archive | None) -> None:
        self.archive = archive
        self._kept: OrderedDict[tuple[str, str, str], bytes] = OrderedDict()
        self._kept_bytes = 0

    @property
    def event_limit(self) -> int:
        """Most bytes of one payload."""
        return INLINE_LIMIT if self.archive is None else EVENT_LIMIT

    @property
    def inline_limit(self) -> int:
        """Most bytes of one payload in the store; the scripts check it too."""
        return INLINE_LIMIT if self.archive is None else INLINE_WITH_BLOBS

    async def pack(
        self, namespace: str, session_id: str, events: Sequence[NewEvent]
    ) -> list[bytes]:
        """What to store for each event; blobs are durable when this returns.

        Raises:
            UserError: a payload is over the limit; nothing was written.
            ArchiveUnavailable: a blob could not be stored; repeat the whole call.
        """
        payloads = [event.payload() for event in events]
        for event, payload in zip(events, payloads, strict=True):
            if len(payload) > self.event_limit:
                text = too_big(event.type, len(payload), self.event_limit)
                raise UserError(text, field="content")
        packed = []
        for event, payload in zip(events, payloads, strict=True):
            if self.archive is None or len(payload) <= self.inline_limit:
                packed.append(payload)
                continue
            digest = await self.archive.put_blob(namespace, session_id, payload)
            self._keep((namespace, session_id, digest), payload)
            packed.append(reference(payload, event.cause))
        return packed

    async def resolve(
        self, namespace: str, session_id: str, events: Sequence[Event]
    ) -> list[Event]:
        """The events with their original payloads.

        Raises:
            BlobMissing, LogIncompatible: a blob is gone, damaged, or of a newer release.
            ArchiveUnavailable: no answer, or this process has no archive.
        """
        found = [(event, reference_of(event.payload)) for event in events]
        if all(ref is None for _, ref in found):
            return list(events)
        gate = asyncio.Semaphore(FETCHES)

        async def one(event: Event, ref: tuple[str, int] | None) -> Event:
            if ref is None:
                return event
            async with gate:
                payload = await self._fetch(namespace, session_id, *ref)
            return replace(event, payload=payload)

        return list(await asyncio.gather(*(one(event, ref) for event, ref in found)))

    async def _fetch(self, namespace: str, session_id: str, digest: str, size: int) -> bytes:
        key = (namespace, session_id, digest)
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            return kept
        if self.archive is None:
            # The blob is there: a process that knows of the archive (while one is being installed, the next
            # pod) reads it, so this is nothing to end a session for.
            raise ArchiveUnavailable(
                f"an event of {session_id} is kept as the blob {digest}, and this process has no archive:"
                " set COWHAND_ARCHIVE_URL (chart value archive.enabled)",
                after=5.0,
            )
        payload = checked(await self.archive.get_blob(namespace, session_id, digest), digest, size)
        self._keep(key, payload)
        return payload

    def _keep(self, key: tuple[str, str, str], payload: bytes) -> None:
        if key in self._kept or len(payload) > CACHE_BYTES:
            return
        self._kept[key] = payload
        self._kept_bytes += len(payload)
        while self._kept_bytes > CACHE_BYTES:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= len(dropped)
