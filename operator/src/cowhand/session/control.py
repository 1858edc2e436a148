"""`ControlLog` on Redis Streams: what the operator and the broker do, across tenants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Final

from cowhand.errors import SessionNotFound, UserError
from cowhand.session import codec
from cowhand.session.events import (
    LOG_REGRESSED,
    SESSION_DELETED,
    SESSION_RESUMED,
    SESSION_SUSPENDED,
    SESSION_UPDATED,
    NewEvent,
)
from cowhand.session.keys import GROUP, doomed
from cowhand.session.log import Backlog, HandRecord, Mode, StoreUsage
from cowhand.session.quota import Quotas
from cowhand.session.sessions import check_event_id
from cowhand.session.upkeep import Upkeep

if TYPE_CHECKING:
    from cowhand.session.store import Store

TOMBSTONE_MS: Final = 30 * 86_400_000
"""A tombstone outlives its session by so long, so that a deleted run is not made again by a late sync."""

LOST_RECORD_MS: Final = 86_400_000
"""The record of a lost sandbox stays for so long."""

_MODE_EVENTS: Final[dict[Mode, str]] = {"suspended": SESSION_SUSPENDED, "running": SESSION_RESUMED}


class RedisControlLog:
    """See `log.ControlLog`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._upkeeps: dict[str, Upkeep] = {}
        self._quotas = Quotas(store)

    async def store_usage(self, namespaces: Sequence[str]) -> StoreUsage:
        """See `log.ControlLog.store_usage`."""
        return await self._quotas.usage(namespaces)

    async def put_quota(self, namespace: str, used: int, limit: int | None) -> None:
        """See `log.ControlLog.put_quota`."""
        await self._quotas.put(namespace, used, limit)

    async def get_quota(self, namespace: str) -> tuple[int, int] | None:
        """See `log.ControlLog.get_quota`."""
        return await self._quotas.get(namespace)

    async def set_mode(self, namespace: str, session_id: str, mode: Mode, event: NewEvent) -> int:
        """See `log.ControlLog.set_mode`."""
        if event.type != _MODE_EVENTS[mode]:
            raise ValueError(f"mode {mode} goes with {_MODE_EVENTS[mode]}, not {event.type}")
        check_event_id(event)
        reply = await self._store.script(
            "set_mode",
            self._store.keys(namespace).session(session_id),
            *(event.id, event.type, *await self._pack(namespace, session_id, event), mode),
        )
        return int(reply[1])

    async def set_budget(self, namespace: str, session_id: str, event: NewEvent) -> int:
        """See `log.ControlLog.set_budget`."""
        if event.type != SESSION_UPDATED:
            raise ValueError(f"a budget goes with {SESSION_UPDATED}, not {event.type}")
        check_event_id(event)
        reply = await self._store.script(
            "ingest",
            self._store.keys(namespace).session(session_id),
            *(event.id, event.type, *await self._pack(namespace, session_id, event), 0),
            codec.dump(event.data["budget"] or {}),
        )
        return int(reply[1])

    async def regress(self, namespace: str, session_id: str, event: NewEvent, *, seen: int) -> int:
        """See `log.ControlLog.regress`."""
        if event.type != LOG_REGRESSED:
            raise ValueError(f"a log that lost its tail says so with {LOG_REGRESSED}")
        check_event_id(event)
        reply = await self._store.script(
            "regress",
            self._store.keys(namespace).session(session_id),
            *(event.id, event.type, *await self._pack(namespace, session_id, event), seen),
        )
        return int(reply[1])

    async def accept_regression(self, namespace: str, session_id: str, position: int) -> bool:
        """See `log.ControlLog.accept_regression`."""
        keys = self._store.keys(namespace).session(session_id)
        return bool((await self._store.script("accept", keys, position))[0] == "OK")

    async def close(
        self, namespace: str, session_id: str, event: NewEvent, *, retain_s: int
    ) -> None:
        """See `log.ControlLog.close`."""
        if event.type != SESSION_DELETED:
            raise ValueError(f"a log ends with {SESSION_DELETED}, not {event.type}")
        if retain_s < 0:
            raise UserError(f"retain_s is {retain_s}, it must be 0 or more", field="retain_s")
        check_event_id(event)
        keys = self._store.keys(namespace)
        try:
            reply = await self._store.script(
                "close",
                keys.session(session_id),
                *(event.id, event.type, *await self._pack(namespace, session_id, event)),
                retain_s * 1000,
            )
        except SessionNotFound:
            # An earlier close may have ended it and died before it said so.
            await self._doom(namespace, session_id, retain_s)
            return
        await self._doom(namespace, session_id, retain_s)
        tombstone = reply[1].decode()
        if tombstone:
            left = max(retain_s * 1000, TOMBSTONE_MS)
            await self._store.writes.call("PEXPIRE", keys.tombstone(tombstone), left)

    async def _doom(self, namespace: str, session_id: str, retain_s: int) -> None:
        """Write down when what the archive has of an ended session goes; the earliest time counts.

        Nothing else lets the archive delete a session: that its log is absent from the store is no evidence.
        """
        if self._store.payloads.archive is None:
            return
        seconds, micros = await self._store.reads.call("TIME")
        due = int(seconds) * 1000 + int(micros) // 1000 + retain_s * 1000
        key = doomed(self._store.config.prefix)
        await self._store.writes.call("ZADD", key, "LT", due, f"{namespace}/{session_id}")

    async def _pack(self, namespace: str, session_id: str, event: NewEvent) -> tuple[bytes, int]:
        """What to store for an event, and the limit that the script checks."""
        (payload,) = await self._store.payloads.pack(namespace, session_id, [event])
        return payload, self._store.payloads.inline_limit

    async def drop_worker(self, namespace: str, pod_uid: str) -> int:
        """See `log.ControlLog.drop_worker`."""
        bases = self._store.keys(namespace).bases()
        found = await asyncio.gather(
            *(self._store.reads.call("ZRANGE", base + "w", 0, -1) for base in bases)
        )
        prefix = f"{pod_uid}.".encode()
        calls = []
        for base, workers in zip(bases, found, strict=True):
            gone = [worker for worker in workers if worker.startswith(prefix)]
            if gone:
                dirty = [f"{base}dirty:{worker.decode()}" for worker in gone]
                calls.append(self._store.writes.call("ZREM", base + "w", *gone))
                calls.append(self._store.writes.call("DEL", *dirty))
        await asyncio.gather(*calls)
        return await self._upkeep(namespace).requeue()

    def _upkeep(self, namespace: str) -> Upkeep:
        if namespace not in self._upkeeps:
            keys = self._store.keys(namespace)
            self._upkeeps[namespace] = Upkeep(self._store, keys, audit=True)
        return self._upkeeps[namespace]

    async def sweep(self, namespace: str) -> int:
        """See `log.ControlLog.sweep`."""
        return await self._upkeep(namespace).sweep()

    async def backlog(self, namespace: str) -> Backlog:
        """See `log.ControlLog.backlog`."""
        bases = self._store.keys(namespace).bases()
        call = self._store.reads.call
        seconds, micros = await call("TIME")
        now = int(seconds) * 1000 + int(micros) // 1000
        leased, workers, waiting = await asyncio.gather(
            asyncio.gather(*(call("ZCARD", base + "own") for base in bases)),
            call("ZCOUNT", bases[0] + "w", f"({now}", "+inf"),
            asyncio.gather(*(self._waiting(base) for base in bases)),
        )
        oldest = min((first for _, first in waiting if first), default=now)
        return Backlog(
            ready=sum(count for count, _ in waiting),
            leased=sum(leased),
            workers=workers,
            oldest_ready_ms=max(0, now - oldest),
        )

    async def _waiting(self, base: str) -> tuple[int, int]:
        """Entries of one ready stream that nobody has claimed, and the time of the oldest (0: none)."""
        call = self._store.reads.call
        ready = base + "rdy"
        if not await call("EXISTS", ready):
            return 0, 0
        last, pending, first = b"-", 0, b""
        for raw in await call("XINFO", "GROUPS", ready):
            group = codec.pairs(raw)
            if group[b"name"] == GROUP.encode():
                last = b"(" + group[b"last-delivered-id"]
                pending = int(group[b"pending"])
        if pending:
            first = (await call("XPENDING", ready, GROUP))[1]
        # Not the group's lag: servers answer nil for it in some states, and the stream is short.
        unread = await call("XRANGE", ready, last, "+")
        if unread and not first:
            first = unread[0][0]
        return pending + len(unread), int(first.split(b"-")[0]) if first else 0

    async def take_projections(self, namespace: str, limit: int = 100) -> list[str]:
        """See `log.ControlLog.take_projections`."""
        taken: list[str] = []
        for base in self._store.keys(namespace).bases():
            if len(taken) >= limit:
                break
            found = await self._store.writes.call("SPOP", base + "proj", limit - len(taken))
            taken += [sid.decode(errors="replace") for sid in found]
        return taken

    async def projection_nudges(self, namespaces: Sequence[str]) -> AsyncIterator[str]:
        """See `log.ControlLog.projection_nudges`."""
        channels = {
            f"{base}p": namespace
            for namespace in namespaces
            for base in self._store.keys(namespace).bases()
        }
        async with self._store.hub.subscribe(channels) as subscription:
            for namespace in namespaces:
                yield namespace
            while True:
                message = await subscription.get()
                if message is None:
                    continue
                if message[0]:
                    yield channels[message[0]]
                else:
                    for namespace in namespaces:
                        yield namespace

    async def put_hand(self, namespace: str, record: HandRecord) -> None:
        """See `log.ControlLog.put_hand`."""
        keys = self._store.keys(namespace)
        body = codec.record_json(record)
        if record.sandbox_uid:
            await self._store.writes.script(
                "put_sandbox",
                [keys.sandbox(record.sandbox_uid)],
                keys.base_of(record.sandbox_uid),
                record.sandbox_uid,
                body,
                LOST_RECORD_MS if record.state == "Lost" else 0,
            )
        if record.session_id:
            # Last, because it nudges the worker that waits for it.
            field = f"{record.hand}/{record.instance}"
            await self._store.script("put_hand", keys.session(record.session_id), field, body)

    async def get_hand(
        self, namespace: str, session_id: str, hand: str, instance: int
    ) -> HandRecord | None:
        """See `log.ControlLog.get_hand`."""
        key = self._store.keys(namespace).session(session_id).hands
        return codec.record(await self._store.reads.call("HGET", key, f"{hand}/{instance}"))

    async def get_sandbox(self, namespace: str, sandbox_uid: str) -> HandRecord | None:
        """See `log.ControlLog.get_sandbox`."""
        key = self._store.keys(namespace).sandbox(sandbox_uid)
        return codec.record(await self._store.reads.call("GET", key))
