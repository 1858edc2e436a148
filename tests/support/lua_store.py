"""A store server inside the test process: the log's own Lua scripts, run by Lua, over keys kept in Python.

The simulation needs a server that costs microseconds and lives in virtual time. Only the commands are written
anew here (those that `cowhand.session` uses, with Redis' replies); what decides about sessions is the packaged
Lua text. `test_lua_store` holds it against a real server and against the reference model.
"""

from __future__ import annotations

import fnmatch
import hashlib
import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lupa import lua51
from redis import exceptions as redis_errors

Id = tuple[int, int]
Reply = Any


class Status(bytes):
    """A simple-string reply."""


OK = Status(b"OK")


def error(text: str) -> redis_errors.ResponseError:
    """The exception that the client library raises for an error reply."""
    kinds: dict[str, type[redis_errors.ResponseError]] = {
        "NOSCRIPT": redis_errors.NoScriptError,
        "READONLY": redis_errors.ReadOnlyError,
        "OOM": redis_errors.OutOfMemoryError,
        "LOADING": redis_errors.ResponseError,
    }
    word, _, rest = text.partition(" ")
    kind = kinds.get(word)
    if kind is None or kind is redis_errors.ResponseError:
        return redis_errors.ResponseError(text)
    return kind(rest)


class CommandError(Exception):
    """An error reply of a command."""


@dataclass
class Pending:
    consumer: bytes
    delivered_ms: int
    count: int = 1


@dataclass
class Group:
    last: Id = (0, 0)
    pending: dict[Id, Pending] = field(default_factory=dict)
    consumers: dict[bytes, int] = field(default_factory=dict)
    read: int = 0


@dataclass
class Stream:
    ids: list[Id] = field(default_factory=list)
    fields: list[list[bytes]] = field(default_factory=list)
    last: Id = (0, 0)
    added: int = 0
    groups: dict[bytes, Group] = field(default_factory=dict)

    def between(self, low: bytes, high: bytes, count: int | None = None) -> list[list[Any]]:
        first = _start(self.ids, low)
        last = _end(self.ids, high)
        if count is not None:
            last = min(last, first + count)
        return [[_id(self.ids[i]), list(self.fields[i])] for i in range(first, last)]


def _id(value: Id) -> bytes:
    return b"%d-%d" % value


def _parse(raw: bytes, missing: int = 0) -> Id:
    ms, _, seq = raw.partition(b"-")
    return int(ms), int(seq) if seq else missing


def _start(ids: list[Id], raw: bytes) -> int:
    if raw == b"-":
        return 0
    if raw.startswith(b"("):
        return bisect_right(ids, _parse(raw[1:]))
    return bisect_left(ids, _parse(raw))


def _end(ids: list[Id], raw: bytes) -> int:
    if raw == b"+":
        return len(ids)
    if raw.startswith(b"("):
        return bisect_left(ids, _parse(raw[1:]))
    return bisect_right(ids, _parse(raw, 2**64))


def _number(value: float) -> bytes:
    return b"%d" % int(value) if value == int(value) else repr(value).encode()


class LuaStore:
    """See the module.

    Attributes:
        clock: milliseconds since the epoch.
        publish: called with channel and message of each PUBLISH; answers how many heard it.
        added: called with the key, the id and the fields of each XADD.
        failing: word -> reply of every write while it is set ("OOM ...", "READONLY ...").
    """

    def __init__(self, clock: Callable[[], int], seed: int = 0) -> None:
        self.clock = clock
        self.publish: Callable[[bytes, bytes], int] = lambda _channel, _message: 0
        self.added: Callable[[bytes, Id, list[bytes]], None] = lambda _key, _id, _fields: None
        self.data: dict[bytes, Any] = {}
        self.failing = ""
        self._rng = random.Random(seed)
        self._expires: dict[bytes, int] = {}
        self._sources: dict[bytes, bytes] = {}

    # Commands and scripts.

    def execute(self, words: Sequence[bytes | str | int | float]) -> Reply:
        """Run one command; answers the raw reply, or the exception that stands for an error reply."""
        found = [_word(word) for word in words]
        name = found[0].upper()
        try:
            if self.failing and name in _WRITES:
                raise CommandError(self.failing)
            return self._run(name, found[1:])
        except CommandError as err:
            return error(str(err))

    def _run(self, name: bytes, args: list[bytes]) -> Reply:
        command = getattr(self, f"_{name.decode().lower()}", None)
        if command is None:
            raise CommandError(f"ERR unknown command '{name.decode()}'")
        return command(*args)

    def _script(self, what: bytes, *args: bytes) -> Reply:
        if what.upper() == b"LOAD":
            sha = hashlib.sha1(args[0], usedforsecurity=False).hexdigest().encode()
            self._sources[sha] = args[0]
            return sha
        if what.upper() == b"FLUSH":
            self._sources.clear()
            return OK
        raise CommandError("ERR unknown SCRIPT subcommand")

    def _evalsha(self, sha: bytes, count: bytes, *args: bytes) -> Reply:
        source = self._sources.get(sha)
        if source is None:
            raise CommandError("NOSCRIPT No matching script. Please use EVAL.")
        keys = int(count)
        return _lua().run(sha, source, self, args[:keys], args[keys:])

    def run_script(self, source: str, keys: Sequence[str], args: Sequence[Any]) -> Reply:
        """Run a script at once, whatever the server has loaded; raises what the client would raise."""
        raw = source.encode()
        sha = hashlib.sha1(raw, usedforsecurity=False).hexdigest().encode()
        return _lua().run(sha, raw, self, [_word(k) for k in keys], [_word(a) for a in args])

    def forget_scripts(self) -> None:
        """SCRIPT FLUSH, or a restart."""
        self._sources.clear()

    def _ping(self) -> Reply:
        return Status(b"PONG")

    def _time(self) -> Reply:
        now = self.clock()
        return [b"%d" % (now // 1000), b"%d" % (now % 1000 * 1000)]

    def _wait(self, *_args: bytes) -> Reply:
        return 0

    # Keys.

    def has(self, key: bytes) -> bool:
        """Whether the key is there and has not expired."""
        return self._get_as(key, object) is not None

    def _get_as(self, key: bytes, kind: type[Any]) -> Any:
        deadline = self._expires.get(key)
        if deadline is not None and deadline <= self.clock():
            self._drop(key)
        value = self.data.get(key)
        if value is not None and not isinstance(value, kind):
            raise CommandError("WRONGTYPE Operation against a key holding the wrong kind of value")
        return value

    def _made(self, key: bytes, kind: type[Any]) -> Any:
        value = self._get_as(key, kind)
        if value is None:
            value = self.data[key] = kind()
        return value

    def _drop(self, key: bytes) -> int:
        self._expires.pop(key, None)
        return int(self.data.pop(key, None) is not None)

    def _tidy(self, key: bytes) -> None:
        if not self.data.get(key, True):
            self._drop(key)

    def _exists(self, *keys: bytes) -> Reply:
        return sum(self._get_as(key, object) is not None for key in keys)

    def _del(self, *keys: bytes) -> Reply:
        return sum(self._drop(key) for key in keys)

    _unlink = _del

    def _rename(self, key: bytes, other: bytes) -> Reply:
        value = self._get_as(key, object)
        if value is None:
            raise CommandError("ERR no such key")
        self._drop(other)
        self.data[other] = self.data.pop(key)
        if key in self._expires:
            self._expires[other] = self._expires.pop(key)
        return OK

    def _pexpire(self, key: bytes, ms: bytes, *_: bytes) -> Reply:
        if self._get_as(key, object) is None:
            return 0
        self._expires[key] = self.clock() + int(ms)
        return 1

    def _expire(self, key: bytes, seconds: bytes, *_: bytes) -> Reply:
        return self._pexpire(key, b"%d" % (int(seconds) * 1000))

    def _persist(self, key: bytes) -> Reply:
        return int(self._expires.pop(key, None) is not None)

    def _pttl(self, key: bytes) -> Reply:
        if self._get_as(key, object) is None:
            return -2
        deadline = self._expires.get(key)
        return -1 if deadline is None else deadline - self.clock()

    def _scan(self, _cursor: bytes, *options: bytes) -> Reply:
        pattern = b"*"
        for at, word in enumerate(options):
            if word.upper() == b"MATCH":
                pattern = options[at + 1]
        text = pattern.decode().replace("[", "[[]")
        found = [key for key in list(self.data) if self._get_as(key, object) is not None]
        return [b"0", [key for key in found if fnmatch.fnmatchcase(key.decode(), text)]]

    # Strings.

    def _get(self, key: bytes) -> Reply:
        return self._get_as(key, bytes)

    def _set(self, key: bytes, value: bytes, *options: bytes) -> Reply:
        words = [word.upper() for word in options]
        if b"NX" in words and self._get_as(key, object) is not None:
            return None
        self.data[key] = value
        if b"KEEPTTL" not in words:
            self._expires.pop(key, None)
        if b"PX" in words:
            self._expires[key] = self.clock() + int(options[words.index(b"PX") + 1])
        if b"EX" in words:
            self._expires[key] = self.clock() + 1000 * int(options[words.index(b"EX") + 1])
        return OK

    def _incrby(self, key: bytes, by: bytes) -> Reply:
        value = int(self._get_as(key, bytes) or b"0") + int(by)
        self.data[key] = b"%d" % value
        return value

    def _incr(self, key: bytes) -> Reply:
        return self._incrby(key, b"1")

    def _decrby(self, key: bytes, by: bytes) -> Reply:
        return self._incrby(key, b"%d" % -int(by))

    # Hashes.

    def _hget(self, key: bytes, name: bytes) -> Reply:
        return (self._get_as(key, dict) or {}).get(name)

    def _hmget(self, key: bytes, *names: bytes) -> Reply:
        found = self._get_as(key, dict) or {}
        return [found.get(name) for name in names]

    def _hgetall(self, key: bytes) -> Reply:
        return [word for pair in (self._get_as(key, dict) or {}).items() for word in pair]

    def _hset(self, key: bytes, *pairs: bytes) -> Reply:
        found = self._made(key, dict)
        before = len(found)
        for at in range(0, len(pairs), 2):
            found[pairs[at]] = pairs[at + 1]
        return len(found) - before

    def _hsetnx(self, key: bytes, name: bytes, value: bytes) -> Reply:
        found = self._made(key, dict)
        if name in found:
            return 0
        found[name] = value
        return 1

    def _hdel(self, key: bytes, *names: bytes) -> Reply:
        found = self._get_as(key, dict) or {}
        gone = sum(found.pop(name, None) is not None for name in names)
        self._tidy(key)
        return gone

    def _hlen(self, key: bytes) -> Reply:
        return len(self._get_as(key, dict) or {})

    def _hexists(self, key: bytes, name: bytes) -> Reply:
        return int(name in (self._get_as(key, dict) or {}))

    def _hincrby(self, key: bytes, name: bytes, by: bytes) -> Reply:
        found = self._made(key, dict)
        value = int(found.get(name, b"0")) + int(by)
        found[name] = b"%d" % value
        return value

    def _hincrbyfloat(self, key: bytes, name: bytes, by: bytes) -> Reply:
        found = self._made(key, dict)
        found[name] = _number(float(found.get(name, b"0")) + float(by))
        return found[name]

    # Sets.

    def _sadd(self, key: bytes, *members: bytes) -> Reply:
        found = self._made(key, set)
        before = len(found)
        found.update(members)
        return len(found) - before

    def _srem(self, key: bytes, *members: bytes) -> Reply:
        found = self._get_as(key, set) or set()
        gone = len(found & set(members))
        found -= set(members)
        self._tidy(key)
        return gone

    def _scard(self, key: bytes) -> Reply:
        return len(self._get_as(key, set) or ())

    def _smembers(self, key: bytes) -> Reply:
        return sorted(self._get_as(key, set) or ())

    def _sismember(self, key: bytes, member: bytes) -> Reply:
        return int(member in (self._get_as(key, set) or ()))

    def _spop(self, key: bytes, count: bytes | None = None) -> Reply:
        found = self._get_as(key, set) or set()
        wanted = 1 if count is None else int(count)
        taken = self._rng.sample(sorted(found), min(wanted, len(found)))
        found -= set(taken)
        self._tidy(key)
        if count is None:
            return taken[0] if taken else None
        return taken

    # Sorted sets.

    def _zadd(self, key: bytes, *args: bytes) -> Reply:
        found = self._made(key, dict)
        before = len(found)
        flags = set()
        while args and args[0].upper() in (b"NX", b"XX", b"GT", b"LT", b"CH"):
            flags.add(args[0].upper())
            args = args[1:]
        for at in range(0, len(args), 2):
            score, member = float(args[at]), args[at + 1]
            old = found.get(member)
            if old is not None and (
                b"NX" in flags
                or (b"GT" in flags and score <= old)
                or (b"LT" in flags and score >= old)
            ):
                continue
            if old is None and b"XX" in flags:
                continue
            found[member] = score
        return len(found) - before

    def _ordered(self, key: bytes) -> list[tuple[float, bytes]]:
        found = self._get_as(key, dict) or {}
        return sorted((score, member) for member, score in found.items())

    def _zscore(self, key: bytes, member: bytes) -> Reply:
        score = (self._get_as(key, dict) or {}).get(member)
        return None if score is None else _number(score)

    def _zrem(self, key: bytes, *members: bytes) -> Reply:
        return self._hdel(key, *members)

    def _zcard(self, key: bytes) -> Reply:
        return self._hlen(key)

    def _zrange(self, key: bytes, low: bytes, high: bytes, *options: bytes) -> Reply:
        words = [word.upper() for word in options]
        if b"BYSCORE" in words:
            chosen = [item for item in self._ordered(key) if _within(item[0], low, high)]
            if b"LIMIT" in words:
                at = words.index(b"LIMIT")
                offset, count = int(options[at + 1]), int(options[at + 2])
                chosen = chosen[offset:] if count < 0 else chosen[offset : offset + count]
        else:
            ordered = self._ordered(key)
            last = int(high)
            chosen = ordered[int(low) : None if last == -1 else last + 1]
        if b"WITHSCORES" in words:
            return [word for score, member in chosen for word in (member, _number(score))]
        return [member for _, member in chosen]

    def _zrangebyscore(self, key: bytes, low: bytes, high: bytes, *options: bytes) -> Reply:
        return self._zrange(key, low, high, b"BYSCORE", *options)

    def _zcount(self, key: bytes, low: bytes, high: bytes) -> Reply:
        return sum(_within(score, low, high) for score, _ in self._ordered(key))

    def _zremrangebyscore(self, key: bytes, low: bytes, high: bytes) -> Reply:
        gone = [member for score, member in self._ordered(key) if _within(score, low, high)]
        return self._hdel(key, *gone) if gone else 0

    # Streams.

    def _xadd(self, key: bytes, *args: bytes) -> Reply:
        stream: Stream = self._made(key, Stream)
        raw, fields = args[0], list(args[1:])
        if raw == b"*":
            now = self.clock()
            new = (now, 0) if now > stream.last[0] else (stream.last[0], stream.last[1] + 1)
        elif raw.endswith(b"-*"):
            ms = int(raw[:-2])
            new = (ms, stream.last[1] + 1 if ms == stream.last[0] else 0)
        else:
            new = _parse(raw)
            if new <= stream.last:
                raise CommandError(
                    "ERR The ID specified in XADD is equal or smaller than the target stream top item"
                )
        stream.ids.append(new)
        stream.fields.append(fields)
        stream.last = new
        stream.added += 1
        self.added(key, new, fields)
        return _id(new)

    def _stream(self, key: bytes) -> Stream:
        return self._get_as(key, Stream) or Stream()

    def _xlen(self, key: bytes) -> Reply:
        return len(self._stream(key).ids)

    def _xrange(self, key: bytes, low: bytes, high: bytes, *options: bytes) -> Reply:
        return self._stream(key).between(low, high, int(options[1]) if options else None)

    def _xrevrange(self, key: bytes, high: bytes, low: bytes, *options: bytes) -> Reply:
        found = self._stream(key).between(low, high)[::-1]
        return found[: int(options[1])] if options else found

    def _xtrim(self, key: bytes, how: bytes, *args: bytes) -> Reply:
        stream = self._stream(key)
        if how.upper() == b"MAXLEN":
            cut = max(0, len(stream.ids) - int(args[-1]))
        else:
            cut = bisect_left(stream.ids, _parse(args[-1]))
        del stream.ids[:cut], stream.fields[:cut]
        return cut

    def _xdel(self, key: bytes, *ids: bytes) -> Reply:
        stream, gone = self._stream(key), 0
        for raw in ids:
            at = bisect_left(stream.ids, _parse(raw))
            if at < len(stream.ids) and stream.ids[at] == _parse(raw):
                del stream.ids[at], stream.fields[at]
                gone += 1
        return gone

    def _group(self, key: bytes, name: bytes) -> tuple[Stream, Group]:
        stream = self._stream(key)
        if name not in stream.groups:
            raise CommandError(
                f"NOGROUP No such key '{key.decode()}' or consumer group '{name.decode()}'"
            )
        return stream, stream.groups[name]

    def _xgroup(self, what: bytes, key: bytes, name: bytes, *args: bytes) -> Reply:
        if what.upper() == b"CREATE":
            stream: Stream = self._made(key, Stream)
            if name in stream.groups:
                raise CommandError("BUSYGROUP Consumer Group name already exists")
            stream.groups[name] = Group(last=(0, 0) if args[0] == b"0" else stream.last)
            return OK
        if what.upper() == b"DELCONSUMER":
            _, group = self._group(key, name)
            group.consumers.pop(args[0], None)
            gone = [one for one, entry in group.pending.items() if entry.consumer == args[0]]
            for one in gone:
                del group.pending[one]
            return len(gone)
        raise CommandError("ERR unknown XGROUP subcommand")

    def read_group(
        self, group_name: bytes, consumer: bytes, count: int, keys: Sequence[bytes]
    ) -> Reply:
        """XREADGROUP of new entries, without waiting."""
        found = []
        for key in keys:
            stream, group = self._group(key, group_name)
            group.consumers[consumer] = self.clock()
            first = bisect_right(stream.ids, group.last)
            entries = []
            for at in range(first, min(first + count, len(stream.ids))):
                group.last = stream.ids[at]
                group.read += 1
                group.pending[stream.ids[at]] = Pending(consumer, self.clock())
                entries.append([_id(stream.ids[at]), list(stream.fields[at])])
            if entries:
                found.append([key, entries])
        return found or None

    def _xreadgroup(self, *args: bytes) -> Reply:
        words = [word.upper() for word in args]
        at = words.index(b"STREAMS") + 1
        keys = args[at : at + (len(args) - at) // 2]
        count = int(args[words.index(b"COUNT") + 1]) if b"COUNT" in words else 1 << 30
        return self.read_group(args[1], args[2], count, keys)

    def _xack(self, key: bytes, name: bytes, *ids: bytes) -> Reply:
        group = self._stream(key).groups.get(name)
        if group is None:
            return 0
        return sum(group.pending.pop(_parse(raw), None) is not None for raw in ids)

    def _xautoclaim(
        self, key: bytes, name: bytes, consumer: bytes, idle: bytes, start: bytes, *options: bytes
    ) -> Reply:
        stream, group = self._group(key, name)
        count = int(options[1]) if options else 100
        now = self.clock()
        taken, gone = [], []
        for one in sorted(group.pending):
            if one < _parse(start) or len(taken) >= count:
                continue
            entry = group.pending[one]
            if now - entry.delivered_ms < int(idle):
                continue
            at = bisect_left(stream.ids, one)
            if at == len(stream.ids) or stream.ids[at] != one:
                del group.pending[one]
                gone.append(_id(one))
                continue
            group.pending[one] = Pending(consumer, now, entry.count + 1)
            taken.append([_id(one), list(stream.fields[at])])
        group.consumers[consumer] = now
        return [b"0-0", taken, gone]

    def _xpending(self, key: bytes, name: bytes, *args: bytes) -> Reply:
        _, group = self._group(key, name)
        ids = sorted(group.pending)
        if not args:
            if not ids:
                return [0, None, None, None]
            counts: dict[bytes, int] = {}
            for entry in group.pending.values():
                counts[entry.consumer] = counts.get(entry.consumer, 0) + 1
            summary = [[who, b"%d" % number] for who, number in sorted(counts.items())]
            return [len(ids), _id(ids[0]), _id(ids[-1]), summary]
        chosen = ids[_start(ids, args[0]) : _end(ids, args[1])]
        if len(args) > 3:
            chosen = [one for one in chosen if group.pending[one].consumer == args[3]]
        now = self.clock()
        return [
            [_id(one), entry.consumer, now - entry.delivered_ms, entry.count]
            for one in chosen[: int(args[2])]
            for entry in [group.pending[one]]
        ]

    def _xinfo(self, what: bytes, key: bytes, name: bytes = b"") -> Reply:
        stream = self._get_as(key, Stream)
        if stream is None:
            raise CommandError("ERR no such key")
        if what.upper() == b"GROUPS":
            return [
                [
                    *(b"name", one, b"consumers", len(group.consumers)),
                    *(b"pending", len(group.pending), b"last-delivered-id", _id(group.last)),
                    *(b"entries-read", group.read or None, b"lag", stream.added - group.read),
                ]
                for one, group in stream.groups.items()
            ]
        _, group = self._group(key, name)
        now = self.clock()
        return [
            [
                *(b"name", who, b"idle", now - seen, b"inactive", now - seen),
                *(b"pending", sum(e.consumer == who for e in group.pending.values())),
            ]
            for who, seen in group.consumers.items()
        ]

    def _publish(self, channel: bytes, message: bytes) -> Reply:
        return self.publish(channel, message)

    _spublish = _publish


_WRITES = frozenset({b"EVALSHA", b"SET", b"ZREM", b"DEL", b"XGROUP", b"PEXPIRE", b"SPOP"})


def _within(score: float, low: bytes, high: bytes) -> bool:
    above = score > float(low[1:]) if low.startswith(b"(") else score >= float(low)
    below = score < float(high[1:]) if high.startswith(b"(") else score <= float(high)
    return above and below


def _word(word: bytes | str | int | float) -> bytes:
    if isinstance(word, bytes):
        return bytes(word)
    if isinstance(word, str):
        return word.encode()
    return _number(word)


class _Lua:
    """One Lua state; a script is compiled once."""

    def __init__(self) -> None:
        self._runtime = lua51.LuaRuntime(
            encoding=None, unpack_returned_tuples=False, register_eval=False
        )
        self._compiled: dict[bytes, Any] = {}
        self._store: LuaStore | None = None
        self._wrap = self._runtime.eval(
            b"function(call, pcall) return "
            b"{call = call, pcall = pcall, error_reply = function(t) return {err = t} end} end"
        )
        self._redis = self._wrap(self._call, self._pcall)
        self._load = self._runtime.eval(
            b"function(text) local f, e = loadstring(text) if not f then error(e) end return f() end"
        )
        self._table_from = self._runtime.table_from

    def _call(self, *args: Any) -> Any:
        store = self._store
        assert store is not None
        words = [_word(word) for word in args]
        reply = store._run(words[0].upper(), words[1:])
        return self._to_lua(reply)

    def _pcall(self, *args: Any) -> Any:
        try:
            return self._call(*args)
        except CommandError as err:
            return self._table_from({b"err": str(err).encode()})

    def _to_lua(self, reply: Any) -> Any:
        kind = type(reply)
        if reply is None:
            return False
        if kind is list:
            return self._table_from([self._to_lua(item) for item in reply])
        if kind is Status:
            return self._table_from({b"ok": bytes(reply)})
        return reply

    def _from_lua(self, value: Any) -> Any:
        if value is None or value is False:
            return None
        if value is True:
            return 1
        if isinstance(value, bytes | int):
            return value
        if isinstance(value, float):
            return int(value)
        if value[b"ok"] is not None:
            return Status(value[b"ok"])
        if value[b"err"] is not None:
            raise CommandError(value[b"err"].decode())
        found, at = [], 1
        while (item := value[at]) is not None:
            found.append(self._from_lua(item))
            at += 1
        return found

    def run(
        self,
        sha: bytes,
        source: bytes,
        store: LuaStore,
        keys: Sequence[bytes],
        args: Sequence[bytes],
    ) -> Reply:
        script = self._compiled.get(sha)
        if script is None:
            text = b"return function(KEYS, ARGV, redis)\n" + source + b"\nend"
            script = self._compiled[sha] = self._load(text)
        self._store = store
        try:
            answer = script(self._table_from(keys), self._table_from(args), self._redis)
        except lua51.LuaError as err:
            raise CommandError(f"ERR Error running script: {err}") from err
        return self._from_lua(answer)


_STATE: list[_Lua] = []


def _lua() -> _Lua:
    if not _STATE:
        _STATE.append(_Lua())
    return _STATE[0]
