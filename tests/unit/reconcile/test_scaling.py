"""How many harness pods a tenant needs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from cowhand.reconcile.scaling import CALM, Demand, ScaleSettings, scale_harness

NOW = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)
SETTINGS = ScaleSettings(minimum=1, maximum=10, sessions_per_harness=50)


@pytest.mark.parametrize(
    ("demand", "current", "wanted"),
    [
        (Demand(0, 0, 0, 1), 1, 1),
        (Demand(0, 0, 0, 0), 0, 1),
        (Demand(10, 40, 100, 1), 1, 1),
        (Demand(11, 40, 100, 1), 1, 2),
        (Demand(400, 400, 100, 1), 1, 10),
        (Demand(1, 0, 5000, 1), 1, 2),
        (Demand(1, 0, 5000, 0), 1, 1),  # the pod is still starting: another would not be faster
        (Demand(1, 0, 60_000, 2), 2, 2),  # a session that nobody can help does not fill the cluster
        (Demand(0, 0, 0, 12), 12, 10),
    ],
)
def test_up_at_once_and_within_bounds(demand: Demand, current: int, wanted: int) -> None:
    assert scale_harness(demand, current, SETTINGS, NOW).replicas == wanted


def test_a_session_that_waits_for_ever_adds_one_pod_in_all() -> None:
    current = 1
    for step in range(50):
        demand = Demand(1, 0, 1_000_000, current)
        current = scale_harness(demand, current, SETTINGS, NOW + timedelta(seconds=step)).replicas
    assert current == 2


def test_down_by_one_after_a_calm_time() -> None:
    idle = Demand(0, 0, 0, 3)
    first = scale_harness(idle, 3, SETTINGS, NOW)
    assert (first.replicas, first.surplus_since) == (3, NOW)
    early = scale_harness(idle, 3, SETTINGS, NOW + CALM - timedelta(seconds=1), NOW)
    assert early.replicas == 3
    then = NOW + CALM
    second = scale_harness(idle, 3, SETTINGS, then, NOW)
    assert (second.replicas, second.surplus_since) == (2, then)
    last = scale_harness(idle, 2, SETTINGS, then + CALM, then)
    assert (last.replicas, last.surplus_since) == (1, None)


def test_work_that_comes_back_starts_the_calm_time_anew() -> None:
    since = scale_harness(Demand(0, 0, 0, 2), 2, SETTINGS, NOW).surplus_since
    busy = scale_harness(Demand(60, 40, 0, 2), 2, SETTINGS, NOW + timedelta(minutes=4), since)
    assert (busy.replicas, busy.surplus_since) == (2, None)
