"""Connections between the processes of a simulation and the store, with the faults that connections have.

`StoreConnection` stands where `session.link` expects a connection of the client library. What is sent arrives
later, in order; a fault may break the connection before or after the server has acted, or keep the answer back.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import hiredis
from redis import exceptions as redis_errors

from simulation.loop import PROCESS, Process, SimLoop
from support.lua_store import LuaStore


@dataclass
class Faults:
    """How often something goes wrong, each from 0 to 1.

    Attributes:
        before: the connection breaks, and the request does not arrive.
        after: the request is carried out, and its answer is lost with the connection.
        silence: the request is carried out or not, and no answer ever comes.
        nudge: a published message is lost.
        slow: an answer takes a second.
    """

    before: float = 0.0
    after: float = 0.0
    silence: float = 0.0
    nudge: float = 0.0
    slow: float = 0.0


class StoreServer:
    """The store as the network sees it.

    Attributes:
        reachable: connections are accepted; while not, those that exist are gone.
        passing: error text that every command gets ("LOADING ..."), empty for none.
        struck: how many connections broke or went silent.
    """

    def __init__(self, loop: SimLoop, store: LuaStore, rng: random.Random) -> None:
        self.loop = loop
        self.store = store
        self.rng = rng
        self.faults = Faults()
        self.reachable = True
        self.passing = ""
        self.struck = 0
        # In the order in which they were opened: a set would have another one in each run.
        self.connections: dict[StoreConnection, None] = {}
        self._waiting: list[tuple[StoreConnection, Sequence[Any], Any]] = []
        self.before_command: Any = lambda _words: None
        self.after_command: Any = lambda: None
        store.publish = self._publish
        self._blocked = False

    async def open(self) -> StoreConnection:
        connection = StoreConnection(self)
        await connection.connect()
        return connection

    def drop_all(self) -> None:
        """Every connection breaks, as when the server restarts."""
        self.struck += len(self.connections)
        for connection in list(self.connections):
            connection.broken()

    def restart(self, down_s: float) -> None:
        """Gone for a while; the data stays, as with an append-only file."""
        self.reachable = False
        self.store.forget_scripts()
        self.drop_all()
        self.loop.at(down_s, self._back)

    def _back(self) -> None:
        self.reachable = True

    def latency(self) -> float:
        return self.rng.uniform(0.0001, 0.002)

    def arrive(self, connection: StoreConnection, commands: Sequence[Sequence[Any]]) -> None:
        """Carry commands out; replies go back in order."""
        if connection.closed:
            return
        for words in commands:
            name = _text(words[0]).upper()
            if name in ("SUBSCRIBE", "UNSUBSCRIBE", "SSUBSCRIBE", "SUNSUBSCRIBE"):
                self._subscribe(connection, name, [_text(word) for word in words[1:]])
            elif name == "XREADGROUP" and any(_text(w).upper() == "BLOCK" for w in words[:8]):
                self._block(connection, words)
            else:
                connection.answer(self.run(words))

    def run(self, words: Sequence[Any]) -> Any:
        if self.passing:
            kind = redis_errors.ReadOnlyError if "READONLY" in self.passing else None
            return (kind or redis_errors.ResponseError)(self.passing)
        self.before_command(words)
        reply = self.store.execute(words)
        self._wake()
        self.after_command()
        return reply

    def _block(self, connection: StoreConnection, words: Sequence[Any]) -> None:
        reply = self.run(words)
        if reply is not None:
            connection.answer(reply)
            return
        entry = (connection, words, object())
        self._waiting.append(entry)
        at = [_text(word).upper() for word in words].index("BLOCK")
        self.loop.at(int(_text(words[at + 1])) / 1000, self._give_up, entry)

    def _give_up(self, entry: Any) -> None:
        if entry in self._waiting:
            self._waiting.remove(entry)
            entry[0].answer(None)

    def _wake(self) -> None:
        if not self._waiting or self._blocked:
            return
        self._blocked = True
        try:
            for entry in list(self._waiting):
                if entry[0].closed:
                    self._waiting.remove(entry)
                    continue
                reply = self.store.execute(entry[1])
                if reply is not None:
                    self._waiting.remove(entry)
                    entry[0].answer(reply)
        finally:
            self._blocked = False

    def _subscribe(self, connection: StoreConnection, name: str, channels: list[str]) -> None:
        for channel in channels:
            if name.endswith("UNSUBSCRIBE"):
                connection.channels.discard(channel)
            else:
                connection.channels.add(channel)
            kind = name.lower().encode()
            connection.answer([kind, channel.encode(), len(connection.channels)])

    def _publish(self, channel: bytes, message: bytes) -> int:
        text, heard = channel.decode(), 0
        for connection in self.connections:
            if text in connection.channels:
                heard += 1
                if self.rng.random() >= self.faults.nudge:
                    connection.answer([b"message", channel, message])
        return heard


def unpacked(packed: Iterable[bytes]) -> list[list[bytes]]:
    """The commands that were sent, as a server reads them: words of bytes."""
    reader = hiredis.Reader()
    for piece in packed:
        reader.feed(piece)
    found: list[list[bytes]] = []
    while reader.has_data():
        words = reader.gets()
        assert isinstance(words, list), "half a command was sent"
        found.append(words)
    return found


def _text(word: Any) -> str:
    return word.decode(errors="replace") if isinstance(word, bytes) else str(word)


class StoreConnection:
    """One connection of one process, in place of `redis.asyncio.Connection`."""

    def __init__(self, server: StoreServer) -> None:
        self._server = server
        self._loop = server.loop
        self._process: Process = PROCESS.get(server.loop.world)
        self.channels: set[str] = set()
        self.closed = True
        self._replies: deque[Any] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._there = 0.0
        self._back = 0.0

    @property
    def is_connected(self) -> bool:
        return not self.closed

    async def connect(self) -> None:
        await asyncio.sleep(self._server.latency())
        if not self._server.reachable:
            raise redis_errors.ConnectionError("connection refused")
        self.closed = False
        self._server.connections[self] = None
        self._process.on_end.append(self.broken)

    def pack_commands(self, commands: Sequence[Sequence[Any]]) -> list[bytes]:
        return [hiredis.pack_command(tuple(words)) for words in commands]

    async def send_packed_command(self, packed: list[bytes], check_health: bool = True) -> None:
        if self.closed:
            raise redis_errors.ConnectionError("connection reset")
        commands = unpacked(packed)
        faults, rng = self._server.faults, self._server.rng
        chance = rng.random()
        self._server.struck += chance < faults.before + faults.after + faults.silence
        if chance < faults.before:
            self._loop.at(self._server.latency(), self.broken)
            return
        self._there = max(self._there, self._loop.time() + self._server.latency())
        if chance < faults.before + faults.after:
            self._loop.at(self._there - self._loop.time(), self._last, commands)
        elif chance < faults.before + faults.after + faults.silence:
            if rng.random() < 0.5:
                self._loop.at(self._there - self._loop.time(), self._mute, commands)
        else:
            self._loop.at(self._there - self._loop.time(), self._server.arrive, self, commands)

    def _last(self, commands: Any) -> None:
        self._mute(commands)
        self.broken()

    def _mute(self, commands: Any) -> None:
        if not self.closed:
            for words in commands:
                if _text(words[0]).upper() not in ("SUBSCRIBE", "UNSUBSCRIBE"):
                    self._server.run(words)

    def answer(self, reply: Any) -> None:
        """Called by the server: a reply is on its way."""
        slow = 1.0 if self._server.rng.random() < self._server.faults.slow else 0.0
        self._back = max(self._back, self._loop.time() + self._server.latency() + slow)
        self._loop.at(self._back - self._loop.time(), self._deliver, reply)

    def _deliver(self, reply: Any) -> None:
        if not self.closed:
            self._replies.append(reply)
            self._tell()

    def _tell(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def broken(self) -> None:
        """The connection is gone."""
        self.closed = True
        self._server.connections.pop(self, None)
        self._tell()

    async def read_response(self, timeout: Any = None, disconnect_on_error: bool = True) -> Any:
        while not self._replies:
            if self.closed:
                raise redis_errors.ConnectionError("connection reset")
            self._reader = self._loop.create_future()
            await self._reader
        reply = self._replies.popleft()
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def disconnect(self, nowait: bool = False) -> None:
        self.broken()
