"""Scripts are loaded by the control plane alone, and stay loaded for tenants of two releases."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Iterator

import pytest

from cowhand.errors import Denied, StoreUnavailable
from cowhand.session import connect
from cowhand.session import link as link_module
from cowhand.session import scripts as lua
from cowhand.session.acl import CONTROL_USERS, users_acl
from cowhand.session.keeper import KEEP_MS, ScriptKeeper
from cowhand.session.log import StoreConfig
from cowhand.session.store import Store
from support import sessions as make
from support.store import Store as Server

USERS = (*CONTROL_USERS, "t-team-a")


@pytest.fixture
def guarded() -> Iterator[Server]:
    hashed = {user: hashlib.sha256(f"pw-{user}".encode()).hexdigest() for user in USERS}
    one = Server(acl=users_acl(hashed, ["team-a"])).start()
    yield one
    one.stop()


def as_user(server: Server, user: str, scripts: dict[str, lua.Script] | None = None) -> Store:
    return Store(StoreConfig(server.url, username=user, password=f"pw-{user}"), "team-a", scripts)


def release(mark: str) -> dict[str, lua.Script]:
    """The scripts of another release: the same, but with other digests."""
    return {name: lua.Script(name, f"-- {mark}\n{s.source}") for name, s in lua.load().items()}


async def test_a_tenant_runs_what_the_control_plane_loaded_and_waits_for_it(guarded, monkeypatch):
    async with as_user(guarded, "operator") as control, as_user(guarded, "t-team-a") as tenant:
        await control.check()
        monkeypatch.setattr(link_module, "RETRY_SECONDS", 0.0)
        worker = tenant.worker_log("pod-1")
        with pytest.raises(StoreUnavailable, match="operator, broker or gateway"):
            await worker.beat()
        with pytest.raises(Denied, match="ACL"):
            await tenant.reads.call("SCRIPT", "LOAD", "return 1")
        monkeypatch.setattr(link_module, "RETRY_SECONDS", 60.0)
        beating = asyncio.create_task(worker.beat())
        control.keep_scripts()
        await asyncio.wait_for(beating, 60)


async def test_a_restarted_store_knows_them_again_without_anybody_asking(guarded, monkeypatch):
    monkeypatch.setattr("cowhand.session.keeper.LOOK_SECONDS", 0.02)
    monkeypatch.setattr(link_module, "RETRY_SECONDS", 60.0)
    async with as_user(guarded, "gateway") as control, as_user(guarded, "t-team-a") as tenant:
        control.keep_scripts()
        worker = tenant.worker_log("pod-1")
        await worker.beat()
        await asyncio.to_thread(guarded.restart)
        await asyncio.wait_for(worker.beat(), 60)


async def test_control_without_the_keeper_the_tenant_stays_shut_out(guarded, monkeypatch):
    async with as_user(guarded, "gateway") as control, as_user(guarded, "t-team-a") as tenant:
        await ScriptKeeper(control, lua.load()).look()
        await tenant.worker_log("pod-1").beat()
        await asyncio.to_thread(guarded.restart)
        monkeypatch.setattr(link_module, "RETRY_SECONDS", 0.3)
        with pytest.raises(StoreUnavailable, match="does not know this release's scripts"):
            await tenant.worker_log("pod-1").beat()


async def test_in_an_upgrade_both_releases_find_their_scripts_after_a_restart(guarded):
    old, new = release("N-1"), release("N")
    async with (
        as_user(guarded, "operator", old) as before,
        as_user(guarded, "operator", new) as after,
        as_user(guarded, "t-team-a", old) as old_harness,
        as_user(guarded, "t-team-a", new) as new_harness,
    ):
        assert await ScriptKeeper(before, old).look() == len(old)
        keeper = ScriptKeeper(after, new)
        assert await keeper.look() == len(new)
        await asyncio.to_thread(guarded.restart)
        # The control plane of the old release is gone by now.
        with contextlib.suppress(StoreUnavailable):
            assert await keeper.look() == len(old) + len(new)
        for harness in (old_harness, new_harness):
            worker = harness.worker_log("pod-1")
            await worker.beat()
        sid = await make.start(after.session_log())
        assert await make.take(worker, sid)


async def test_scripts_of_long_ago_are_forgotten_and_ones_in_use_never(guarded):
    old, new = release("N-9"), release("N")
    async with as_user(guarded, "operator", old) as store:
        await ScriptKeeper(store, old).look()
        for sha in (script.sha for script in [*old.values(), *new.values()]):
            await store.writes.call("ZADD", "cowhand:scripts-noted", 1, sha)
    async with as_user(guarded, "operator", new) as store:
        await ScriptKeeper(store, new).look()
        known = {sha.decode() for sha in await store.reads.call("HKEYS", "cowhand:scripts")}
        assert known == {script.sha for script in new.values()}
        assert await store.reads.call("ZCARD", "cowhand:scripts-noted") == len(new)
    assert KEEP_MS > 86_400_000


async def test_a_tenant_named_like_our_keys_does_not_reach_them():
    """Keys of the control plane have no colon behind their name: no tenant's pattern covers them."""
    names = ["scripts", "scripts-noted", "gen", "quota"]
    users = (*CONTROL_USERS, *(f"t-{name}" for name in names))
    hashed = {user: hashlib.sha256(f"pw-{user}".encode()).hexdigest() for user in users}
    server = Server(acl=users_acl(hashed, names)).start()
    try:
        async with as_user(server, "operator") as control:
            await ScriptKeeper(control, lua.load()).look()
        for name in names:
            config = StoreConfig(server.url, username=f"t-{name}", password=f"pw-t-{name}")
            async with connect(config, namespace=name) as store:
                for key in ("cowhand:scripts", "cowhand:scripts-noted"):
                    with pytest.raises(Denied):
                        await store.writes.call("DEL", key)
    finally:
        server.stop()
