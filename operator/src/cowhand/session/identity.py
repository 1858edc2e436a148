"""The store's identity: a random mark that says whether this is the store that was used before.

Compared on each new connection, so that a store that was emptied, replaced or restored under a process is not taken
for its own. On a cluster each partition has the mark too, because each node may lose its data alone. Made by the
first process of the control plane that meets a new store. Called by `store`.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from redis import exceptions as redis_errors

from cowhand.errors import StoreMismatch, StoreUnavailable
from cowhand.session.cluster import Topology, slot_of
from cowhand.session.keys import identity_key
from cowhand.session.link import Link, translate
from cowhand.session.log import StoreConfig

NOT_MADE: Final = "the store has no identity yet: operator, broker or gateway makes it"


class IdentityKeeper(Protocol):
    """Remembers a store's identity across restarts of the process, outside the store."""

    @property
    def where(self) -> str:
        """Where it is kept, for people."""

    async def recall(self) -> str | None:
        """What was kept; None if nothing was: the store that is there is accepted."""

    async def keep(self, identity: str) -> None:
        """Keep it for good."""


class Identity:
    """What one process knows of the store's identity."""

    def __init__(
        self,
        config: StoreConfig,
        keeper: IdentityKeeper | None,
        topology: Topology | None,
        read: Callable[[str], Awaitable[Any]],
    ) -> None:
        """`topology` of a cluster; `read` answers the value of a key over a greeted connection."""
        self._config = config
        self._keeper = keeper
        self._topology = topology
        self._read = read
        self._identity: bytes | None = None
        self._home = slot_of(identity_key(config.prefix))
        self._partitions = {
            slot_of(identity_key(config.prefix, number)): number
            for number in range(config.partitions)
        }

    def greeting(self, slot: int | None) -> Callable[[Link], Awaitable[None]]:
        """How the connection of a slot of a cluster is greeted; None: of a node, which has no identity."""
        if slot == self._home:
            return self.greet
        number = None if slot is None else self._partitions.get(slot)

        async def greet(link: Link) -> None:
            if number is not None:
                await self._greet_partition(link, number)

        return greet

    async def _greet_partition(self, link: Link, number: int) -> None:
        """A node may be emptied alone: each partition must have the identity that the store has."""
        expected = self._identity or await self._read(identity_key(self._config.prefix))
        (found,) = await link.run([("GET", identity_key(self._config.prefix, number))])
        if isinstance(found, redis_errors.MovedError | redis_errors.AskError):
            self._forget_places()
            raise StoreUnavailable(f"partition {number} is on another node", after=0.1)
        if isinstance(found, Exception):
            raise translate(found) from found
        if found != expected:
            raise StoreMismatch(
                f"partition {number} of the store {'is empty' if found is None else 'is of another store'}: the "
                "node that has it lost its data. Restore it, or lose the sessions of this partition"
            )

    def _forget_places(self) -> None:
        if self._topology is not None:
            self._topology.forget()

    async def greet(self, link: Link) -> None:
        """Compare the identity of the store with the one it must have, on each new connection."""
        (found,) = await link.run([("GET", identity_key(self._config.prefix))])
        if self._topology is not None and isinstance(found, redis_errors.MovedError):
            self._forget_places()
            raise StoreUnavailable("the store's identity is on another node", after=0.1)
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
        key = identity_key(self._config.prefix)
        if found is None:
            fresh = secrets.token_hex(16)
            if self._topology is not None:
                fresh = await self._mark_partitions(fresh)
            (made,) = await link.run([("SET", key, fresh, "NX")])
            if isinstance(made, redis_errors.NoPermissionError):
                raise StoreUnavailable(NOT_MADE, after=1.0)
            if isinstance(made, Exception):
                raise translate(made) from made
            (found,) = await link.run([("GET", key)])
            if isinstance(found, Exception):
                raise translate(found) from found
        assert isinstance(found, bytes), "GET after SET NX"
        if self._keeper is not None:
            await self._keeper.keep(found.decode())
        return found

    async def _mark_partitions(self, fresh: str) -> str:
        """Give each partition of a new cluster the identity; answers the one that the first of them has.

        The store's own comes last, so that whoever finds it finds them all. A partition that was marked by somebody
        else, where the store has none: it is being made by another process, or a node lost its data.
        """
        for number in range(self._config.partitions):
            key = identity_key(self._config.prefix, number)
            assert self._topology is not None, "asked for by a cluster alone"
            link = Link(self._topology.connect_to(slot_of(key)), _silent)
            try:
                made, found = await link.run([("SET", key, fresh, "NX"), ("GET", key)])
            finally:
                await link.close()
            if isinstance(found, Exception):
                raise translate(found) from found
            if isinstance(made, Exception):
                raise StoreUnavailable(NOT_MADE, after=1.0)
            if made is None and self._keeper is None:
                raise StoreUnavailable("the store's identity is being made by another", after=1.0)
            if number == 0:
                fresh = found.decode()
            elif found.decode() != fresh:
                raise StoreMismatch(f"partition {number} of the store is of another store")
        return fresh

    async def verify(self, base: str = "") -> None:
        """Raise StoreMismatch if the data was lost behind an open connection; `base`: of the partition concerned."""
        key = identity_key(self._config.prefix)
        if base and self._topology is not None:
            key = identity_key(self._config.prefix, self._partitions[slot_of(base)])
        if await self._read(key) != self._identity:
            raise StoreMismatch("the store has lost its data: restore it, or restart the process")


async def _silent(_: Link) -> None:
    """Nothing to compare yet."""
