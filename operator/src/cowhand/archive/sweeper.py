"""Deletion: what the archive has of a session goes when its policy says so, and blobs that nothing refers to.

Nothing is deleted because something is absent: a session goes only when its end was written down with a time (by
`ControlLog.close`), a blob only after the whole log of a session that is there was read twice, an hour apart, without
meeting it. A store that was lost, a log that lost its end, or a listing that is empty, deletes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from cowhand.archive import layout
from cowhand.archive.objects import Objects
from cowhand.errors import LogIncompatible, Retryable, SessionNotFound
from cowhand.session import archive
from cowhand.session.blobs import reference_of
from cowhand.session.log import ArchiveLog
from cowhand.telemetry.metrics import ARCHIVE_DELETED

log = logging.getLogger(__name__)

SWEEP_S: Final = 10.0
DOOMED_PER_SWEEP: Final = 20
"""Sessions that one sweep deletes."""

ORPHAN_S: Final = 7 * 86_400.0
"""A blob whose event was never appended goes after so long."""

ORPHAN_SWEEP_S: Final = 3600.0
"""How often sessions are searched for such blobs."""


CONFIRM_S: Final = 0.9 * ORPHAN_SWEEP_S
"""A blob that one search did not find referred to goes when another one, so much later, does not either."""

FORGET_S: Final = 86_400.0
"""A suspicion that nobody confirmed in so long begins anew."""


class Sweeper:
    """Deletes what is due.

    Args:
        log: the store's side.
        objects: the archive's objects.
        tenants: namespaces that are served.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        log: ArchiveLog,
        objects: Objects,
        tenants: Sequence[str],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._log = log
        self._objects = objects
        self._tenants = tenants
        self._clock = clock
        self._referred: set[str] = set()
        self._suspects: dict[str, float] = {}

    async def run(self) -> None:
        """Sweep until cancelled; what fails is tried again."""
        orphans_at = self._clock() + ORPHAN_SWEEP_S
        while True:
            try:
                while await self.sweep() == DOOMED_PER_SWEEP:
                    pass
                if self._clock() >= orphans_at:
                    orphans_at = self._clock() + ORPHAN_SWEEP_S
                    for namespace in self._tenants:
                        await self.sweep_orphans(namespace)
            except Retryable as err:
                log.warning("not swept", extra={"why": str(err)})
            await asyncio.sleep(SWEEP_S)

    async def sweep(self) -> int:
        """Delete the sessions whose time is over; answers how many."""
        doomed = await self._log.doomed(DOOMED_PER_SWEEP)
        for namespace, session_id in doomed:
            try:
                folder = layout.session_folder(namespace, session_id)
            except ValueError:
                await self._log.forget(namespace, session_id)
                continue
            paths = [item.path for item in await self._objects.entries(folder)]
            await self._objects.delete(paths)
            # Last: whoever is killed before it deletes again, and finds less.
            await self._log.forget(namespace, session_id)
            ARCHIVE_DELETED.labels("session").inc(len(paths))
            if paths:
                log.info("deleted", extra={"session": session_id, "objects": len(paths)})
        return len(doomed)

    async def sweep_orphans(self, namespace: str, *, pause_s: float = 0.05) -> int:
        """Delete old blobs of a tenant's sessions that no event refers to; answers how many."""
        deleted, cursor = 0, 0
        while True:
            cursor, logs = await self._log.hot_logs(namespace, cursor)
            for one in logs:
                try:
                    deleted += await self._orphans(namespace, one.session_id)
                except (LogIncompatible, SessionNotFound, ValueError) as err:
                    log.info("blobs kept", extra={"session": one.session_id, "why": str(err)})
            if not cursor:
                return deleted
            await asyncio.sleep(pause_s)

    async def _orphans(self, namespace: str, session_id: str) -> int:
        folder = f"{layout.session_folder(namespace, session_id)}/blobs"
        before = self._clock() - ORPHAN_S
        old = [
            item.path
            for item in await self._objects.entries(folder)
            if item.created_s < before and item.path not in self._referred
        ]
        if not old:
            return 0
        referred = {f"{folder}/{digest}" for digest in await self._digests(namespace, session_id)}
        # An event is never taken back: what was once referred to need not be looked for again.
        self._referred |= referred & set(old)
        orphans = self._twice([path for path in old if path not in referred])
        await self._objects.delete(orphans)
        ARCHIVE_DELETED.labels("orphan").inc(len(orphans))
        return len(orphans)

    def _twice(self, paths: list[str]) -> list[str]:
        """Those that were suspected an hour ago too.

        A store that was just restored from an old copy does not say yet that its logs are behind (`log.regressed`):
        the operator, which has seen more, needs some minutes to notice.
        """
        now = self._clock()
        since = {path: self._suspects.setdefault(path, now) for path in paths}
        sure = [path for path, first in since.items() if now - first >= CONFIRM_S]
        for path in sure:
            del self._suspects[path]
        forgotten = [path for path, first in self._suspects.items() if now - first > FORGET_S]
        for path in forgotten:
            del self._suspects[path]
        return sure

    async def _digests(self, namespace: str, session_id: str) -> set[str]:
        """Every blob that a log refers to; raises LogIncompatible if a position of it cannot be read."""
        found: set[str] = set()
        position = 1
        folder = layout.segments_folder(namespace, session_id)
        listed = await self._objects.entries(folder)
        spans = (archive.span_of(item.path.rpartition("/")[2]) for item in listed)
        for span in archive.chain([span for span in spans if span is not None]):
            data = await self._objects.get(layout.segment_path(namespace, session_id, span))
            for event in archive.decode(data, span):
                if (ref := reference_of(event.payload)) is not None:
                    found.add(ref[0])
            position = span.last + 1
        while True:
            hot = await self._log.stored(
                namespace, session_id, position, archive.SEGMENT_EVENTS, archive.SEGMENT_BYTES
            )
            if not hot:
                break
            if hot[0].seq != position:
                raise LogIncompatible(f"position {position} is in neither store nor archive")
            found |= {ref[0] for event in hot if (ref := reference_of(event.payload)) is not None}
            position = hot[-1].seq + 1
        if position != await self._log.whole(namespace, session_id):
            raise LogIncompatible(f"position {position} is in neither store nor archive")
        return found
