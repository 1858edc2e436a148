"""Leader election with two replicas, one API and a clock by hand."""

from __future__ import annotations

import pytest

from cowhand.controller.leader import LEASE_NAME, Elector, LeadershipLost
from cowhand.kube import kinds
from cowhand.kube.errors import Conflict, KubeUnavailable
from support.memory_kube import MemoryKube


class Two:
    def __init__(self) -> None:
        self.kube = MemoryKube()
        self.now = 1000.0
        self.a = self.replica("a")
        self.b = self.replica("b")

    def replica(self, name: str) -> Elector:
        return Elector(self.kube, "sys", name, 30.0, clock=lambda: self.now)

    async def holder(self) -> str:
        lease = await self.kube.get(kinds.LEASE, "sys", LEASE_NAME)
        assert lease is not None
        name: str = lease["spec"]["holderIdentity"]
        return name


@pytest.fixture
def two() -> Two:
    return Two()


async def test_one_leads_and_the_other_waits(two: Two) -> None:
    assert await two.a.step()
    assert not await two.b.step()
    for _ in range(20):
        two.now += 5
        assert await two.a.step()
        assert not await two.b.step()
    assert await two.holder() == "a"


async def test_a_dead_leader_is_followed_after_the_duration_and_never_before(two: Two) -> None:
    await two.a.step()
    await two.b.step()
    two.now += 29
    assert not await two.b.step()
    assert not two.a.leading()  # it stopped by itself after two thirds
    two.now += 1
    assert await two.b.step()
    assert await two.holder() == "b"


async def test_never_two_at_once(two: Two) -> None:
    await two.a.step()
    for _ in range(60):
        two.now += 1
        await two.b.step()
        assert not (two.a.leading() and two.b.leading())
    assert two.b.leading()


async def test_the_old_leader_learns_that_it_lost(two: Two) -> None:
    await two.a.step()
    await two.b.step()
    two.now += 31
    await two.b.step()
    with pytest.raises(LeadershipLost):
        await two.a.step()
    assert not two.a.leading()


async def test_a_short_outage_costs_nothing_a_long_one_the_lead(two: Two) -> None:
    await two.a.step()
    two.kube.fail("get", kinds.LEASE, KubeUnavailable("no answer"), times=99)
    two.now += 10
    assert await two.a.step()
    two.now += 10
    assert not await two.a.step()


async def test_losing_the_race_for_a_free_lease_is_no_lead(two: Two) -> None:
    await two.a.step()
    await two.a.release()
    two.kube.fail("patch", kinds.LEASE, Conflict("somebody was faster"))
    assert not await two.b.step()


async def test_a_released_lease_is_taken_at_once(two: Two) -> None:
    await two.a.step()
    await two.b.step()
    await two.a.release()
    assert not two.a.leading()
    assert await two.b.step()
    lease = await two.kube.get(kinds.LEASE, "sys", LEASE_NAME)
    assert lease is not None
    assert lease["spec"]["leaseTransitions"] == 1


async def test_release_leaves_the_lease_of_another_alone(two: Two) -> None:
    await two.a.step()
    await two.b.step()
    two.now += 31
    await two.b.step()
    await two.a.release()
    assert await two.holder() == "b"
