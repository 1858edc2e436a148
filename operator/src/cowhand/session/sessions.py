"""`SessionLog` on Redis Streams: create, emit, read and follow the sessions of one tenant.

Used by the gateway, the operator and the harness.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from cowhand.errors import SessionNotFound, StoreUnavailable, UserError
from cowhand.session import codec
from cowhand.session.blobs import reference_of
from cowhand.session.events import (
    EXTERNAL,
    SESSION_CREATED,
    SESSION_DELETED,
    SESSION_EXEC,
    SESSION_SUSPENDED,
    SYSTEM_MESSAGE,
    USER_CUSTOM_TOOL_RESULT,
    USER_INTERRUPT,
    USER_MESSAGE,
    USER_TOOL_CONFIRMATION,
    Event,
    NewEvent,
)
from cowhand.session.export import Header
from cowhand.session.importing import Importer, fork, restore
from cowhand.session.keys import Keys
from cowhand.session.log import Created, Restored, SessionMeta, SessionState, from_end

if TYPE_CHECKING:
    from cowhand.session.store import Store

T = TypeVar("T")

CHUNK: Final = 32
"""Events of a first read; an event has up to 1 MiB, and a reply holds up the other readers."""

MAX_CHUNK: Final = 256
"""Events of the later reads, while those before them were small."""

SMALL_CHUNK: Final = 256 * 1024
"""Bytes of payloads in a read after which the next one may be twice as long."""

SCAN_COUNT: Final = 500
"""Keys that one step of a listing looks at; between steps others get their turn."""

POLL_SECONDS: Final = 5.0
"""How often a follower looks without being nudged."""

FOLLOW_BYTES: Final = 4 * 1024 * 1024
"""Payloads that a follower holds at a time, unless one event alone has more."""

EMITTABLE: Final = frozenset(
    {
        USER_MESSAGE,
        USER_INTERRUPT,
        USER_TOOL_CONFIRMATION,
        USER_CUSTOM_TOOL_RESULT,
        SYSTEM_MESSAGE,
        SESSION_EXEC,
    }
)
"""What `emit_event` takes; the other external types belong to create_session and to ControlLog."""

QUIET: Final = frozenset({SESSION_EXEC, SYSTEM_MESSAGE})
"""External events that give a harness nothing to do: they do not make the session ready."""

_SESSION_ID: Final = re.compile(r"sesn_[0-9a-f]{32}")
_EVENT_ID_LIMIT: Final = 256


def check_event_id(event: NewEvent) -> None:
    """Raise UserError unless the event has a usable id."""
    if not event.id or len(event.id) > _EVENT_ID_LIMIT:
        raise UserError(
            f"event {event.type} needs an id of 1 to {_EVENT_ID_LIMIT} characters: it is the key of"
            " deduplication when the same event is sent again",
            field="id",
        )


class RedisSessionLog:
    """See `log.SessionLog`."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys

    async def create_session(self, meta: SessionMeta, events: Sequence[NewEvent]) -> Created:
        """See `log.SessionLog.create_session`."""
        self._check(meta, events)
        return await self._durably(self._bases(meta), lambda: self._create(meta, events))

    def _bases(self, meta: SessionMeta) -> list[str]:
        """Bases of the partitions that making a session writes to."""
        names = [meta.session_id, meta.tombstone] if meta.tombstone else [meta.session_id]
        return [self._keys.base_of(name) for name in names]

    async def _create(self, meta: SessionMeta, events: Sequence[NewEvent]) -> Created:
        stored = await self._pack(meta.session_id, events)
        words: list[str | bytes] = []
        for event, payload in zip(events, stored, strict=True):
            words += [event.type, event.id, payload]
        if meta.tombstone:
            other = await self._bury(meta)
            if other is not None:
                return Created(other, existed=True)
        kinds = {event.type for event in events}
        reply = await self._store.script(
            "create",
            self._keys.session(meta.session_id),
            int(USER_MESSAGE in kinds),
            "suspended" if SESSION_SUSPENDED in kinds else "running",
            self._store.payloads.inline_limit,
            len(events),
            *words,
            *codec.meta_fields(meta),
            *("bud", codec.dump(events[0].data.get("budget") or {})),
        )
        if meta.tombstone:
            key = self._keys.tombstone(meta.tombstone)
            await self._store.writes.call("SET", key, meta.session_id)
        return Created(meta.session_id, existed=reply[0] == "EXISTS")

    def _check(self, meta: SessionMeta, events: Sequence[NewEvent]) -> None:
        if not _SESSION_ID.fullmatch(meta.session_id):
            raise UserError(f"{meta.session_id!r} is not a session id (sesn_ and 32 hex digits)")
        if meta.namespace != self._keys.namespace:
            raise UserError(f"session of {meta.namespace!r} in the log of {self._keys.namespace!r}")
        if not events or events[0].type != SESSION_CREATED:
            raise UserError("the first event of a session must be session.created")
        for event in events:
            check_event_id(event)
            if event.type not in EXTERNAL:
                raise UserError(f"{event.type} cannot be among the first events of a session")
        if len({event.id for event in events}) != len(events):
            raise UserError("the first events of a session must have different ids", field="id")

    async def _bury(self, meta: SessionMeta) -> str | None:
        """Claim the tombstone; answers the session that made this run before, or None."""
        key = self._keys.tombstone(meta.tombstone)
        base = self._keys.base_of(meta.tombstone)
        expected = ""
        while True:
            raw: bytes = await self._store.writes.script(
                "tomb", [key], base, meta.session_id, expected
            )
            found = raw.decode()
            if found.removeprefix("?") == meta.session_id:
                return None
            if not found.startswith("?"):
                return found
            # Somebody began to make this run. If the session is there it counts, otherwise we take over.
            other = found[1:]
            if await self._store.reads.call("EXISTS", self._keys.session(other).meta):
                return other
            expected = found

    async def fork_session(
        self,
        meta: SessionMeta,
        created: NewEvent,
        source: tuple[str, int],
        extra: Sequence[NewEvent],
    ) -> Created:
        """See `log.SessionLog.fork_session`."""
        self._check(meta, (created, *extra))
        if meta.tombstone:
            other = await self._bury(meta)
            if other is not None:
                return Created(other, existed=True)
        if source[0] == meta.session_id:
            raise UserError("a session cannot be a fork of itself")
        seconds, micros = await self._store.reads.call("TIME")
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        importer = Importer(self._store, self._keys)
        bases = self._bases(meta)
        generations = await self._generations(bases)
        made = await fork(importer, meta, created, source, extra, self.get_events, now_ms)
        if meta.tombstone:
            key = self._keys.tombstone(meta.tombstone)
            await self._store.writes.call("SET", key, meta.session_id)
        await self._confirm(bases, generations)
        return Created(meta.session_id, existed=not made)

    async def session_ids(self) -> AsyncIterator[str]:
        """See `log.SessionLog.session_ids`."""
        pattern = f"{self._keys.prefix}:{self._keys.namespace}:*:s:*:m"
        seen: set[str] = set()
        cursor = 0
        while True:
            cursor, found = await self._store.reads.scan(cursor, pattern, SCAN_COUNT)
            for key in found:
                session_id = key.decode(errors="replace").split(":")[-2]
                if session_id not in seen and _SESSION_ID.fullmatch(session_id):
                    seen.add(session_id)
                    yield session_id
            if not cursor:
                await self._store.verify()
                return

    async def restore_session(
        self, header: Header, events: AsyncIterator[Event], *, dry_run: bool = False
    ) -> Restored:
        """See `log.SessionLog.restore_session`."""
        session_id = header.session_id
        if not _SESSION_ID.fullmatch(session_id):
            raise UserError(f"{session_id!r} is not a session id (sesn_ and 32 hex digits)")
        if header.meta.namespace != self._keys.namespace:
            raise UserError(
                f"the backup is of a session of namespace {header.meta.namespace}: it can be restored "
                f"there only, not in {self._keys.namespace}"
            )
        there: SessionState | None
        try:
            there = await self.get_session(session_id)
        except SessionNotFound:
            there = None

        async def read(first: int, last: int) -> list[Event]:
            return await self.get_events(session_id, first, last)

        importer = Importer(self._store, self._keys)
        bases = self._bases(header.meta)
        generations = await self._generations(bases)
        done = await restore(importer, header, events, there, read, dry_run=dry_run)
        if not dry_run:
            await self._confirm(bases, generations)
        return done

    async def emit_event(self, session_id: str, event: NewEvent) -> int:
        """See `log.SessionLog.emit_event`."""
        if event.type not in EMITTABLE:
            raise UserError(
                f"{event.type} cannot be emitted: {', '.join(sorted(EMITTABLE))} can", field="type"
            )
        check_event_id(event)
        if not _SESSION_ID.fullmatch(session_id):
            raise SessionNotFound(f"there is no session {session_id}")
        (payload,) = await self._pack(session_id, [event])
        reply = await self._durably(
            [self._keys.base_of(session_id)],
            lambda: self._store.script(
                "ingest",
                self._keys.session(session_id),
                event.id,
                event.type,
                payload,
                self._store.payloads.inline_limit,
                int(event.type not in QUIET),
            ),
        )
        return int(reply[1])

    async def _pack(self, session_id: str, events: Sequence[NewEvent]) -> list[bytes]:
        return await self._store.payloads.pack(self._keys.namespace, session_id, events)

    async def _durably(self, bases: Sequence[str], write: Callable[[], Awaitable[T]]) -> T:
        """Write, and wait until it is as durable as the profile promises.

        Between the two a connection may have changed, and with it the server, which may have lost what was
        written: so it is written again, which changes nothing where it is. Answers what the first one said.
        """
        generations = [self._store.writes.at(base).link.generation for base in bases]
        first = await write()
        if not self._store.has_barrier:
            return first
        while (now := await self._wait(bases)) != generations:
            generations = now
            await write()
        return first

    async def _wait(self, bases: Sequence[str]) -> list[int]:
        return list(await asyncio.gather(*(self._store.wait(base) for base in bases)))

    async def _generations(self, bases: Sequence[str]) -> list[int]:
        """Generations of the connections for writes now."""
        writes = self._store.writes
        return [(await writes.at(base).call_on("PING"))[1] for base in bases]

    async def _confirm(self, bases: Sequence[str], generations: list[int]) -> None:
        """As `_durably` for what was written since then and cannot be written again here."""
        if self._store.has_barrier and await self._wait(bases) != generations:
            raise StoreUnavailable(
                "the connection to the store has changed meanwhile: it may be written or not, repeat it",
                after=0.5,
            )

    async def get_events(
        self,
        session_id: str,
        start: int = 1,
        end: int | None = None,
        *,
        limit: int | None = None,
        types: Collection[str] | None = None,
        max_bytes: int | None = None,
    ) -> list[Event]:
        """See `log.SessionLog.get_events`."""
        if start < 0 or (end is not None and end < 0):
            start, end = from_end(start, end, (await self.get_session(session_id)).next_seq)
        events = await self._range(session_id, start, end, limit, types, max_bytes)
        return await self._store.payloads.resolve(self._keys.namespace, session_id, events)

    async def _range(
        self,
        session_id: str,
        start: int,
        end: int | None,
        limit: int | None,
        types: Collection[str] | None = None,
        max_bytes: int | None = None,
    ) -> list[Event]:
        """Events as they are stored; sizes are those of the blobs that they refer to."""
        position = max(start, 1)
        events: list[Event] = []
        first = CHUNK
        if max_bytes is not None:
            first = max(1, min(CHUNK, max_bytes // self._store.payloads.inline_limit))
        chunk, left = first, max_bytes
        if limit == 0 or (end is not None and position > end):
            await self._first(session_id)
        while (end is None or position <= end) and (limit is None or len(events) < limit):
            few = limit is not None and types is None
            count = min(chunk, limit - len(events)) if few and limit is not None else chunk
            found, more = await self._page(session_id, position, end, count)
            kept = found if types is None else [item for item in found if item.type in types]
            if left is not None:
                whole, left = _fitting(kept, left, anyhow=not events)
                events += whole
                if len(whole) < len(kept):
                    break
            else:
                events += kept
            if not more:
                break
            small = sum(len(event.payload) for event in found) <= SMALL_CHUNK
            chunk = min(MAX_CHUNK, chunk * 2) if small else first
            position = found[-1].seq + 1
        return events if limit is None else events[:limit]

    async def _page(
        self, session_id: str, position: int, end: int | None, count: int
    ) -> tuple[list[Event], bool]:
        """At most `count` events from `position` on, and whether more may follow.

        Positions are dense: a read that begins later than asked shows that the store has dropped what lies between,
        also when it did so since the read before; and a segment is durable before that.
        """
        found = await self._hot(session_id, position, end, count)
        cold = found[0].seq - 1 if found else await self._first(session_id) - 1
        if position > cold:
            return found, len(found) == count
        last = cold if end is None else min(cold, end)
        return await self._store.cold.events(
            self._keys.namespace, session_id, position, last, count
        ), True

    async def _hot(
        self, session_id: str, position: int, end: int | None, count: int
    ) -> list[Event]:
        log = self._keys.session(session_id).log
        last = "+" if end is None else f"{end}-0"
        raw = await self._store.reads.call("XRANGE", log, f"{position}-0", last, "COUNT", count)
        return [codec.event(entry) for entry in raw]

    async def _first(self, session_id: str) -> int:
        """First position that the store still holds, or will hold. Raises SessionNotFound."""
        key = self._keys.session(session_id).meta
        following, first = await self._store.reads.call("HMGET", key, "next", "min")
        if following is None:
            await self._store.verify()
            raise SessionNotFound(f"there is no session {session_id}")
        return int(first or 1)

    async def get_session(self, session_id: str) -> SessionState:
        """See `log.SessionLog.get_session`."""
        raw = await self._store.reads.call("HGETALL", self._keys.session(session_id).meta)
        if not raw:
            await self._store.verify()
            raise SessionNotFound(f"there is no session {session_id}")
        return codec.session_state(session_id, self._keys.namespace, codec.pairs(raw))

    async def follow(self, session_id: str, start: int = 1) -> AsyncIterator[Event]:
        """See `log.SessionLog.follow`."""
        position = max(start, 1)
        known = False
        # Subscribed before the first read: what comes between the two is announced.
        async with self._store.hub.subscribe([self._keys.session(session_id).tail]) as tail:
            while True:
                try:
                    events = await self.get_events(
                        session_id, position, limit=CHUNK, max_bytes=FOLLOW_BYTES
                    )
                except SessionNotFound:
                    if known:
                        return
                    raise
                known = True
                for event in events:
                    yield event
                    position = event.seq + 1
                    if event.type == SESSION_DELETED:
                        return
                if (
                    len(events) == CHUNK
                    or sum(len(event.payload) for event in events) > SMALL_CHUNK
                ):
                    continue  # there may be more: this many, or this much, may be all of one answer
                while message := await tail.get(POLL_SECONDS):
                    if not message[1] or int(message[1]) >= position:
                        break


def _fitting(events: list[Event], left: int, *, anyhow: bool) -> tuple[list[Event], int]:
    """The first events whose payloads have `left` bytes together, and what is left then; `anyhow`: at least one."""
    whole: list[Event] = []
    for event in events:
        ref = reference_of(event.payload)
        size = len(event.payload) if ref is None else ref[1]
        if size > left and (whole or not anyhow):
            break
        whole.append(event)
        left = max(0, left - size)
    return whole, left
