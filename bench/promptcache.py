"""Share of input tokens that the prompt cache answers, over a loop of 20 requests: undisturbed, and with forced wakes.

The model server accounts the cache as the API does (prefix match, breakpoints, 20 blocks of lookback); that a woken
session sends the same bytes is what keeps the share.
"""

from __future__ import annotations

from typing import Any

from figures import Row, row
from rig import World, host

TURNS = 20
WAKES = (5, 10, 15)


async def _loop(world: World, name: str, wakes: tuple[int, ...]) -> tuple[float, int]:
    """Cached share of all input, and input tokens."""
    stack = world.stack
    command = {"command": "head -c 1500 /dev/zero | tr '\\0' x"}
    call = {"type": "tool_use", "name": "bash", "input": command}
    gates = {turn: {"gate": f"{name}{turn}"} for turn in wakes}
    turns = [{"content": [call], **gates.get(turn, {})} for turn in range(TURNS - 1)]
    await stack.script(name, *turns, {"content": [{"type": "text", "text": "done"}]})
    pod, _ = await world.harness()
    # As long as a short system prompt: shorter prefixes are not cached at all.
    sid = await stack.create(
        f"[[script:{name}]] " + "Follow the instructions of the repository. " * 80
    )
    for turn in wakes:
        await stack.at_gate(f"{name}{turn}")
        other, _ = await world.harness()
        await stack.kill_worker(pod)
        await stack.reaches(
            sid, "span.model_request_start", turn + 1 + len([w for w in wakes if w <= turn])
        )
        await stack.release(f"{name}{turn}")
        pod = other
    await stack.settled(sid)
    await stack.stop_worker(pod)
    cached = total = 0
    for response in await stack.of(sid, "model.response"):
        usage = response["message"]["usage"]
        read = usage["cache_read_input_tokens"]
        cached += read
        total += read + usage["input_tokens"] + usage["cache_creation_input_tokens"]
    return cached / total, total


async def share(world: World) -> list[Row]:
    calm, tokens = await _loop(world, "calm", ())
    woken, _ = await _loop(world, "woken", WAKES)
    what = (
        f"{TURNS} requests, each but the last answered with a bash call of 1.5 kB, {tokens} input tokens in all; cache accounted by "
        f"the model server; {host()}"
    )
    return [
        row("cache_read_share", woken, "share", 0.9, TURNS, f"harness killed at requests {', '.join(str(w + 1) for w in WAKES)} while they were open, woken by another; {what}"),
        row("cache_read_share_calm", calm, "share", 0.9, TURNS, f"no wake; {what}"),
    ]  # fmt: skip


PARTS: dict[str, Any] = {"cache": share}
