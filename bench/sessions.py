"""Sessions on a warm harness: message to request, waking a long log, many attached, streaming, idle, all at once."""

from __future__ import annotations

import asyncio
import gc
import time
import uuid
from typing import Any

from cowhand.harness.journal import Journal
from cowhand.harness.request import body
from cowhand.session.log import Lease
from figures import Row, percentile, quantiles, row
from rig import World, host, until
from seed import history, idle_sessions, put, wake_all
from support.harness_rig import user

ECHO = "[[script:echo]] hi"


async def parked(world: World, sids: list[str], turns: int = 2) -> None:
    """Until none of the sessions is at work and all have had so many turns."""
    log = world.stack.store.session_log()
    waiting = set(sids)

    async def done() -> bool:
        for sid in list(waiting)[:2000]:
            state = await log.get_session(sid)
            if state.lease or state.status.get("turns", 0) < turns:
                return False
            waiting.discard(sid)
        return not waiting

    await until("all sessions are parked again", done, 600, every=0.02 if len(sids) == 1 else 0.2)


async def message_to_request(world: World, samples: int = 200) -> list[Row]:
    """One idle session after the other gets a message."""
    store = world.stack.store
    sids = await idle_sessions(store, 10)
    pod, _ = await world.harness()
    log = store.session_log()
    sent: dict[str, list[float]] = {sid: [] for sid in sids}
    for number in range(samples + len(sids)):
        sid = sids[number % len(sids)]
        turn = number // len(sids) + 2
        sent[sid].append(time.time())
        await log.emit_event(sid, user("go on", uuid.uuid4().hex))
        await parked(world, [sid], turn)
    arrived: dict[str, list[float]] = {sid: [] for sid in sids}
    for sid, at in await world.arrivals():
        arrived[sid].append(at)
    await world.stack.stop_worker(pod)
    took = [
        (at - before) * 1000
        for sid in sids
        for before, at in list(zip(sent[sid], arrived[sid], strict=True))[1:]
    ]
    what = (
        "user.message sent to the store -> model request at the model server, through the pod's proxy; idle session of "
        f"about 15 to {15 + 9 * samples // 10} events, warm harness, one after the other; profile dev; {host()}"
    )
    return quantiles("message_to_request_ms", took, "ms", {"p50": 10, "p99": 50}, what)


async def wake(world: World, samples: int = 24) -> list[Row]:
    """A log of 1 000 events: claim, read, fold, verify, build; then the same with a whole harness."""
    store = world.stack.store
    worker = store.worker_log("wake")
    await worker.beat()
    sids = []
    for _ in range(samples):
        sid = f"sesn_{uuid.uuid4().hex}"
        log = history(sid, ECHO, 198, 5_500)
        await worker.beat()
        sids.append(await put(store, worker, log))
    count, size = log.conversation.last_seq, sum(len(e.payload()) for e in log.rest)
    took: dict[str, list[float]] = {"all": [], "load": [], "rest": [], "cpu": []}
    for sid in sids:
        await worker.beat()
        gc.collect()
        began, cpu_began = time.perf_counter(), time.process_time()
        lease = await worker.claim(sid)
        assert isinstance(lease, Lease)
        journal = Journal(worker, store.session_log(), lease)
        await journal.load()
        loaded = time.perf_counter()
        talk = journal.conversation
        assert talk.prefix_matches()
        body(talk.base, sid, talk.max_tokens, talk.prompt(talk.last_seq))
        ended = time.perf_counter()
        took["cpu"].append((time.process_time() - cpu_began) * 1000)
        took["all"].append((ended - began) * 1000)
        took["load"].append((loaded - began) * 1000)
        took["rest"].append((ended - loaded) * 1000)
        await worker.park(lease, talk.last_seq + 1)
    await worker.retire()
    rows = quantiles(
        "wake_1000_events_ms",
        took["all"],
        "ms",
        {"p99": 60},
        f"claim, read, fold, check of the last request's hash and bytes of the next request, in one process; log of {count} events, "
        f"{size / count / 1000:.1f} kB each on average; of the median {percentile(took['load'], 0.5):.1f} ms claim, read and fold, "
        f"{percentile(took['rest'], 0.5):.1f} ms check and build; profile dev; {host()}",
    )
    rows.append(
        row("wake_1000_events_cpu_ms", percentile(took["cpu"], 0.5), "ms", None, samples,
            f"CPU of the process for the same, median; log of {count} events, {size / 1e6:.1f} MB; {host()}")
    )  # fmt: skip
    pod, process = await world.harness()
    log_of = store.session_log()
    whole, cpu = [], process.cpu()
    for sid in sids:
        before = time.time()
        await log_of.emit_event(sid, user("go on", uuid.uuid4().hex))
        await parked(world, [sid])
        whole.append(before)
    spent = (process.cpu() - cpu) / samples * 1000
    arrived = dict(await world.arrivals())
    await world.stack.stop_worker(pod)
    times = [(arrived[sid] - before) * 1000 for sid, before in zip(sids, whole, strict=True)]
    what = (
        f"user.message -> model request at the model server, session of {count} events ({size / 1e6:.1f} MB), warm harness, "
        f"one after the other; {spent:.0f} ms of CPU of the harness for the whole turn; {host()}"
    )
    return rows + quantiles("wake_1000_events_to_request_ms", times, "ms", {"p99": 150}, what)


async def attached(
    world: World, count: int = 1000, calls: int = 50, result: int = 8_000
) -> list[Row]:
    """So many sessions in mid-turn on one worker, all waiting for the first byte of an answer."""
    store, stack = world.stack.store, world.stack
    dummy = {"content": [{"type": "text", "text": "never"}]}
    await stack.script("attached", *[dummy] * (calls + 1), {**dummy, "gate": "attached"})
    sids = await idle_sessions(
        store, count, first="[[script:attached]]", calls=calls, result=result
    )
    size = sum(len(one.payload) for one in await store.session_log().get_events(sids[0]))
    pod, process = await world.harness(COWHAND_MAX_SESSIONS=2 * count)
    fresh = process.rss()
    began, cpu = time.monotonic(), process.cpu()
    await wake_all(store, sids)

    async def all_wait() -> bool:
        return len((await stack.control("GET", "gates"))["waiting"]) >= count

    await until("all sessions wait for the model", all_wait, 600, every=1.0)
    took, busy = time.monotonic() - began, process.cpu() - cpu
    rss = process.rss()
    await asyncio.sleep(2)
    began, cpu = time.monotonic(), process.cpu()
    await asyncio.sleep(15)
    share = (process.cpu() - cpu) / (time.monotonic() - began)
    holding = len((await stack.control("GET", "gates"))["waiting"])
    assert holding == count, f"{holding} of {count} sessions are still attached"
    await stack.release("attached")
    await parked(world, sids)
    again = process.rss()
    await stack.stop_worker(pod)
    what = (
        f"{count} sessions leased by one `cowhand harness`, each in mid-turn with a request open and a log of {size / 1000:.0f} kB "
        f"({calls} tool calls); {host()}"
    )
    room = (1024 - fresh) / ((rss - fresh) / count)
    return [
        row("attached_sessions", count if rss < 1024 and share < 1 else min(count, int(room)), "sessions", 1000, 1,
            f"within 1 core and 1 GiB (attached_rss_mb, attached_cpu); {what}"),
        row("attached_rss_mb", rss, "MiB", 1024, 1, f"VmRSS of the harness with {what}; {fresh:.0f} MiB before, {again:.0f} MiB after"),
        row("attached_session_kb", (rss - fresh) * 1024 / count, "KiB", None, count, f"memory of the harness per session; {what}"),
        row("attached_cpu", share, "cores", 1, 1, f"CPU of the harness while nothing happens, over 15 s; {what}"),
        row("attach_cpu_ms", busy / count * 1000, "ms", None, count, f"CPU of the harness per session until its request is out, all woken at once in {took:.0f} s; {what}"),
    ]  # fmt: skip


async def streaming(world: World, count: int = 100, rate: int = 50, seconds: int = 12) -> list[Row]:
    """So many answers at once, each `rate` deltas a second."""
    store, stack = world.stack.store, world.stack
    words = " ".join(f"word{i % 10} and more" for i in range(rate * seconds))
    await stack.script(
        "streaming", {"content": [{"type": "text", "text": words}], "delta_ms": 1000 // rate, "gate": "stream"}
    )  # fmt: skip
    log = store.session_log()
    pod, process = await world.harness(COWHAND_MAX_SESSIONS=2 * count)
    made = [await stack.create("[[script:streaming]] talk") for _ in range(count)]

    async def all_wait() -> bool:
        return len((await stack.control("GET", "gates"))["waiting"]) >= count

    await until("all requests are at the gate", all_wait)
    began, cpu, model = time.monotonic(), process.cpu(), world.model_process().cpu()
    await stack.release("stream")
    peak = 0.0
    while True:
        await asyncio.sleep(0.25)
        peak = max(peak, process.rss())
        states = [await log.get_session(made[0]), await log.get_session(made[-1])]
        if all(not one.lease for one in states):
            break
    await parked(world, made, 1)
    took = time.monotonic() - began
    busy, model_busy = process.cpu() - cpu, world.model_process().cpu() - model
    await stack.stop_worker(pod)
    deltas = count * rate * seconds
    each = busy / deltas * 1e6
    what = (
        f"{count} streams at once of {rate * seconds} text deltas each, meant to come {rate} a second ({deltas / took:.0f} of "
        f"{count * rate} deltas/s came: model server {model_busy / took:.2f} cores, proxy in the driving process); {host()}"
    )
    return [
        row("streaming_sessions", 1e6 / each / rate, "sessions", 100, deltas, f"sessions with {rate} deltas/s that one core carries, from delta_cpu_us; {what}"),
        row("delta_cpu_us", each, "us", None, deltas, f"CPU of the harness per delta, the whole turn counted; {what}"),
        row("streaming_rss_mb", peak, "MiB", 1024, 1, f"highest VmRSS of the harness; {what}"),
    ]  # fmt: skip


async def idle(world: World, count: int = 10_000) -> list[Row]:
    """Idle sessions: what they cost in the store and on a worker; then all of them get a message at once."""
    store = world.stack.store
    before = world.used_memory()
    sids = await idle_sessions(store, count)
    each = (world.used_memory() - before) / count
    events = await store.session_log().get_events(sids[0])
    payload = sum(len(one.payload) for one in events)
    pod, process = await world.harness()
    await asyncio.sleep(3)
    began, cpu = time.monotonic(), process.cpu()
    await asyncio.sleep(15)
    share = (process.cpu() - cpu) / (time.monotonic() - began)
    rss = process.rss()
    await world.stack.stop_worker(pod)
    what = f"{count} idle sessions of {len(events)} events, {payload} B of payload each"
    rows = [
        row("idle_session_hot_bytes", each, "B", None, count, f"memory of the store per session, log not archived: {what}; of it {each - payload:.0f} B beside the payload"),
        row("idle_worker_cpu", share, "cores", 0.02, 1, f"CPU of a worker (heartbeat, sweeps, reading the ready queue of 16 partitions) over 15 s, {what}"),
        row("idle_worker_rss_mb", rss, "MiB", None, 1, f"VmRSS of that worker: {what}"),
    ]  # fmt: skip
    return rows + await herd(world, sids)


async def herd(world: World, sids: list[str], seconds: float = 150.0) -> list[Row]:
    """All at once: a message each while no worker runs, then one worker starts.

    After `seconds` those that had their request until then are counted.
    """
    began = time.monotonic()
    await wake_all(world.stack.store, sids)
    sent = time.monotonic() - began
    pod, process = await world.harness()
    start, cpu = time.time(), process.cpu()

    async def all_there() -> bool:
        awake = {sid for sid, _ in await world.arrivals()}
        return len(awake) == len(sids) or time.time() - start > seconds

    await until("every session has had its request", all_there, seconds + 60, every=2.0)
    arrivals = dict(await world.arrivals())
    busy = process.cpu() - cpu
    rate = len(arrivals) / (max(arrivals.values()) - start)
    await world.stack.stop_worker(pod)
    each = busy / len(arrivals) * 1000
    what = (
        f"{len(sids)} idle sessions of 20 events get a message while no worker runs (taken in {sent:.1f} s), then one worker starts; "
        f"until {len(arrivals)} had their request at the model server; {each:.1f} ms of CPU of the harness per turn; {host()}"
    )
    return [
        row("wakes_per_s", rate, "1/s", 50, len(arrivals), what),
        row("turn_cpu_ms", each, "ms", None, len(arrivals), f"CPU of the harness for a whole turn with one request; {what}"),
    ]  # fmt: skip


PARTS: dict[str, Any] = {
    "message": message_to_request,
    "wake": wake,
    "attached": attached,
    "streaming": streaming,
    "idle": idle,
}
