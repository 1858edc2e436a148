"""Processes are killed or stand still at every phase of a turn: a harness, the store, the harness's proxy, sandboxd.

The moment is named by what passes on a connection, as in `test_faults`. A harness that is killed or frozen is
replaced by another one; a frozen one wakes up when that has ended the turn, with what it had sent still under way
in the cases `late`. It must change nothing, and go on to serve: the next case begins with it. A sample runs by
default, `COWHAND_CHAOS=all` (`make soak`) runs the whole matrix.

A killed sandboxd is the one case in which Claude hears of it: nobody can know how far the command came.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import aiohttp
import pytest

from cowhand.harness.verify import Report, verify
from cowhand.session import events as ev
from cowhand.session import scripts as lua
from cowhand.session.events import Event
from cowhand.session.export import Export, header_of
from support.chaos_rig import COUNT, LONG_STALL_S, STORE, Case, Rig, patient, rig
from support.fault_proxy import Fault, FaultProxy, How, Moment
from support.harness_rig import NAMESPACE
from support.harness_stack import StubBroker, until
from support.store import Store as Server

ALL = os.environ.get("COWHAND_CHAOS", "") == "all"
pytestmark = pytest.mark.timeout(7200 if ALL else 600)

Whom = Literal["harness", "store", "proxy", "sandboxd"]
What = Literal["kill", "freeze", "late"]

FROZEN_S = 2.0
"""How long proxy and sandboxd stand still; the store does for `LONG_STALL_S`, a harness until it was replaced."""

BEAT = STORE["beat"]


@dataclass(frozen=True)
class Strike(Case):
    """A case that strikes a process.

    Attributes:
        whom, what: `late` freezes a harness and keeps back what it has sent until another one has taken over.
        hint: the operator says at once that the worker is gone; otherwise its heartbeat runs out.
    """

    whom: Whom = "harness"
    what: What = "kill"
    hint: bool = True

    def __str__(self) -> str:
        end = "" if self.hint else "-unseen"
        return f"{self.whom}-{self.what}-{self.to}-{self.phase}-{self.fault.moment}{end}"


WAYS: dict[tuple[str, str], list[tuple[Moment, How]]] = {
    ("harness", "kill"): [("request", "cut"), ("reply", "cut")],
    ("harness", "freeze"): [("sent", "delay")],
    ("harness", "late"): [("request", "hold")],
    ("store", "kill"): [("request", "cut"), ("reply", "cut")],
    ("store", "freeze"): [("request", "delay")],
    ("proxy", "kill"): [("request", "cut")],
    ("proxy", "freeze"): [("request", "delay")],
    ("sandboxd", "kill"): [("request", "cut"), ("sent", "delay"), ("reply", "cut")],
    ("sandboxd", "freeze"): [("request", "delay"), ("sent", "delay")],
}
"""What happens to the bytes by which a moment is known: those of a process that stands still do arrive."""

MODEL = {
    f"{what} {nth}": (pattern, nth)
    for nth in (1, 2)
    for what, pattern in (("request", b"POST /v1/messages"), ("stream", b"content_block_delta"))
}


def strikes() -> Iterator[Strike]:
    """The whole matrix."""
    for (whom, what), ways in WAYS.items():
        for moment, how in ways:
            some: dict[str, Any] = {"whom": whom, "what": what}
            if whom in ("harness", "store"):
                for phase, pattern in STORE.items():
                    yield Strike("store", phase, Fault(pattern, moment, how, stall_s=0.0), **some)
            if whom in ("harness", "sandboxd"):
                fault = Fault(b"POST /v1/execute", moment, how, stall_s=0.0)
                yield Strike("sandboxd", "call", fault, **some)
            if whom == "proxy" or (whom == "harness" and moment != "reply" and what != "late"):
                for phase, (pattern, nth) in MODEL.items():
                    when: Moment = "stream" if phase.startswith("stream") else moment
                    yield Strike("model", phase, Fault(pattern, when, how, nth, 0.0), **some)
    for what, moment, how in (("kill", "reply", "cut"), ("freeze", "sent", "delay")):
        fault = Fault(STORE["response"], moment, how, stall_s=0.0)  # type: ignore[arg-type]
        yield Strike("store", "response", fault, "harness", what, hint=False)  # type: ignore[arg-type]


SAMPLE = {
    "harness-kill-store-response-reply",
    "store-kill-store-request-reply",
    "proxy-kill-model-stream 1-stream",
    "sandboxd-kill-sandboxd-call-sent",
}


class Processes(Rig):
    """A rig whose processes can be struck. `to_store` is the way of the harness that works now."""

    server: Server
    proxy: asyncio.subprocess.Process
    spare: asyncio.subprocess.Process | None = None
    proxy_argv: tuple[str, ...]
    pod = ""
    frozen: tuple[str, FaultProxy] | None = None
    refused = 0

    async def new_harness(self, prelude: str = "") -> str:
        """Another harness, with a way of its own to the store."""
        self.to_store = await FaultProxy(self.server.port).start()
        self.pod = await self.here.worker(prelude=prelude, COWHAND_STORE_URL=self.store_url)
        self.ways.append(self.to_store)
        return self.pod

    async def _spare_proxy(self) -> asyncio.subprocess.Process:
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        argv = (sys.executable, "-m", *self.proxy_argv)
        with (self.here.folder / "proxy.log").open("ab") as out:
            return await asyncio.create_subprocess_exec(
                *argv, env=env, stdin=asyncio.subprocess.PIPE, stdout=out, stderr=out
            )

    async def start_proxy(self) -> None:
        """A proxy that listens; the next one is kept ready, so that no turn gives up while Python starts."""
        self.proxy = self.spare or await self._spare_proxy()
        assert self.proxy.stdin is not None
        self.proxy.stdin.write(b"\n")
        self.spare = await self._spare_proxy()

        async def answers() -> bool:
            with contextlib.suppress(aiohttp.ClientError):
                async with self.here.http.get(f"{self.here.proxy_url}/cowhand/keys") as answer:
                    return answer.status == 200
            return False

        await until("the proxy answers", answers)

    def strike(self, case: Strike) -> None:
        """Called by the fault proxy when the moment has come."""
        number = signal.SIGKILL if case.what == "kill" else signal.SIGSTOP
        match case.whom:
            case "harness":
                self.here.workers[self.pod].send_signal(number)
            case "store":
                self.server.kill() if case.what == "kill" else self.server.freeze()
            case "proxy":
                self.proxy.send_signal(number)
            case "sandboxd":
                next(reversed(self.here.pods.values())).process.send_signal(number)
        self.struck.set()

    async def aftermath(self, case: Strike) -> None:
        """What a cluster does about it."""
        await self.struck.wait()
        match case.whom, case.what:
            case "harness", what:
                await self._replace(case.hint, killed=what == "kill", late=what == "late")
            case "store", "kill":
                await asyncio.to_thread(self.server.start)
            case "store", _:
                await asyncio.sleep(LONG_STALL_S)
                self.server.thaw()
            case "proxy", "kill":
                await self.proxy.wait()
                await self.start_proxy()
            case "proxy", _:
                await asyncio.sleep(FROZEN_S)
                self.proxy.send_signal(signal.SIGCONT)
            case "sandboxd", "kill":
                pod = next(reversed(self.here.pods.values()))
                await pod.process.wait()
                pod.process = await pod.start()
            case "sandboxd", _:
                await asyncio.sleep(FROZEN_S)
                next(reversed(self.here.pods.values())).process.send_signal(signal.SIGCONT)

    async def _replace(self, hint: bool, *, killed: bool, late: bool) -> None:
        pod, way = self.pod, self.to_store
        if killed:
            await self.here.workers.pop(pod).wait()
        else:
            self.frozen = pod, way
        if late:
            # Cut off from the store, but for what is under way. Otherwise the store may nominate it while it stands
            # still, and the session waits until that has run out (`ORPHAN_MS`), as it does in the cases `freeze`.
            way.cut_others()
        if hint:
            await self.here.store.control_log().drop_worker(NAMESPACE, pod)
        await self.new_harness()

    async def wake(self, case: Case, session_id: str, before: list[Event]) -> None:
        """The frozen harness goes on: it must notice that it holds nothing any more."""
        if self.frozen is None:
            return
        (pod, way), self.frozen = self.frozen, None
        heard = way.replies
        held = self.to_sandboxd[-1] if case.to == "sandboxd" else way
        if case.fault.how == "hold":
            held.release()
        if held is way and case.fault.how == "hold":
            await until("the store has answered what was late", lambda: way.replies > heard)
        beaten = Fault(BEAT, "reply", "delay", stall_s=0.0)
        way.arm(beaten)
        self.here.workers[pod].send_signal(signal.SIGCONT)
        await until("it beats again", way.fired.is_set, 30)
        self.refused += way.fenced
        after = await self.here.events(session_id)
        assert after == before, f"it wrote {[event.type for event in after[len(before) :]]}"
        # The other one goes, so that the next case shows that this one still works.
        other = self.pod
        self.here.workers[other].kill()
        await self.here.workers.pop(other).wait()
        await self.here.store.control_log().drop_worker(NAMESPACE, other)
        self.pod, self.to_store = pod, way

    async def turn(self, case: Case) -> tuple[str, Report]:
        assert isinstance(case, Strike)
        self.struck = asyncio.Event()
        case = replace(case, fault=replace(case.fault, strike=lambda: self.strike(case)))
        task = asyncio.create_task(self.aftermath(case))
        try:
            session_id, report = await super().turn(case)
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self.wake(case, session_id, await patient(lambda: self.here.events(session_id)))
        return session_id, report

    def wrong(self, case: Case, answers: list[tuple[str, bool]], ran: int) -> list[str]:
        assert isinstance(case, Strike)
        if (case.whom, case.what) != ("sandboxd", "kill"):
            return super().wrong(case, answers, ran)
        # It cannot know whether the command had an effect: it says so, and never runs it again.
        told = len(answers) == 1 and answers[0][1] and "sandboxd restarted" in answers[0][0]
        return [] if told and ran <= 1 else super().wrong(case, answers, ran)

    async def close(self) -> None:
        self.server.thaw()
        for way in self.ways:
            await way.close()
        await super().close()
        for process in (self.proxy, self.spare):
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()


def quiet_port() -> int:
    """A free port that no connection is given while its process is down (those begin at 32768)."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


@contextlib.asynccontextmanager
async def processes(folder: Path, prelude: str = "") -> AsyncIterator[Processes]:
    """A rig with one harness; each process of it is one of the system's."""
    # What a killed server has answered is on disk: losing acknowledged events is another test's subject.
    server, port = Server(fsync="always").start(), quiet_port()
    argv: list[str] = []

    async def way_to_proxy(broker: StubBroker) -> str:
        key = broker.key.private.private_bytes_raw().hex()
        argv.extend(("support.proxy_process", str(port), key, broker.model_url))
        return f"http://127.0.0.1:{port}"

    try:
        async with rig(server.url, folder, kind=Processes, way_to_proxy=way_to_proxy) as made:
            made.server, made.proxy_argv, made.ways = server, tuple(argv), []
            await made.start_proxy()
            await made.new_harness(prelude)
            yield made
    finally:
        server.stop()


def part(case: Strike) -> str:
    """The test of the whole matrix that a case belongs to."""
    return f"{case.whom}-{case.what}"


@pytest.mark.parametrize("which", dict.fromkeys(map(part, strikes())) if ALL else ["sample"])
async def test_a_turn_survives_the_end_or_the_sleep_of_a_process_at_every_phase(
    which: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    wanted = [one for one in strikes() if (part(one) == which if ALL else str(one) in SAMPLE)]
    assert wanted
    assert ALL or len(wanted) == len(SAMPLE)
    found: list[str] = []
    async with processes(tmp_path) as made:
        for case in wanted:
            found += await made.check(case)
        refused = made.refused
    record_property("real processes killed or frozen", len(wanted))
    record_property("strikes not survived", len({line.split(": ")[0] for line in found}))
    record_property("writes of woken harnesses refused", refused)
    assert not found, "\n" + "\n".join(found)
    assert refused or "late" not in "".join(map(str, wanted)), "no late write met the fence"


FENCE = "if m[2] ~= lease then return {'FENCED', m[2]} end\n"
NO_FENCE = f"""
from cowhand.session import scripts
real = scripts.load
def load():
    found = real()
    source = found["append"].source
    assert source.count({FENCE!r}) == 1
    found["append"] = scripts.Script("append", source.replace({FENCE!r}, ""))
    return found
scripts.load = load
"""


@pytest.mark.parametrize("fence", [True, False], ids=["fenced", "control: no fence"])
async def test_a_result_that_arrives_while_another_harness_holds_the_session(
    fence: bool, tmp_path: Path
) -> None:
    """Frozen with a tool's result on its way, which arrives when the next one has logged it and waits for Claude."""
    assert lua.load()["append"].source.count(FENCE) == 1
    async with processes(tmp_path, "" if fence else NO_FENCE) as made:
        here, way = made.here, made.to_store
        use = {"type": "tool_use", "name": "bash", "input": {"command": COUNT}}
        # With one error the other harness has come to its fourth append, and the late one is the fifth of its lease.
        fault = {"kind": "529", "times": 1}
        answer = {"content": [{"type": "text", "text": "ok"}], "gate": "late", "fault": fault}
        await here.script("late", {"content": [use]}, answer)
        case = Strike("store", "result", Fault(STORE["result"], "request", "hold"), what="late")
        made.struck = asyncio.Event()
        way.arm(replace(case.fault, strike=lambda: made.strike(case)))
        session_id = await here.create("[[script:late]]")
        await made.aftermath(case)
        await here.at_gate("late")
        await here.control("POST", "release/late?once=1")
        await here.reaches(session_id, ev.MODEL_REQUEST_START, 3)
        await here.at_gate("late")
        heard = way.replies
        way.release()
        await until("the store has answered what was late", lambda: way.replies > heard)
        wrote = len(await here.of(session_id, ev.TOOL_RESULT))
        await here.release("late")
        events = await here.settled(session_id)
        report = verify(Export(header_of(await here.state(session_id), 0), tuple(events)))
        if fence:
            assert way.fenced == 1
            assert wrote == 1
            assert not report.violations
            await made.wake(replace(case, fault=replace(case.fault, how="cut")), session_id, events)
        else:
            assert wrote == 2, "without the fence the late append is accepted"
            assert report.violations, "and `cowhand verify` finds it"
