"""Writes docs/performance/ from bench/results.json: tables with targets and conditions, and plots as SVG.

.venv/bin/python bench/report.py [--check]        # --check: fail if a file is not what this would write
"""

from __future__ import annotations

import html
import math
import pathlib
import sys
from collections.abc import Sequence

sys.path[:0] = [str(pathlib.Path(__file__).parent)]  # make sets PYTHONSAFEPATH

from figures import ROOT, Row, load, met  # noqa: E402

FOLDER = ROOT / "docs/performance"

INTRO = """# Performance

Every figure of `bench/`, from `bench/results.json`; written by `bench/report.py` (`make verify` notices drift). Beside each
stand its workload, sample size and conditions, because a number without them says nothing.

How to repeat: `make bench-local` needs no cluster (real store, real `cowhand harness` processes, the scripted model
server; at most 8 minutes, the failover table with it); `make bench` measures everything on the cluster of `make cluster images install`. One part alone:
`.venv/bin/python bench/local.py --dry wake streaming` (`--dry` writes nothing).

How to read it: everything shares the cores of one small machine, also the model server and the measuring process, and
other work ran beside it: `load` is the machine's load average before and after, and a load above the number of cores
means that absolute times are mostly waiting. CPU, memory, counts and shares are steadier; ratios come from one run. A commit with `+` was measured with changes that were not committed
yet. The API key's round trip to Claude is in none of them.
"""

GROUPS: list[tuple[str, str, tuple[str, ...]]] = [
    ("Appends", "", ("append",)),
    ("From a message to Claude", "", ("message_to_request", "apply_to_request", "wake_", "wakes_", "turn_cpu")),
    ("Takeover", "What a dead harness costs its sessions.", ("takeover",)),
    ("Capacity of a harness", "", ("attach", "streaming", "delta")),
    ("Idle sessions", "", ("idle",)),
    ("Prompt cache", "", ("cache",)),
    ("First token and sandboxes", "", ("ttft", "first_", "execute", "cold", "claim")),
    ("Memory", "", ("operator_rss", "broker_rss", "gateway_rss", "harness_rss", "proxy_")),
]  # fmt: skip

PLOTS: list[tuple[str, str, list[tuple[str, str]]]] = [
    (
        "takeover.svg",
        "Takeover: the harness is gone in mid-turn until the next one has gone on, ms",
        [
            ("takeover_drain_ms_p50", "drain"),
            ("takeover_hint_local_ms_p50", "crash with hint"),
            ("takeover_crash_ms_p50", "crash"),
        ],
    ),
    (
        "latency.svg",
        "Latency, ms",
        [
            ("append_dev_ms_p50", "append, dev"),
            ("append_standard_ms_p50", "append, standard"),
            ("append_strict_ms_p50", "append, strict"),
            ("message_to_request_ms_p50", "message to request"),
            ("wake_1000_events_ms_p50", "wake of 1 000 events"),
        ],
    ),
]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 360, 52, 190, 40, 44
COLOURS = ("#1f6feb", "#bf5700", "#1a7f37", "#8250df", "#57606a")


def svg(title: str, series: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Cumulative distributions on a logarithmic axis: the share of the sample that took at most x."""
    values = [value for _, sample in series for value in sample if value > 0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def x(value: float) -> float:
        share = (math.log10(max(value, 10**low)) - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{html.escape(title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="14" fill="#1f2328">{html.escape(title)}</text>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(share):.1f}" y2="{y(share):.1f}" stroke="#d0d7de"/>'
        )
        parts.append(
            f'<text x="{LEFT - 8}" y="{y(share) + 4:.1f}" text-anchor="end" fill="#57606a">{share:.0%}</text>'
        )
    for power in range(low, high + 1):
        at = x(10**power)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(1):.1f}" y2="{y(0):.1f}" stroke="#d0d7de"/>'
        )
        parts.append(
            f'<text x="{at:.1f}" y="{y(0) + 18:.1f}" text-anchor="middle" fill="#57606a">{10**power:g}</text>'
        )
    for number, (name, sample) in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        ordered = sorted(sample)
        points, before = [], 0.0
        for index, value in enumerate(ordered):
            share = (index + 1) / len(ordered)
            points += [f"{x(value):.1f},{y(before):.1f}", f"{x(value):.1f},{y(share):.1f}"]
            before = share
        parts.append(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        line = TOP + 14 + 20 * number
        parts.append(
            f'<rect x="{WIDTH - RIGHT + 16}" y="{line - 9}" width="12" height="12" fill="{colour}"/>'
        )
        parts.append(
            f'<text x="{WIDTH - RIGHT + 34}" y="{line + 2}" fill="#1f2328">{html.escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])  # fmt: skip


def number(value: float) -> str:
    """Three significant digits, whole above a hundred."""
    return f"{value:,.0f}".replace(",", " ") if abs(value) >= 100 else f"{value:.3g}"


def line(one: Row) -> str:
    verdict = {None: "", True: " (met)", False: " (**missed**)"}[met(one)]
    target = "" if one["target"] is None else f"{number(one['target'])}{verdict}"
    what = one["conditions"].replace("|", "\\|")
    load_ = f"; load {one['load']}" if "load" in one else ""
    commit = one.get("commit", "")
    return f"| `{one['id']}` | {number(one['value'])} {one['unit']} | {target} | {number(one['samples'])} | {what}{load_}; {commit} |"


def readme(rows: Sequence[Row], plots: Sequence[str]) -> str:
    left = list(rows)
    parts = [INTRO]
    parts += [f"![{name.removesuffix('.svg')}]({name})\n" for name in plots]
    groups = [(title, text, tuple(prefixes)) for title, text, prefixes in GROUPS]
    for title, text, prefixes in [*groups, ("Others", "", ("",))]:
        mine = [one for one in left if one["id"].startswith(prefixes)]
        left = [one for one in left if one not in mine]
        if not mine:
            continue
        head = ["| figure | value | target | n | conditions |", "|---|---|---|---|---|"]
        body = "\n".join([*head, *(line(one) for one in mine)])
        parts.append(f"## {title}\n\n{text + chr(10) * 2 if text else ''}{body}\n")
    return "\n".join(parts)


def files(rows: Sequence[Row]) -> dict[str, str]:
    """Name -> text of every file in docs/performance."""
    samples = {one["id"]: one["distribution"] for one in rows if one.get("distribution")}
    made = {}
    for name, title, wanted in PLOTS:
        series = [(label, samples[identity]) for identity, label in wanted if identity in samples]
        if series:
            made[name] = svg(title, series)
    return {"README.md": readme(rows, list(made)), **made}


def main() -> int:
    made = files(load())
    if "--check" in sys.argv[1:]:
        stale = [
            name
            for name, text in made.items()
            if not (FOLDER / name).exists() or (FOLDER / name).read_text() != text
        ]
        for name in stale:
            print(
                f"docs/performance/{name} is not what bench/results.json says: run `make generate`"
            )
        return 1 if stale else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in made.items():
        (FOLDER / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
