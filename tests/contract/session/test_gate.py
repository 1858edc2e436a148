"""The rate gate on a real store: who goes, who waits, in which order, and what opens it."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from cowhand.session import gate as gate_module
from cowhand.session.gate import Entry, RedisRateGate

WORK = ("workspace-1", "model-1")


@pytest.fixture
def gate(log_roles) -> RedisRateGate:
    return log_roles.store.rate_gate()


@pytest.fixture
def elsewhere(log_roles) -> RedisRateGate:
    """Another worker's."""
    return log_roles.store.rate_gate()


async def now_ms(roles) -> int:
    seconds, micros = await roles.store.reads.call("TIME")
    return int(seconds) * 1000 + int(micros) // 1000


async def shut(gate: RedisRateGate, entry: Entry, after: float | None = 60.0) -> None:
    await gate.shut(*WORK, entry, kind="rate_limit_error", retry_after_s=after)


async def until(roles, gate: RedisRateGate) -> int:
    return int(await roles.store.reads.call("HGET", gate.key(*WORK)[1], "until"))


async def test_a_gate_that_nothing_has_shut_is_open_and_writes_nothing(log_roles, gate):
    assert await gate.enter(*WORK) == Entry()
    assert not await log_roles.store.reads.call("EXISTS", gate.key(*WORK)[1])


async def test_a_refusal_shuts_it_for_every_worker_of_the_tenant(log_roles, gate, elsewhere):
    before = await now_ms(log_roles)
    await shut(gate, await gate.enter(*WORK))
    entry = await elsewhere.enter(*WORK)
    assert before + 60_000 <= entry.place <= await now_ms(log_roles) + 66_000
    assert (entry.round, entry.kind) == (1, "rate_limit_error")
    for other in (("workspace-2", "model-1"), ("workspace-1", "model-2")):
        assert await elsewhere.enter(*other) == Entry(), "another line"
    assert await log_roles.store.rate_gate("team-b").enter(*WORK) == Entry()


async def test_each_gets_a_place_in_the_order_of_coming_and_keeps_it(gate, elsewhere):
    await shut(gate, await gate.enter(*WORK))
    places = [(await one.enter(*WORK)).place for one in (gate, elsewhere, gate)]
    first = places[0]
    assert places == [first, first + gate_module.GAP_MS, first + 2 * gate_module.GAP_MS]
    assert (await gate.enter(*WORK, place=places[1])).place == places[1]


async def test_the_line_is_not_endless(gate, monkeypatch):
    monkeypatch.setattr(gate_module, "RAMP_MS", 500)
    await shut(gate, await gate.enter(*WORK))
    places = [(await gate.enter(*WORK)).place for _ in range(8)]
    assert places[-1] == places[-2] == places[0] + 500


async def test_after_the_pause_one_goes_first_and_its_answer_opens_the_gate(gate, elsewhere):
    await shut(gate, await gate.enter(*WORK), after=0)
    probe = await gate.enter(*WORK)
    assert (probe.place, probe.tell, probe.round) == (0, True, 1)
    waiting = [await elsewhere.enter(*WORK) for _ in range(3)]
    assert all(entry.place for entry in waiting), "only one at a time"
    await gate.opened(*WORK, probe)
    assert (await elsewhere.enter(*WORK, place=waiting[0].place)).place == waiting[0].place
    assert (await elsewhere.enter(*WORK, place=1)).tell, "whose place has come goes"
    assert (await gate.enter(*WORK)).place > waiting[2].place, "who comes now stands behind"


async def test_what_is_answered_makes_the_line_faster_until_it_is_gone(gate):
    await shut(gate, await gate.enter(*WORK), after=0)
    probe = await gate.enter(*WORK)
    await gate.enter(*WORK)
    await gate.opened(*WORK, probe)
    places = []
    for _ in range(10):
        places.append((await gate.enter(*WORK)).place)
        await gate.opened(*WORK, probe)
    gaps = [later - sooner for sooner, later in itertools.pairwise(places)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] == gate_module.GAP_MS
    assert gaps[-1] == 0


async def test_a_first_request_that_is_never_answered_is_followed_by_another(gate, monkeypatch):
    monkeypatch.setattr(gate_module, "PROBE_MS", 0)
    await shut(gate, await gate.enter(*WORK), after=0)
    assert (await gate.enter(*WORK)).tell
    assert (await gate.enter(*WORK)).tell


async def test_answers_to_older_requests_do_not_open_it(gate):
    old = await gate.enter(*WORK)
    await shut(gate, old)
    await gate.opened(*WORK, old)
    assert (await gate.enter(*WORK)).place


async def test_many_refusals_at_once_count_as_one_and_only_lengthen(log_roles, gate):
    old = await gate.enter(*WORK)
    await shut(gate, old, after=None)
    first = await until(log_roles, gate)
    await asyncio.gather(*(shut(gate, old, after=None) for _ in range(20)))
    assert await until(log_roles, gate) == first
    await shut(gate, old, after=0.001)
    assert await until(log_roles, gate) == first, "nobody makes it shorter"
    await shut(gate, old, after=300)
    assert await until(log_roles, gate) > first + 200_000


async def test_pauses_without_a_named_time_double_and_end(log_roles, gate, monkeypatch):
    monkeypatch.setattr(gate_module, "JITTER", 0)
    spans = []
    for number in range(8):
        before = await now_ms(log_roles)
        await shut(gate, Entry(round=number), after=None)
        spans.append(round((await until(log_roles, gate) - before) / 1000))
    assert spans == [1, 2, 4, 8, 16, 32, 60, 60]


async def test_a_gate_is_forgotten_some_time_after_it_opens(log_roles, gate):
    await shut(gate, await gate.enter(*WORK), after=3600)
    left = await log_roles.store.reads.call("PTTL", gate.key(*WORK)[1])
    assert gate_module.LONGEST_MS < left <= 2.2 * gate_module.LONGEST_MS
