"""The archiving loop: closed, idle and long logs become segments, and the store lets go of them.

A segment is created before the store drops its positions, and a segment that is there already is read back and
compared, so the archiver may be killed at any point, and any number of times: the next one goes on. Two of them at
once do the same work twice and no harm. Each step is bounded: one page of a scan, a few segments.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from cowhand.archive import layout
from cowhand.archive.objects import Exists, Objects
from cowhand.errors import LogIncompatible, Retryable, SessionNotFound
from cowhand.session import archive
from cowhand.session.archive import HotLog
from cowhand.session.blobs import Span
from cowhand.session.events import Event
from cowhand.session.log import ArchiveLog
from cowhand.telemetry.metrics import ARCHIVE_SEGMENTS

log = logging.getLogger(__name__)

SEGMENTS_PER_LOG: Final = 4
"""Segments of one log that are written before the others get their turn."""

GROWTH: Final = 200
"""A long log of which nothing could be archived is looked at again after so many more events."""

CONFLICT_CYCLES: Final = 360
"""A log that differs from its archive is looked at again after so many cycles: only people can mend it."""

CYCLE_S: Final = 10.0
"""Pause after all tenants were looked at."""

STEP_S: Final = 0.05
"""Pause between two pages of a scan."""


class Archiver:
    """Archives the logs of all tenants.

    Args:
        log: the store's side.
        objects: where segments go.
        tenants: namespaces that are served.
    """

    def __init__(self, log: ArchiveLog, objects: Objects, tenants: Sequence[str]) -> None:
        self._log = log
        self._objects = objects
        self._tenants = tenants
        self._waits: dict[str, int] = {}
        self._conflicts: dict[str, int] = {}
        self._cycles = 0

    async def run(self) -> None:
        """Archive until cancelled; what fails is tried again in the next cycle."""
        while True:
            for namespace in self._tenants:
                try:
                    await self.cycle(namespace, pause_s=STEP_S)
                except Retryable as err:
                    log.warning("not archived", extra={"namespace": namespace, "why": str(err)})
            await asyncio.sleep(CYCLE_S)

    async def cycle(self, namespace: str, *, pause_s: float = 0.0) -> int:
        """Look at every log of a tenant once; answers how many segments were taken out of the store."""
        done, cursor = 0, 0
        self._cycles += 1
        while True:
            cursor, logs = await self._log.hot_logs(namespace, cursor)
            now = await self._log.now_ms()
            for one in logs:
                if archive.wanted(one, now) and not self._is_waiting(one, now):
                    done += await self._safely(namespace, one, now)
            if not cursor:
                return done
            await asyncio.sleep(pause_s)

    def _is_waiting(self, one: HotLog, now: int) -> bool:
        if self._conflicts.get(one.session_id, 0) > self._cycles:
            return True
        resting = one.closed or archive.rests(one, now)
        return not resting and one.next_seq < self._waits.get(one.session_id, 0)

    async def _safely(self, namespace: str, one: HotLog, now: int) -> int:
        """One log must not keep the others out of the archive; a store or bucket that is away ends the cycle."""
        try:
            done = await self._archive(namespace, one, now)
        except (LogIncompatible, ValueError) as err:
            ARCHIVE_SEGMENTS.labels("conflict").inc()
            log.error(
                "a log cannot be archived", extra={"session": one.session_id, "why": str(err)}
            )
            self._conflicts[one.session_id] = self._cycles + CONFLICT_CYCLES
            return 0
        except SessionNotFound:
            return 0
        if done:
            self._waits.pop(one.session_id, None)
        else:
            self._waits[one.session_id] = one.next_seq + GROWTH
        return done

    async def _archive(self, namespace: str, one: HotLog, now: int) -> int:
        first = one.first
        for done in range(SEGMENTS_PER_LOG):
            hot = await self._log.stored(
                namespace, one.session_id, first, archive.SEGMENT_EVENTS, archive.SEGMENT_BYTES
            )
            until = archive.archive_until(one, hot, now)
            if until < first:
                return done
            if hot[0].seq != first:
                raise LogIncompatible(
                    f"position {first} is gone from the store: it was tampered with"
                )
            span = await self._segment(namespace, one.session_id, hot, until)
            if span is None or not await self._log.archived(
                namespace, one.session_id, span.first, span.last
            ):
                return done  # somebody else is at it: look again in the next cycle
            first = span.last + 1
        return SEGMENTS_PER_LOG

    async def _segment(
        self, namespace: str, session_id: str, hot: Sequence[Event], until: int
    ) -> Span | None:
        """A durable segment that begins where the store begins: one that was left behind, or a new one.

        Raises:
            LogIncompatible: what was left behind is not what the store holds (the store was restored from an older
                copy, or somebody wrote to its keys): nothing may be dropped.
        """
        for span in await self._left_behind(namespace, session_id, hot[0].seq):
            data = await self._objects.get(layout.segment_path(namespace, session_id, span))
            events = archive.decode(data, span)
            if len(events) > len(hot):
                hot = await self._log.stored(
                    namespace, session_id, span.first, len(events), archive.MAX_UNPACKED
                )
            if list(hot[: len(events)]) != events:
                raise LogIncompatible(
                    f"the archive has other events at {span.first}-{span.last} than the store"
                )
            ARCHIVE_SEGMENTS.labels("adopted").inc()
            return span
        chosen = archive.cut(hot, until)
        span = Span(chosen[0].seq, chosen[-1].seq)
        data = await asyncio.to_thread(archive.encode, chosen)
        try:
            await self._objects.create(layout.segment_path(namespace, session_id, span), data)
        except Exists:
            return None
        ARCHIVE_SEGMENTS.labels("written").inc()
        return span

    async def _left_behind(self, namespace: str, session_id: str, first: int) -> list[Span]:
        """Segments that begin at the store's first position, the longest first."""
        listed = await self._objects.entries(layout.segments_folder(namespace, session_id))
        spans = (archive.span_of(item.path.rpartition("/")[2]) for item in listed)
        found = [span for span in spans if span is not None and span.first == first]
        return sorted(found, key=lambda span: -span.last)
