"""A stack whose connections pass fault proxies, and what must hold of a turn that met a fault. For tests/chaos."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cowhand.errors import StoreUnavailable
from cowhand.harness.verify import Report, verify
from cowhand.session import events as ev
from cowhand.session import scripts as lua
from cowhand.session.export import Export, header_of
from support.fault_proxy import Fault, FaultProxy
from support.harness_stack import Stack, StubBroker, stack, until

T = TypeVar("T")

COUNT = "echo x >> counter; wc -l < counter"
LONG_STALL_S = 6.0
"""Longer than the harness waits for one reply of the store (`link.REPLY_SECONDS`)."""


@dataclass(frozen=True)
class Case:
    """Where a fault strikes.

    Attributes:
        to: whose connection: `store`, `model` or `sandboxd`.
        phase: of the loop, for people.
        fault: what happens.
    """

    to: str
    phase: str
    fault: Fault

    def __str__(self) -> str:
        return f"{self.to}-{self.phase}-{self.fault.moment}-{self.fault.how}"


def _sha(script: str) -> bytes:
    return lua.load()[script].sha.encode()


STORE: dict[str, bytes] = {
    "beat": _sha("beat"),
    "claim": _sha("claim"),
    "load": b"XRANGE",
    "request": ev.MODEL_REQUEST_START.encode(),
    "response": ev.MODEL_RESPONSE.encode(),
    "hand": ev.HAND_REQUESTED.encode(),
    "result": ev.TOOL_RESULT.encode(),
    "idle": ev.STATUS_IDLE.encode(),
    "park": _sha("park"),
}
"""Phase of the loop -> what the worker sends to the store in it."""


async def patient(read: Callable[[], Awaitable[T]]) -> T:
    """What the test itself reads of the store, also where the machine is so busy that a reply takes seconds."""
    for _ in range(10):
        with contextlib.suppress(StoreUnavailable):
            return await read()
    return await read()


class Rig:
    """A stack whose connections pass fault proxies."""

    def __init__(self, here: Stack, to_store: FaultProxy, to_model: FaultProxy) -> None:
        self.here = here
        self.to_store = to_store
        self.to_model = to_model
        self.to_sandboxd: list[FaultProxy] = []
        self._next: Fault | None = None
        here.way_to_sandboxd = self._way_to_sandboxd

    async def _way_to_sandboxd(self, port: int) -> int:
        proxy = await FaultProxy(port).start()
        if self._next is not None:
            proxy.arm(self._next)
        self.to_sandboxd.append(proxy)
        return proxy.port

    @property
    def store_url(self) -> str:
        return f"redis://127.0.0.1:{self.to_store.port}/0"

    async def turn(self, case: Case) -> tuple[str, Report]:
        """A session whose turn meets the fault; answers its id and what is wrong with its log."""
        here = self.here
        use = {"type": "tool_use", "name": "bash", "input": {"command": COUNT}}
        await here.script(
            "chaos",
            {"content": [{"type": "thinking", "thinking": "hm"}, use]},
            {"content": [{"type": "text", "text": "it says {{result:-1}}"}]},
        )
        self._next = case.fault if case.to == "sandboxd" else None
        proxy = {"store": self.to_store, "model": self.to_model}.get(case.to)
        if proxy is not None:
            proxy.arm(case.fault)
        session_id = await here.create("[[script:chaos]]")
        events = await patient(lambda: here.settled(session_id, seconds=120))
        fired = (proxy or self.to_sandboxd[-1]).fired
        # A heartbeat may come only after a quick turn.
        await until("the fault strikes: without that the case says nothing", fired.is_set, 30)
        header = header_of(await patient(lambda: here.state(session_id)), 0)
        return session_id, verify(Export(header, tuple(events)))

    async def check(self, case: Case) -> list[str]:
        """What is wrong after a case."""
        try:
            session_id, report = await self.turn(case)
        except AssertionError as err:
            return [f"{case}: {err}"]
        found = [f"{item.invariant} at {item.seq}: {item.message}" for item in report.violations]
        idle = await patient(lambda: self.here.of(session_id, ev.STATUS_IDLE))
        if [data["stop_reason"]["type"] for data in idle] != ["end_turn"]:
            found.append(f"the turn ended with {idle}")
        results = await patient(lambda: self.here.of(session_id, ev.TOOL_RESULT))
        pod = self.here.pods.get((session_id, "main", 1))
        counter = None if pod is None else pod.workdir / "counter"
        ran = counter.read_text().count("x") if counter is not None and counter.exists() else 0
        answers = [(data["content"].strip(), data["is_error"]) for data in results]
        return [f"{case}: {one}" for one in (*found, *self.wrong(case, answers, ran))]

    def wrong(self, case: Case, answers: list[tuple[str, bool]], ran: int) -> list[str]:
        """What is wrong with the tool results that Claude saw, and with how often the command ran."""
        found = []
        if answers != [("1", False)]:
            found.append(f"results: {answers}")
        if ran != 1:
            found.append(f"the command ran {ran} times")
        return found

    async def close(self) -> None:
        for proxy in (self.to_store, self.to_model, *self.to_sandboxd):
            await proxy.close()


R = TypeVar("R", bound=Rig)


@contextlib.asynccontextmanager
async def rig(
    store_url: str,
    folder: Path,
    *,
    kind: type[R] = Rig,  # type: ignore[assignment]
    way_to_proxy: Callable[[StubBroker], Awaitable[str]] | None = None,
) -> AsyncIterator[R]:
    """A rig over a store; `kind`: a class of its own. See `stack` for `way_to_proxy`."""
    to_store = await FaultProxy(int(store_url.rsplit(":", 1)[1].split("/")[0])).start()
    to_model: list[FaultProxy] = []

    async def way_to_model(port: int) -> int:
        to_model.append(await FaultProxy(port).start())
        return to_model[0].port

    async with stack(
        store_url, folder, way_to_model=way_to_model, way_to_proxy=way_to_proxy
    ) as here:
        made = kind(here, to_store, to_model[0])
        try:
            yield made
        finally:
            await here.close()
            await made.close()
