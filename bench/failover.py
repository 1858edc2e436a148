"""How many acknowledged events a failover loses in each durability profile: counts, prints and writes the table.

    .venv/bin/python bench/failover.py [--runs N] [--seconds S] [--dry]

Counts, not times: a cut of the replication link, SIGKILL of the primary, the replica takes over, the old primary comes
back as a replica. The rig is tests/support/failover.py; docs/performance/failover.md is what is written.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import pathlib
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import get_args

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]  # make sets PYTHONSAFEPATH

from cowhand.session.log import Profile  # noqa: E402
from figures import commit  # noqa: E402
from support.failover import Outcome, rig  # noqa: E402
from support.store import installed, version  # noqa: E402

PAGE = ROOT / "docs" / "performance" / "failover.md"
HEAD = """# Failover: what was acknowledged and is missing

Counted by `bench/failover.py`. Each run starts a primary and a replica, and eight writers: four clients that send messages,
four workers that append a result and wait for the barrier. Then the primary is killed (SIGKILL), in the rows with a cut
after the replication link has stood still while the writers went on; the replica is promoted, the writers go on with it, and the
old primary comes back as its replica. *Acknowledged* is what a writer was told to be safe before the primary died, *missing*
what of that is not in the log of the server that took over. *Taken up* are the workers' sessions that noticed that their newest
appends are gone, were claimed again and went on from what is there; *rejoined* the runs after which the old primary had the same logs.

What it means: [guarantees](../guarantees.md#durability-profiles). The profile `managed` has no server to kill here.

| server | profile | link | runs | acknowledged | of these in the cut | **missing** | taken up | rejoined |
|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    server: str
    binary: str
    profile: Profile
    cut: bool

    async def run(self) -> Outcome:
        """One run, with servers of its own."""
        async with rig(self.profile, self.binary) as made:
            return await made.fail_over(cut=self.cut)


def settings() -> list[Setting]:
    """All rows."""
    return [
        Setting(f"{name.split('-')[0].title()} {'.'.join(map(str, version(binary)))}", binary, profile, cut)
        for name, binary in installed().items()
        for profile in get_args(Profile)
        for cut in (False, True)
        if profile != "managed"
    ]  # fmt: skip


def line(one: Setting, found: list[Outcome]) -> str:
    """A row of the table."""
    cells = (
        *(one.server, f"`{one.profile}`", "cut" if one.cut else "whole", len(found)),
        *(sum(one.before for one in found), sum(one.in_cut for one in found)),
        f"**{sum(one.missing for one in found)}**",
        f"{sum(one.healed for one in found)} of {sum(one.sessions for one in found)}",
        f"{sum(one.rejoined for one in found)} of {len(found)}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


async def measure(count: int, seconds: float = math.inf) -> AsyncIterator[list[str]]:
    """The table so far, each time with one run more: a run that is stopped leaves what it has counted.

    Every row gets one run, then every row a second one, until all have `count` or so many seconds are over.
    """
    deadline = time.monotonic() + seconds
    found: dict[Setting, list[Outcome]] = {one: [] for one in settings()}
    for number in range(count):
        for one, outcomes in found.items():
            if number and time.monotonic() > deadline:
                return
            outcomes.append(await one.run())
            print(line(one, outcomes), flush=True)
            yield [line(*item) for item in found.items() if item[1]]


def main() -> int:
    """Run all; write the page unless `--dry`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after these")
    args = parser.parse_args()
    asyncio.run(write(args.runs, args.seconds, dry=args.dry))
    return 0


async def write(count: int, seconds: float = math.inf, *, dry: bool = False) -> None:
    """Measure, and write the page unless `dry`."""
    async for rows in measure(count, seconds):
        if not dry:
            end = f"\n\nCommit {commit()}; all servers on one host.\n"
            PAGE.write_text(HEAD + "\n".join(rows) + end)


if __name__ == "__main__":
    raise SystemExit(main())
