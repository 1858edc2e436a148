"""The archived part of a log as `get_events` reads it: whole segments, kept in memory while they are read page by page.

Used by `sessions.py` for positions that are no longer in the store. A segment is durable before the store drops its
positions, so what is in neither place was lost.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from cowhand.errors import ArchiveUnavailable, BlobMissing
from cowhand.session.archive import decode
from cowhand.session.blobs import Archive, Span
from cowhand.session.events import Event

CACHE_BYTES: Final = 32 * 1024 * 1024
"""Payload bytes of the segments that a process keeps."""

LISTED_SESSIONS: Final = 256

Key = tuple[str, str]


class ColdLog:
    """Reads archived events.

    Args:
        archive: where the segments are, or None: then every read fails with what to do.
    """

    def __init__(self, archive: Archive | None) -> None:
        self._archive = archive
        self._spans: OrderedDict[Key, list[Span]] = OrderedDict()
        self._segments: OrderedDict[tuple[Key, Span], tuple[list[Event], int]] = OrderedDict()
        self._bytes = 0

    async def events(
        self, namespace: str, session_id: str, start: int, end: int, limit: int | None = None
    ) -> list[Event]:
        """Events `start..end`, both inclusive, as they were stored; `limit` cuts the list at its end.

        Raises:
            BlobMissing: a position is not archived.
            LogIncompatible: a segment is damaged.
            ArchiveUnavailable.
        """
        last = end if limit is None else min(end, start + limit - 1)
        key = (namespace, session_id)
        found: list[Event] = []
        position = start
        while position <= last:
            span = await self._span_with(key, position)
            segment = await self._segment(key, span)
            found += segment[position - span.first : last - span.first + 1]
            position = span.last + 1
        return found

    async def _span_with(self, key: Key, position: int) -> Span:
        for fresh in (False, True):
            for span in await self._listed(key, fresh=fresh):
                if span.first <= position <= span.last:
                    return span
        raise BlobMissing(
            f"position {position} of {key[1]} is neither in the store nor in the archive:"
            " restore the archive's volume or bucket, or the store, from a copy"
        )

    async def _listed(self, key: Key, *, fresh: bool) -> list[Span]:
        if self._archive is None:
            raise ArchiveUnavailable(
                f"the older part of the log of {key[1]} is in the archive, and this process has none:"
                " set COWHAND_ARCHIVE_URL (chart value archive.enabled)",
                after=5.0,
            )
        if fresh or key not in self._spans:
            self._spans[key] = await self._archive.segments(*key)
            if len(self._spans) > LISTED_SESSIONS:
                self._spans.popitem(last=False)
        self._spans.move_to_end(key)
        return self._spans[key]

    async def _segment(self, key: Key, span: Span) -> list[Event]:
        kept = self._segments.get((key, span))
        if kept is not None:
            self._segments.move_to_end((key, span))
            return kept[0]
        assert self._archive is not None
        events = decode(await self._archive.segment(*key, span), span)
        size = sum(len(event.payload) + 200 for event in events)
        if (key, span) not in self._segments:
            self._segments[(key, span)] = (events, size)
            self._bytes += size
        # The one that is read now stays, however large it is.
        while self._bytes > CACHE_BYTES and len(self._segments) > 1:
            _, (_, dropped) = self._segments.popitem(last=False)
            self._bytes -= dropped
        return events
