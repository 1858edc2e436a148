"""Runs of simulated sessions by seed: `python -m simulation 4711` shows one of them.

A seed names a scenario (of `FAULTY` seeds in a row the same one) and what goes wrong in it: workers that are
killed before their k-th step, that stand still and come back, that drain; connections that break before or after
the store has acted; a store that restarts, loads, refuses; lost nudges; hints of the operator, right and wrong.
"""

from __future__ import annotations

import gc
import math
import os
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cowhand.session import scripts as lua
from simulation import oracle
from simulation.network import Faults
from simulation.scenario import draw
from simulation.world import REAL, Defences, World

SEEDS = int(os.environ.get("COWHAND_SEEDS", "60"))
"""How many seeds the tests run."""

SOAK_S = float(os.environ.get("COWHAND_SOAK_S", "inf"))
"""Seconds after which no new seed is begun; the summary says how many were run."""

FAULTY = 4
"""Faulty runs for each scenario: the run without faults is made once for them."""

HEALED_S = 40.0
"""After so many virtual seconds nothing new breaks."""

COMMAND = "PYTHONPATH=tests PYTHONHASHSEED=0 .venv/bin/python -m simulation"


@dataclass(frozen=True)
class Quiet:
    """A run without faults: how long it is, and what it comes to."""

    steps: int
    seconds: float
    story: dict[str, Any]
    problems: list[str]


def quiet_run(number: int, **changed: Any) -> Quiet:
    """The run of a scenario in which nothing goes wrong."""
    world = World(draw(number), number, **changed)
    try:
        world.run(workers=1)
        problems = oracle.invariants(world)
        story = {} if problems or world.scenario.chaotic else oracle.story(world)
        return Quiet(world.workers[0].steps, world.loop.time(), story, problems)
    finally:
        world.close()


class Trouble:
    """Draws what goes wrong, and lets it happen. Called with the world when its workers have started."""

    def __init__(self, seed: int, quiet: Quiet) -> None:
        self._rng = random.Random(f"trouble {seed}")
        self._quiet = quiet

    def __call__(self, world: World) -> None:
        rng = self._rng
        world.hint = rng.choice([0.0, 0.7, 1.0])
        for process in world.workers:
            self._worker(world, process)
        rate = rng.choice([0.0, 0.0, 0.01, 0.04])
        world.server.faults = Faults(
            before=rate,
            after=rate,
            silence=rate / 4,
            nudge=rng.choice([0.0, 0.3, 1.0]),
            slow=rate / 4,
        )
        world.hand_faults = rng.choice([0.0, 0.0, 0.05, 0.2])
        world.model_faults = rng.choice([0.0, 0.0, 0.1])
        world.loop.at(HEALED_S, self._heal, world)
        self._store(world)
        if rng.random() < 0.15:
            world.ops.start(world.drop(world.workers[0], self._when()))

    def _when(self) -> float:
        return self._rng.uniform(0, max(1.0, self._quiet.seconds))

    def _step(self) -> int:
        return self._rng.randrange(1, max(60, self._quiet.steps))

    def _worker(self, world: World, process: Any) -> None:
        rng, chance = self._rng, self._rng.random()
        if chance < 0.45:
            process.kill_at = self._step()
        elif chance < 0.7:
            process.stop_at = self._step()
            process.stop_s = rng.choice([0.3, 3.0, 9.0, 12.0, 25.0, 70.0])
        elif chance < 0.85:
            world.loop.at(self._when(), self._drain, world, process)

    def _drain(self, world: World, process: Any) -> None:
        worker = world.current.get(process)
        if worker is not None:
            worker.drain()

    def _store(self, world: World) -> None:
        rng, server = self._rng, world.server
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            when, long = self._when(), rng.choice([0.2, 2.0, 7.0])
            what = rng.choice(
                ["restart", "reset", "flush", "LOADING", "READONLY", "OOM", "MISCONF"]
            )
            if what == "restart":
                world.loop.at(when, server.restart, long)
            elif what == "reset":
                world.loop.at(when, server.drop_all)
            elif what == "flush":
                world.loop.at(when, world.store.forget_scripts)
            else:
                world.loop.at(when, _refuse, server, f"{what} for a test")
                world.loop.at(when + long, _refuse, server, "")

    def _heal(self, world: World) -> None:
        world.server.faults = Faults()
        world.hand_faults = world.model_faults = 0.0
        for process in world.workers:
            process.kill_at = process.stop_at = 0


def _refuse(server: Any, text: str) -> None:
    server.passing = text


class Runner:
    """Runs seeds; keeps the quiet run of the newest scenario.

    Args:
        scripts: other Lua scripts than the packaged ones.
        defences: of the world around the harness.
    """

    def __init__(
        self,
        *,
        scripts: Mapping[str, lua.Script] | None = None,
        defences: Defences = REAL,
    ) -> None:
        self._changed: dict[str, Any] = {"scripts": scripts, "defences": defences}
        self._quiet: tuple[int, Quiet] | None = None
        self.kills = 0
        self.steps = 0
        self.stops = 0
        self.faults = 0

    def world(self, seed: int) -> tuple[World, Quiet]:
        """The finished run of a seed."""
        number = seed // FAULTY
        if self._quiet is None or self._quiet[0] != number:
            self._quiet = number, quiet_run(number)
        quiet = self._quiet[1]
        world = World(draw(number), seed, **self._changed)
        if not quiet.problems:
            workers = 1 + random.Random(seed).choice([1, 1, 2])
            world.run(workers=workers, faults=Trouble(seed, quiet))
        return world, quiet

    def check(self, seed: int) -> list[str]:
        """What is wrong with the run of a seed."""
        world, quiet = self.world(seed)
        try:
            if quiet.problems:
                return [f"without any fault: {problem}" for problem in quiet.problems]
            self.kills += world.kills
            self.steps += world.loop.steps
            self.stops += world.loop.stops
            self.faults += world.server.struck
            problems = oracle.invariants(world)
            if not problems and not world.scenario.chaotic:
                problems = oracle.same_story(quiet.story, world)
            return problems
        finally:
            world.close()


@dataclass
class Report:
    """Failures by seed, and how much was run.

    Attributes:
        kills, stops: workers that were killed, that stood still for a while.
        faults: connections to the store that broke or went silent.
    """

    failures: dict[int, list[str]]
    runs: int = 0
    kills: int = 0
    steps: int = 0
    stops: int = 0
    faults: int = 0

    def __add__(self, other: Report) -> Report:
        return Report(
            self.failures | other.failures,
            self.runs + other.runs,
            self.kills + other.kills,
            self.steps + other.steps,
            self.stops + other.stops,
            self.faults + other.faults,
        )


def check_all(
    seeds: Iterable[int], *, stop_after: int = 5, seconds: float = math.inf, **changed: Any
) -> Report:
    """Run seeds until so many have failed, or for so long."""
    deadline = time.monotonic() + seconds
    runner, report = Runner(**changed), Report({})
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for seed in seeds:
            if time.monotonic() > deadline:
                break
            problems = runner.check(seed)
            report.runs += 1
            if report.runs % 50 == 0:
                gc.collect()
            if problems:
                report.failures[seed] = problems
                if len(report.failures) >= stop_after:
                    break
    finally:
        gc.enable()
        gc.unfreeze()
    report.kills, report.steps = runner.kills, runner.steps
    report.stops, report.faults = runner.stops, runner.faults
    return report


def explain(failures: Mapping[int, list[str]]) -> str:
    """Failures with the command that repeats each of them."""
    lines = []
    for seed, problems in failures.items():
        lines.append(f"seed {seed}: repeat it alone with `{COMMAND} {seed}`")
        lines += [f"    {problem}" for problem in problems[:6]]
    return "\n".join(lines)
