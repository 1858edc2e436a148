"""What the store keeps, on the objects: the condition of each session, and Events on the operator's Deployment."""

from __future__ import annotations

import logging
from typing import Any

from cowhand.controller.store_profile import DEPLOYMENT, StoreProfileWatch
from cowhand.kube import kinds
from cowhand.kube.errors import Forbidden, KubeUnavailable
from cowhand.session.durability import Verdict
from support.operator_rig import NS, Rig, session

SYSTEM = "cowhand-system"
GOOD = Verdict("standard", "standard", "Valkey 8.0")
WEAK = Verdict("standard", "dev", "Valkey 8.0", ("0 of 1 replicas are in step with it",))


class Watched:
    """A rig whose operator watches `verdict`."""

    def __init__(self) -> None:
        self.verdict: Verdict | None = GOOD
        self.rig = Rig(store=lambda: self.watch.profile())
        self.watch = StoreProfileWatch(
            lambda: self.verdict, self.rig.kube, SYSTEM, "pod-1", clock=lambda: self.rig.now
        )
        self.watch.changed = self.rig.operator.refresh_sessions

    async def becomes(self, verdict: Verdict | None) -> None:
        self.verdict = verdict
        await self.watch.look()
        self.rig.later(seconds=61)
        await self.watch.look()

    def events(self) -> list[dict[str, Any]]:
        return self.rig.kube.all(kinds.EVENT)

    async def condition(self, name: str) -> tuple[str, str] | None:
        return await self.rig.condition(kinds.AGENT_SESSION, name, "StoreDurable")


def deployment() -> dict[str, Any]:
    meta = {"namespace": SYSTEM, "name": DEPLOYMENT}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta}


async def test_a_change_is_one_write_to_each_session_and_one_event():
    test = Watched()
    rig = test.rig
    about = rig.kube.put(deployment())
    await test.watch.look()
    for name in ("one", "two", "three"):
        await rig.kube.create(session(name))
    await rig.settle(horizon_s=1)
    assert await test.condition("two") == ("True", "Standard")
    before = rig.kube.writes["apply", "agentsessions"]
    await test.becomes(WEAK)
    await rig.settle(horizon_s=1)
    assert [await test.condition(n) for n in ("one", "two", "three")] == [
        ("False", "WeakerThanDemanded")
    ] * 3
    assert await rig.condition(kinds.AGENT_SESSION, "one", "Ready") == ("True", "Accepted")
    assert rig.kube.writes["apply", "agentsessions"] == before + 3
    (event,) = test.events()
    assert (event["type"], event["reason"]) == ("Warning", "WeakerThanDemanded")
    assert event["involvedObject"]["uid"] == about["metadata"]["uid"]
    for name in ("one", "two", "three"):
        await rig.look(kinds.AGENT_SESSION, name)
        await test.watch.look()
    assert rig.kube.writes["apply", "agentsessions"] == before + 3, "nothing is written twice"
    assert len(test.events()) == 1
    await test.becomes(GOOD)
    await rig.settle(horizon_s=1)
    assert await test.condition("one") == ("True", "Standard")
    assert sorted(e["reason"] for e in test.events()) == ["StoreDurable", "WeakerThanDemanded"]


async def test_sessions_are_looked_at_one_after_the_other(monkeypatch):
    """Not all at once: a thousand objects would be a burst of writes."""
    test = Watched()
    rig = test.rig
    await test.watch.look()
    for index in range(45):
        await rig.kube.create(session(f"s{index:02}"))
    await rig.settle(horizon_s=1)
    asked: list[tuple[tuple[str, str], float]] = []
    monkeypatch.setattr(
        rig.operator.sessions, "add", lambda key, after=0.0: asked.append((key, after))
    )
    await test.becomes(WEAK)
    assert asked == [((NS, f"s{index:02}"), index / 20) for index in range(45)]


async def test_a_store_that_is_away_is_unknown_and_its_profile_is_not_forgotten():
    test = Watched()
    rig = test.rig
    test.verdict = WEAK
    await test.watch.look()
    await rig.kube.create(session("one"))
    await rig.settle()
    rig.log.down = True
    await rig.look(kinds.AGENT_SESSION, "one")
    assert await test.condition("one") == ("Unknown", "StoreUnavailable")
    rig.log.down = False
    rig.logs._breaker._down = None
    await rig.look(kinds.AGENT_SESSION, "one")
    assert await test.condition("one") == ("False", "WeakerThanDemanded")


async def test_before_the_first_look_nothing_is_promised():
    test = Watched()
    test.verdict = None
    await test.watch.look()
    await test.rig.kube.create(session("one"))
    await test.rig.settle()
    assert await test.condition("one") == ("Unknown", "NotObserved")
    await test.becomes(GOOD)
    await test.rig.settle(horizon_s=1)
    assert await test.condition("one") == ("True", "Standard")


async def test_an_event_waits_for_kubernetes_and_a_refused_one_stops_nothing(caplog):
    test = Watched()
    test.verdict = WEAK
    test.rig.kube.fail("create", kinds.EVENT, KubeUnavailable("away"), times=2)
    await test.watch.look()
    await test.watch.look()
    assert test.events() == []
    await test.watch.look()
    (event,) = test.events()
    assert "uid" not in event["involvedObject"], (
        "there is no Deployment: it is written all the same"
    )
    test.rig.kube.fail("create", kinds.EVENT, Forbidden("no"))
    with caplog.at_level(logging.WARNING):
        await test.becomes(GOOD)
    assert "cannot be written" in caplog.text
    assert len(test.events()) == 1
    await test.watch.look()
    assert len(test.events()) == 1, "given up"
