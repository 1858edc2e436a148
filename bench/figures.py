"""Rows of bench/results.json: how a figure is written, merged by id, and printed. Used by every part of bench/."""

from __future__ import annotations

import json
import pathlib
import statistics
import subprocess
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results.json"

Row = dict[str, Any]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the sample lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def row(
    identity: str,
    value: float,
    unit: str,
    target: float | None,
    samples: int,
    conditions: str,
    **more: Any,
) -> Row:
    """One figure. `target` is a least value where the unit is in `HIGHER`, a most value otherwise."""
    return {
        "id": identity,
        "value": round(value, 3),
        "unit": unit,
        "target": target,
        "samples": samples,
        "conditions": conditions,
        **more,
    }


def quantiles(
    identity: str, values: Sequence[float], unit: str, targets: dict[str, float], conditions: str
) -> list[Row]:
    """Rows `<identity>_p50` and `_p99`; the first keeps the sample, for plots."""
    kept = [round(value, 3) for value in sorted(values)]
    if len(kept) > 200:  # a plot needs no more
        kept = [kept[round(i * (len(kept) - 1) / 199)] for i in range(200)]
    return [
        row(
            f"{identity}_p50",
            statistics.median(values),
            unit,
            targets.get("p50"),
            len(values),
            conditions,
            distribution=kept,
        ),
        row(
            f"{identity}_p99",
            percentile(values, 0.99),
            unit,
            targets.get("p99"),
            len(values),
            conditions,
        ),
    ]


HIGHER = {"1/s", "share", "sessions", "MB/s"}
"""Units of which more is better; of all others less is."""


def met(one: Row) -> bool | None:
    """Whether the figure reaches its target; None without one."""
    if one["target"] is None:
        return None
    if one["unit"] in HIGHER:
        return bool(one["value"] >= one["target"])
    return bool(one["value"] <= one["target"])


def commit() -> str:
    """Short hash of HEAD, with `+` if the tree differs from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no", "--", "operator/src"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return head + ("+" if dirty else "")


def load() -> list[Row]:
    """The rows of the newest runs."""
    rows: list[Row] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return rows


def merge(rows: Sequence[Row]) -> None:
    """Write rows into bench/results.json: a known id is replaced where it stands, a new one is added."""
    stamp = commit()
    new = {one["id"]: {**one, "commit": stamp} for one in rows}
    merged = [new.pop(one["id"], one) for one in load()] + list(new.values())
    RESULTS.write_text(json.dumps(merged, indent=1, ensure_ascii=False) + "\n")


def print_table(rows: Sequence[Row]) -> None:
    print(f"\n{'id':36} {'value':>10} {'unit':8} {'target':>8} {'n':>6}  conditions")
    for one in rows:
        target = "-" if one["target"] is None else f"{one['target']:g}"
        print(
            f"{one['id']:36} {one['value']:>10g} {one['unit']:8} {target:>8} {one['samples']:>6}  {one['conditions']}"
        )
