"""One history on two servers: every command goes to a real server and to `LuaStore`, and the replies must be equal.

`Twin.watch` puts itself under every `Link`. Both servers take the time from a key, so that the scripts, which are
otherwise as they are, write the same times and the same ids on both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from redis import exceptions as redis_errors

from cowhand.session import scripts as lua
from cowhand.session.link import Command, Link
from support.lua_store import LuaStore, Stream

CLOCK = "twin:clock"
TIME_FROM = "  local t = redis.call('TIME')\n  return t[1] * 1000 + math.floor(t[2] / 1000)\n"
TIME_TO = f"  return tonumber(redis.call('GET', '{CLOCK}'))\n"
ID_FROM = "redis.call('XADD', ready, '*', "
ID_TO = f"redis.call('XADD', ready, redis.call('GET', '{CLOCK}') .. '-*', "
UNEQUAL = (b"idle", b"inactive")
"""Fields of XINFO that tell real time."""


def scripts() -> dict[str, lua.Script]:
    """The packaged scripts, with the time of `CLOCK`."""
    found = {}
    for name, script in lua.load().items():
        assert script.source.count(TIME_FROM) == script.source.count(ID_FROM) == 1
        text = script.source.replace(TIME_FROM, TIME_TO).replace(ID_FROM, ID_TO)
        found[name] = lua.Script(name, text)
    return found


class Twin:
    """See the module.

    Attributes:
        compared: how often each script was run on both, by name.
    """

    def __init__(self, known: Mapping[str, lua.Script]) -> None:
        self.now = 1_700_000_000_000
        self.lua = LuaStore(lambda: self.now)
        self.compared: dict[str, int] = {}
        self._names = {script.sha: name for name, script in known.items()}
        self._run = Link.run
        self._lock = asyncio.Lock()
        self._holder: Any = None

    def watch(self, monkeypatch: Any) -> None:
        """Compare what every link does from now on."""

        async def run(link: Link, commands: Sequence[Command], timeout: float = 5.0) -> list[Any]:
            if self._holder is asyncio.current_task():
                return await self._both(link, commands)  # the greeting of a new connection
            async with self._lock:
                self._holder = asyncio.current_task()
                try:
                    await link.open()
                    return await self._both(link, commands)
                finally:
                    self._holder = None

        monkeypatch.setattr(Link, "run", run)

    async def _both(self, link: Link, commands: Sequence[Command]) -> list[Any]:
        self.now += 7
        clock: Command = ("SET", CLOCK, self.now)
        replies = (await self._run(link, [clock, *commands]))[1:]
        self.lua.execute(clock)
        for command, real in zip(commands, replies, strict=True):
            twin = self.lua.execute(command)
            if command[0] == "EVALSHA" and not isinstance(real, Exception):
                name = self._names[str(command[1])]
                self.compared[name] = self.compared.get(name, 0) + 1
            if command[0] not in ("TIME", "WAIT", "SPOP"):
                one, other = comparable(command, real), comparable(command, twin)
                assert one == other, f"{command!r:.600}: {one!r} and {other!r}"
            elif command[0] == "SPOP":
                assert sorted(real or ()) == sorted(twin or ()), command
        return replies

    async def compare_data(self, link: Link, prefix: str) -> int:
        """Compare every key that begins so; answers how many there are."""
        (found,) = await self._run(link, [("KEYS", prefix + "*")])
        mine = sorted(k for k in self.lua.data if k.startswith(prefix.encode()) and self.lua.has(k))
        assert sorted(found) == mine
        for key in mine:
            value = self.lua.data[key]
            read: dict[type, Command] = {
                bytes: ("GET", key),
                set: ("SMEMBERS", key),
                Stream: ("XRANGE", key, "-", "+"),
                dict: ("HGETALL", key),
            }
            command = read[type(value)]
            if type(value) is dict and any(isinstance(score, float) for score in value.values()):
                command = ("ZRANGE", key, 0, -1, "WITHSCORES")
            (real,) = await self._run(link, [command])
            twin = self.lua.execute(command)
            assert comparable(command, real) == comparable(command, twin), key
        return len(mine)


def comparable(command: Command, reply: Any) -> Any:
    """A reply without what may differ between two right servers: order of sets and hashes, texts of Lua errors."""
    if isinstance(reply, redis_errors.ResponseError):
        return type(reply).__name__, str(reply).split(" ")[0]
    assert not isinstance(reply, Exception), reply
    word = str(command[0])
    if word == "HGETALL":
        return sorted(zip(reply[::2], reply[1::2], strict=True))
    if word == "XINFO":
        return [
            {k: v for k, v in zip(raw[::2], raw[1::2], strict=True) if k not in UNEQUAL}
            for raw in reply
        ]
    if word == "XPENDING" and len(command) > 3:
        return [(entry, who, count) for entry, who, _idle, count in reply]
    if word in ("SMEMBERS", "HKEYS"):
        return sorted(reply)
    if word == "SCAN":
        return sorted(reply[1])
    if isinstance(reply, list) and reply and all(isinstance(item, bytes) for item in reply):
        return sorted(reply) if word == "EVALSHA" else reply
    return reply
