"""Finds the primary through Sentinels: they are asked for every new connection.

A failover is noticed as any lost connection is (Sentinel ends the clients' connections to a server that it demotes,
and a write to a replica is refused), and the next connection asks again. An answer may be out of date, so the server
has to say itself that it is a primary. Called by `link`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection

from cowhand.errors import StoreUnavailable, UserError

SENTINEL_SECONDS: Final = 1.0
"""How long one Sentinel may take to answer before the next one is asked."""

SENTINEL_PORT: Final = 26379

Open = Callable[[dict[str, Any]], AbstractConnection]
"""Makes an unconnected connection from its options (`host`, `port` and so on)."""


@dataclass(frozen=True)
class SentinelAddress:
    """What a URL says: `redis+sentinel://[user:password@]host[:port],host[:port]/name`, `rediss+...` with TLS.

    Attributes:
        hosts: the Sentinels.
        name: what they call the primary.
        tls: whether Sentinels and servers are reached with TLS.
        username, password: for the Sentinels; the servers have the login of `StoreConfig`.
    """

    hosts: tuple[tuple[str, int], ...]
    name: str
    tls: bool = False
    username: str = ""
    password: str = ""


def parse(url: str) -> SentinelAddress | None:
    """The address in a URL, None if it is not about Sentinels.

    Raises:
        UserError: it is, but not a valid one.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in ("redis+sentinel", "rediss+sentinel"):
        return None
    place, _, name = rest.partition("/")
    login, _, places = place.rpartition("@")
    username, _, password = login.partition(":")
    hosts = hosts_of(places, SENTINEL_PORT)
    if not hosts or not name or "/" in name:
        raise UserError(
            f"store URL of {len(hosts)} Sentinels and primary {name!r}: it must be"
            " redis+sentinel://host:port,host:port,host:port/name",
            field="url",
        )
    return SentinelAddress(
        hosts, name, scheme == "rediss+sentinel", unquote(username), unquote(password)
    )


def hosts_of(places: str, port: int) -> tuple[tuple[str, int], ...]:
    """Hosts and ports of `host[:port],host[:port]`; `port` where none is named. Raises UserError."""
    return tuple(_host(part, port) for part in places.split(",") if part)


def _host(part: str, default: int) -> tuple[str, int]:
    try:
        found = urlsplit(f"//{part}")
        host, port = found.hostname, found.port
    except ValueError as err:
        raise UserError(f"store URL: {part!r} is no host:port: {err}", field="url") from err
    if not host:
        raise UserError(f"store URL: {part!r} is no host:port", field="url")
    return host, port or default


class Sentinels:
    """The Sentinels of one primary; the one that answered last is asked first."""

    def __init__(self, address: SentinelAddress, make: Open) -> None:
        self._address = address
        self._make = make
        self._hosts = list(address.hosts)

    async def primary(self) -> tuple[str, int]:
        """Host and port of the primary. Raises StoreUnavailable if no Sentinel knows one."""
        said: list[str] = []
        for host, port in list(self._hosts):
            try:
                async with asyncio.timeout(SENTINEL_SECONDS):
                    found = await self._ask(host, port)
            except (OSError, TimeoutError, redis_errors.RedisError) as err:
                said.append(f"{host}:{port}: {err or type(err).__name__}")
                continue
            if found is None:
                said.append(f"{host}:{port} knows no primary {self._address.name!r}")
                continue
            self._hosts.remove((host, port))
            self._hosts.insert(0, (host, port))
            return found
        raise StoreUnavailable(f"no Sentinel names a primary: {'; '.join(said)}", after=1.0)

    async def _ask(self, host: str, port: int) -> tuple[str, int] | None:
        options: dict[str, Any] = {"host": host, "port": port}
        if self._address.password:
            options["password"] = self._address.password
        if self._address.username:
            options["username"] = self._address.username
        connection = self._make(options)
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            found = await ask(connection, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._address.name)
        finally:
            await connection.disconnect(nowait=True)
        return (found[0].decode(), int(found[1])) if found else None


async def ask(connection: AbstractConnection, *command: str) -> Any:
    """One command on a connection of its own."""
    await connection.send_command(*command, check_health=False)
    return await connection.read_response(timeout=math.inf, disconnect_on_error=False)


async def demand_primary(connection: AbstractConnection) -> None:
    """Raise StoreUnavailable if the server is not a primary. HELLO says so, which every login may call."""
    found = await ask(connection, "HELLO")
    fields = dict(zip(found[::2], found[1::2], strict=True))
    if fields.get(b"role") != b"master":
        raise StoreUnavailable("the server that Sentinel names is not the primary yet", after=0.5)
