"""Durability profiles against real servers: primary and replica, on every installed server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import pytest

from cowhand.errors import StoreTooWeak, StoreUnavailable
from cowhand.session import barriers as barriers_module
from cowhand.session import connect
from cowhand.session import durability as durability_module
from cowhand.session import link as link_module
from cowhand.session.log import Profile, StoreConfig
from support import sessions as make
from support.store import Store as Server
from support.store import installed

Start = Callable[..., Server]


@pytest.fixture(params=sorted(installed()) or [""])
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    servers: list[Server] = []

    def one(**more: str | bool) -> Server:
        server = Server(installed().get(request.param), **more).start()  # type: ignore[arg-type]
        servers.append(server)
        return server

    yield one
    for server in servers:
        server.stop()


@pytest.fixture
def pair(start: Start) -> tuple[Server, Server]:
    primary, replica = start(), start()
    replica.follow(primary)
    return primary, replica


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durability_module, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(durability_module, "PAUSE", 0.01)


def patience(monkeypatch: pytest.MonkeyPatch, milliseconds: int) -> None:
    """How long barriers wait."""
    for name in ("WAIT_MS", "DISK_WAIT_MS"):
        monkeypatch.setattr(barriers_module, name, milliseconds)


def config(server: Server, profile: Profile, **more: object) -> StoreConfig:
    return StoreConfig(server.url, profile=profile, **more)  # type: ignore[arg-type]


# What is there


async def test_what_the_store_keeps_is_seen(start):
    primary, replica = start(fsync="everysec"), start(fsync="everysec")
    await asyncio.to_thread(replica.follow, primary)
    for profile in ("dev", "standard", "strict", "managed"):
        async with connect(config(primary, profile)) as store:
            await store.require_durability()
            verdict = store.durability.verdict
            assert (verdict.demanded, verdict.effective, verdict.faults) == (profile, profile, ())
            assert ("2 s" in str(verdict.notes)) == (profile == "strict")
    async with connect(config(start(fsync="always"), "strict", replicas=0)) as store:
        await store.require_durability()
        assert store.durability.verdict.notes == ()


async def test_a_store_that_keeps_less_is_refused_unless_allowed(start):
    lonely, fleeting = start(), start(aof=False)
    cases = [
        (lonely, "standard", "dev", "0 of 1 replicas"),
        (lonely, "strict", "dev", "0 of 1 replicas"),
        (fleeting, "dev", "none", "appendonly yes"),
        (fleeting, "strict", "none", "appendonly yes"),
    ]
    for server, profile, effective, why in cases:
        async with connect(config(server, profile)) as store:
            with pytest.raises(StoreTooWeak, match=f"keeps only {effective}.*{why}.*allowWeaker"):
                await store.require_durability()
        async with connect(config(server, profile, allow_weaker=True)) as store:
            await store.require_durability()
            assert store.durability.verdict.effective == effective


async def test_a_start_waits_for_a_replica_that_is_on_its_way(start, monkeypatch):
    monkeypatch.setattr(durability_module, "SETTLE_SECONDS", 600.0)
    primary, replica = start(), start()
    async with connect(config(primary, "standard")) as store:
        waiting = asyncio.create_task(store.require_durability())
        while store.durability.verdict is None:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)
        assert store.durability.verdict.effective == "dev"
        await asyncio.to_thread(replica.follow, primary)
        await waiting
        assert store.durability.verdict.effective == "standard"


async def test_a_store_that_is_away_is_let_be_and_a_replica_is_not_judged(pair, monkeypatch):
    primary, replica = pair
    monkeypatch.setattr(link_module, "RETRY_SECONDS", 0.0)
    async with connect(config(primary, "dev")) as store:
        await store.check()  # makes the identity, which a replica cannot
        await asyncio.to_thread(replica.follow, primary)
    async with connect(config(replica, "standard")) as store:
        with pytest.raises(StoreUnavailable, match="replica"):
            await store.durability.look()
        await store.require_durability()
        assert store.durability.verdict is None
    primary.kill()
    async with connect(config(primary, "standard")) as store:
        await store.require_durability()
        assert store.durability.verdict is None


# Barriers


@pytest.mark.parametrize("profile", ["standard", "strict"])
async def test_nothing_is_acknowledged_that_the_replica_does_not_have(pair, monkeypatch, profile):
    primary, replica = pair
    async with connect(config(primary, profile), namespace="team-a") as store:
        log, worker = store.session_log(), store.worker_log("pod-1")
        patience(monkeypatch, 4000)
        sid = make.new_sid()
        for _ in range(
            20
        ):  # A replica says nothing of its disk before it has written its file anew.
            with contextlib.suppress(StoreUnavailable):
                await make.start(log, sid=sid)
                break
        await worker.beat()
        lease = await make.take(worker, sid)
        await worker.append(lease, [make.result()])
        await worker.barrier(lease)
        patience(monkeypatch, 100)
        replica.freeze()
        with pytest.raises(StoreUnavailable, match="ask again"):
            await log.emit_event(sid, make.message("msg:1"))
        # The same message over a new connection writes nothing: still it is not acknowledged.
        await store.writes.link.close()
        with pytest.raises(StoreUnavailable, match="ask again"):
            await log.emit_event(sid, make.message("msg:1"))
        await worker.append(lease, [make.result()])
        await store.writes.link.close()
        with pytest.raises(StoreUnavailable, match="ask again"):
            await worker.barrier(lease)
        replica.thaw()
        patience(monkeypatch, 4000)
        await worker.barrier(lease)
        position = await log.emit_event(sid, make.message("msg:1"))
        state = await log.get_session(sid)
        assert state.next_seq == position + 2, "asked again, written once"


async def test_control_without_the_mark_a_new_connection_confirms_what_no_replica_has(
    pair, monkeypatch
):
    """A WAIT on a connection that has written nothing passes at once: the barrier's mark is what counts."""
    patience(monkeypatch, 60_000)
    primary, replica = pair
    async with connect(config(primary, "standard"), namespace="team-a") as store:
        sid = await make.start(store.session_log())
        patience(monkeypatch, 100)
        replica.freeze()
        await store.writes.call("SET", "cowhand:team-a:{p00}:x", "1")
        assert await store.writes.call("WAIT", 1, 100) == 0
        await store.writes.link.close()
        assert await store.writes.call("WAIT", 1, 100) == 1
        with pytest.raises(StoreUnavailable, match="ask again"):
            await store.wait(store.keys().base(0))
        replica.thaw()
        assert sid


@pytest.mark.parametrize("profile", ["dev", "managed"])
async def test_profiles_without_a_barrier_wait_for_nobody(start, profile):
    async with connect(config(start(), profile), namespace="team-a") as store:
        sid = await make.start(store.session_log())
        worker = store.worker_log("pod-1")
        await worker.beat()
        await worker.barrier(await make.take(worker, sid))
        assert await store.reads.call("EXISTS", f"{store.keys().base_of(sid)}bar") == 0


async def test_strict_alone_waits_for_its_own_disk(start):
    async with connect(
        config(start(fsync="always"), "strict", replicas=0), namespace="team-a"
    ) as store:
        sid = await make.start(store.session_log())
        assert await store.reads.call("EXISTS", f"{store.keys().base_of(sid)}bar") == 1
        assert (await store.session_log().get_session(sid)).next_seq == 3


async def test_a_weaker_store_that_is_allowed_serves_on(start, monkeypatch):
    patience(monkeypatch, 100)
    for profile, server in (("standard", start()), ("strict", start(aof=False))):
        async with connect(config(server, profile), namespace="team-a") as store:
            with pytest.raises(StoreUnavailable, match="ask again"):
                await make.start(store.session_log())
        async with connect(config(server, profile, allow_weaker=True), namespace="team-a") as store:
            await make.start(store.session_log())
            await make.start(store.session_log())
