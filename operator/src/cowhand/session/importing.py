"""Writing whole logs: a fork of a session, and a session that comes back from a backup.

The events are staged beside the session under a key that nobody reads and that expires by itself; one script then
puts them in the place of the log. So a reader sees all of it or nothing, whatever breaks off in between, and the
source of a fork is only read. Used by `sessions.py`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from cowhand.errors import SessionNotFound, StoreUnavailable, UserError
from cowhand.session import codec
from cowhand.session.blobs import reference, too_big
from cowhand.session.events import (
    LOG_REGRESSED,
    SESSION_DELETED,
    SESSION_RESUMED,
    SESSION_SUSPENDED,
    STATUS_IDLE,
    USER_CUSTOM_TOOL_RESULT,
    USER_MESSAGE,
    USER_TOOL_CONFIRMATION,
    Event,
    NewEvent,
)
from cowhand.session.export import Header
from cowhand.session.keys import Keys, doomed
from cowhand.session.log import Restored, SessionMeta, SessionState

if TYPE_CHECKING:
    from cowhand.session.store import Store

CHUNK: Final = 64
"""Most events of one script."""

CHUNK_BYTES: Final = 512 * 1024
"""Payload bytes after which a chunk is written: a longer script would hold up every session of the server."""

STAGED_MS: Final = 3_600_000
"""What was staged and not imported goes after so long."""

RETAIN_MS: Final = 30 * 86_400_000
"""How long a session is kept that had ended when its backup was made."""

STRAY: Final = "stray:"
"""Event ids of the operator's suspension of a session whose object is missing begin with this."""

_INPUT: Final = frozenset({USER_MESSAGE, USER_TOOL_CONFIRMATION, USER_CUSTOM_TOOL_RESULT})


@dataclass
class Staged:
    """A log that is being staged; positions are dense from 1.

    Attributes:
        key: of its stream.
        count: events so far.
        ids: external event id -> position, for deduplication.
        open: input stands after the last `session.status_idle`.
    """

    key: str
    count: int = 0
    ids: list[tuple[str, int]] = field(default_factory=list)
    open: bool = False
    _chunk: list[Event] = field(default_factory=list)
    _bytes: int = 0


class Importer:
    """Writes logs of one tenant."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys

    def begin(self, session_id: str) -> Staged:
        """A new, empty staged log."""
        return Staged(f"{self._keys.session(session_id).log}:{secrets.token_hex(8)}")

    async def add(self, session_id: str, staged: Staged, event: Event, *, known: bool) -> None:
        """Stage the next event; `known` makes its id count as seen if it is an external one.

        Raises:
            UserError: its position is not the next one, or its payload is over the limit.
        """
        if event.seq != staged.count + 1:
            raise UserError(f"event {event.seq} stands where {staged.count + 1} should")
        staged.count += 1
        if known and not event.lease:
            staged.ids.append((event.id, event.seq))
        if event.type in _INPUT:
            staged.open = True
        elif event.type == STATUS_IDLE:
            staged.open = False
        staged._chunk.append(event)
        staged._bytes += len(event.payload)
        if len(staged._chunk) >= CHUNK or staged._bytes >= CHUNK_BYTES:
            await self.flush(session_id, staged)

    async def flush(self, session_id: str, staged: Staged) -> None:
        """Write what was added so far."""
        if not staged._chunk:
            return
        words: list[str | bytes | int] = []
        for event in staged._chunk:
            payload = await self._packed(session_id, event)
            words += [event.seq, event.type, event.id, event.ts, event.lease, payload]
        await self._store.script(
            "stage",
            self._keys.session(session_id),
            *(self._store.payloads.inline_limit, STAGED_MS, *words),
            more=[staged.key],
        )
        staged._chunk, staged._bytes = [], 0

    async def _packed(self, session_id: str, event: Event) -> bytes:
        """What to store for a payload that exists as bytes."""
        payloads, payload = self._store.payloads, event.payload
        if len(payload) > payloads.event_limit:
            raise UserError(
                too_big(event.type, len(payload), payloads.event_limit), field="content"
            )
        if payloads.archive is None or len(payload) <= payloads.inline_limit:
            return payload
        await payloads.archive.put_blob(self._keys.namespace, session_id, payload)
        try:
            cause = str(json.loads(payload).get("c") or "")
        except (ValueError, AttributeError):
            cause = ""
        return reference(payload, cause)

    async def commit(
        self,
        meta: SessionMeta,
        staged: Staged,
        fields: Sequence[str | int],
        *,
        extra: Sequence[NewEvent] = (),
        replaces: int | None = None,
        ready: bool = False,
        expire_ms: int = 0,
    ) -> bool:
        """Put the staged log in the place of the session's; False if the session exists already.

        Args:
            meta: of the session.
            staged: all of its events.
            fields: further fields of the meta hash, `name, value, ...`.
            extra: external events to write behind them.
            replaces: `next` of the session that it takes the place of, None for a new one.
            ready: make it ready.
            expire_ms: the session goes after so long; 0: it stays.

        Raises:
            UserError: the session changed meanwhile, or a harness holds it.
            StoreUnavailable: what was staged is gone; start again.
        """
        await self.flush(meta.session_id, staged)
        stored = await self._store.payloads.pack(self._keys.namespace, meta.session_id, extra)
        tail: list[str | bytes] = []
        for event, payload in zip(extra, stored, strict=True):
            tail += [event.type, event.id, payload]
        every = [*codec.meta_fields(meta), *fields]
        reply = await self._store.script(
            "import",
            self._keys.session(meta.session_id),
            *(staged.count, "" if replaces is None else replaces, expire_ms, int(ready)),
            *(len(staged.ids), *(word for pair in staged.ids for word in pair)),
            *(len(every) // 2, *every, *tail),
            more=[staged.key],
        )
        if reply[0] == "TORN":
            raise StoreUnavailable("the store lost what was staged for an import: start it again")
        if reply[0] in ("CHANGED", "HELD"):
            why = "it changed meanwhile" if reply[0] == "CHANGED" else "a harness works on it"
            raise UserError(
                f"session {meta.session_id} cannot be restored now: {why}. Suspend it "
                "(spec.operatingMode) and try again"
            )
        return bool(reply[0] == "OK")

    async def spare(self, session_id: str, retain_ms: int) -> None:
        """Keep the archive from deleting what this session needs again; `retain_ms`: only for so long (0: for good)."""
        if self._store.payloads.archive is None:
            return
        key, member = doomed(self._store.config.prefix), f"{self._keys.namespace}/{session_id}"
        if not retain_ms:
            await self._store.writes.call("ZREM", key, member)
            return
        seconds, _ = await self._store.reads.call("TIME")
        await self._store.writes.call("ZADD", key, int(seconds) * 1000 + retain_ms, member)

    async def bury(self, meta: SessionMeta) -> None:
        """Let the tombstone of a restored session say that its run was made, unless it names another one."""
        if meta.tombstone:
            key = self._keys.tombstone(meta.tombstone)
            await self._store.writes.call("SET", key, meta.session_id, "NX")


def copied(event: Event, source: str) -> Event:
    """An event of a fork's source as it stands in the fork: the id of an external one names the source.

    So ids stay unique, and none of them counts as seen: the fork has its own `msg:0`.
    """
    if event.lease:
        return event
    return Event(event.seq, event.type, f"{event.id}@{source}", event.ts, "", event.payload)


class Comparison:
    """Whether a session in the store may be replaced by its backup: only if the backup goes on where it stops.

    Args:
        there: the session as the store has it.
        read: reads events of it: first and last position.
    """

    def __init__(self, there: SessionState, read: Any) -> None:
        self._last = there.next_seq - 1
        self._read = read
        self._page: list[Event] = []
        self._differs = 0

    async def see(self, event: Event) -> None:
        """The next event of the backup.

        Raises:
            UserError: the store has another event at this position.
        """
        if event.seq > self._last or self._differs:
            return
        if not self._page or self._page[-1].seq < event.seq:
            end = min(self._last, event.seq + CHUNK - 1)
            self._page = await self._read(event.seq, end)
        if self._page[event.seq - self._page[0].seq] == event:
            return
        self._differs = event.seq
        rest = await self._read(event.seq, self._last)
        # What the operator wrote when it noticed the loss is all that may be given up for the lost events.
        if not all(_notice(found) for found in rest):
            raise UserError(
                f"the store has another event {event.seq} than the backup: the session went on after "
                "the backup was made or restored, and nothing of it is overwritten. To look at the "
                "backup use `cowhand verify FILE` and `cowhand replay FILE`"
            )

    def common(self) -> int:
        """Last position up to which both are equal, once all events were seen."""
        return self._differs - 1 if self._differs else self._last


def _notice(event: Event) -> bool:
    """What the operator writes about a log that lost its end, or whose object is missing."""
    stray = event.type == SESSION_SUSPENDED and event.id.startswith(STRAY)
    return event.type == LOG_REGRESSED or stray


async def restore(
    importer: Importer,
    header: Header,
    events: AsyncIterator[Event],
    there: SessionState | None,
    read: Any,
    *,
    dry_run: bool = False,
) -> Restored:
    """See `log.SessionLog.restore_session`."""
    meta = header.meta
    if there is not None and there.meta.uid != meta.uid:
        raise UserError(
            f"the store has session {meta.session_id} with another uid: nothing was restored"
        )
    comparison = Comparison(there, read) if there is not None else None
    staged = importer.begin(meta.session_id)
    newest = None
    async for event in events:
        if comparison is not None:
            await comparison.see(event)
        if dry_run:
            staged.count += 1
        else:
            await importer.add(meta.session_id, staged, event, known=True)
        newest = event
    if staged.count != header.last_seq or newest is None:
        raise UserError(f"the backup has {staged.count} events, its header says {header.last_seq}")
    if comparison is not None and comparison.common() >= staged.count:
        return Restored("unchanged", comparison.common(), staged.count)
    outcome: Literal["restored", "extended"] = "extended" if there is not None else "restored"
    before = comparison.common() if comparison is not None else 0
    if dry_run:
        return Restored(outcome, before, staged.count)
    closed = newest.type == SESSION_DELETED or header.state == "closed"
    state = header.state if header.state in ("closed", "terminated") else "idle"
    working = state == "idle" and (header.state != "idle" or staged.open)
    # Nothing runs before the operator has compared the log with what it has seen: it resumes the session.
    mode = "suspended" if working else header.mode
    fields: list[str | int] = [
        *("state", "rescheduling" if working else state, "mode", mode, "epoch", header.epoch),
        *("created", header.created_ms, "input", staged.count if working else 0),
        *("seen", 0 if working else 1, "st", codec.dump(dict(header.status))),
        *("bud", codec.dump(dict(header.budget))),
    ]
    replaces = there.next_seq if there is not None else None
    retain = RETAIN_MS if closed else 0
    await importer.spare(meta.session_id, retain)
    if not await importer.commit(meta, staged, fields, replaces=replaces, expire_ms=retain):
        raise UserError(f"session {meta.session_id} was made meanwhile: restore it again")
    await importer.bury(meta)
    return Restored(outcome, before, staged.count)


async def fork(
    importer: Importer,
    meta: SessionMeta,
    created: NewEvent,
    source: tuple[str, int],
    extra: Sequence[NewEvent],
    read: Any,
    now_ms: int,
) -> bool:
    """Copy `source` (session id, position) into a new session; False if that exists already."""
    source_id, position = source
    staged = importer.begin(meta.session_id)
    first = Event(1, created.type, created.id, now_ms, "", created.payload())
    await importer.add(meta.session_id, staged, first, known=True)
    start = 2
    while start <= position:
        page = await read(source_id, start, min(position, start + CHUNK - 1))
        if not page:
            raise SessionNotFound(f"session {source_id} has no event {start}")
        for event in page:
            if event.type == SESSION_DELETED:
                raise UserError(
                    f"event {event.seq} ends session {source_id}: fork at {event.seq - 1} or before"
                )
            await importer.add(meta.session_id, staged, copied(event, source_id), known=False)
        start = page[-1].seq + 1
    suspended = any(event.type == "session.suspended" for event in extra)
    mode = "suspended" if suspended and extra[-1].type != SESSION_RESUMED else "running"
    budget = created.data.get("budget") or {}
    fields: list[str | int] = [
        *("mode", mode, "epoch", 0, "input", position, "seen", 0, "created", now_ms),
        *("bud", codec.dump(budget)),
    ]
    return await importer.commit(meta, staged, fields, extra=extra, ready=mode == "running")
