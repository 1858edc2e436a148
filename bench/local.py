"""`make bench-local`: the figures that need no cluster; prints the table and merges it into bench/results.json.

`bench/run.py` calls `measure` too. Each part has a store, a model server and harness processes of its own.

    .venv/bin/python bench/local.py [--dry] [PART...]        # --dry: do not write
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import sys
import time
from collections.abc import Sequence

sys.path[:0] = [str(pathlib.Path(__file__).parent)]  # make sets PYTHONSAFEPATH

from figures import ROOT, Row, merge, print_table  # noqa: E402

sys.path[:0] = [str(ROOT / "tests")]

import appends  # noqa: E402
import promptcache  # noqa: E402
import sessions  # noqa: E402
import takeover  # noqa: E402
from rig import world  # noqa: E402

WITHOUT_WORLD = appends.PARTS
PARTS = {**appends.PARTS, **sessions.PARTS, **takeover.PARTS, **promptcache.PARTS}


async def one(name: str) -> list[Row]:
    rows: list[Row]
    if name in WITHOUT_WORLD:
        rows = await PARTS[name]()
        return rows
    async with world() as made:
        rows = await PARTS[name](made)
        return rows


def measure(parts: Sequence[str] = (), *, write: bool = True) -> list[Row]:
    """Rows of the table; each part is written when it is done."""
    rows: list[Row] = []
    for name in parts or PARTS:
        began = time.monotonic()
        load = f"{os.getloadavg()[0]:.1f}"
        found = asyncio.run(one(name))
        for each in found:
            each["load"] = f"{load} -> {os.getloadavg()[0]:.1f}"
        rows += found
        if write:
            merge(found)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return rows


def main() -> int:
    words = sys.argv[1:]
    dry = "--dry" in words
    print_table(measure([word for word in words if word != "--dry"], write=not dry))
    return 0


if __name__ == "__main__":
    sys.exit(main())
