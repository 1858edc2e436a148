"""The log on a real Redis Cluster: every partition on its node, slots that move, nodes that die or come back empty."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from cowhand.errors import StoreMismatch, StoreUnavailable, UserError
from cowhand.session import connect
from cowhand.session import link as link_module
from cowhand.session import scripts as lua
from cowhand.session.acl import CONTROL_USERS, users_acl
from cowhand.session.keeper import ScriptKeeper
from cowhand.session.keys import identity_key
from cowhand.session.log import StoreConfig
from cowhand.session.store import Store
from support import sessions as make
from support.cluster import Cluster, Node
from support.store import Store as Server
from support.store import installed

USERS = (*CONTROL_USERS, "t-team-a")
NS = "team-a"


def _acl() -> str:
    hashed = {user: hashlib.sha256(f"pw-{user}".encode()).hexdigest() for user in USERS}
    lines = users_acl(hashed, [NS]).splitlines()
    # The test itself, and what the nodes say to each other in MIGRATE, come as the default user.
    return "\n".join(["user default on nopass ~* &* +@all", *lines[1:]]) + "\n"


@pytest.fixture(scope="module", params=sorted(installed()))
def running(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    cluster = Cluster(installed()[request.param], acl=_acl())
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    running.flush()
    return running


def as_user(cluster: Cluster, user: str, **more: Any) -> Store:
    config = StoreConfig(cluster.url, username=user, password=f"pw-{user}", **more)
    return Store(config, NS)


@pytest.fixture
async def roles(cluster: Cluster) -> AsyncIterator[tuple[Store, Store]]:
    """The operator's and a tenant's access; the scripts are loaded."""
    async with as_user(cluster, "operator") as control, as_user(cluster, "t-team-a") as tenant:
        await control.check()
        await ScriptKeeper(control, control._scripts).look()
        yield control, tenant


def everywhere(store: Store) -> list[str]:
    """Session ids, one in each partition."""
    found: dict[str, str] = {}
    while len(found) < store.config.partitions:
        sid = make.new_sid()
        found.setdefault(store.keys(NS).base_of(sid), sid)
    return list(found.values())


def base_of(store: Store, sid: str) -> str:
    return store.keys(NS).base_of(sid)


async def test_the_whole_log_on_three_nodes(cluster, roles):
    """Sessions in every partition: made, claimed, appended to, followed, parked, listed and measured."""
    control, tenant = roles
    log, worker = tenant.session_log(), tenant.worker_log("pod-1")
    sids = everywhere(tenant)
    assert {cluster.owner(base_of(tenant, sid)) for sid in sids} == set(cluster.nodes)
    for sid in sids:
        await make.start(log, sid=sid)
    await worker.beat()
    work, follow = worker.work(), log.follow(sids[3], 4)
    following = asyncio.create_task(anext(follow))
    async with asyncio.timeout(30):
        assert {await anext(work) for _ in sids} == set(sids)
        for sid in sids:
            lease = await make.take(worker, sid)
            await worker.append(lease, [make.result(sid)])
            await log.emit_event(sid, make.message("msg:1"))
            assert (await worker.park(lease, 5)).parked is False
        assert (await following).data["content"] == sids[3]
        assert await worker.beat() >= set(sids)
    events = [event.seq for event in await log.get_events(sids[5])]
    assert events == [1, 2, 3, 4, 5]
    assert {sid async for sid in control.session_log(NS).session_ids()} == set(sids)
    side = control.archive_log()
    seen, cursor = [], 0
    while True:
        cursor, logs = await side.hot_logs(NS, cursor)
        seen += [one.session_id for one in logs]
        if not cursor:
            break
    assert sorted(seen) == sorted(sids)
    usage = await control.control_log().store_usage([NS])
    assert usage.tenants[NS] > 16 * 1000
    assert (await control.control_log().backlog(NS)).leased == 16
    assert set(await control.control_log().take_projections(NS)) == set(sids)
    assert await control.control_log().drop_worker(NS, "pod-1") == 16
    await control.control_log().sweep(NS)
    await follow.aclose()
    await work.aclose()


async def test_scripts_are_kept_on_each_node(cluster, roles):
    control, _ = roles
    for node in cluster.nodes:
        node.command("SCRIPT", "FLUSH")
    count = len(control._scripts)
    assert await ScriptKeeper(control, control._scripts).look() == 3 * count
    assert await ScriptKeeper(control, control._scripts).look() == 0


async def test_the_profile_is_the_weakest_node_s(cluster, roles):
    control, _ = roles
    verdict = await control.durability.look()
    assert (verdict.effective, verdict.faults) == ("dev", ())
    assert "3 primaries" in verdict.server
    cluster.nodes[1].command("CONFIG", "SET", "appendonly", "no")
    try:
        verdict = await control.durability.look()
        assert verdict.effective == "none"
        assert verdict.weaker
        assert len(verdict.faults) == 1
    finally:
        cluster.nodes[1].command("CONFIG", "SET", "appendonly", "yes")


async def test_a_slot_that_moved_is_followed_in_the_middle_of_a_session(cluster, roles):
    """The lease, the blocking reader, the follower, appends in doubt: none of them notices."""
    _, tenant = roles
    log, worker = tenant.session_log(), tenant.worker_log("pod-1")
    sid = await make.start(log)
    await worker.beat()
    work, follow = worker.work(), log.follow(sid, 4)
    following = asyncio.create_task(anext(follow))
    async with asyncio.timeout(30):
        assert await anext(work) == sid
        lease = await make.take(worker, sid)
        target = next(
            node for node in cluster.nodes if node is not cluster.owner(base_of(tenant, sid))
        )
        await asyncio.to_thread(cluster.move, base_of(tenant, sid), target)
        await worker.append(lease, [make.result("after")])
        assert (await following).data["content"] == "after"
        assert (await worker.park(lease, 5)).parked
        await log.emit_event(sid, make.message("msg:1"))
        assert await anext(work) == sid, "the blocked reader reads from the new node"
    assert cluster.owner(base_of(tenant, sid)) is target
    assert [event.seq for event in await log.get_events(sid)] == [1, 2, 3, 4, 5]
    await follow.aclose()
    await work.aclose()


async def halfway(cluster: Cluster, tenant: Store, sid: str) -> tuple[Node, Node]:
    """The slot of a session is on its way, and its log has gone ahead: (from, to)."""
    base = base_of(tenant, sid)
    target = next(node for node in cluster.nodes if node is not cluster.owner(base))
    source = await asyncio.to_thread(cluster.begin_move, base, target)
    assert await asyncio.to_thread(cluster.move_keys, base, source, target, only=f"{sid}:l") == 1
    return source, target


async def test_a_slot_on_its_way_is_read_and_written_when_it_has_arrived(cluster, roles):
    """Reads of what has gone are ASKed for at the other node; a script that needs keys of both waits."""
    _, tenant = roles
    log, worker = tenant.session_log(), tenant.worker_log("pod-1")
    sid = await make.start(log)
    await worker.beat()
    lease = await make.take(worker, sid)
    source, target = await halfway(cluster, tenant, sid)
    async with asyncio.timeout(30):
        seqs = [event.seq for event in await log.get_events(sid)]
        assert seqs == [1, 2, 3], "meta from one node, the log from the other"
        appending = asyncio.create_task(worker.append(lease, [make.result("once")]))
        sending = asyncio.create_task(log.emit_event(sid, make.message("msg:1")))
        await asyncio.wait([appending, sending], timeout=0.3)
        assert not appending.done()
        assert not sending.done()
        await asyncio.to_thread(cluster.end_move, base_of(tenant, sid), source, target)
        await asyncio.gather(appending, sending)
    types = [event.type for event in await log.get_events(sid)]
    assert sorted(types[3:]) == ["tool.result", "user.message"]


async def test_control_without_asking_reads_wait_for_the_end_of_the_move(
    cluster, roles, monkeypatch
):
    _, tenant = roles
    log = tenant.session_log()
    sid = await make.start(log)
    await log.get_events(sid)

    async def never(*_: Any) -> None:
        return None

    monkeypatch.setattr("cowhand.session.cluster.SlotPipe._asked", never)
    monkeypatch.setattr(link_module, "RETRY_SECONDS", 0.3)
    source, target = await halfway(cluster, tenant, sid)
    try:
        with pytest.raises(StoreUnavailable):
            await log.get_events(sid)
    finally:
        await asyncio.to_thread(cluster.end_move, base_of(tenant, sid), source, target)


def careless() -> dict[str, lua.Script]:
    """The scripts as they would be if the holder were marked behind the first write."""
    changed = {}
    for name, script in lua.load().items():
        source = script.source.replace("\nmark(lease)\n", "\n").replace(
            "\nnudge(lease, seq)\n", "\nmark(lease)\nnudge(lease, seq)\n"
        )
        changed[name] = lua.Script(name, source)
    return changed


@pytest.mark.parametrize("gone", ["dirty", "quota", "control"])
async def test_a_script_that_meets_a_key_that_has_gone_has_written_nothing(
    cluster, roles, monkeypatch, gone
):
    """Keys that scripts do not declare: all that are declared are still there, and these have moved."""
    control, tenant = roles
    monkeypatch.setattr(link_module, "RETRY_SECONDS", 0.3)
    if gone == "control":
        scripts = careless()
        assert scripts["ingest"].source != tenant._scripts["ingest"].source
        await ScriptKeeper(control, scripts).look()
        for pipes in (tenant.writes, tenant.reads):
            pipes._scripts = scripts
    log, worker = tenant.session_log(), tenant.worker_log("pod-1")
    sid = await make.start(log)
    base = base_of(tenant, sid)
    await worker.beat()
    await make.take(worker, sid)
    # Every key that `ingest` declares exists, so that the server lets it run in the middle of a move.
    meta = tenant.keys(NS).session(sid).meta
    for key in (f"{base}own", f"{base}w", f"{base}rdy", f"{meta[:-2]}:d"):
        assert await control.reads.call("EXISTS", key) == 1
    await control.control_log().put_quota(NS, 0, 10**9)
    await log.emit_event(sid, make.message("msg:1"))
    before = [event.id for event in await log.get_events(sid)]
    target = next(node for node in cluster.nodes if node is not cluster.owner(base))
    source = await asyncio.to_thread(cluster.begin_move, base, target)
    ending = f"quota.{NS}" if gone == "quota" else f"dirty:{worker.worker_id}"
    assert await asyncio.to_thread(cluster.move_keys, base, source, target, only=ending) >= 1
    if gone == "control":
        await log.emit_event(
            sid, make.message("msg:2")
        )  # the repeat found the first half, and called it done
        await asyncio.to_thread(cluster.end_move, base, source, target)
        last = (await log.get_events(sid))[-1]
        assert last.id == "msg:2"
        assert int(await control.reads.call("HGET", meta, "input")) < last.seq, (
            "nobody will answer it"
        )
        return
    with pytest.raises(StoreUnavailable, match="non local key"):
        await log.emit_event(sid, make.message("msg:2"))
    await asyncio.to_thread(cluster.end_move, base, source, target)
    assert [event.id for event in await log.get_events(sid)] == before
    last = await log.emit_event(sid, make.message("msg:2"))
    assert last == len(before) + 1
    assert int(await control.reads.call("HGET", meta, "input")) == last


async def test_a_node_that_came_back_empty_is_refused(cluster, roles):
    """The identity is on another node and looks right; the partition's own mark is gone."""
    _, tenant = roles
    log = tenant.session_log()
    sid = await make.start(log)
    node = cluster.owner(base_of(tenant, sid))
    home = cluster.owner(identity_key("cowhand"))
    if node is home:
        sid = next(s for s in everywhere(tenant) if cluster.owner(base_of(tenant, s)) is not home)
        await make.start(log, sid=sid)
        node = cluster.owner(base_of(tenant, sid))
    node.flush()
    with pytest.raises(StoreMismatch):
        await log.get_session(sid)
    async with as_user(cluster, "gateway") as other:
        with pytest.raises(StoreMismatch, match=r"partition \d+ of the store is empty"):
            await other.session_log().get_session(sid)
        elsewhere = next(s for s in everywhere(tenant) if cluster.owner(base_of(tenant, s)) is home)
        await make.start(other.session_log(), sid=elsewhere)


async def test_an_emptied_home_is_not_given_a_new_identity(cluster, roles, monkeypatch):
    """Partitions that were marked before show that the store is not new; only the operator, which keeps it, may say."""
    monkeypatch.setattr(link_module, "RETRY_SECONDS", 0.3)
    cluster.owner(identity_key("cowhand")).flush()
    async with as_user(cluster, "gateway") as other:
        with pytest.raises((StoreUnavailable, StoreMismatch)):
            await other.check()


async def test_the_wrong_kind_of_url_is_refused_with_the_right_one(cluster):
    node = cluster.nodes[0]
    plain = StoreConfig(f"redis://127.0.0.1:{node.port}/0")
    async with connect(plain, namespace=NS) as store:
        elsewhere = next(s for s in everywhere(store) if cluster.owner(base_of(store, s)) != node)
        with pytest.raises(UserError, match=r"redis\+cluster://"):
            await make.start(store.session_log(), sid=elsewhere)
        with pytest.raises(UserError, match=r"redis\+cluster://"):
            await store.require_durability()
    single = Server().start()
    try:
        async with connect(StoreConfig(f"redis+cluster://127.0.0.1:{single.port}")) as store:
            with pytest.raises(UserError, match="is no cluster"):
                await store.check()
    finally:
        single.stop()


@pytest.mark.skipif(os.environ.get("COWHAND_CHAOS", "") != "all", reason="10 s: make soak")
async def test_a_replica_takes_over_and_nothing_acknowledged_is_missing():
    """Profile standard: a primary dies in the middle of appends, its replica is made primary by the others."""
    cluster = Cluster(replicas=1)
    try:
        await asyncio.to_thread(cluster.start)
        config = StoreConfig(cluster.url, profile="standard")
        async with connect(config, namespace=NS) as store:
            await store.require_durability()
            assert store.durability.verdict is not None
            assert (store.durability.verdict.effective, store.durability.verdict.faults) == (
                "standard",
                (),
            )
            log, worker = store.session_log(), store.worker_log("pod-1")
            sid = await make.start(log)
            await worker.beat()
            lease = await make.take(worker, sid)
            acknowledged = []
            for number in range(20):
                await worker.append(lease, [make.result(f"before {number}")])
                await worker.barrier(lease)
                acknowledged.append(f"before {number}")
            dead = cluster.owner(base_of(store, sid))
            await asyncio.to_thread(dead.kill)
            # The new primary has no replica: what waits for one does not pass, and says so.
            weaker = StoreConfig(cluster.url, profile="standard", allow_weaker=True)
            async with asyncio.timeout(60), connect(weaker, namespace=NS) as other:
                there: list[str] = []
                while not there:
                    with contextlib.suppress(StoreUnavailable):
                        events = await other.session_log().get_events(sid)
                        there = [str(event.data.get("content")) for event in events]
                assert [text for text in there if text.startswith("before")] == acknowledged
                while True:
                    with contextlib.suppress(StoreUnavailable):
                        await other.session_log().emit_event(sid, make.message("msg:1"))
                        break
                while True:
                    with contextlib.suppress(StoreUnavailable):
                        await worker.append(lease, [make.result("after")])
                        break
            assert cluster.owner(base_of(store, sid)) in cluster.replicas
            link_seconds = asyncio.timeout(1)
            with pytest.raises((StoreUnavailable, TimeoutError)):
                async with link_seconds:
                    await worker.barrier(lease)
    finally:
        cluster.stop()
