"""Seeded histories of the real harness and the real scripts, each with other faults.

`COWHAND_SEEDS` sets how many (default 60, `make soak` runs thousands), `COWHAND_SEED` runs one alone, `COWHAND_SOAK_S`
bounds the time. Many seeds are shared out among processes; which run does not depend on how many processes there are.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable

import pytest

from simulation.run import FAULTY, SEEDS, SOAK_S, Report, Runner, check_all, explain

ONE = os.environ.get("COWHAND_SEED", "")
SLICES = 8
FEW = 300
"""So many seeds are not worth the start of processes."""


def _slice(number: int) -> Report:
    scenarios = range(number, (SEEDS + FAULTY - 1) // FAULTY, SLICES)
    seeds = (seed for one in scenarios for seed in range(one * FAULTY, (one + 1) * FAULTY))
    at_once = min(SLICES, os.cpu_count() or 1) if SEEDS > FEW else 1
    return check_all(seeds, seconds=SOAK_S * at_once / SLICES)


@pytest.mark.skipif(bool(ONE), reason="COWHAND_SEED names one seed")
@pytest.mark.timeout(max(900, SEEDS))
def test_no_history_loses_doubles_or_forgets_anything(
    record_property: Callable[[str, object], None],
) -> None:
    if SEEDS <= FEW:
        reports = [_slice(number) for number in range(SLICES)]
    else:
        with multiprocessing.get_context("spawn").Pool(min(SLICES, os.cpu_count() or 1)) as pool:
            reports = pool.map(_slice, range(SLICES), chunksize=1)
    all_of_them = sum(reports, Report({}))
    record_property("histories", all_of_them.runs)
    record_property("workers killed in them", all_of_them.kills)
    record_property("workers stopped in them", all_of_them.stops)
    record_property("connections broken in them", all_of_them.faults)
    record_property("failed histories", len(all_of_them.failures))
    assert not all_of_them.failures, "\n" + explain(all_of_them.failures)
    assert all_of_them.runs >= (SEEDS if math.isinf(SOAK_S) else min(SEEDS, FEW))
    few = "the simulation does too little to prove anything"
    assert all_of_them.kills > all_of_them.runs / 4, few
    assert all_of_them.faults > all_of_them.runs / 4, few


@pytest.mark.skipif(not ONE, reason="without COWHAND_SEED all are run")
def test_one_history() -> None:
    found = Runner().check(int(ONE or "0"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("seed", [4, 21, 38])
def test_a_seed_gives_the_same_history_again(seed: int) -> None:
    """Otherwise a failing seed could not be repeated."""

    def history() -> list[tuple[object, ...]]:
        world, _ = Runner().world(seed)
        try:
            assert not world.problems
            return [(e.seq, e.type, e.id, e.ts, e.lease, e.payload) for e in world.log()]
        finally:
            world.close()

    assert history() == history()
