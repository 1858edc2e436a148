"""A process's access to the store: its connections, the store's identity, and the three roles.

`connect` makes it; nothing is opened before the first call. Connections: one for scripts (so that WAIT speaks
of our own appends), one for reads, one for nudges, and one for each blocking reader.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from redis import exceptions as redis_errors

from cowhand.errors import (
    Fenced,
    QuotaExceeded,
    SessionClosed,
    SessionNotFound,
    StoreMismatch,
    StoreUnavailable,
    Suspended,
    Terminal,
    UserError,
)
from cowhand.session import scripts as lua
from cowhand.session.archiving import RedisArchiveLog
from cowhand.session.blobs import Archive, Payloads, too_big
from cowhand.session.cold import ColdLog
from cowhand.session.control import RedisControlLog
from cowhand.session.durability import Durability, barrier, confirmed
from cowhand.session.gate import RateGate, RedisRateGate
from cowhand.session.hub import Hub
from cowhand.session.keeper import ScriptKeeper
from cowhand.session.keys import Keys, SessionKeys
from cowhand.session.link import Link, Pipe, connection_factory, translate
from cowhand.session.log import ArchiveLog, ControlLog, SessionLog, StoreConfig, WorkerLog
from cowhand.session.preview import Previews, RedisPreviews
from cowhand.session.sessions import RedisSessionLog
from cowhand.session.slots import ModelSlots, RedisModelSlots
from cowhand.session.worker import RedisWorkerLog
from cowhand.telemetry.metrics import STORE_BARRIER_SECONDS

LOG = logging.getLogger(__name__)

WAIT_MS = 1000
"""How long a barrier waits for replicas before it is asked again."""

DISK_WAIT_MS = 3000
"""The same where it waits for disks: with `appendfsync everysec` they take up to two seconds."""

WEAK_WAIT_MS: Final = 20
"""The same while `allow_weaker` lets barriers pass that nobody confirms."""

MARK_MS: Final = 60_000
"""Life of the key that a barrier writes."""


class IdentityKeeper(Protocol):
    """Remembers a store's identity across restarts of the process, outside the store."""

    @property
    def where(self) -> str:
        """Where it is kept, for people."""

    async def recall(self) -> str | None:
        """What was kept; None if nothing was: the store that is there is accepted."""

    async def keep(self, identity: str) -> None:
        """Keep it for good."""


class Store:
    """Connections of one process to one store.

    Use as `async with connect(...) as store`, or call `aclose`.
    """

    def __init__(
        self,
        config: StoreConfig,
        namespace: str,
        scripts: Mapping[str, lua.Script] | None = None,
        archive: Archive | None = None,
        keeper: IdentityKeeper | None = None,
    ) -> None:
        """`scripts` replaces the packaged ones (tests that prove that a defence matters)."""
        self.config = config
        self.payloads = Payloads(archive)
        self.cold = ColdLog(archive)
        self._namespace = namespace
        self._make = connection_factory(config)
        self._identity: bytes | None = None
        self._keeper = keeper
        self._scripts = lua.load() if scripts is None else scripts
        self.writes = Pipe(self.link(), self._scripts)
        self.reads = Pipe(self.link(), self._scripts)
        self.hub = Hub(self.link())
        self._tasks: list[asyncio.Task[None]] = []
        self.durability = Durability(self)
        self._weak = False
        self._barrier_turn = asyncio.Lock()
        self._barrier_next: asyncio.Task[tuple[int, bool]] | None = None

    async def __aenter__(self) -> Store:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections but those of readers that still iterate."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.writes.close()
        await self.reads.close()
        await self.hub.close()

    async def check(self) -> None:
        """Connect now.

        Raises:
            StoreUnavailable: it does not answer, or has no identity yet and we may not make one.
            StoreMismatch: it is not the store that this process started with.
            Denied: wrong user or password.
        """
        await self.reads.call("PING")

    def keep_scripts(self) -> None:
        """Keep the scripts loaded until `aclose`: each process of the control plane does it (see `keeper`)."""
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(ScriptKeeper(self, self._scripts).run()))

    async def require_durability(self) -> None:
        """Refuse a store that keeps less than the profile promises, and look at it from now on until `aclose`.

        For the control plane's logins: tenants may not ask. Raises StoreTooWeak (see `durability`).
        """
        await self.durability.require()
        self._tasks.append(asyncio.get_running_loop().create_task(self.durability.run()))

    @property
    def has_barrier(self) -> bool:
        """Whether the profile has barriers at all."""
        return barrier(self.config.profile, self.config.replicas, 0) is not None

    def session_log(self, namespace: str | None = None) -> SessionLog:
        """`SessionLog` of a tenant (default: the one given to `connect`)."""
        return RedisSessionLog(self, self.keys(namespace))

    def worker_log(self, pod_uid: str, namespace: str | None = None) -> WorkerLog:
        """`WorkerLog` of a new worker incarnation in the pod with this uid."""
        return RedisWorkerLog(self, self.keys(namespace), f"{pod_uid}.{secrets.token_hex(4)}")

    def rate_gate(self, namespace: str | None = None) -> RateGate:
        """`RateGate` of a tenant."""
        return RedisRateGate(self, self.keys(namespace))

    def model_slots(self) -> ModelSlots:
        """Slots of model workspaces, shared by all tenants; for the broker's login."""
        return RedisModelSlots(self)

    def previews(self, namespace: str | None = None) -> Previews:
        """`Previews` of a tenant."""
        return RedisPreviews(self, self.keys(namespace))

    def control_log(self) -> ControlLog:
        """`ControlLog`, for all tenants."""
        return RedisControlLog(self)

    def archive_log(self) -> ArchiveLog:
        """`ArchiveLog`, for all tenants."""
        return RedisArchiveLog(self)

    def keys(self, namespace: str | None = None) -> Keys:
        """Key names of a tenant."""
        chosen = self._namespace if namespace is None else namespace
        if not chosen or ":" in chosen:
            raise UserError(f"{chosen!r} is not a namespace", field="namespace")
        return Keys(self.config.prefix, chosen, self.config.partitions)

    def link(self) -> Link:
        """A connection of one's own, for a blocking reader; close it after use."""
        return Link(self._make, self._greet)

    async def _greet(self, link: Link) -> None:
        """Compare the identity of the store with the one it must have, on each new connection."""
        (found,) = await link.run([("GET", f"{self.config.prefix}:gen")])
        if isinstance(found, Exception):
            raise translate(found) from found
        if self._identity is not None and found == self._identity:
            return
        expected, remedy = await self._expected()
        if expected is None:
            self._identity = await self._accept(link, found)
        elif found == expected:
            self._identity = found
        else:
            what = "is empty" if found is None else "is another one"
            raise StoreMismatch(
                f"the store {what}: the data of the one that was used before is lost or replaced. "
                f"Restore its volume, or, to go on with what is there now, {remedy}"
            )

    async def _expected(self) -> tuple[bytes | None, str]:
        """The identity that the store must have, None for any; and how a person accepts another one."""
        if self._keeper is None:
            return self._identity, "restart the process"
        kept = await self._keeper.recall()
        return None if kept is None else kept.encode(), f"delete {self._keeper.where}"

    async def _accept(self, link: Link, found: bytes | None) -> bytes:
        """The identity of a store that is new to us; a new store gets one."""
        key = f"{self.config.prefix}:gen"
        if found is None:
            (made,) = await link.run([("SET", key, secrets.token_hex(16), "NX")])
            if isinstance(made, redis_errors.NoPermissionError):
                raise StoreUnavailable(
                    "the store has no identity yet: operator, broker or gateway makes it", after=1.0
                )
            if isinstance(made, Exception):
                raise translate(made) from made
            (found,) = await link.run([("GET", key)])
            if isinstance(found, Exception):
                raise translate(found) from found
        assert isinstance(found, bytes), "GET after SET NX"
        if self._keeper is not None:
            await self._keeper.keep(found.decode())
        return found

    async def verify(self) -> None:
        """Raise StoreMismatch if the data was lost behind an open connection."""
        key = f"{self.config.prefix}:gen"
        if await self.reads.call("GET", key) != self._identity:
            raise StoreMismatch("the store has lost its data: restore it, or restart the process")

    async def script(
        self, name: str, keys: SessionKeys, *args: str | bytes | int, more: Sequence[str] = ()
    ) -> list[Any]:
        """Run a session script; answers `[code, ...]` with the code as text. `more`: keys behind its parts.

        Raises:
            SessionNotFound, SessionClosed, Fenced, UserError for the codes that mean these, besides what
            `Pipe.call` raises.
        """
        return (await self.script_on(name, keys, *args, more=more))[0]

    async def script_on(
        self, name: str, keys: SessionKeys, *args: str | bytes | int, more: Sequence[str] = ()
    ) -> tuple[list[Any], int]:
        """As `script`, with the generation of the connection that answered."""
        names = [*(keys.name(part) for part in lua.PARTS[name]), *more]
        raw, generation = await self.writes.script_on(
            name, names, keys.base, keys.session_id, *args
        )
        reply = [raw[0].decode(), *raw[1:]]
        await self._raise(keys, reply)
        return reply, generation

    async def _raise(self, keys: SessionKeys, reply: list[Any]) -> None:
        code, session_id = reply[0], keys.session_id
        if code == "NOSESSION":
            await self.verify()
            raise SessionNotFound(f"there is no session {session_id}")
        if code == "CLOSED":
            raise SessionClosed(f"session {session_id} has ended; nothing can be appended")
        if code == "FENCED":
            raise Fenced(f"session {session_id} is held by {reply[1].decode() or 'nobody'}")
        if code == "QUOTA":
            raise QuotaExceeded(keys.namespace, used=reply[1], limit=reply[2])
        if code == "NOTRUNNING":
            raise Suspended(f"session {session_id} is suspended; nothing new may begin")
        if code == "TOOBIG":
            raise UserError(too_big(f"event {reply[1]}", reply[2], self.payloads.inline_limit))

    async def wait(self, keys: Keys) -> int:
        """Barrier: wait until all that we wrote on this connection is as durable as the profile promises.

        Answers the generation of the connection that it speaks of.

        A WAIT speaks of what its own connection has written, and one that has written nothing passes at once: a
        repeated append that had run on an older connection writes nothing. So a mark is written first, behind
        everything that was answered on this connection.

        Args:
            keys: of the tenant, whose login may write the mark.

        Raises:
            StoreUnavailable: not confirmed in time; what was written is not lost, ask again.
        """
        began, outcome = time.monotonic(), "unavailable"
        try:
            generation, done = await self._shared_barrier(keys)
            if not done and not self.config.allow_weaker:
                raise StoreUnavailable(
                    f"the append is not confirmed as profile {self.config.profile} demands"
                    f" ({self.config.replicas} replicas): it may be lost or not, ask again",
                    after=0.5,
                )
            if self._weak == done:
                self._weak = not done
                LOG.warning("barriers are %s", "confirmed again" if done else "not confirmed now")
            outcome = "ok" if done else "weaker"
        finally:
            STORE_BARRIER_SECONDS.labels(outcome).observe(time.monotonic() - began)
        return generation

    async def _shared_barrier(self, keys: Keys) -> tuple[int, bool]:
        """One barrier for all who ask before its mark is written: a second mark would wait for the replicas again."""
        if self._barrier_next is None or self._barrier_next.done():
            task = asyncio.get_running_loop().create_task(self._take_turn(keys))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._barrier_next = task
        return await asyncio.shield(self._barrier_next)

    async def _take_turn(self, keys: Keys) -> tuple[int, bool]:
        async with self._barrier_turn:
            self._barrier_next = None  # Whoever asks from now on may have written behind this mark.
            return await self._barrier(keys)

    async def _barrier(self, keys: Keys) -> tuple[int, bool]:
        """The generation of the connection, and whether enough have confirmed."""
        profile, replicas = self.config.profile, self.config.replicas
        patience = DISK_WAIT_MS if profile == "strict" else WAIT_MS
        command = barrier(profile, replicas, WEAK_WAIT_MS if self._weak else patience)
        assert command is not None, "no barrier in this profile"
        mark = ("SET", keys.barrier(), "1", "PX", MARK_MS)
        # Both are queued before either is sent, so they go over one connection in this order, or the
        # generations tell.
        found = await asyncio.gather(
            self.writes.call_on(*mark), self.writes.call_on(*command), return_exceptions=True
        )
        for one in found:
            if isinstance(one, Terminal):
                # WAITAOF of a server that writes no file, for instance: nothing is promised, nothing is lost.
                LOG.warning("the store refuses the barrier: %s", one)
                return self.writes.link.generation, False
            if isinstance(one, BaseException):
                raise one
        (_, marked), (reply, generation) = (one for one in found if isinstance(one, tuple))
        return generation, marked == generation and confirmed(profile, replicas, reply)
