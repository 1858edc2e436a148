"""Slots of a model workspace on a real store: whose turn it is, and what becomes of those who are gone."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from cowhand.errors import Denied
from cowhand.session import scripts as lua
from cowhand.session import slots as slots_module
from cowhand.session.acl import CONTROL_USERS, users_acl
from cowhand.session.keys import slots as slots_key
from cowhand.session.log import StoreConfig
from cowhand.session.slots import Asked, ModelSlots
from cowhand.session.store import Store
from support.store import Store as Server

POOL = "ab" * 32
FAIR = "total + before(mine) >= limit"


@pytest.fixture
def slots(log_roles: Any) -> ModelSlots:
    found: ModelSlots = log_roles.store.model_slots()
    return found


@dataclass
class Tenant:
    """A proxy of one tenant with a line of requests; `order` gets the tenant's name for each that is let through."""

    slots: ModelSlots
    namespace: str
    waiting: int
    order: list[str]
    limit: int = 4
    weight: float = 1.0
    held: list[str] = field(default_factory=list)
    made: int = 0

    async def ask(self, *, end: int = 0, pause_ms: int = 0) -> int:
        """Report the oldest `end` requests as done, ask for all that wait; answers how many went."""
        done, self.held = self.held[:end], self.held[end:]
        count = min(16, self.waiting)
        wanted = [f"{self.made + n}" for n in range(count)]
        asked = Asked(self.namespace, self.waiting, wanted, tuple(self.held), tuple(done), pause_ms)
        answer = await self.slots.ask(
            POOL, f"team-{self.namespace}", asked, limit=self.limit, weight=self.weight
        )
        self.made += len(answer.granted)
        self.waiting -= len(answer.granted)
        self.held += answer.granted
        self.order += self.namespace * len(answer.granted)
        return len(answer.granted)


async def until(done: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while True:
            if await done():
                return
            await asyncio.sleep(0.01)


async def others_before(slots: ModelSlots) -> int:
    """How many of the 200 requests of `a` are let through after `b` has come with one, and before it."""
    order: list[str] = []
    a, b = Tenant(slots, "a", 200, order), Tenant(slots, "b", 1, order)
    await a.ask()
    assert order == ["a"] * 4, "all that there are, while nobody else wants any"
    await b.ask()
    came = len(order)
    while "b" not in order:
        await a.ask(end=1)  # always the first to know of a free slot
        await b.ask()
    return order.index("b") - came


async def test_one_request_among_two_hundred_of_another_tenant_is_next(slots: ModelSlots) -> None:
    assert await others_before(slots) == 0


@pytest.fixture
def unfair(store_url: str) -> Iterator[Store]:
    """A store whose script does not look at the others' turns."""
    scripts = lua.load()
    source = scripts["slots"].source
    assert source.count(FAIR) == 1
    scripts["slots"] = lua.Script("slots", source.replace(FAIR, "total >= limit"))
    return Store(StoreConfig(store_url), "team-a", scripts=scripts)


async def test_control_without_turns_it_waits_for_all_of_them(unfair: Store) -> None:
    async with unfair as store:
        assert await others_before(store.model_slots()) == 196


async def run(*tenants: Tenant, rounds: int) -> None:
    """Each request lasts until the tenant has asked as often as there are slots; the first tenant asks first."""
    for _ in range(rounds):
        for tenant in tenants:
            await tenant.ask(end=1)


async def test_tenants_that_wait_get_turns_by_weight(slots: ModelSlots) -> None:
    order: list[str] = []
    a = Tenant(slots, "a", 1000, order, weight=1)
    b = Tenant(slots, "b", 1000, order, weight=3)
    await a.ask()
    await run(a, b, rounds=60)
    assert len(order) > 60
    assert 2.5 < order[10:].count("b") / order[10:].count("a") < 3.5


async def test_with_one_slot_they_take_turns(slots: ModelSlots) -> None:
    order: list[str] = []
    a, b = (Tenant(slots, name, 100, order, limit=1) for name in "ab")
    await run(a, b, rounds=10)
    turns = "".join(order)
    assert len(turns) > 5
    for end in range(1, len(turns) + 1):
        assert abs(turns[:end].count("a") - turns[:end].count("b")) <= 1, turns


async def test_waiting_long_ago_earns_no_more_than_the_next_turn(slots: ModelSlots) -> None:
    order: list[str] = []
    a, b = (Tenant(slots, name, 30, order, limit=1) for name in "ab")
    for _ in range(20):
        await a.ask(end=1)
    await run(a, b, rounds=8)
    late = order[order.index("b") :]
    assert "bbb" not in "".join(late), "b does not catch up on what it did not ask for"


async def test_slots_that_nobody_else_can_use_are_not_kept_free(slots: ModelSlots) -> None:
    order: list[str] = []
    a, b = Tenant(slots, "a", 10, order, limit=1), Tenant(slots, "b", 1, order, limit=1)
    await a.ask()
    await b.ask()
    a.limit = b.limit = 4
    await a.ask()
    assert order == ["a"] * 3, "one is kept for the one request of b"
    await b.ask()
    assert order == ["a"] * 3 + ["b"]


async def test_a_proxy_that_stops_asking_keeps_nobodys_turn(
    slots: ModelSlots, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    a, b = Tenant(slots, "a", 10, order, limit=1), Tenant(slots, "b", 1, order, limit=1)
    await a.ask()
    monkeypatch.setattr(slots_module, "WANT_MS", 3_000)
    await b.ask()
    assert await a.ask(end=1) == 0, "the turn of b"
    await until(a.ask)
    assert order == ["a", "a"]


async def test_slots_of_a_proxy_that_died_come_back(
    slots: ModelSlots, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    dead, b = Tenant(slots, "a", 4, order), Tenant(slots, "b", 1, order)
    monkeypatch.setattr(slots_module, "HOLD_MS", 3_000)
    await dead.ask()
    assert await b.ask() == 0
    await until(b.ask)
    await dead.ask()
    monkeypatch.setattr(slots_module, "HOLD_MS", 60_000)
    assert len(dead.held) == 4, "requests that still run are counted again, beyond the limit"
    c = Tenant(slots, "c", 1, order)
    assert await c.ask() == 0
    await dead.ask(end=2)
    assert await c.ask() == 1


async def test_a_question_whose_answer_was_lost_is_repeated_with_the_same_result(
    slots: ModelSlots,
) -> None:
    asked = Asked("p", 3, ("1", "2", "3"))
    first = await slots.ask(POOL, "team-a", asked, limit=2, weight=1)
    assert first.granted == ("1", "2")
    assert await slots.ask(POOL, "team-a", asked, limit=2, weight=1) == first
    ended = Asked("p", 1, ("3",), ("2",), ("1",))
    assert (await slots.ask(POOL, "team-a", ended, limit=2, weight=1)).granted == ("3",)
    again = Asked("p", 1, ("4",), ("2", "3"), ("1",))
    assert (await slots.ask(POOL, "team-a", again, limit=2, weight=1)).granted == ()


async def test_when_the_endpoint_has_nothing_left_nobody_gets_a_slot(slots: ModelSlots) -> None:
    order: list[str] = []
    a, b = Tenant(slots, "a", 10, order), Tenant(slots, "b", 10, order)
    await a.ask(pause_ms=3_000)
    assert await b.ask() == 0
    answer = await slots.ask(POOL, "team-c", Asked("c", 1, ("1",)), limit=4, weight=1)
    assert 0 < answer.pause_ms <= 3_000
    await until(b.ask)


async def test_workspaces_do_not_know_each_other(slots: ModelSlots) -> None:
    for pool in (POOL, "cd" * 32):
        answer = await slots.ask(pool, "team-a", Asked("p", 1, ("1",)), limit=1, weight=1)
        assert answer.granted == ("1",)


async def test_no_tenants_login_reaches_the_slots_and_the_brokers_does() -> None:
    users = (*CONTROL_USERS, "t-team-a")
    hashed = {user: hashlib.sha256(f"pw-{user}".encode()).hexdigest() for user in users}
    server = Server(acl=users_acl(hashed, ["team-a"])).start()
    asked = Asked("p", 1, ("1",))

    def as_user(user: str) -> Store:
        return Store(StoreConfig(server.url, username=user, password=f"pw-{user}"), "team-a")

    try:
        async with as_user("broker") as control, as_user("t-team-a") as tenant:
            control.keep_scripts()
            answer = await control.model_slots().ask(POOL, "team-a", asked, limit=1, weight=1)
            assert answer.granted == ("1",)
            key = slots_key("cowhand", POOL, control.config.partitions)
            assert 0 < await control.reads.call("PTTL", key) <= 600_000
            with pytest.raises(Denied):
                await tenant.model_slots().ask(POOL, "team-b", asked, limit=9, weight=1)
            for command in (("HGETALL", key), ("DEL", key), ("HSET", key, "u:", "9")):
                with pytest.raises(Denied):
                    await tenant.writes.call(*command)
    finally:
        server.stop()
