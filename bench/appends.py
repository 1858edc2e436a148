"""Fenced appends of 1 KB by one worker: how many a second, and how long one takes in each durability profile.

An append of the latency figures is what a harness waits for before an effect: the append itself and the barrier of
the profile. Servers of its own; the replica and the primary share the host.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from cowhand.session import connect
from cowhand.session import events as ev
from cowhand.session.events import NewEvent
from cowhand.session.log import Lease, SessionMeta, StoreConfig, WorkerLog
from cowhand.session.store import Store
from figures import Row, percentile, quantiles, row
from rig import host, until
from support.store import Store as Server

SESSIONS = 50
BATCHED = 20_000
SERIAL = 2_000
PAYLOAD = 1024
RATE = 200
PACED_S = 8
STORES: dict[str, str] = {
    "dev": "one server, AOF everysec",
    "standard": "primary and replica, AOF everysec, WAIT 1",
    "strict": "primary and replica, AOF always, WAITAOF 1 1",
}


def event() -> NewEvent:
    """One event whose payload is about 1 KB and does not compress."""
    return NewEvent(ev.TOOL_RESULT, {"content": os.urandom(PAYLOAD // 2 - 24).hex()})


async def follows(replica: Server) -> bool:
    return b"master_link_status:up" in replica.command("INFO", "replication")


@contextlib.asynccontextmanager
async def servers(profile: str) -> AsyncIterator[Store]:
    """A store as the profile wants it, empty."""
    started = [Server().start()]
    try:
        if profile != "dev":
            started.append(Server().start())
            started[1].command("REPLICAOF", "127.0.0.1", str(started[0].port))
            await until("the replica follows", lambda: follows(started[1]))
        if profile == "strict":
            for server in started:
                server.command("CONFIG", "SET", "appendfsync", "always")
        config = StoreConfig(started[0].url, profile=profile)  # type: ignore[arg-type]
        async with connect(config, namespace="bench") as store:
            yield store
    finally:
        for server in started:
            server.stop()


async def leases(store: Store, worker: WorkerLog, count: int) -> list[Lease]:
    log = store.session_log()
    made = []
    for _ in range(count):
        sid = f"sesn_{uuid.uuid4().hex}"
        meta = SessionMeta(sid, "bench", "bench", sid[5:], {})
        await log.create_session(meta, [NewEvent(ev.SESSION_CREATED, {}, id="created")])
        lease = await worker.claim(sid)
        assert isinstance(lease, Lease), lease
        made.append(lease)
    return made


async def many(worker: WorkerLog, held: list[Lease], total: int) -> tuple[float, list[float]]:
    """Appends of all sessions at once; answers (appends a second, milliseconds of each)."""
    events = [event() for _ in range(100)]
    times: list[float] = []

    async def one(lease: Lease) -> None:
        for number in range(total // len(held)):
            before = time.perf_counter()
            await worker.append(lease, [events[number % 100]])
            times.append((time.perf_counter() - before) * 1000)

    start = time.perf_counter()
    await asyncio.gather(*(one(lease) for lease in held))
    return len(times) / (time.perf_counter() - start), times


async def paced(worker: WorkerLog, held: list[Lease]) -> list[float]:
    """Milliseconds of append and barrier, at RATE a second over all sessions."""
    times: list[float] = []
    events = [event() for _ in range(100)]

    async def one(number: int) -> None:
        lease = held[number % len(held)]
        before = time.perf_counter()
        await worker.append(lease, [events[number % 100]])
        await worker.barrier(lease)
        times.append((time.perf_counter() - before) * 1000)

    start, tasks = time.perf_counter(), []
    for number in range(RATE * PACED_S):
        await asyncio.sleep(max(0.0, start + number / RATE - time.perf_counter()))
        tasks.append(asyncio.create_task(one(number)))
        if number % RATE == 0:
            await worker.beat()
    await asyncio.gather(*tasks)
    return times


async def throughput() -> list[Row]:
    """Appends a second, profile dev."""
    async with servers("dev") as store:
        worker = store.worker_log("bench")
        await worker.beat()
        held = await leases(store, worker, SESSIONS)
        await many(worker, held, SESSIONS * 20)  # Connections and scripts are warm.
        await worker.beat()
        rate, times = await many(worker, held, BATCHED)
        await worker.beat()
        serial, alone = await many(worker, held[:1], SERIAL)
        written = sum([len(await store.session_log().get_events(x.session_id)) for x in held])
        assert written == SESSIONS * 22 + BATCHED + SERIAL, "every append is in the log, once"
    where = f"one worker, payload {PAYLOAD} B, profile dev (AOF everysec), store on the same host; {host()}"
    rows = [
        ("appends_per_s", rate, BATCHED, f"{SESSIONS} sessions at once", times, 5000),
        ("appends_serial_per_s", serial, SERIAL, "one session, one at a time", alone, None),
    ]
    return [
        row(name, round(value), "1/s", target, samples, f"{what}, {where}",
            p50_ms=round(percentile(each, 0.5), 3), p99_ms=round(percentile(each, 0.99), 3))
        for name, value, samples, what, each, target in rows
    ]  # fmt: skip


async def latency(profile: str) -> list[Row]:
    """Append and barrier at a steady rate."""
    async with servers(profile) as store:
        worker = store.worker_log("bench")
        await worker.beat()
        held = await leases(store, worker, SESSIONS)
        await many(worker, held, SESSIONS * 4)
        times = await paced(worker, held)
    targets = {"p50": 3.0, "p99": 15.0} if profile == "standard" else {}
    what = (
        f"append of {PAYLOAD} B and barrier, {RATE} a second over {SESSIONS} sessions of one worker; profile {profile}: "
        f"{STORES[profile]}; all servers on this host; {host()}"
    )
    return quantiles(f"append_{profile}_ms", times, "ms", targets, what)


def profiles() -> list[str]:
    """The profiles that this release has."""
    known = str(StoreConfig.__dataclass_fields__["profile"].type)
    return [name for name in STORES if name in known]


async def measure() -> list[Row]:
    """All of it."""
    rows = await throughput()
    for profile in profiles():
        rows += await latency(profile)
    return rows


PARTS: dict[str, Any] = {"appends": measure}
