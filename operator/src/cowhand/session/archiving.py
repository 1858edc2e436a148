"""`ArchiveLog` on Redis Streams: what the archive process reads and trims, across tenants."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from cowhand.errors import LogIncompatible, SessionNotFound
from cowhand.session import codec
from cowhand.session.archive import HotLog
from cowhand.session.events import Event
from cowhand.session.keys import doomed
from cowhand.session.log import ArchiveLog

if TYPE_CHECKING:
    from cowhand.session.store import Store

log = logging.getLogger(__name__)

SCAN_COUNT: Final = 200
"""Keys that one step of a scan looks at."""

CHUNK: Final = 128
"""Entries of one read; a reply holds up the other readers."""

_ENDED: Final = ("closed", "terminated")


class RedisArchiveLog(ArchiveLog):
    """See `log.ArchiveLog`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def hot_logs(self, namespace: str, cursor: int) -> tuple[int, list[HotLog]]:
        """See `log.ArchiveLog.hot_logs`."""
        prefix = self._store.config.prefix
        following, found = await self._store.reads.scan(
            cursor, f"{prefix}:{namespace}:*:s:*:m", SCAN_COUNT
        )
        sids = {key.decode(errors="replace").split(":")[-2] for key in found}
        logs = await asyncio.gather(*(self._hot_log(namespace, sid) for sid in sorted(sids)))
        return following, [log for log in logs if log is not None]

    async def _hot_log(self, namespace: str, session_id: str) -> HotLog | None:
        keys = self._store.keys(namespace).session(session_id)
        call = self._store.reads.call
        state, lease, following, first, ready = await call(
            "HMGET", keys.meta, "state", "lease", "next", "min", "rdy"
        )
        if following is None:
            return None
        newest, size = await asyncio.gather(
            call("XREVRANGE", keys.log, "+", "-", "COUNT", 1), call("MEMORY", "USAGE", keys.log)
        )
        try:
            return HotLog(
                session_id=session_id,
                closed=(state or b"").decode() in _ENDED,
                held=bool(lease) or (ready or b"0") != b"0",
                first=int(first or 1),
                next_seq=int(following),
                size=int(size or 0),
                newest_ms=codec.event(newest[0]).ts if newest else 0,
            )
        except (ValueError, LogIncompatible) as err:
            # The tenant's own login can write it: that must not keep the others out of the archive.
            log.warning("not archived", extra={"session": session_id, "reason": str(err)})
            return None

    async def now_ms(self) -> int:
        """See `log.ArchiveLog.now_ms`."""
        seconds, micros = await self._store.reads.call("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    async def stored(
        self, namespace: str, session_id: str, start: int, count: int, size: int
    ) -> list[Event]:
        """See `log.ArchiveLog.stored`."""
        key = self._store.keys(namespace).session(session_id).log
        events: list[Event] = []
        while len(events) < count and sum(len(event.payload) for event in events) <= size:
            step = min(CHUNK, count - len(events))
            raw = await self._store.reads.call("XRANGE", key, f"{start}-0", "+", "COUNT", step)
            events += [codec.event(entry) for entry in raw]
            if len(raw) < step:
                break
            start = events[-1].seq + 1
        return events

    async def whole(self, namespace: str, session_id: str) -> int:
        """See `log.ArchiveLog.whole`."""
        meta = self._store.keys(namespace).session(session_id).meta
        following, regressed = await self._store.reads.call("HMGET", meta, "next", "reg")
        if following is None:
            raise SessionNotFound(f"there is no session {session_id}")
        if regressed is not None:
            raise LogIncompatible(f"the log of {session_id} lost its end")
        return int(following)

    async def archived(self, namespace: str, session_id: str, first: int, last: int) -> bool:
        """See `log.ArchiveLog.archived`."""
        keys = self._store.keys(namespace).session(session_id)
        reply = await self._store.script("archived", keys, first, last)
        return bool(reply[0] == "OK")

    async def doomed(self, limit: int) -> list[tuple[str, str]]:
        """See `log.ArchiveLog.doomed`."""
        key = doomed(self._store.config.prefix)
        due = await self._store.reads.call(
            "ZRANGE", key, "-inf", await self.now_ms(), "BYSCORE", "LIMIT", 0, limit
        )
        found = []
        for raw in due:
            namespace, _, session_id = raw.decode().partition("/")
            meta = self._store.keys(namespace).session(session_id).meta
            state = await self._store.reads.call("HGET", meta, "state")
            # A session that lives although it was said to have ended: the store was restored from a copy.
            if state in (None, b"closed"):
                found.append((namespace, session_id))
        return found

    async def forget(self, namespace: str, session_id: str) -> None:
        """See `log.ArchiveLog.forget`."""
        key = doomed(self._store.config.prefix)
        await self._store.writes.call("ZREM", key, f"{namespace}/{session_id}")
