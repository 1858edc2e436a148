"""Connections of a real worker process break at every phase of a turn: to the store, to the model, to sandboxd.

After each fault the turn ends, the log passes `cowhand verify`, and the command has run once. A sample runs by
default, `COWHAND_CHAOS=all` (`make soak`) runs the whole matrix: each phase, at each moment, in each way.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cowhand.errors import StoreUnavailable
from cowhand.hands import sandbox
from cowhand.harness.verify import Report, verify
from cowhand.session import events as ev
from cowhand.session import scripts as lua
from cowhand.session.export import Export, header_of
from cowhand.session.log import StoreConfig
from cowhand.session.store import Store
from support.fault_proxy import Fault, FaultProxy
from support.harness_rig import NAMESPACE
from support.harness_stack import Stack, stack, until

ALL = os.environ.get("COWHAND_CHAOS", "") == "all"
pytestmark = pytest.mark.timeout(7200 if ALL else 600)

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


def cases() -> Iterator[Case]:
    """The whole matrix."""
    for phase, pattern in STORE.items():
        for moment, how in itertools.product(
            ("request", "sent", "reply", "torn"), ("cut", "reset", "stall")
        ):
            yield Case("store", phase, Fault(pattern, moment, how, stall_s=LONG_STALL_S))  # type: ignore[arg-type]
        yield Case("store", phase, Fault(pattern, "reply", "delay"))
    for nth in (1, 2):
        for moment, how in itertools.product(
            ("request", "sent", "reply", "torn"), ("cut", "reset", "stall", "delay")
        ):
            fault = Fault(b"POST /v1/messages", moment, how, nth)  # type: ignore[arg-type]
            yield Case("model", f"request {nth}", fault)
        for pattern, how in itertools.product(
            (b"content_block_delta", b"message_delta", b"message_stop"), ("cut", "reset", "stall")
        ):
            fault = Fault(pattern, "stream", how, nth)  # type: ignore[arg-type]
            yield Case("model", f"stream {nth} {pattern.decode()}", fault)
    for moment, how in itertools.product(
        ("request", "sent", "reply", "torn"), ("cut", "reset", "stall", "delay")
    ):
        yield Case("sandboxd", "call", Fault(b"POST /v1/execute", moment, how))  # type: ignore[arg-type]


SAMPLE = {
    "store-claim-reply-reset",
    "store-request-request-cut",
    "store-response-reply-cut",
    "store-result-reply-reset",
    "store-park-torn-reset",
    "model-stream 1 content_block_delta-stream-cut",
    "model-request 2-reply-reset",
    "sandboxd-call-request-cut",
    "sandboxd-call-sent-reset",
    "sandboxd-call-reply-cut",
}


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
        if [(data["content"].strip(), data["is_error"]) for data in results] != [("1", False)]:
            found.append(f"results: {results}")
        ran = (self.here.pods[session_id, "main", 1].workdir / "counter").read_text().count("x")
        if ran != 1:
            found.append(f"the command ran {ran} times")
        return [f"{case}: {one}" for one in found]

    async def close(self) -> None:
        for proxy in (self.to_store, self.to_model, *self.to_sandboxd):
            await proxy.close()


@contextlib.asynccontextmanager
async def rig(store_url: str, folder: Path) -> AsyncIterator[Rig]:
    to_store = await FaultProxy(int(store_url.rsplit(":", 1)[1].split("/")[0])).start()
    to_model: list[FaultProxy] = []

    async def way_to_model(port: int) -> int:
        to_model.append(await FaultProxy(port).start())
        return to_model[0].port

    async with stack(store_url, folder, way_to_model=way_to_model) as here:
        made = Rig(here, to_store, to_model[0])
        try:
            yield made
        finally:
            await here.close()
            await made.close()


def part(case: Case) -> str:
    """The test of the whole matrix that a case belongs to."""
    return f"{case.to}-{case.phase.split()[0]}"


@pytest.mark.parametrize("which", dict.fromkeys(map(part, cases())) if ALL else ["sample"])
async def test_a_turn_survives_a_broken_connection_at_every_phase(
    which: str, store_url: str, tmp_path: Path
) -> None:
    wanted = [case for case in cases() if (part(case) == which if ALL else str(case) in SAMPLE)]
    assert wanted
    assert ALL or len(wanted) == len(SAMPLE)
    found = []
    async with rig(store_url, tmp_path) as made:
        await made.here.worker(COWHAND_STORE_URL=made.store_url)
        for case in wanted:
            found += await made.check(case)
    print(f"{len(wanted)} faults")
    assert not found, "\n" + "\n".join(found)


# Controls: the same cases without a defence.

RESULT_LOST = Case("store", "result", Fault(ev.TOOL_RESULT.encode(), "reply", "reset"))
CALL_LOST = Case("sandboxd", "call", Fault(b"POST /v1/execute", "reply", "reset"))


async def test_control_without_dedupe_a_lost_reply_doubles_an_event(
    store_url: str, tmp_path: Path
) -> None:
    scripts = lua.load()
    line = (
        "if wseq == last then return {'DUP', tonumber(m[4])} end\n"
        "if wseq ~= last + 1 then return {'GAP', last} end\n"
    )
    source = scripts["append"].source
    assert source.count(line) == 1
    scripts["append"] = lua.Script("append", source.replace(line, ""))
    async with rig(store_url, tmp_path) as made:
        config = StoreConfig(made.store_url, partitions=2)
        async with Store(config, NAMESPACE, scripts) as store:
            await made.here.local_worker(store)
            found = await made.check(RESULT_LOST)
            await made.here.close()
    assert any("twice" in one or "results" in one for one in found), found


async def test_control_with_a_new_call_id_for_each_try_a_command_runs_twice(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., Any] = sandbox.SandboxHand._exchange
    numbers = itertools.count()

    async def exchange(hand: Any, delivery: Any, record: Any) -> Any:
        delivery.ask = False
        delivery.call = replace(delivery.call, call_id=f"{delivery.call.call_id}-{next(numbers)}")
        return await real(hand, delivery, record)

    monkeypatch.setattr(sandbox.SandboxHand, "_exchange", exchange)
    async with rig(store_url, tmp_path) as made:
        await made.here.local_worker()
        found = await made.check(CALL_LOST)
    assert any("ran 2 times" in one for one in found), found
