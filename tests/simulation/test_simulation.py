"""Seeded histories of the real harness and the real scripts, each with other faults.

`COWHAND_SEEDS` sets how many (default 60, `make soak` runs thousands), `COWHAND_SEED` runs one alone. Many seeds are
shared out among processes. Which seeds run does not depend on how many processes there are.
"""

from __future__ import annotations

import multiprocessing
import os

import pytest

from simulation.run import FAULTY, SEEDS, Report, Runner, check_all, explain

ONE = os.environ.get("COWHAND_SEED", "")
SLICES = 8
FEW = 300
"""So many seeds are not worth the start of processes."""


def _slice(number: int) -> Report:
    scenarios = range(number, (SEEDS + FAULTY - 1) // FAULTY, SLICES)
    return check_all(seed for one in scenarios for seed in range(one * FAULTY, (one + 1) * FAULTY))


@pytest.mark.skipif(bool(ONE), reason="COWHAND_SEED names one seed")
@pytest.mark.timeout(max(900, SEEDS))
def test_no_history_loses_doubles_or_forgets_anything() -> None:
    if SEEDS <= FEW:
        reports = [_slice(number) for number in range(SLICES)]
    else:
        with multiprocessing.get_context("spawn").Pool(min(SLICES, os.cpu_count() or 1)) as pool:
            reports = pool.map(_slice, range(SLICES), chunksize=1)
    failures = {seed: found for report in reports for seed, found in report.failures.items()}
    runs = sum(report.runs for report in reports)
    kills = sum(report.kills for report in reports)
    print(f"{runs} histories, {kills} workers killed, {sum(r.steps for r in reports)} steps")
    assert not failures, "\n" + explain(failures)
    assert runs >= SEEDS
    assert kills > runs / 4, "the simulation kills too few workers to prove anything"


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
