"""Random histories of a session log on a real server, compared with `log_model` after every step.

Sessions, workers that die, pause and come back (their writes are tried again later), lost requests and lost
replies, duplicate producers, input that races with parking, suspension, handover, readers that die before they
claim. `LogMachine.mutate` lets a test take one defence out of the scripts.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from redis import exceptions as redis_errors

from cowhand.errors import Fenced, SessionClosed, SessionNotFound, Suspended
from cowhand.session import events as ev
from cowhand.session import scripts as lua
from cowhand.session.codec import pairs
from cowhand.session.control import RedisControlLog
from cowhand.session.keys import Keys
from cowhand.session.link import Link
from cowhand.session.log import Lease, Parked, SessionMeta, StoreConfig
from cowhand.session.sessions import RedisSessionLog
from cowhand.session.store import Store
from cowhand.session.worker import RedisWorkerLog
from support.log_model import Entry, Model

T = TypeVar("T")

PARTITIONS = 2
SESSIONS = st.integers(0, 1)
EVENT_IDS = st.integers(0, 5)
PICK = st.integers(0, 7)
FAULT = st.sampled_from(["", "", "request", "reply"])


class FaultyLink:
    """Loses the next request (`request`) or its reply (`reply`) of a link, once, as a broken connection does."""

    def __init__(self, link: Link) -> None:
        self.fault = ""
        self._run = link.run
        self._link = link
        link.run = self.run  # type: ignore[method-assign]

    async def run(self, commands: Any, timeout: float = 5.0) -> list[Any]:
        if not any(command[0] == "EVALSHA" for command in commands):
            return await self._run(commands, timeout)
        fault, self.fault = self.fault, ""
        if fault == "request":
            await self._link.close()
            raise redis_errors.ConnectionError("request lost")
        replies = await self._run(commands, timeout)
        if fault == "reply" and not any(isinstance(r, redis_errors.NoScriptError) for r in replies):
            await self._link.close()
            raise redis_errors.ConnectionError("reply lost")
        return replies


class World:
    """The server and the connections, shared by all histories of a run."""

    def __init__(self, url: str, scripts: dict[str, lua.Script]) -> None:
        self.loop = asyncio.new_event_loop()
        self.store = Store(StoreConfig(url, partitions=PARTITIONS), "unused", scripts)
        self.faults = FaultyLink(self.store.writes.link)
        self.reader = self.store.link()
        self.run(self.store.check())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def close(self) -> None:
        self.run(self.store.aclose())
        self.run(self.reader.close())
        self.loop.close()


def entry_of(event: ev.NewEvent) -> Entry:
    return Entry(event.type, event.id, "", event.payload())


class LogMachine(RuleBasedStateMachine):
    """See the module. Subclass with `world` set; `run_state_machine_as_test` runs it."""

    world: ClassVar[World]
    _numbers: ClassVar[Any] = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.namespace = f"n{next(LogMachine._numbers)}"
        self.model = Model()
        self.keys = Keys("cowhand", self.namespace, PARTITIONS)
        self.log = RedisSessionLog(self.world.store, self.keys)
        self.control = RedisControlLog(self.world.store)
        self.workers: list[RedisWorkerLog] = []
        self.gone: list[RedisWorkerLog] = []
        self.leases: list[tuple[RedisWorkerLog, Lease, int]] = []
        self.appends: list[tuple[str, list[str], list[Any]]] = []
        self.modes = 0
        self.texts = itertools.count()
        self.world.faults.fault = ""

    # What the rules share

    def sid(self, number: int) -> str:
        return f"sesn_{number:032x}"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.world.run(work)

    def attempt(
        self, work: Coroutine[Any, Any, Any], good: Callable[[Any], Any] = lambda r: (r,)
    ) -> Any:
        try:
            return ("OK", *good(self.run(work)))
        except Fenced:
            return ("FENCED",)
        except Suspended:
            return ("SUSPENDED",)
        except SessionClosed:
            return ("CLOSED",)
        except SessionNotFound:
            return ("NOSESSION",)

    def call(self, *command: str | int) -> Any:
        return self.run(self.world.store.reads.call(*command))

    def message(self, number: int) -> ev.NewEvent:
        return ev.NewEvent(ev.USER_MESSAGE, {"n": next(self.texts)}, id=f"msg:{number}")

    # Workers

    @initialize()
    def first_workers(self) -> None:
        self.start_worker()
        self.start_worker()
        self.create(0, message=True, suspended=False)
        self.take(self.workers[0], self.sid(0))

    @precondition(lambda self: len(self.workers) < 4)
    @rule()
    def start_worker(self) -> None:
        worker = RedisWorkerLog(
            self.world.store, self.keys, f"pod{len(self.workers) + len(self.gone)}.x"
        )
        self.model.alive[worker.worker_id] = True
        self.workers.append(worker)
        self.run(worker._make_groups(self.world.reader, self.ready()))
        self.run(worker.beat())

    def ready(self) -> list[str]:
        return [base + "rdy" for base in self.keys.bases()]

    def pick(self, number: int) -> RedisWorkerLog:
        return self.workers[number % len(self.workers)]

    @rule(number=PICK)
    def beat(self, number: int) -> None:
        worker = self.pick(number)
        dirty = self.run(worker.beat())
        self.model.alive[worker.worker_id] = True
        held = {
            sid
            for sid, session in self.model.sessions.items()
            if session.lease and session.holder == worker.worker_id
        }
        missed = (self.model.dirty.pop(worker.worker_id, set()) & held) - dirty
        assert not missed, f"input of {missed} was never announced to its holder"

    @rule(number=PICK)
    def pause(self, number: int) -> None:
        """A worker stands still for longer than its deadline; it may come back."""
        worker = self.pick(number)
        for base in self.keys.bases():
            self.call("ZADD", base + "w", 1, worker.worker_id)
        self.model.alive[worker.worker_id] = False

    @precondition(lambda self: len(self.workers) > 1)
    @rule(number=PICK)
    def crash(self, number: int) -> None:
        self.pause(number)
        self.gone.append(self.workers.pop(number % len(self.workers)))

    @rule(number=SESSIONS)
    def get_stuck(self, number: int) -> None:
        sid = self.sid(number)
        session = self.model.sessions.get(sid)
        if session is not None and session.lease:
            self.call("ZADD", self.keys.base_of(sid) + "own", 1, sid)
            session.stuck = True

    # Producers

    @rule(number=SESSIONS, message=st.booleans(), suspended=st.booleans(), fault=FAULT)
    def create(self, number: int, message: bool, suspended: bool, fault: str = "") -> None:
        self.world.faults.fault = fault
        sid = self.sid(number)
        events = [ev.NewEvent(ev.SESSION_CREATED, {"n": next(self.texts)}, id="created")]
        if message:
            events.append(self.message(99))
        if suspended:
            events.append(ev.NewEvent(ev.SESSION_SUSPENDED, {}, id="mode:first"))
        meta = SessionMeta(sid, self.namespace, "name", "uid", {})
        got = self.attempt(self.log.create_session(meta, events), lambda r: (r.existed,))
        want = self.model.create(
            sid, [entry_of(e) for e in events], ready=message, suspended=suspended
        )
        # A repeated request finds what the lost one made.
        assert got == want or (fault == "reply" and got == ("OK", True)), (got, want)

    @rule(number=SESSIONS, event=EVENT_IDS, fault=FAULT)
    def emit(self, number: int, event: int, fault: str = "") -> None:
        self.world.faults.fault = fault
        new = self.message(event)
        got = self.attempt(self.log.emit_event(self.sid(number), new))
        assert got == self.model.ingest(self.sid(number), entry_of(new), wakes=True)

    @rule(number=SESSIONS, event=EVENT_IDS)
    def emit_quietly(self, number: int, event: int) -> None:
        new = ev.NewEvent(ev.SESSION_EXEC, {}, id=f"exec:{event}")
        got = self.attempt(self.log.emit_event(self.sid(number), new))
        assert got == self.model.ingest(self.sid(number), entry_of(new), wakes=False)

    @rule(
        number=SESSIONS,
        mode=st.sampled_from(["suspended", "running"]),
        again=st.booleans(),
        fault=FAULT,
    )
    def set_mode(self, number: int, mode: Any, again: bool, fault: str = "") -> None:
        self.world.faults.fault = fault
        self.modes += 0 if again else 1
        kind = ev.SESSION_SUSPENDED if mode == "suspended" else ev.SESSION_RESUMED
        new = ev.NewEvent(kind, {}, id=f"mode:{mode}:{self.modes}")
        got = self.attempt(self.control.set_mode(self.namespace, self.sid(number), mode, new))
        assert got == self.model.ingest(self.sid(number), entry_of(new), wakes=False, mode=mode)

    @precondition(lambda self: len(self.model.sessions) == 2)
    @rule(number=SESSIONS)
    def close(self, number: int) -> None:
        new = ev.NewEvent(ev.SESSION_DELETED, {}, id="deleted")
        self.attempt(self.control.close(self.namespace, self.sid(number), new, retain_s=600))
        self.model.close(self.sid(number), entry_of(new))

    # The ready stream

    @rule(number=PICK)
    def read_ready(self, number: int) -> None:
        """Reads, and may die before it claims."""
        worker = self.pick(number)
        self.run(worker._read(self.world.reader, self.ready(), block=False))

    @rule(number=PICK)
    def read_orphans(self, number: int) -> None:
        worker = self.pick(number)
        self.run(worker._orphans(self.world.reader, self.ready()))

    @rule(number=PICK, session=SESSIONS, nominated=st.booleans(), fault=FAULT)
    def claim(self, number: int, session: int, nominated: bool, fault: str = "") -> None:
        self.world.faults.fault = fault
        worker = self.pick(number)
        sid = self.sid(session)
        if nominated and worker._nominated:
            sid = sorted(worker._nominated)[session % len(worker._nominated)]
        self.take(worker, sid)

    def take(self, worker: RedisWorkerLog, sid: str) -> bool:
        want = self.model.may_claim(sid, worker.worker_id)
        got = self.run(worker.claim(sid))
        if not isinstance(got, Lease):
            assert got.why == want, (got, want)
            return False
        assert want == "OK", f"claimed although {want}"
        assert got.epoch > max(
            (int(e.lease.split(":")[0]) for e in self.model.sessions[sid].log if e.lease), default=0
        )
        assert got.next_seq == self.model.claimed(sid, worker.worker_id, got.value)
        self.leases.append((worker, got, got.next_seq))
        return True

    @rule(number=PICK)
    def take_all_work(self, number: int) -> None:
        """However it went so far: one worker that sweeps and reads gets every session that has work."""
        worker = self.pick(number)
        self.beat(number)
        self.sweep(number)
        waiting = {sid for sid in self.model.sessions if self.model.has_work(sid)}
        got = set()
        for _ in range(4):
            found = self.run(worker._orphans(self.world.reader, self.ready()))
            found += self.run(worker._read(self.world.reader, self.ready(), block=False))
            if not found:
                break
            got |= {sid for sid in found if self.take(worker, sid)}
        assert waiting <= got, f"{waiting - got} had work, and no worker got it"

    @precondition(lambda self: self.leases and len(self.workers) > 1)
    @rule(number=PICK)
    def take_over(self, number: int) -> None:
        """The holder stands still, another worker takes its session; the holder may come back."""
        _, holder, lease, _ = self.lease(number)
        if holder in self.workers:
            self.pause(self.workers.index(holder))
        others = [w for w in self.workers if w is not holder]
        self.take(others[number % len(others)], lease.session_id)

    # Holders, and those who believe that they are

    def lease(self, number: int) -> tuple[int, RedisWorkerLog, Lease, int]:
        index = len(self.leases) - 1 - number % len(self.leases)
        return (index, *self.leases[index])

    @precondition(lambda self: self.leases)
    @rule(
        number=PICK,
        count=st.integers(1, 3),
        status=st.booleans(),
        begins=st.booleans(),
        fault=FAULT,
    )
    def append(self, number: int, count: int, status: bool, begins: bool, fault: str = "") -> None:
        self.world.faults.fault = fault
        index, worker, lease, _ = self.lease(number)
        kinds = [ev.TOOL_RESULT] * (count - 1) + [ev.TOOL_STARTED if begins else ev.TOOL_RESULT]
        events = [ev.NewEvent(kind, {"n": next(self.texts)}) for kind in kinds]
        appender = worker._appenders.get(lease.value)
        wseq = appender.wseq + 1 if appender else 0
        entries = [
            Entry(e.type, f"{wseq}.{i}@{lease.value}", lease.value, e.payload())
            for i, e in enumerate(events)
        ]
        got = self.attempt(worker.append(lease, events, status={"turns": 1} if status else None))
        want = self.model.append(lease.session_id, lease.value, entries)
        assert got == want, (got, want)
        if got[0] == "OK":
            self.leases[index] = (worker, lease, got[1] + count)
            words = [word for e in events for word in (e.type, e.payload())]
            self.appends.append((lease.session_id, [lease.value, str(wseq)], words))

    @precondition(lambda self: self.appends)
    @rule(number=PICK)
    def append_arrives_again(self, number: int) -> None:
        """An old request that was on its way comes in late: a duplicate, or a zombie's."""
        sid, head, words = self.appends[-1 - number % len(self.appends)]
        before = self.call("XLEN", self.keys.session(sid).log)
        keys = self.keys.session(sid)
        names = [keys.name(part) for part in lua.PARTS["append"]]
        self.run(
            self.world.store.writes.script(
                "append", names, keys.base, sid, *head, 1000000, 65536, "", *words
            )
        )
        assert self.call("XLEN", keys.log) == before, "an append was written twice"

    @precondition(lambda self: self.leases)
    @rule(
        number=PICK,
        fresh=st.sampled_from([True, True, False]),
        state=st.sampled_from([*["idle"] * 7, "terminated"]),
        fault=FAULT,
    )
    def park(self, number: int, fresh: bool, state: Any, fault: str = "") -> None:
        self.world.faults.fault = fault
        _, worker, lease, seen = self.lease(number)
        expected = self.model.sessions[lease.session_id].next if fresh else seen
        got = self.attempt(worker.park(lease, expected, state=state))
        want = self.model.park(lease.session_id, lease.value, expected, state)
        if isinstance(got[-1], Parked):
            got = ("OK" if got[1].parked else "NEW", got[1].next_seq)
        elif want[0] == "FENCED":
            want = ("FENCED",)
        if want == ("FENCED",) and got[0] == "OK":
            # Parked by this very lease before: repeating it is no error.
            assert lease.value == self.meta(lease.session_id)[b"rel"].decode()
            return
        assert got == want, (got, want)

    @precondition(lambda self: self.leases)
    @rule(number=PICK, fault=FAULT)
    def handover(self, number: int, fault: str = "") -> None:
        self.world.faults.fault = fault
        _, worker, lease, _ = self.lease(number)
        got = self.attempt(worker.handover(lease), lambda r: ())
        want = self.model.handover(lease.session_id, lease.value)
        if want == ("FENCED",) and got == ("OK",):
            assert lease.value == self.meta(lease.session_id)[b"rel"].decode()
            return
        assert got == want, (got, want)

    @rule(number=PICK)
    def sweep(self, number: int) -> None:
        self.run(self.pick(number)._upkeep.requeue())
        self.model.requeue()

    @rule()
    def trim(self) -> None:
        self.run(self.pick(0)._upkeep.trim())

    # What must always hold

    def meta(self, sid: str) -> dict[bytes, bytes]:
        return pairs(self.call("HGETALL", self.keys.session(sid).meta))

    @invariant()
    def promises_hold(self) -> None:
        self.world.faults.fault = ""
        self.run(self.check_all())

    async def check_all(self) -> None:
        await asyncio.gather(
            *(self.check_log(sid) for sid in self.model.sessions),
            *(self.check_lag(ready) for ready in self.ready()),
        )

    async def check_log(self, sid: str) -> None:
        session, keys = self.model.sessions[sid], self.keys.session(sid)
        log, raw = await asyncio.gather(
            self.log.get_events(sid), self.world.store.reads.call("HGETALL", keys.meta)
        )
        assert [e.seq for e in log] == list(range(1, len(log) + 1)), "positions are not dense"
        assert len({e.id for e in log}) == len(log), "an event stands twice in the log"
        self.check_fencing(log)
        want = [(e.type, e.id, e.lease, e.payload) for e in session.log]
        assert [(e.type, e.id, e.lease, e.payload) for e in log] == want
        meta = pairs(raw)
        assert meta[b"lease"].decode() == session.lease
        assert int(meta[b"next"]) == len(log) + 1
        entry = meta[b"rdy"].decode()
        if entry == "0":
            waits = self.model.has_work(sid) and not session.lease
            assert not waits, "parked with unseen input, and not in the ready stream"
        else:
            found = await self.world.store.reads.call("XRANGE", keys.base + "rdy", entry, entry)
            assert found, "the ready entry was trimmed before its claim"

    async def check_lag(self, ready: str) -> None:
        (raw,) = await self.world.store.reads.call("XINFO", "GROUPS", ready)
        group = pairs(raw)
        last = b"(" + group[b"last-delivered-id"]
        unread = await self.world.store.reads.call("XRANGE", ready, last, "+")
        assert group[b"lag"] == len(unread), "the lag of the ready group is not exact"

    def check_fencing(self, log: list[ev.Event]) -> None:
        holder, suspended = "", False
        for event in log:
            if event.type == ev.SESSION_WAKE:
                assert not suspended, "a suspended session was claimed"
                holder = event.lease
            elif event.lease:
                assert event.lease == holder, "a write by an old lease after a later wake"
            if event.type == ev.SESSION_SUSPENDED:
                suspended = True
            elif event.type == ev.SESSION_RESUMED:
                suspended = False
