"""`WorkerLog` on Redis Streams: what a harness worker does with the log of its tenant.

Exactly once without the server's help: every append carries the lease and a number (wseq) that grows by one, so
a repeated append answers the first one's position, and a worker whose lease is gone is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from redis import exceptions as redis_errors

from cowhand.errors import (
    CowhandError,
    Fenced,
    SessionClosed,
    SessionNotFound,
    StoreUnavailable,
    Suspended,
    Terminal,
    UserError,
)
from cowhand.session import codec
from cowhand.session.events import EXTERNAL, SESSION_WAKE, NewEvent
from cowhand.session.keys import GROUP, Keys
from cowhand.session.link import Command, Link
from cowhand.session.log import HandRecord, Held, Lease, Parked, State
from cowhand.session.upkeep import Upkeep
from cowhand.telemetry.metrics import CLAIMS

if TYPE_CHECKING:
    from cowhand.session.store import Store

LOG = logging.getLogger(__name__)

T = TypeVar("T")

BEAT_TTL_MS = 10_000
"""A worker that has not beaten for so long is dead."""

PROGRESS_MS: Final = 20 * 60 * 1000
"""A session that its holder has neither appended to nor touched for so long is stuck."""

BLOCK_MS: Final = 2_000
ORPHAN_MS = 5_000
"""A ready entry that its reader has not claimed for so long is read by another."""

ORPHAN_SECONDS: Final = 5.0


@dataclass
class _Appender:
    """Appends of one lease, one at a time.

    `unsure` are the script arguments of an append whose outcome is unknown: it is sent again before (or as)
    the next one, because it may still arrive.
    """

    lease: Lease
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    wseq: int = 0
    unsure: list[str | bytes | int] | None = None
    generation: int = 0


class RedisWorkerLog:
    """See `log.WorkerLog`."""

    def __init__(self, store: Store, keys: Keys, worker_id: str) -> None:
        self._store = store
        self._keys = keys
        self._worker_id = worker_id
        self._upkeep = Upkeep(store, keys, audit=False)
        self._appenders: dict[str, _Appender] = {}
        self._nominated: dict[str, set[bytes]] = {}
        self._unsure_claims: dict[str, str] = {}
        self._beat_generations: list[int] = []

    @property
    def worker_id(self) -> str:
        """See `log.WorkerLog.worker_id`."""
        return self._worker_id

    # Heartbeat

    async def beat(self) -> set[str]:
        """See `log.WorkerLog.beat`."""
        replies = await asyncio.gather(
            *(
                self._store.writes.script_on(
                    "beat", [base + "w"], base, "", self._worker_id, BEAT_TTL_MS
                )
                for base in self._keys.bases()
            )
        )
        dirty = {sid.decode() for group, _ in replies for sid in group}
        generations = [number for _, number in replies]
        if generations != self._beat_generations:
            # An answer may have been lost with its connection, and what it took from the dirty sets with it.
            self._beat_generations = generations
            dirty |= {appender.lease.session_id for appender in self._appenders.values()}
        return dirty

    async def retire(self) -> None:
        """See `log.WorkerLog.retire`."""
        bases = self._keys.bases()
        await asyncio.gather(
            *(self._store.writes.call("ZREM", base + "w", self._worker_id) for base in bases)
        )
        await asyncio.gather(*(self._give_back(base) for base in bases))

    async def _give_back(self, base: str) -> None:
        """Nominate what was delivered to us and not claimed for others."""
        ready = base + "rdy"
        try:
            pending = await self._store.reads.call(
                "XPENDING", ready, GROUP, "-", "+", 1000, self._worker_id
            )
        except Terminal:
            return  # No group in this partition: nobody has ever read it.
        for entry_id, *_ in pending:
            for _, fields in await self._store.reads.call("XRANGE", ready, entry_id, entry_id):
                keys = self._keys.session(fields[1].decode())
                await self._store.script("giveback", keys, GROUP, entry_id)

    # Work

    async def work(self) -> AsyncIterator[str]:
        """See `log.WorkerLog.work`."""
        groups = self._store.readers([base + "rdy" for base in self._keys.bases()])
        async with contextlib.aclosing(merged([self._reader(ready) for ready in groups])) as found:
            async for session_id in found:
                yield session_id

    async def _reader(self, ready: Sequence[str]) -> AsyncGenerator[str, None]:
        link = self._store.link(ready[0])
        try:
            async for session_id in self._nominations(link, ready):
                yield session_id
        finally:
            await link.close()

    async def _nominations(self, link: Link, ready: Sequence[str]) -> AsyncIterator[str]:
        clock = asyncio.get_running_loop()
        orphans_at = 0.0
        generation = -1
        pause = 0.05
        while True:
            try:
                if generation != link.generation:
                    await self._make_groups(link, ready)
                    generation = link.generation
                found: list[str] = []
                if clock.time() >= orphans_at:
                    orphans_at = clock.time() + ORPHAN_SECONDS
                    found += await self._orphans(link, ready)
                if not found:
                    # Never without a wait: the claim that makes a nomination certain needs its turn.
                    found = await self._read(link, ready, block=not self._unsure_of(ready))
                found += [sid for sid in self._unsure_of(ready) if sid not in found]
                pause = 0.05
            except (OSError, TimeoutError, redis_errors.RedisError, CowhandError) as err:
                error = self._store.translate(err)
                if not isinstance(error, StoreUnavailable):
                    raise error from err
                LOG.info("ready stream not readable, trying again: %s", error)
                # It may be a replica by now, which answers, but never with work.
                await link.close()
                generation = -1
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)
                continue
            for session_id in found:
                yield session_id

    def _unsure_of(self, ready: Sequence[str]) -> list[str]:
        """Sessions of these streams whose claim may have run."""
        return [sid for sid in self._unsure_claims if f"{self._keys.base_of(sid)}rdy" in ready]

    async def _make_groups(self, link: Link, ready: Sequence[str]) -> None:
        replies = await link.run(
            [("XGROUP", "CREATE", key, GROUP, "0", "MKSTREAM") for key in ready]
        )
        for reply in replies:
            if isinstance(reply, Exception) and "BUSYGROUP" not in str(reply):
                raise reply

    async def _read(self, link: Link, ready: Sequence[str], *, block: bool = True) -> list[str]:
        wait = ("BLOCK", str(BLOCK_MS)) if block else ()
        command: Command = (
            *("XREADGROUP", "GROUP", GROUP, self._worker_id, "COUNT", "1", *wait),
            *("STREAMS", *ready, *([">"] * len(ready))),
        )
        (reply,) = await link.run([command], timeout=BLOCK_MS / 1000 + 5)
        if isinstance(reply, Exception):
            if "NOGROUP" in str(reply):
                await self._store.verify(ready[0].removesuffix("rdy"))
                await self._make_groups(link, ready)
                return []
            raise reply
        return [sid for _, entries in reply or () for sid in self._nominate(entries)]

    async def _orphans(self, link: Link, ready: Sequence[str]) -> list[str]:
        """Entries whose reader died between reading and claiming."""
        replies = await link.run(
            [
                ("XAUTOCLAIM", key, GROUP, self._worker_id, ORPHAN_MS, "0-0", "COUNT", 16)
                for key in ready
            ]
        )
        found: list[str] = []
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
            found += self._nominate(reply[1])
        return found

    def _nominate(self, entries: Sequence[Any]) -> list[str]:
        sids = []
        for entry_id, fields in entries:
            sid = fields[1].decode()
            self._nominated.setdefault(sid, set()).add(entry_id)
            sids.append(sid)
        return sids

    async def nudges(self) -> AsyncIterator[str]:
        """See `log.WorkerLog.nudges`."""
        channels = [f"{base}n:{self._worker_id}" for base in self._keys.bases()]
        async with self._store.hub.subscribe(channels) as subscription:
            while True:
                message = await subscription.get()
                # Nothing to do after a reconnect: the next beat answers the dirty set.
                if message is not None and message[1]:
                    yield message[1].split(b" ")[0].decode()

    # Leases

    async def claim(self, session_id: str) -> Lease | Held:
        """See `log.WorkerLog.claim`."""
        nonce = self._unsure_claims.pop(session_id, "") or secrets.token_hex(6)
        ids = self._nominated.get(session_id, set()).copy()
        keys = self._keys.session(session_id)
        try:
            reply = await self._store.script(
                "claim", keys, self._worker_id, nonce, PROGRESS_MS, GROUP, *sorted(ids)
            )
        except (StoreUnavailable, asyncio.CancelledError):
            # The claim may have run: `work` offers the session again, and the same nonce answers the same lease.
            self._unsure_claims[session_id] = nonce
            raise
        except SessionNotFound:
            reply = ["NOSESSION"]
        except SessionClosed:
            reply = ["CLOSED"]
        CLAIMS.labels(reply[0].lower()).inc()
        if reply[0] == "DEADWORKER":
            return Held("DEADWORKER")
        left = self._nominated.pop(session_id, set()) - ids
        if left:
            self._nominated[session_id] = left
        if reply[0] != "OK":
            return Held(reply[0], reply[1].decode() if len(reply) > 1 else "")
        # Endpoint and credential: what an endpoint counts requests by, as far as it can be told from here.
        workspace = hashlib.sha256(reply[4]).hexdigest()[:16]
        lease = Lease(session_id, reply[1].decode(), reply[2], reply[3], workspace)
        self._appenders.setdefault(lease.value, _Appender(lease))
        return lease

    async def append(
        self, lease: Lease, events: Sequence[NewEvent], *, status: dict[str, Any] | None = None
    ) -> int:
        """See `log.WorkerLog.append`."""
        for event in events:
            if event.type in EXTERNAL or event.type == SESSION_WAKE:
                raise ValueError(f"{event.type} is not an event that a worker appends")
        if not events and status is None:
            raise ValueError("nothing to append")
        document = "" if status is None else codec.dump(status)
        task = asyncio.get_running_loop().create_task(self._append(lease, events, document))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise

    async def _append(self, lease: Lease, events: Sequence[NewEvent], status: str) -> int:
        appender = self._appenders.get(lease.value)
        if appender is None:
            raise Fenced(f"lease {lease.value} of {lease.session_id} was given back or lost")
        async with appender.lock:
            payloads = self._store.payloads
            stored = await payloads.pack(self._keys.namespace, lease.session_id, events)
            args: list[str | bytes | int] = [status]
            for event, payload in zip(events, stored, strict=True):
                args += [event.type, payload]
            if appender.unsure is not None and appender.unsure != args:
                with contextlib.suppress(Suspended):
                    await self._send(lease, appender, appender.unsure)
            return await self._send(lease, appender, args)

    async def _send(self, lease: Lease, appender: _Appender, args: list[str | bytes | int]) -> int:
        appender.unsure = args
        wseq = appender.wseq + 1
        try:
            reply, generation = await self._store.script_on(
                "append",
                self._keys.session(lease.session_id),
                *(lease.value, wseq, PROGRESS_MS, self._store.payloads.inline_limit, *args),
            )
        except (Suspended, UserError):
            appender.unsure = None  # refused for certain
            raise
        except (Fenced, SessionNotFound, SessionClosed) as err:
            self._lost(lease, err)
        if reply[0] == "GAP":
            await self._regressed(lease, reply[1])
        appender.wseq, appender.unsure, appender.generation = wseq, None, generation
        return int(reply[1])

    def _lost(self, lease: Lease, err: Exception) -> NoReturn:
        self._appenders.pop(lease.value, None)
        if isinstance(err, Fenced):
            raise err
        raise Fenced(f"the lease of {lease.session_id} is gone: {err}") from err

    async def _regressed(self, lease: Lease, last: int) -> NoReturn:
        """The store lost a tail with our appends in it: what this worker knows is no longer the log."""
        LOG.warning("the store lost appends of %s after number %s", lease.session_id, last)
        await self.handover(lease)
        raise Fenced(
            f"the store lost the newest events of {lease.session_id} (a failover): the session is queued"
            " again, and whoever claims it continues from what is there"
        )

    async def barrier(self, lease: Lease | None = None) -> None:
        """See `log.WorkerLog.barrier`."""
        if not self._store.has_barrier:
            return
        chosen = list(self._appenders) if lease is None else [lease.value]
        leases = [lease] if lease is not None else [one.lease for one in self._appenders.values()]
        bases = sorted({self._keys.base_of(one.session_id) for one in leases})
        waited = await asyncio.gather(*(self._store.wait(base) for base in bases))
        generations = dict(zip(bases, waited, strict=True))
        for value in chosen:
            appender = self._appenders.get(value)
            if appender is None:
                if lease is not None:
                    raise Fenced(f"lease {value} was given back or lost")
                continue
            # The appends went over an older connection, maybe to another server: are they still there?
            base = self._keys.base_of(appender.lease.session_id)
            while appender.wseq and appender.generation != generations[base]:
                appender.generation = await self._touch(appender.lease, appender.wseq)
                generations[base] = await self._store.wait(base)

    async def touch(self, lease: Lease) -> None:
        """See `log.WorkerLog.touch`."""
        await self._touch(lease, None)

    async def _touch(self, lease: Lease, wseq: int | None) -> int:
        try:
            reply, generation = await self._store.script_on(
                "touch",
                self._keys.session(lease.session_id),
                *(lease.value, PROGRESS_MS, "" if wseq is None else wseq),
            )
        except (Fenced, SessionNotFound, SessionClosed) as err:
            self._lost(lease, err)
        if reply[0] == "GAP":
            await self._regressed(lease, reply[1])
        return generation

    async def park(
        self,
        lease: Lease,
        expected_next: int,
        *,
        state: State = "idle",
        wake_at_ms: int | None = None,
    ) -> Parked:
        """See `log.WorkerLog.park`."""
        try:
            reply = await self._store.script(
                "park",
                self._keys.session(lease.session_id),
                *(lease.value, expected_next, state, "" if wake_at_ms is None else wake_at_ms),
            )
        except (Fenced, SessionNotFound, SessionClosed) as err:
            self._lost(lease, err)
        if reply[0] == "NEW":
            return Parked(parked=False, next_seq=reply[1])
        self._appenders.pop(lease.value, None)
        return Parked(parked=True, next_seq=reply[1])

    async def handover(self, lease: Lease) -> None:
        """See `log.WorkerLog.handover`."""
        try:
            await self._store.script("handover", self._keys.session(lease.session_id), lease.value)
        except (Fenced, SessionNotFound, SessionClosed) as err:
            self._lost(lease, err)
        self._appenders.pop(lease.value, None)

    async def sweep(self) -> int:
        """See `log.WorkerLog.sweep`."""
        return await self._upkeep.sweep()

    async def get_hand(self, session_id: str, hand: str, instance: int) -> HandRecord | None:
        """See `log.WorkerLog.get_hand`."""
        key = self._keys.session(session_id).hands
        return codec.record(await self._store.reads.call("HGET", key, f"{hand}/{instance}"))


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """What several sources yield, as it comes; each is only asked while somebody waits for it.

    One that raises ends all of them.
    """
    if len(sources) == 1:
        async with contextlib.aclosing(sources[0]) as only:
            async for item in only:
                yield item
        return
    waiting: dict[asyncio.Task[T], AsyncGenerator[T, None]] = {}
    idle = list(sources)
    try:
        while True:
            for source in idle:
                waiting[asyncio.ensure_future(anext(source))] = source
            idle = []
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                idle.append(waiting.pop(task))
                yield task.result()
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.gather(*(source.aclose() for source in sources))
