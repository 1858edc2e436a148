"""How many acknowledged events a failover loses in each durability profile: counts, prints and writes the table.

    .venv/bin/python bench/failover.py [--runs N] [--dry]

Counts, not times: a cut of the replication link, SIGKILL of the primary, the replica takes over, the old primary comes
back as a replica. The rig is tests/support/failover.py; docs/performance/failover.md is what is written.
"""

from __future__ import annotations

import argparse
import asyncio
import pathlib
import sys
from collections.abc import AsyncIterator
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


async def runs(profile: Profile, binary: str, count: int, *, cut: bool) -> list[Outcome]:
    """Several runs, each with servers of its own."""
    found = []
    for _ in range(count):
        async with rig(profile, binary) as made:
            found.append(await made.fail_over(cut=cut))
    return found


def line(server: str, profile: str, cut: bool, found: list[Outcome]) -> str:
    """A row of the table."""
    cells = (
        *(server, f"`{profile}`", "cut" if cut else "whole", len(found)),
        *(sum(one.before for one in found), sum(one.in_cut for one in found)),
        f"**{sum(one.missing for one in found)}**",
        f"{sum(one.healed for one in found)} of {sum(one.sessions for one in found)}",
        f"{sum(one.rejoined for one in found)} of {len(found)}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


async def measure(count: int) -> AsyncIterator[list[str]]:
    """The rows so far, each time with one more: a run that is stopped leaves what it has counted."""
    rows: list[str] = []
    for name, binary in installed().items():
        server = f"{name.split('-')[0].title()} {'.'.join(map(str, version(binary)))}"
        for profile in get_args(Profile):
            for cut in (False, True):
                if profile == "managed":
                    continue
                row = line(server, profile, cut, await runs(profile, binary, count, cut=cut))
                print(row, flush=True)
                rows.append(row)
                yield rows


def main() -> int:
    """Run all; write the page unless `--dry`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()
    asyncio.run(write(args.runs, dry=args.dry))
    return 0


async def write(count: int, *, dry: bool) -> None:
    """Measure, and write the page unless `dry`."""
    async for rows in measure(count):
        if not dry:
            end = f"\n\nCommit {commit()}; all servers on one host.\n"
            PAGE.write_text(HEAD + "\n".join(rows) + end)


if __name__ == "__main__":
    raise SystemExit(main())
