"""Connections of a real worker process break at every phase of a turn: to the store, to the model, to sandboxd.

After each fault the turn ends, the log passes `cowhand verify`, and the command has run once. A sample runs by
default, `COWHAND_CHAOS=all` (`make soak`) runs the whole matrix: each phase, at each moment, in each way.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cowhand.hands import sandbox
from cowhand.session import events as ev
from cowhand.session import scripts as lua
from cowhand.session.log import StoreConfig
from cowhand.session.store import Store
from support.chaos_rig import LONG_STALL_S, STORE, Case, rig
from support.fault_proxy import Fault
from support.harness_rig import NAMESPACE

ALL = os.environ.get("COWHAND_CHAOS", "") == "all"
pytestmark = pytest.mark.timeout(7200 if ALL else 600)


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


def part(case: Case) -> str:
    """The test of the whole matrix that a case belongs to."""
    return f"{case.to}-{case.phase.split()[0]}"


@pytest.mark.parametrize("which", dict.fromkeys(map(part, cases())) if ALL else ["sample"])
async def test_a_turn_survives_a_broken_connection_at_every_phase(
    which: str, store_url: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    wanted = [case for case in cases() if (part(case) == which if ALL else str(case) in SAMPLE)]
    assert wanted
    assert ALL or len(wanted) == len(SAMPLE)
    found = []
    async with rig(store_url, tmp_path) as made:
        await made.here.worker(COWHAND_STORE_URL=made.store_url)
        for case in wanted:
            found += await made.check(case)
    record_property("connections of real processes broken", len(wanted))
    record_property("of these not survived", len({line.split(": ")[0] for line in found}))
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
