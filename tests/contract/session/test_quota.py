"""Quotas: a tenant that has no room left does not stop the others, and can get out."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest

from cowhand.controller.quotas import QuotaController
from cowhand.errors import Denied, Fenced, QuotaExceeded, StoreUnavailable
from cowhand.session import events as ev
from cowhand.session import scripts as lua
from cowhand.session.acl import CONTROL_USERS, users_acl
from cowhand.session.events import NewEvent
from cowhand.session.log import StoreConfig
from cowhand.session.store import Store
from support import sessions as make
from support.store import Store as Server

TENANTS = ("team-a", "team-b")
LIMIT = 200_000


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    users = (*CONTROL_USERS, *(f"t-{name}" for name in TENANTS))
    hashed = {user: hashlib.sha256(f"pw-{user}".encode()).hexdigest() for user in users}
    one = Server(acl=users_acl(hashed, TENANTS)).start()
    yield one
    one.stop()


def as_user(server: Server, user: str, scripts: dict[str, lua.Script] | None = None) -> Store:
    config = StoreConfig(server.url, username=user, password=f"pw-{user}")
    return Store(config, user.removeprefix("t-"), scripts)


@pytest.fixture
async def control(server: Server) -> AsyncIterator[Store]:
    async with as_user(server, "operator") as store:
        store.keep_scripts()
        yield store
        for key in (await store.reads.call("SCAN", 0, "MATCH", "*", "COUNT", 10000))[1]:
            await store.writes.call("DEL", key)


@pytest.fixture
async def tenants(server: Server, control: Store) -> AsyncIterator[tuple[Store, Store]]:
    async with as_user(server, "t-team-a") as first, as_user(server, "t-team-b") as second:
        yield first, second


def big(number: int, size: int = 20_000) -> NewEvent:
    return make.message(f"m{number}", "x" * size)


async def fill(store: Store, sid: str, first: int = 0) -> int:
    """Messages until the store refuses one; answers how many it took."""
    for number in range(1000):
        try:
            await store.session_log().emit_event(sid, big(first + number))
        except QuotaExceeded:
            return number
    raise AssertionError("no quota")


async def measure(control: Store, limit: int | None = LIMIT) -> None:
    await QuotaController(control.control_log(), TENANTS, 0 if limit is None else limit).step()


async def test_one_tenant_is_full_and_the_other_goes_on(control, tenants):
    first, second = tenants
    await measure(control)
    mine = await make.start(first.session_log())
    theirs = await make.start(second.session_log(), namespace="team-b")
    # Counted by the scripts, without another measurement.
    assert 5 <= await fill(first, mine) <= 11
    assert await second.session_log().emit_event(theirs, big(1)) == 3
    # The measurement says the same, in every partition.
    await measure(control)
    assert await fill(first, mine, 100) <= 2
    told = r"team-a uses \d+ of the 200000 bytes.*tenantQuota"
    with pytest.raises(QuotaExceeded, match=told) as caught:
        await first.session_log().emit_event(mine, big(999))
    assert caught.value.limit == LIMIT
    assert LIMIT * 0.7 < caught.value.used < LIMIT * 1.2
    used, limit = await control.control_log().get_quota("team-a")
    assert limit == LIMIT
    assert used > LIMIT * 0.7
    assert await second.session_log().emit_event(theirs, big(2)) == 4
    await measure(control, LIMIT // 2)
    with pytest.raises(QuotaExceeded):
        await make.start(first.session_log())
    await make.start(second.session_log(), namespace="team-b")


async def test_control_without_the_check_in_the_scripts_nobody_is_refused(server, control):
    without = {
        name: replace(script, source=script.source.replace("if full then return full end", ""))
        for name, script in lua.load().items()
    }
    assert without["ingest"].sha != lua.load()["ingest"].sha
    await measure(control)
    async with as_user(server, "operator", without) as store:
        log = store.session_log("team-a")
        sid = await make.start(log)
        for number in range(15):
            await log.emit_event(sid, big(number))


async def test_a_full_tenant_can_stop_answer_and_delete_and_then_goes_on(control, tenants):
    first, _ = tenants
    await measure(control)
    log, worker = first.session_log(), first.worker_log("pod-1")
    sid, other = await make.start(log), await make.start(log)
    await worker.beat()
    lease = await make.take(worker, sid)
    await fill(first, other)
    await measure(control)
    answer = {"tool_use_id": "toolu_1", "result": "deny", "actor": {}}
    for event in (
        NewEvent(ev.USER_INTERRUPT, {"actor": {}}, id="stop"),
        NewEvent(ev.USER_TOOL_CONFIRMATION, answer, id="confirm:toolu_1"),
    ):
        await log.emit_event(sid, event)
    # A turn that runs may end: a worker has an eighth on top.
    await worker.append(lease, [make.result("y" * 10_000)], status={"turns": 1})
    with contextlib.suppress(QuotaExceeded):
        for _ in range(10):
            await worker.append(lease, [make.result("y" * 10_000)])
    with pytest.raises(QuotaExceeded):
        await worker.append(lease, [make.result("y" * 10_000)])
    await control.control_log().set_mode("team-a", sid, "suspended", make.suspended())
    for one in (sid, other):
        await control.control_log().close("team-a", one, make.deleted(), retain_s=0)
    await measure(control)
    await make.start(log)
    with pytest.raises(Fenced):
        await worker.append(lease, [make.result()])


async def test_a_refused_append_is_written_once_when_there_is_room(control, tenants):
    first, _ = tenants
    log, worker = first.session_log(), first.worker_log("pod-1")
    sid = await make.start(log)
    await worker.beat()
    lease = await make.take(worker, sid)
    await measure(control, limit=1)
    for _ in range(2):
        with pytest.raises(StoreUnavailable) as caught:
            await worker.append(lease, [make.result("late")])
        assert caught.value.after == 10
    await measure(control, limit=None)
    await worker.append(lease, [make.result("late")])
    await worker.append(lease, [make.result("later")])
    texts = [event.data.get("content") for event in await log.get_events(sid, 4)]
    assert texts == ["late", "later"]


async def test_a_tenant_can_neither_raise_nor_remove_its_quota(control, tenants):
    first, second = tenants
    await measure(control)
    key = first.keys().quotas()[3]
    assert await first.reads.call("GET", key)
    for command in (("SET", key, "1 9 9 0"), ("DEL", key), ("EXPIRE", key, 1)):
        with pytest.raises(Denied):
            await first.writes.call(*command)
    with pytest.raises(Denied):
        await second.reads.call("GET", key)


async def test_a_forged_counter_is_found_out_by_the_next_measurement(control, tenants):
    first, _ = tenants
    await measure(control)
    sid = await make.start(first.session_log())
    await fill(first, sid)
    (raw,) = {await first.reads.call("GET", key) for key in first.keys().quotas()}
    grown = f"{first.keys().base_of(sid)}grown:{raw.split()[0].decode()}"
    for forged in ("0", "-99999999", "rubbish"):
        await first.writes.call("SET", grown, forged)
        await first.session_log().emit_event(sid, big(500 + len(forged)))
    await measure(control)
    with pytest.raises(QuotaExceeded):
        await first.session_log().emit_event(sid, big(600))


async def test_what_a_tenant_writes_past_the_scripts_is_measured_too(control, tenants):
    first, _ = tenants
    await first.writes.call("SET", "cowhand:team-a:mine", "z" * LIMIT)
    await measure(control)
    with pytest.raises(QuotaExceeded):
        await make.start(first.session_log())
    await first.writes.call("DEL", "cowhand:team-a:mine")


async def test_no_quota_no_limit_and_an_old_one_does_not_bind(control, tenants):
    first, _ = tenants
    await measure(control)
    await measure(control, limit=None)
    sid = await make.start(first.session_log())
    for number in range(15):
        await first.session_log().emit_event(sid, big(number))
    assert await control.control_log().get_quota("team-a") is None
    await measure(control)
    ttl = await control.reads.call("PTTL", first.keys().quotas()[0])
    assert 0 < ttl <= 600_000


async def test_the_share_follows_the_memory_of_the_store(control):
    usage = await control.control_log().store_usage(TENANTS)
    assert (usage.max_bytes, set(usage.tenants)) == (0, set(TENANTS))
    assert usage.used_bytes > 100_000
