"""A process's access to the store: its connections, the store's identity, and the three roles.

`connect` makes it; nothing is opened before the first call. Connections: one for scripts (so that WAIT speaks
of our own appends), one for reads, one for nudges, and one for each blocking reader; on a cluster one for scripts, one
for reads and one for each blocking reader of each partition that is used (see `cluster`).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from cowhand.errors import (
    Fenced,
    QuotaExceeded,
    SessionClosed,
    SessionNotFound,
    StoreUnavailable,
    Suspended,
    UserError,
)
from cowhand.session import cluster
from cowhand.session import scripts as lua
from cowhand.session.archiving import RedisArchiveLog
from cowhand.session.barriers import Barriers
from cowhand.session.blobs import Archive, Payloads, too_big
from cowhand.session.cluster import MOVES, SlotPipes
from cowhand.session.cold import ColdLog
from cowhand.session.control import RedisControlLog
from cowhand.session.durability import Durability, barrier
from cowhand.session.gate import RateGate, RedisRateGate
from cowhand.session.hub import Hub
from cowhand.session.identity import Identity, IdentityKeeper
from cowhand.session.keeper import ScriptKeeper
from cowhand.session.keys import Keys, SessionKeys, identity_key
from cowhand.session.link import Link, Pipe, connection_factory, translate
from cowhand.session.log import ArchiveLog, ControlLog, SessionLog, StoreConfig, WorkerLog
from cowhand.session.preview import Previews, RedisPreviews
from cowhand.session.sessions import RedisSessionLog
from cowhand.session.slots import ModelSlots, RedisModelSlots
from cowhand.session.worker import RedisWorkerLog


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
        self._scripts = lua.load() if scripts is None else scripts
        address = cluster.parse(config.url)
        self._topology = None
        if address is None:
            self._make = connection_factory(config)
        else:
            self._topology = cluster.topology(config, address)
        self._identity = Identity(config, keeper, self._topology, self._get)
        self.writes = self._pipes(follow=not self.has_barrier)
        self.reads = self._pipes(follow=True)
        self.hub = Hub(self.link())
        self._tasks: list[asyncio.Task[None]] = []
        self.durability = Durability(self)
        self._barriers = Barriers(config, self.writes)

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

    def _pipes(self, *, follow: bool) -> Pipe | SlotPipes:
        if self._topology is None:
            return Pipe(self.link(), self._scripts)
        home = identity_key(self.config.prefix)
        greeting = self._identity.greeting
        return SlotPipes(self._topology, self._scripts, greeting, home, follow=follow)

    def link(self, key: str = "") -> Link:
        """A connection of one's own, for a blocking reader of a key or for nudges; close it after use."""
        if self._topology is None:
            return Link(self._make, self._identity.greet)
        slot = cluster.slot_of(key or identity_key(self.config.prefix))
        return Link(self._topology.connect_to(slot), self._identity.greeting(slot))

    def readers(self, names: Sequence[str]) -> list[list[str]]:
        """Keys that one command may name together: each group needs one blocking reader."""
        return [list(names)] if self._topology is None else [[name] for name in names]

    async def _get(self, key: str) -> Any:
        return await self.reads.call("GET", key)

    async def verify(self, base: str = "") -> None:
        """Raise StoreMismatch if the data was lost behind an open connection; `base`: of the partition concerned."""
        await self._identity.verify(base)

    def translate(self, err: BaseException) -> Exception:
        """As `link.translate`; on a cluster a slot that has moved is asked for again."""
        if self._topology is not None and isinstance(err, MOVES):
            self._topology.forget()
            return StoreUnavailable("the slot is on another node now", after=0.1)
        return translate(err)

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
            await self.verify(keys.base)
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

    async def wait(self, base: str) -> int:
        """Barrier of a partition: see `barriers.Barriers.wait`."""
        return await self._barriers.wait(base)
