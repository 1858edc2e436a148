"""Connections to the store: one `Link` is one connection, one `Pipe` lets many tasks share a link.

redis-py's own client is not used: it re-sends commands whose reply was lost (ten times by default), which is
wrong for anything that is not idempotent, and hides which connection a WAIT runs on. Here nothing is re-sent
but by `Pipe`, whose commands are idempotent by construction (scripts with a wseq, an event id or a nonce; reads).
Called by `store`.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

import hiredis
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from cowhand.errors import CowhandError, Denied, StoreUnavailable, Terminal, UserError
from cowhand.session import sentinel
from cowhand.session.log import StoreConfig
from cowhand.session.scripts import Script
from cowhand.telemetry.metrics import STORE_SCRIPT_SECONDS, STORE_SCRIPTS

Command = tuple[str | bytes | int, ...]

RETRY_SECONDS: Final = 5.0
"""How long a command is tried again while the store does not answer, before StoreUnavailable."""

REPLY_SECONDS: Final = 5.0
"""How long one batch may take before its connection counts as dead."""

FIRST_PAUSE = 0.02
"""Seconds before the first new try; doubled each time, up to LONGEST_PAUSE."""

LONGEST_PAUSE: Final = 0.5

NOT_LOADED: Final = (
    "the store does not know this release's scripts yet: operator, broker or gateway of the same release"
    " loads them, is one of them running?"
)
"""A tenant's login met NOSCRIPT, and may not load scripts itself."""

BATCH_COMMANDS: Final = 128
BATCH_BYTES: Final = 1024 * 1024

_PASSING_ERRORS: Final = (
    redis_errors.ClusterDownError,
    redis_errors.MasterDownError,
    redis_errors.TryAgainError,
)
"""The client library takes the first word of these away."""

_NOT_LOCAL: Final = "access a non local key"
"""A script met a key that has moved already, before it wrote anything (see `cluster`)."""

_PASSING: Final = (
    "LOADING",
    "READONLY",
    "MASTERDOWN",
    "TRYAGAIN",
    "CLUSTERDOWN",
    "BUSY ",
    "UNBLOCKED",
)
_NO_PERMISSION: Final = ("NOPERM", "ACL failure", "The user executing the script can't")
_OUTCOMES: Final = {
    code.upper().encode(): code
    for code in ("ok", "dup", "gap", "fenced", "closed", "nosession", "toobig", "quota")
}
_REFUSING: Final = ("OOM", "MISCONF", "NOREPLICAS")


Connect = Callable[[], Awaitable[AbstractConnection]]
"""Opens a connection to the server that takes writes now."""


def connection_factory(config: StoreConfig) -> Connect:
    """A function that opens connections; UserError if the URL is not usable."""
    sentinels = sentinel.parse(config.url)
    if sentinels is not None and config.sentinel_password:
        sentinels = replace(
            sentinels, username=config.sentinel_username, password=config.sentinel_password
        )
    url = config.url
    if sentinels is not None:
        host, port = sentinels.hosts[0]
        url = f"{'rediss' if sentinels.tls else 'redis'}://{host}:{port}"
    make, login = dialer(config, url)

    async def plain() -> AbstractConnection:
        connection = make(login)
        await connection.connect()  # type: ignore[no-untyped-call]
        return connection

    if sentinels is None:
        return plain
    watchers = sentinel.Sentinels(sentinels, make)

    async def elected() -> AbstractConnection:
        host, port = await watchers.primary()
        connection = make(login | {"host": host, "port": port})
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            await sentinel.demand_primary(connection)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    return elected


def dialer(config: StoreConfig, url: str) -> tuple[sentinel.Open, dict[str, Any]]:
    """What makes unconnected connections from further options, and the options of our login.

    Args:
        config: CA and login.
        url: of one server; UserError if it is not usable.
    """
    try:
        options: dict[str, Any] = dict(parse_url(url))
    except ValueError as err:
        raise UserError(f"store URL {config.url!r} is not valid: {err}", field="url") from err
    kind = options.pop("connection_class", Connection)
    options |= {
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": None,
        "socket_connect_timeout": REPLY_SECONDS,
        "socket_keepalive": True,
        "driver_info": None,
    }
    if kind is SSLConnection and config.ca_file:
        options["ssl_ca_certs"] = config.ca_file
    login: dict[str, Any] = {}
    if config.username:
        login["username"] = config.username
    if config.password:
        login["password"] = config.password

    def make(more: dict[str, Any]) -> AbstractConnection:
        connection: AbstractConnection = kind(**options | more)
        return connection

    return make, login


def translate(err: BaseException) -> Exception:
    """The error that our callers see for an error of the client library."""
    if isinstance(err, CowhandError):
        return err
    if isinstance(err, redis_errors.NoPermissionError):
        return Denied(f"the store's ACL refuses this: {err}")
    if isinstance(err, redis_errors.AuthenticationError | redis_errors.AuthorizationError):
        return Denied(f"the store refuses our user or password: {err}")
    if isinstance(err, redis_errors.MovedError | redis_errors.ClusterCrossSlotError):
        return UserError(
            "the store is a Redis Cluster: give its URL as redis+cluster://host:port,host:port (an empty"
            " one; what a single server holds is not carried over)",
            field="url",
        )
    if isinstance(err, redis_errors.ResponseError):
        if is_passing(err) or _starts(err, _REFUSING):
            return StoreUnavailable(f"the store refuses writes for now: {err}", after=1.0)
        if any(text in str(err) for text in _NO_PERMISSION):
            return Denied(f"the store's ACL refuses this: {err}")
        return Terminal(f"the store refuses the command: {err}", reason="StoreRefused")
    return StoreUnavailable(f"the store does not answer: {err or type(err).__name__}", after=1.0)


def is_passing(err: Exception) -> bool:
    """Whether an error reply says that the server cannot for now."""
    known = isinstance(err, _PASSING_ERRORS) or _NOT_LOCAL in str(err)
    return known or _starts(err, _PASSING)


def _starts(err: Exception, words: tuple[str, ...]) -> bool:
    if isinstance(err, redis_errors.ReadOnlyError):
        return "READONLY" in words
    if isinstance(err, redis_errors.OutOfMemoryError):
        return "OOM" in words
    return str(err).startswith(words)


def _outcome(reply: Any) -> str:
    """The label of a script's answer: its code, where it begins with one."""
    if not isinstance(reply, list) or not reply or not isinstance(reply[0], bytes):
        return "ok"
    return _OUTCOMES.get(reply[0], "other")


@functools.cache
def _count(script: str, outcome: str) -> Callable[[], None]:
    """Counts one run of a script; the metric is looked up once."""
    return STORE_SCRIPTS.labels(script, outcome).inc


@functools.cache
def _observe(script: str) -> Callable[[float], None]:
    """Takes the seconds of one run of a script."""
    return STORE_SCRIPT_SECONDS.labels(script).observe


_GENERATIONS: Final = itertools.count(1)


class Link:
    """One connection, opened when it is first used, and again after an error.

    Attributes:
        generation: another number for each connection of this process that was opened; a WAIT says something only
            about its own connection.
    """

    def __init__(self, connect: Connect, greet: Callable[[Link], Awaitable[None]]) -> None:
        """`greet` runs on each new connection, before anything else."""
        self._connect = connect
        self._greet = greet
        self._connection: AbstractConnection | None = None
        self.generation = 0

    def __str__(self) -> str:
        """Where it leads, for people."""
        return "closed" if self._connection is None else str(self._connection)

    @property
    def connection(self) -> AbstractConnection | None:
        """The connection as it is now, None while there is none."""
        return self._connection

    async def open(self) -> AbstractConnection:
        """The connection, connected and greeted."""
        if self._connection is not None and self._connection.is_connected:
            return self._connection
        connection = await self._connect()
        self._connection = connection
        self.generation = next(_GENERATIONS)
        try:
            await self._greet(self)
        except BaseException:
            await self.close()
            raise
        return connection

    async def run(self, commands: Sequence[Command], timeout: float = REPLY_SECONDS) -> list[Any]:
        """Send all, then read all replies; an error reply stands in the list as a ResponseError.

        Any other failure closes the connection, because a half-read one must not be used again. Answers raw
        RESP2 values.
        """
        try:
            async with asyncio.timeout(timeout):
                connection = await self.open()
                # redis-py packs in Python, which was a quarter of an append's CPU.
                packed = [hiredis.pack_command(cast(Any, command)) for command in commands]
                await connection.send_packed_command(packed, check_health=False)
                return [await self._reply(connection) for _ in commands]
        except BaseException:
            await self.close()
            raise

    async def _reply(self, connection: AbstractConnection) -> Any:
        try:
            return await connection.read_response(timeout=math.inf, disconnect_on_error=False)
        except redis_errors.ResponseError as err:
            return err

    async def close(self) -> None:
        """Drop the connection; the next use opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)


@dataclass
class _Item:
    command: Command
    size: int
    deadline: float
    future: asyncio.Future[tuple[Any, int]] = field(repr=False)


class Pipe:
    """Idempotent commands of many tasks over one link, what waits going out together as one write.

    Cancelling a caller does not take its command back: it may already be on its way.
    """

    def __init__(self, link: Link, scripts: Mapping[str, Script]) -> None:
        self._link = link
        self._scripts = scripts
        self._queue: deque[_Item] = deque()
        self._may_load = True
        self._flusher: asyncio.Task[None] | None = None

    @property
    def link(self) -> Link:
        """The link underneath."""
        return self._link

    def at(self, key: str | bytes) -> Pipe:
        """The pipe that commands about a key go over."""
        return self

    async def pipes(self) -> list[Pipe]:
        """A pipe for each server that holds a part of the store."""
        return [self]

    async def everywhere(self, *command: str | bytes | int) -> list[Any]:
        """Run one command on each of them; answers the replies."""
        return [await self.call(*command)]

    async def scan(self, cursor: int, pattern: str, count: int) -> tuple[int, list[bytes]]:
        """One step of a scan over all of them: the next cursor (0: done) and the keys that match."""
        following, found = await self.call("SCAN", cursor, "MATCH", pattern, "COUNT", count)
        return int(following), found

    async def call(self, *command: str | bytes | int) -> Any:
        """Run one command; answers the raw reply.

        Raises:
            StoreUnavailable: no answer within RETRY_SECONDS; the command may have run or may yet run.
            StoreMismatch, Denied, Terminal.
        """
        return (await self.call_on(*command))[0]

    async def call_on(self, *command: str | bytes | int) -> tuple[Any, int]:
        """As `call`, with the generation of the connection that answered."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[tuple[Any, int]] = loop.create_future()
        size = sum(len(word) for word in command if isinstance(word, str | bytes))
        self._queue.append(_Item(command, size, loop.time() + RETRY_SECONDS, future))
        if self._flusher is None or self._flusher.done():
            self._flusher = loop.create_task(self._flush())
        return await future

    async def script(self, name: str, keys: Sequence[str], *args: str | bytes | int) -> Any:
        """Run a script by its digest; if the server does not know it, it is loaded, or waited for."""
        return (await self.script_on(name, keys, *args))[0]

    async def script_on(
        self, name: str, keys: Sequence[str], *args: str | bytes | int
    ) -> tuple[Any, int]:
        """As `script`, with the generation of the connection that answered."""
        began, outcome = time.monotonic(), "error"
        try:
            found = await self.call_on("EVALSHA", self._scripts[name].sha, len(keys), *keys, *args)
            outcome = _outcome(found[0])
        except StoreUnavailable:
            outcome = "unavailable"
            raise
        finally:
            _count(name, outcome)()
            _observe(name)(time.monotonic() - began)
        return found

    async def _flush(self) -> None:
        pause = FIRST_PAUSE
        while self._queue:
            batch = self._take()
            try:
                replies = await self._link.run([item.command for item in batch])
            except (OSError, TimeoutError, redis_errors.RedisError, CowhandError) as err:
                if self._again(batch, err):
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, LONGEST_PAUSE)
                continue
            except BaseException as err:
                self._fail([*batch, *self._queue], err)
                self._queue.clear()
                raise
            if await self._settle(batch, replies):
                pause = FIRST_PAUSE
            else:
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)

    def _take(self) -> list[_Item]:
        batch: list[_Item] = []
        size = 0
        while self._queue and len(batch) < BATCH_COMMANDS and size < BATCH_BYTES:
            batch.append(self._queue.popleft())
            size += batch[-1].size
        return batch

    def _again(self, batch: list[_Item], err: Exception) -> bool:
        """Put back what still has time; answers whether anything waits."""
        error = translate(err)
        if isinstance(error, StoreUnavailable):
            now = asyncio.get_running_loop().time()
            late = [item for item in batch if item.deadline <= now]
            self._fail(late, error)
            self._queue.extendleft(reversed([item for item in batch if item.deadline > now]))
        else:
            self._fail(batch, error)
        return bool(self._queue)

    async def _settle(self, batch: list[_Item], replies: list[Any]) -> bool:
        """Hand out the replies; answers False if the store said that it cannot for now."""
        unknown: list[_Item] = []
        passing: list[_Item] = []
        reason: Exception | None = None
        generation = self._link.generation
        for item, reply in zip(batch, replies, strict=True):
            if isinstance(reply, redis_errors.AskError):
                found = await self._elsewhere(item, reply)
                if found is None:
                    passing.append(item)
                    reason = redis_errors.TryAgainError("the slot is on its way to another node")
                    continue
                reply, generation_of = found
            else:
                generation_of = generation
            if isinstance(reply, redis_errors.MovedError) and self._redirected():
                passing.append(item)
                reason = redis_errors.TryAgainError("the slot has moved to another node")
            elif isinstance(reply, redis_errors.NoScriptError):
                unknown.append(item)
            elif isinstance(reply, Exception) and is_passing(reply):
                passing.append(item)
                reason = reply
            elif isinstance(reply, Exception):
                self._fail([item], translate(reply))
            elif not item.future.done():
                item.future.set_result((reply, generation_of))
        loaded = await self._load(unknown) if unknown else True
        if reason is not None:
            await self._link.close()
            self._again(passing, reason)
        return reason is None and loaded

    def _redirected(self) -> bool:
        """A server says that another one has the key; answers whether that can be followed (see `cluster`)."""
        return False

    async def _asked(self, command: Command, err: redis_errors.AskError) -> tuple[Any, int] | None:
        """The answer, and its connection's generation, of the server that is getting a key; None: later."""
        return None

    async def _elsewhere(self, item: _Item, err: redis_errors.AskError) -> tuple[Any, int] | None:
        try:
            return await self._asked(item.command, err)
        except (OSError, TimeoutError, redis_errors.RedisError, CowhandError):
            return None

    async def _load(self, items: list[_Item]) -> bool:
        """Load all scripts, so that `items` can be sent again; answers False if that is not our right.

        A tenant's login may only run what the control plane has loaded (see `keeper`): it waits for that.
        """
        if not self._may_load:
            self._again(items, StoreUnavailable(NOT_LOADED, after=1.0))
            return False
        loads = [("SCRIPT", "LOAD", script.source) for script in self._scripts.values()]
        try:
            replies = await self._link.run(loads)
        except (OSError, TimeoutError, redis_errors.RedisError, CowhandError) as err:
            self._again(items, err)
            return True
        errors = [reply for reply in replies if isinstance(reply, Exception)]
        if errors and isinstance(errors[0], redis_errors.NoPermissionError):
            self._may_load = False
            return await self._load(items)
        if errors:
            self._fail(items, translate(errors[0]))
        else:
            self._queue.extendleft(reversed(items))
        return True

    @staticmethod
    def _fail(items: Sequence[_Item], err: BaseException) -> None:
        for item in items:
            if not item.future.done():
                if isinstance(err, Exception):
                    item.future.set_exception(err)
                else:
                    item.future.cancel()

    async def close(self) -> None:
        """Stop; commands that wait are cancelled."""
        if self._flusher is not None and not self._flusher.done():
            self._flusher.cancel()
            await asyncio.gather(self._flusher, return_exceptions=True)
        await self._link.close()
