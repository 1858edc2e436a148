"""Compares context profiles on one long scripted session: tokens sent, cache share, facts forgotten; no cluster, a minute.

The harness's loop and its real model client, the model server over HTTP in this process, the log in memory, bash for the tools.
All sessions run at once and differ in nothing but profile and model, so that ratios count. Prints the table and writes
docs/performance/profiles.md.

    .venv/bin/python bench/profiles.py [--dry]        # --dry: do not write
"""

from __future__ import annotations

import asyncio
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

sys.path[:0] = [str(pathlib.Path(__file__).parent)]  # make sets PYTHONSAFEPATH

from figures import ROOT  # noqa: E402

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "model-server/src")]

from cowhand.harness.model import AnthropicModel  # noqa: E402
from cowhand.harness.replay import replay  # noqa: E402
from cowhand.session import events as ev  # noqa: E402
from support.harness_rig import SID, Rig, World, user, world  # noqa: E402
from support.model_rig import ModelRig  # noqa: E402

PAGE = ROOT / "docs/performance/profiles.md"
STEPS, SIZE, WINDOW, TRIGGER = 40, 4000, 20_000, 12_000
SYSTEM = "Follow the instructions of the repository. " * 80
PRICES = {
    "input_tokens": 1.0,
    "cache_creation_input_tokens": 1.25,
    "cache_read_input_tokens": 0.1,
    "output_tokens": 5.0,
}
INPUT = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
NEW, MIDDLE, TIRED = "claude-opus-5-5", "claude-opus-4-1", "claude-sonnet-4-5"


@dataclass(frozen=True)
class Case:
    """One session.

    Attributes:
        name: row of the table.
        window: size of the context window, tokens; 0: none.
        tools: with the tools for the log.
        mark: more options of the script.
    """

    name: str
    profile: str
    model: str
    window: int = WINDOW
    tools: bool = True
    mark: str = ""


CASES = (
    Case("plain, in a window without end", "plain", NEW, window=0),
    Case("plain", "plain", NEW),
    Case("compaction", "compaction", NEW),
    Case("compaction, without the log tools", "compaction", NEW, tools=False),
    Case("clearing by the harness", "clearing", MIDDLE),
    Case("clearing by the API", "clearing", NEW),
    Case("reset, thorough notes", "reset", TIRED),
    Case("reset, short notes", "reset", TIRED, mark=" notes=short"),
    Case(
        "reset, short notes, without the log tools",
        "reset",
        TIRED,
        tools=False,
        mark=" notes=short",
    ),
)


@dataclass(frozen=True)
class Figures:
    """What became of it; tokens by the model server's count."""

    requests: int
    sent: int
    cached: float
    cost: float
    largest: int
    renewals: int
    known: int
    looked_up: int
    forgotten: int
    ended: str


def bash(name: str, data: Mapping[str, Any]) -> str:
    return subprocess.run(
        ["bash", "-c", data["command"]], capture_output=True, text=True, check=True
    ).stdout


async def run(case: Case, url: str) -> World:
    context = {"profile": case.profile, "window_tokens": WINDOW, "trigger_tokens": TRIGGER}
    text = f"[[script:long-session steps={STEPS} size={SIZE} window={case.window}{case.mark}]] Take the steps. {SYSTEM}"
    hidden = {} if case.tools else dict.fromkeys(("read_log", "search_log"), "Deny")
    here = world(user(text), model=case.model, context=context, permissions=hidden)
    provision = here.provision

    def provided(hand: str, instance: int) -> None:
        provision(hand, instance)
        for sandbox in here.sandboxes.values():
            sandbox.run = bash

    here.provision = provided  # type: ignore[method-assign]
    rig, model = Rig(here, lambda body: AssertionError("not asked")), AnthropicModel(url)
    rig.around = replace(rig.around, model=model)
    await rig.run()
    await model.close()
    found = list(replay(SID, here.events))
    assert all(one.matches for one in found), "the log does not rebuild its requests"
    return here


def usages(here: World) -> list[Mapping[str, int]]:
    """What each request used, also those for a summary or notes."""
    out: list[Mapping[str, int]] = []
    for event in here.events:
        usage = {}
        if event.type == ev.MODEL_RESPONSE:
            usage = event.data["message"]["usage"]
        elif event.type in (ev.CONTEXT_COMPACTED, ev.CONTEXT_RESET):
            usage = event.data["usage"]
        out += usage.get("iterations") or ([usage] if usage else [])
    return out


def figures(here: World) -> Figures:
    used = usages(here)
    sent = sum(one[key] for one in used for key in INPUT)
    message = [event.data["message"] for event in here.events if event.type == ev.MODEL_RESPONSE][
        -1
    ]
    answer = "".join(block.get("text", "") for block in message["content"])
    right = [f"fact {k} is {k * 7919 % 10007}" for k in (1, STEPS // 2, STEPS)]
    said = sum(fact in answer.split("; ")[0].split(", ") for fact in right)
    tried = re.search(r"looked up: (\d+)", answer)
    looked_up = min(int(tried[1]) if tried else 0, said)
    return Figures(
        requests=len(used),
        sent=sent,
        cached=sum(one["cache_read_input_tokens"] for one in used) / sent,
        cost=sum(one[key] * price for one in used for key, price in PRICES.items()),
        largest=max(sum(one[key] for key in INPUT) for one in used),
        renewals=sum(
            event.type in (ev.CONTEXT_COMPACTED, ev.CONTEXT_RESET, ev.CONTEXT_CLEARED)
            for event in here.events
        ),
        known=said - looked_up,
        looked_up=looked_up,
        forgotten=3 - said,
        ended=here.data(ev.STATUS_IDLE)[-1]["stop_reason"]["type"],
    )


async def measure() -> list[tuple[Case, Figures]]:
    async with ModelRig(api_key="added-by-the-proxy") as rig:
        done = await asyncio.gather(*(run(case, rig.url) for case in CASES))
    return [(case, figures(here)) for case, here in zip(CASES, done, strict=True)]


def page(rows: list[tuple[Case, Figures]]) -> str:
    base = rows[0][1]
    lines = [
        "# Context profiles compared",
        "",
        "Written by `bench/profiles.py`; [context-profiles.md](../context-profiles.md) says what each profile does.",
        "",
        f"One scripted session of {STEPS} tool calls with {SIZE} bytes of output each, {STEPS * SIZE // 4000}k tokens of results in all, in a window of {WINDOW} tokens;",
        f"the profile acts at {TRIGGER}. At its end the session is asked for three facts: of the first, the middle and the last step. Tokens and cache are counted by the",
        "model server (four bytes a token, cache as the API's: prefix, 20 blocks of lookback, 5 minutes); cost is in the price of an uncached input token (cache write 1.25, cache read 0.1, output 5),",
        "relative to the first row. Input and cost count the requests for summaries and notes too.",
        "",
        "| profile | model | requests | input tokens | of plain | largest request | cache share | cost of plain | renewals | facts in view | looked up in the log | forgotten | ended |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, one in rows:
        cells = [
            case.name, f"`{case.model}`", one.requests, f"{one.sent:,}".replace(",", " "), f"{one.sent / base.sent:.2f}",
            f"{one.largest:,}".replace(",", " "), f"{one.cached:.2f}", f"{one.cost / base.cost:.2f}", one.renewals, one.known, one.looked_up, one.forgotten,
            f"`{one.ended}`",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "What it shows: mechanism and price, not the judgement of a model. The script forgets by rule: its summary holds the first message and the newest call, its thorough notes every fact that it saw, its short",
        "notes none. How much a real model keeps in a summary depends on the model and the task; measure with your own sessions (`usage` in `context.compacted` and `context.reset`). The API's own clearing",
        "renews nothing in the log, so it counts none. `plain` ends when the window is full, so its input is that of a session that did not finish.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    text = page(asyncio.run(measure()))
    print(text)
    if "--dry" not in sys.argv[1:]:
        PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
