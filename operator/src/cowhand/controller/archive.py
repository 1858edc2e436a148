"""The operator's access to the archive: an archive that is away costs one wait, not one for each session.

Only a few looks at a session need it (large or old events); all others must go on as if it were there. So its calls end
before those of `logs.Logs` do, which would take the store for dead, and after a failure they fail at once for a moment.
"""

from __future__ import annotations

from typing import Final

from cowhand.controller.breaker import Breaker
from cowhand.errors import ArchiveUnavailable
from cowhand.session.blobs import Archive, Span

LIMIT_S: Final = 3.0
"""Longest wait for one call; less than `logs.LIMIT_S`."""

PAUSE_S: Final = 5.0
"""How long calls fail at once after one failed."""


class CarefulArchive(Archive):
    """`blobs.Archive` behind a time limit and a breaker."""

    def __init__(self, archive: Archive, *, limit_s: float = LIMIT_S) -> None:
        self._archive = archive
        failures = (ArchiveUnavailable,)
        self._breaker = Breaker("the archive", ArchiveUnavailable, limit_s, PAUSE_S, failures)

    async def put_blob(self, namespace: str, session_id: str, payload: bytes) -> str:
        """See `Archive.put_blob`."""
        return await self._breaker.call(
            lambda: self._archive.put_blob(namespace, session_id, payload)
        )

    async def get_blob(self, namespace: str, session_id: str, sha256: str) -> bytes:
        """See `Archive.get_blob`."""
        return await self._breaker.call(
            lambda: self._archive.get_blob(namespace, session_id, sha256)
        )

    async def segments(self, namespace: str, session_id: str) -> list[Span]:
        """See `Archive.segments`."""
        return await self._breaker.call(lambda: self._archive.segments(namespace, session_id))

    async def segment(self, namespace: str, session_id: str, span: Span) -> bytes:
        """See `Archive.segment`."""
        return await self._breaker.call(lambda: self._archive.segment(namespace, session_id, span))
