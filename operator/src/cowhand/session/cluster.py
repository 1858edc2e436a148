"""Redis Cluster: which node has a slot, and one connection for each slot that we use.

Every key of a partition carries its hash tag, so a partition is one slot, and whatever one script touches lies on
one node. A connection for each partition (not for each node) keeps what the rest of `session/` relies on: commands of
a partition go over one connection in order, and a WAIT on it speaks of them. As with Sentinels, the cluster is asked
where a slot is for new connections, so a failover or a slot that moved is noticed as any lost connection is.
redis-py's cluster client is not used for the reason that `link` gives: it repeats commands whose outcome is unknown.
Called by `store`.
"""

from __future__ import annotations

import asyncio
import binascii
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection

from cowhand.errors import StoreUnavailable, UserError
from cowhand.session.link import Command, Connect, Link, Pipe, dialer
from cowhand.session.log import StoreConfig
from cowhand.session.scripts import Script
from cowhand.session.sentinel import Open, ask, hosts_of

SLOTS: Final = 16384
ASK_SECONDS: Final = 1.0
"""How long one node may take to say where the slots are before the next one is asked."""

FRESH_SECONDS: Final = 0.5
"""Connections that are opened so soon after each other share one answer."""

CLUSTER_PORT: Final = 6379
MAX_NODES: Final = 4096
"""More than a cluster has; a cursor of `scan` is a node's cursor times this, and the node."""

MOVES: Final = (redis_errors.MovedError, redis_errors.AskError)
"""What a node answers about a slot that another one has, or gets."""

Place = tuple[str, int]
"""Host and port of a node."""

_SECOND: Final = frozenset({"XINFO", "MEMORY", "XGROUP", "OBJECT"})
_KEYLESS: Final = frozenset({"PING", "TIME", "INFO", "CONFIG", "SCRIPT", "ECHO"})


@dataclass(frozen=True)
class ClusterAddress:
    """What a URL says: `redis+cluster://host[:port],host[:port]`, `rediss+cluster://...` with TLS.

    Attributes:
        hosts: some of the nodes; the others are found through them.
        tls: whether nodes are reached with TLS.
    """

    hosts: tuple[Place, ...]
    tls: bool = False


def parse(url: str) -> ClusterAddress | None:
    """The address in a URL, None if it is not about a cluster.

    Raises:
        UserError: it is, but not a valid one.
    """
    scheme, _, places = url.partition("://")
    if scheme not in ("redis+cluster", "rediss+cluster"):
        return None
    if not places or "/" in places or "@" in places:
        raise UserError(
            "store URL of a cluster: it must be redis+cluster://host:port,host:port (a cluster has no"
            " databases, and the login stands in username and password)",
            field="url",
        )
    return ClusterAddress(hosts_of(places, CLUSTER_PORT), scheme == "rediss+cluster")


def slot_of(key: str | bytes) -> int:
    """Slot of a key: of what stands in its first braces, where something does."""
    raw = key.encode() if isinstance(key, str) else key
    _, opened, rest = raw.partition(b"{")
    tag, closed, _ = rest.partition(b"}")
    return binascii.crc_hqx(tag if opened and closed and tag else raw, 0) % SLOTS


def key_of(command: Sequence[str | bytes | int]) -> str | bytes | None:
    """The key or channel that a command goes by; None: any node answers it."""
    name = str(command[0]).upper()
    if name in _KEYLESS:
        return None
    position = 3 if name == "EVALSHA" else 2 if name in _SECOND else 1
    found = command[position]
    assert isinstance(found, str | bytes), f"{name} without a key"
    return found


class Topology:
    """Where the slots are."""

    def __init__(self, address: ClusterAddress, make: Open) -> None:
        """`make` makes an unconnected connection with our login from its options."""
        self._seeds = address.hosts
        self._make = make
        self._ranges: list[tuple[int, int, Place]] = []
        self._asked_at = -math.inf
        self._asking = asyncio.Lock()

    def forget(self) -> None:
        """A node said that a slot has moved: ask again."""
        self._asked_at = -math.inf

    async def primary(self, slot: int) -> Place:
        """The node that has a slot. Raises StoreUnavailable, UserError (no cluster)."""
        for first, last, place in await self._look():
            if first <= slot <= last:
                return place
        raise StoreUnavailable(f"no node of the cluster has slot {slot} now", after=0.5)

    async def primaries(self) -> list[Place]:
        """All nodes that have slots, in a fixed order."""
        return sorted({place for _, _, place in await self._look()})

    async def _look(self) -> list[tuple[int, int, Place]]:
        async with self._asking:
            now = asyncio.get_running_loop().time
            if now() - self._asked_at > FRESH_SECONDS:
                self._ranges = await self._ask_one()
                self._asked_at = now()
        return self._ranges

    async def _ask_one(self) -> list[tuple[int, int, Place]]:
        said: list[str] = []
        known = [place for _, _, place in self._ranges]
        for place in dict.fromkeys([*known, *self._seeds]):
            try:
                async with asyncio.timeout(ASK_SECONDS):
                    return await self._ask(place)
            except redis_errors.ResponseError as err:
                if "cluster support disabled" in str(err):
                    raise UserError(
                        f"the store at {place[0]}:{place[1]} is no cluster: give its URL as"
                        " redis://host:port/0",
                        field="url",
                    ) from err
                if isinstance(err, redis_errors.NoPermissionError):
                    raise
                said.append(f"{place[0]}:{place[1]}: {err}")
            except redis_errors.AuthenticationError:
                raise
            except (OSError, TimeoutError, redis_errors.RedisError) as err:
                said.append(f"{place[0]}:{place[1]}: {err or type(err).__name__}")
        raise StoreUnavailable(f"no node of the cluster answers: {'; '.join(said)}", after=1.0)

    async def _ask(self, place: Place) -> list[tuple[int, int, Place]]:
        connection = self._make({"host": place[0], "port": place[1]})
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            found = await ask(connection, "CLUSTER", "SLOTS")
        finally:
            await connection.disconnect(nowait=True)
        return [
            # A node that does not know its own address leaves it out: it is the one that we asked.
            (int(first), int(last), (node[0].decode() if node[0] else place[0], int(node[1])))
            for first, last, node, *_ in found
        ]

    def connect_to(self, slot: int) -> Connect:
        """Opens connections to whoever has a slot."""

        async def connect() -> AbstractConnection:
            return await self.open(await self.primary(slot))

        return connect

    async def open(self, place: Place) -> AbstractConnection:
        """A connection to a node; the cluster is asked again after one that failed."""
        connection = self._make({"host": place[0], "port": place[1]})
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            self.forget()
            raise
        return connection


def topology(config: StoreConfig, address: ClusterAddress) -> Topology:
    """Where the slots of a cluster are, seen with the login of a process."""
    host, port = address.hosts[0]
    make, login = dialer(config, f"{'rediss' if address.tls else 'redis'}://{host}:{port}")
    return Topology(address, lambda more: make(login | more))


class SlotPipe(Pipe):
    """The pipe of one slot: knows what MOVED and ASK mean."""

    def __init__(
        self, link: Link, scripts: Mapping[str, Script], topology: Topology, *, follow: bool
    ) -> None:
        """`follow`: carry out on the other node what a node says to ask it for (ASK).

        Not where barriers are: a WAIT on this connection would not speak of it. There it waits until the slot has
        moved.
        """
        super().__init__(link, scripts)
        self._topology = topology
        self._follow = follow
        self._other: tuple[Place, Link] | None = None

    def _redirected(self) -> bool:
        self._topology.forget()
        return True

    async def _asked(self, command: Command, err: redis_errors.AskError) -> tuple[Any, int] | None:
        """What the node that gets the slot answers to one command; None: ask again later."""
        if not self._follow:
            return None
        place = (str(err.node_addr[0]) or self._host(), int(err.node_addr[1]))
        if self._other is None or self._other[0] != place:
            await self._leave()
            self._other = (place, Link(lambda: self._topology.open(place), _no_greeting))
        link = self._other[1]
        _, reply = await link.run([("ASKING",), command])
        if isinstance(reply, redis_errors.NoScriptError) and self._may_load:
            await link.run([("SCRIPT", "LOAD", script.source) for script in self._scripts.values()])
            return None
        if isinstance(reply, MOVES):
            return None
        return reply, link.generation

    def _host(self) -> str:
        return str(getattr(self.link.connection, "host", ""))

    async def _leave(self) -> None:
        other, self._other = self._other, None
        if other is not None:
            await other[1].close()

    async def close(self) -> None:
        """Stop; commands that wait are cancelled."""
        await super().close()
        await self._leave()


async def _no_greeting(_: Link) -> None:
    """A slot that is on its way has been greeted where it comes from."""


class SlotPipes:
    """One `SlotPipe` for each slot in use, with the methods of `Pipe`: commands find theirs by their key."""

    def __init__(
        self,
        topology: Topology,
        scripts: Mapping[str, Script],
        greet: Callable[[int | None], Callable[[Link], Awaitable[None]]],
        home: str,
        *,
        follow: bool,
    ) -> None:
        """`greet` answers how a slot's connection is greeted (None: a node's); `home` is a key that all may read."""
        self._topology = topology
        self._scripts = scripts
        self._greet = greet
        self._home = home
        self._follow = follow
        self._slots: dict[int, SlotPipe] = {}
        self._nodes: dict[Place, Pipe] = {}

    def at(self, key: str | bytes) -> Pipe:
        """The pipe of a key's slot."""
        slot = slot_of(key)
        if slot not in self._slots:
            link = Link(self._topology.connect_to(slot), self._greet(slot))
            self._slots[slot] = SlotPipe(link, self._scripts, self._topology, follow=self._follow)
        return self._slots[slot]

    async def call(self, *command: str | bytes | int) -> Any:
        """See `Pipe.call`."""
        return (await self.call_on(*command))[0]

    async def call_on(self, *command: str | bytes | int) -> tuple[Any, int]:
        """See `Pipe.call_on`."""
        key = key_of(command)
        return await self.at(self._home if key is None else key).call_on(*command)

    async def script(self, name: str, keys: Sequence[str], *args: str | bytes | int) -> Any:
        """See `Pipe.script`."""
        return (await self.script_on(name, keys, *args))[0]

    async def script_on(
        self, name: str, keys: Sequence[str], *args: str | bytes | int
    ) -> tuple[Any, int]:
        """See `Pipe.script_on`."""
        return await self.at(keys[0]).script_on(name, keys, *args)

    async def everywhere(self, *command: str | bytes | int) -> list[Any]:
        """See `Pipe.everywhere`: one answer of each primary."""
        return [await pipe.call(*command) for pipe in await self.pipes()]

    async def pipes(self) -> list[Pipe]:
        """See `Pipe.pipes`: one for each primary, in a fixed order."""
        places = await self._topology.primaries()
        for place in self._nodes.keys() - set(places):
            await self._nodes.pop(place).close()
        for place in places:
            if place not in self._nodes:
                link = Link(self._opens(place), self._greet(None))
                self._nodes[place] = Pipe(link, self._scripts)
        return [self._nodes[place] for place in places]

    def _opens(self, place: Place) -> Connect:
        async def connect() -> AbstractConnection:
            return await self._topology.open(place)

        return connect

    async def scan(self, cursor: int, pattern: str, count: int) -> tuple[int, list[bytes]]:
        """See `Pipe.scan`: one node after the other. A slot that moves meanwhile may be missed, or seen twice."""
        pipes = await self.pipes()
        node, at = cursor % MAX_NODES, cursor // MAX_NODES
        if node >= len(pipes):
            return 0, []
        following, found = await pipes[node].scan(at, pattern, count)
        if following:
            return following * MAX_NODES + node, found
        return (node + 1 if node + 1 < len(pipes) else 0), found

    async def close(self) -> None:
        """Stop; commands that wait are cancelled."""
        for pipe in (*self._slots.values(), *self._nodes.values()):
            await pipe.close()
