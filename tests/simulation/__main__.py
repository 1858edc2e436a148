"""`python -m simulation SEED...`: run seeds alone and show their logs; `python -m simulation 0-999` only counts."""

from __future__ import annotations

import sys
import time

from simulation import oracle
from simulation.run import FAULTY, Runner, check_all, explain
from simulation.scenario import draw
from simulation.world import World


def show(seed: int) -> bool:
    world, quiet = Runner().world(seed)
    if quiet.problems:
        print("without any fault:")
        world = World(draw(seed // FAULTY), seed // FAULTY)
        world.run(workers=1)
    for action in world.scenario.actions:
        print(
            "action",
            action.kind,
            action.when,
            action.event,
            action.data,
            f"{action.at_s:.2f}",
            action.done,
        )
    for number, turn in enumerate(world.scenario.turns):
        print("turn", number, turn)
    if world.workers:
        for event in world.log():
            lease = event.lease.split(":")[1] if event.lease else ""
            print(
                f"{event.seq:4} {event.ts % 10_000_000:8} {lease:14} {event.type:28} {event.payload[:300]!r}"
            )
    problems = quiet.problems or oracle.invariants(world)
    if not problems and not world.scenario.chaotic:
        problems = oracle.same_story(quiet.story, world)
    for problem in problems:
        print("PROBLEM", problem)
    return not problems


def main() -> int:
    good = True
    for word in sys.argv[1:]:
        first, _, last = word.partition("-")
        if last:
            began = time.process_time()
            report = check_all(range(int(first), int(last) + 1), stop_after=20)
            took = time.process_time() - began
            print(explain(report.failures))
            print(
                f"{report.runs} runs, {len(report.failures)} failures, {report.kills} workers killed, "
                f"{report.steps} steps, {took:.1f} s of CPU"
            )
            good = good and not report.failures
        else:
            good = show(int(word)) and good
    return not good


if __name__ == "__main__":
    sys.exit(main())
