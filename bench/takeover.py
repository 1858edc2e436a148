"""A harness goes away in mid-turn: how long until another one has the session's next request out, or asks for its tool.

Crash: SIGKILL, nobody says anything. Hint: SIGKILL, and the worker's heartbeat is removed, as the operator does when
it sees the pod gone (how long it takes to see that is part of `bench/run.py`). Drain: SIGTERM while the tools run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from figures import Row, quantiles
from rig import World, host, until
from support.harness_stack import StubBroker

WHERE = "request in flight -> next request of the session at the model server; another harness runs; profile dev"


async def _mid_turn(world: World, count: int, gate: str) -> tuple[str, list[str]]:
    """A harness with so many sessions that wait for the first byte; answers its pod and the sessions."""
    stack = world.stack
    await stack.script(gate, {"content": [{"type": "text", "text": "ok"}], "gate": gate})
    pod, _ = await world.harness()
    sids = [await stack.create(f"[[script:{gate}]] go") for _ in range(count)]

    async def waiting() -> bool:
        found = await stack.control("GET", "gates")
        return len([one for one in found["waiting"] if one["gate"] == gate]) >= count

    await until("all sessions wait at the gate", waiting)
    return pod, sids


async def _killed(world: World, rounds: int, count: int, *, hint: bool) -> list[float]:
    stack, took = world.stack, []
    for number in range(rounds):
        gate = f"{'hint' if hint else 'crash'}{number}"
        pod, sids = await _mid_turn(world, count, gate)
        other, _ = await world.harness()
        process = stack.workers.pop(pod)
        process.kill()
        killed = time.time()
        await process.wait()
        if hint:
            await stack.store.control_log().drop_worker("team-a", pod)
        mine = set(sids)

        async def again(mine: set[str] = mine, killed: float = killed) -> dict[str, float] | None:
            found = {sid: at for sid, at in await world.arrivals() if sid in mine and at > killed}
            return found if len(found) == len(mine) else None

        found = await until("all sessions have their request again", again, 60, every=0.25)
        took += [(at - killed) * 1000 for at in found.values()]
        await stack.release(gate)
        for sid in sids:
            await stack.settled(sid)
        await stack.stop_worker(other)
    return took


async def crash(world: World, rounds: int = 2, count: int = 10) -> list[Row]:
    took = await _killed(world, rounds, count, hint=False)
    what = f"SIGKILL of the harness that holds {count} sessions, {rounds} times, no hint; {WHERE}; {host()}"
    return quantiles("takeover_crash_ms", took, "ms", {"p99": 12000}, what)


async def hint(world: World, rounds: int = 3, count: int = 5) -> list[Row]:
    took = await _killed(world, rounds, count, hint=True)
    what = f"SIGKILL of the harness that holds {count} sessions, {rounds} times, its heartbeat removed at once; {WHERE}; {host()}"
    return quantiles("takeover_hint_local_ms", took, "ms", {"p99": 2500}, what)


class _Watched:
    """The stub broker of the stack, with the time of each hand token: a new holder asks for one to reach its tool."""

    def __init__(self, broker: StubBroker) -> None:
        self._post = broker.post
        self.tokens: list[tuple[str, str, float]] = []
        broker.post = self.post  # type: ignore[method-assign]

    async def post(self, target: str, body: Mapping[str, Any]) -> dict[str, Any]:
        if target == "/v1/hand-token":
            self.tokens.append((body["session_id"], body["lease"], time.time()))
        return await self._post(target, body)


async def drain(world: World, rounds: int = 4, count: int = 4) -> list[Row]:
    """SIGTERM while tools run in real sandboxes; each round the next harness takes over the same calls."""
    stack = world.stack
    watched = _Watched(stack.broker)
    call = {"type": "tool_use", "name": "bash", "input": {"command": "sleep 600", "timeout_ms": 900_000}}  # fmt: skip
    await stack.script("drain", {"content": [call]}, {"content": [{"type": "text", "text": "ok"}]})
    pod, _ = await world.harness()
    sids = [await stack.create("[[script:drain]] go") for _ in range(count)]
    for sid in sids:
        await stack.reaches(sid, "tool.started")

    async def asked(since: float = 0.0) -> dict[str, float] | None:
        found = {sid: at for sid, _, at in watched.tokens if at > since}
        return found if len(found) == count else None

    await until("all tools run", asked, 60)
    took: list[float] = []
    for _ in range(rounds):
        other, _ = await world.harness()
        await asyncio.sleep(0.5)
        process = stack.workers.pop(pod)
        since = time.time()
        process.terminate()
        found = await until("all tools are asked for", lambda since=since: asked(since), 25)
        took += [(at - since) * 1000 for at in found.values()]
        assert await process.wait() == 0
        pod = other
    for sid in sids:
        assert len(await stack.of(sid, "tool.started")) == 1, "no call was made twice"
    what = (
        f"SIGTERM of the harness that holds {count} sessions whose `bash` runs, {rounds} times -> the next harness asks for its "
        f"token to re-attach the call; another harness runs; profile dev; {host()}"
    )
    return quantiles("takeover_drain_ms", took, "ms", {"p99": 300}, what)


PARTS: dict[str, Any] = {"crash": crash, "hint": hint, "drain": drain}
