"""One tenant's store login writes rubbish into its own keys: the operator goes on serving the others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from cowhand.controller import operator as module
from cowhand.controller.logs import Logs
from cowhand.controller.operator import Operator
from cowhand.controller.scaling import Scaler
from cowhand.errors import StoreUnavailable
from cowhand.kube import kinds
from cowhand.session import connect
from cowhand.session.log import StoreConfig
from support.operator_rig import Rig

HOSTILE, OTHER = "team-a", "team-b"
SID = "sesn_" + "ab" * 16
BASE = "cowhand:team-a:{p00}:"


class Seen:
    """Stands for the queue of sessions; remembers what was put into line."""

    def __init__(self) -> None:
        self.keys: list[Any] = []

    def add(self, key: Any, after: float = 0.0) -> None:
        self.keys.append(key)


@pytest.fixture
async def world(store_url: str) -> AsyncIterator[tuple[Any, Operator, Seen]]:
    async with connect(StoreConfig(store_url)) as store:
        rig = Rig()
        logs = Logs(store.control_log(), store.session_log)
        operator = Operator(
            rig.kube,
            logs,
            tenants=(HOSTILE, OTHER),
            sessions=rig.session_controller,
            sandboxes=rig.sandbox_controller,
            orphans=rig.orphans,
        )
        seen = Seen()
        operator.sessions = seen  # type: ignore[assignment]
        yield store, operator, seen


async def other_is_served(store: Any, operator: Operator, seen: Seen) -> bool:
    body = {"metadata": {"namespace": OTHER, "name": "one", "uid": "ab" * 16}, "spec": {}}
    operator.seen(kinds.AGENT_SESSION, "ADDED", body)
    seen.keys.clear()
    await store.writes.call("SADD", "cowhand:team-b:{p01}:proj", SID)
    for namespace in (HOSTILE, OTHER):
        await operator.project(namespace)
        await operator._sweep(namespace)
    return (OTHER, "one") in seen.keys


@pytest.mark.parametrize(
    "commands",
    [
        [("SADD", BASE + "proj", b"\xff\xfe")],
        [("SADD", BASE + "proj", "x"), ("HSET", BASE + "s:x:m", "a", "b")],
        [("SADD", BASE + "proj", "x"), ("SET", BASE + "s:x:m", "no hash")],
        [("SET", BASE + "proj", "no set")],
        [("SET", BASE + "own", "no zset")],
        [("ZADD", BASE + "own", 1, b"\xff")],
        [("ZADD", BASE + "own", 1, "x"), ("HSET", BASE + "s:x:m", "state", "\n")],
        [("SET", BASE + "rdy", "no stream")],
        [("HSET", BASE + "s:x\xff:m", "a", "b")],
    ],
    ids=str,
)
async def test_broken_keys_of_one_tenant(
    world: tuple[Any, Operator, Seen], commands: list[tuple[Any, ...]]
) -> None:
    store = world[0]
    for command in commands:
        await store.writes.call(*command)
    assert await other_is_served(*world)


async def test_a_flood_of_projections_ends(
    world: tuple[Any, Operator, Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, operator, _ = world
    monkeypatch.setattr(module, "PROJECTION_ROUNDS", 3)
    taken: list[str] = []

    async def endless(namespace: str, limit: int = 100) -> list[str]:
        taken.append(namespace)
        assert len(taken) < 10
        return [SID]

    monkeypatch.setattr(operator._logs.control, "take_projections", endless)
    await operator.project(HOSTILE)
    assert len(taken) == 3


async def test_a_store_that_is_away_is_still_everybodys_concern(
    world: tuple[Any, Operator, Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, operator, _ = world

    async def away(namespace: str, limit: int = 100) -> list[str]:
        raise StoreUnavailable("away")

    monkeypatch.setattr(operator._logs.control, "take_projections", away)
    with pytest.raises(StoreUnavailable):
        await operator.project(OTHER)


async def test_scaling_goes_on_with_the_next_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    scaler: Scaler = rig.scaler
    scaler._tenants = (HOSTILE, OTHER)
    asked: list[str] = []

    class Enough(BaseException):
        pass

    async def step(namespace: str) -> None:
        asked.append(namespace)
        if namespace == OTHER:
            raise Enough
        raise KeyError("of the tenant's own making")

    monkeypatch.setattr(scaler, "step", step)
    with pytest.raises(Enough):
        await scaler.run()
    assert asked == [HOSTILE, OTHER]
