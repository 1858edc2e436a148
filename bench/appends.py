"""Fenced appends of 1 KB per second by one worker: many sessions at once (batched), and one after the other.

Run alone it starts a server of its own: `.venv/bin/python bench/appends.py`.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from cowhand.session import connect
from cowhand.session import events as ev
from cowhand.session.events import NewEvent
from cowhand.session.log import Lease, SessionMeta, StoreConfig, WorkerLog
from cowhand.session.store import Store

SESSIONS = 50
BATCHED = 20_000
SERIAL = 2_000
PAYLOAD = 1024
TARGET = 5000


def event() -> NewEvent:
    """One event whose payload is about 1 KB and does not compress."""
    return NewEvent(ev.TOOL_RESULT, {"content": os.urandom(PAYLOAD // 2 - 24).hex()})


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


async def measure(url: str) -> list[dict[str, Any]]:
    """Measure against the server at `url` (it should be empty); answers rows for bench/results.json."""
    async with connect(StoreConfig(url), namespace="bench") as store:
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
    conditions = (
        f"one worker, payload {PAYLOAD} B, profile dev (AOF everysec), store on the same host, "
        f"{os.cpu_count()} cores"
    )
    rows = [
        ("appends_per_s", rate, BATCHED, f"{SESSIONS} sessions at once", times, TARGET),
        ("appends_serial_per_s", serial, SERIAL, "one session, one at a time", alone, None),
    ]
    return [
        {
            "id": name,
            "value": round(value),
            "unit": "1/s",
            "target": target,
            "samples": samples,
            "conditions": f"{what}, {conditions}",
            "p50_ms": round(statistics.median(each), 3),
            "p99_ms": round(statistics.quantiles(each, n=100)[98], 3),
        }
        for name, value, samples, what, each, target in rows
    ]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'figure':<22}{'value':>10} {'unit':<6}{'target':>8}{'p50 ms':>9}{'p99 ms':>9}  conditions"
    ]
    for row in rows:
        target = "-" if row["target"] is None else row["target"]
        lines.append(
            f"{row['id']:<22}{row['value']:>10} {row['unit']:<6}{target:>8}"
            f"{row['p50_ms']:>9}{row['p99_ms']:>9}  {row['samples']} appends, {row['conditions']}"
        )
    return "\n".join(lines)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from support.store import Store as Server

    server = Server().start()
    try:
        print(table(asyncio.run(measure(server.url))))
    finally:
        server.stop()


if __name__ == "__main__":
    main()
