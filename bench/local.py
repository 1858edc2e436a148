"""`make bench-local`: the figures that need no cluster; prints the table and merges it into bench/results.json.

`bench/run.py` calls `measure` too. Each part has a store, a model server and harness processes of its own.

    .venv/bin/python bench/local.py [--dry] [--seconds S] [PART...]        # --dry: do not write
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import pathlib
import sys
import time
from collections.abc import Sequence

sys.path[:0] = [str(pathlib.Path(__file__).parent)]  # make sets PYTHONSAFEPATH

from figures import ROOT, Row, merge, print_table  # noqa: E402

sys.path[:0] = [str(ROOT / "tests")]

import appends  # noqa: E402
import failover  # noqa: E402
import promptcache  # noqa: E402
import sessions  # noqa: E402
import takeover  # noqa: E402
from rig import world  # noqa: E402

WITHOUT_WORLD = appends.PARTS
PARTS = {
    **appends.PARTS, **promptcache.PARTS, **takeover.PARTS, **sessions.PARTS,
}  # fmt: skip
"""In this order: the longest, which the time may not be enough for, at the end."""

FAILOVER_RUNS = 10
FAILOVER_S = 75.0
"""Of a bounded time so much is kept for one run of each row of the failover table."""


async def one(name: str) -> list[Row]:
    rows: list[Row]
    if name in WITHOUT_WORLD:
        rows = await PARTS[name]()
        return rows
    async with world() as made:
        rows = await PARTS[name](made)
        return rows


def measure(
    parts: Sequence[str] = (), *, write: bool = True, seconds: float = math.inf
) -> tuple[list[Row], list[str]]:
    """Rows of the table, and parts that were not over in time; each part is written when it is done."""
    rows: list[Row] = []
    late: list[str] = []
    deadline = time.monotonic() + seconds
    for name in parts or PARTS:
        began = time.monotonic()
        load = f"{os.getloadavg()[0]:.1f}"
        left = None if math.isinf(seconds) else max(0.0, deadline - began)
        try:
            found = asyncio.run(asyncio.wait_for(one(name), left))
        except TimeoutError:
            late.append(name)
            continue
        for each in found:
            each["load"] = f"{load} -> {os.getloadavg()[0]:.1f}"
        rows += found
        if write:
            merge(found)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return rows, late


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}, failover")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    parser.add_argument("--seconds", type=float, default=math.inf, help="bound of the whole")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    named = [part for part in args.parts if part != "failover"]
    rows: list[Row] = []
    late: list[str] = []
    if named or not args.parts:
        rows, late = measure(named, write=not args.dry, seconds=args.seconds - FAILOVER_S)
    print_table(rows)
    if not args.parts or "failover" in args.parts:
        left = max(0.0, deadline - time.monotonic())
        asyncio.run(failover.write(FAILOVER_RUNS, left, dry=args.dry))
    for name in late:
        print(f"{name}: not over in time, its rows are those of an earlier run", file=sys.stderr)
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
