"""The loop of one claimed session: decide, do, append, until there is nothing to do.

`Worker` makes one `SessionLoop` for each session it holds. Everything the loop knows comes from the
log; what it keeps beside it only says what this process itself has begun. Requests and tools can
be stopped at any moment (interrupt, drain); appends are never torn.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Literal, TypeVar

from cowhand.errors import LogIncompatible, Suspended, UserError
from cowhand.hands.base import Outcome, next_instance
from cowhand.hands.registry import Delivery, Hands
from cowhand.harness import decide, metering
from cowhand.harness.admission import Admission
from cowhand.harness.budget import calls_left, cost_nanousd, seconds_left
from cowhand.harness.calls import ToolCall, plan_open, plan_tools
from cowhand.harness.context import outgoing, renewal
from cowhand.harness.decide import (
    Append,
    Park,
    Provision,
    RunTools,
    SendRequest,
    Stop,
    next_step,
)
from cowhand.harness.fold import tool_uses
from cowhand.harness.journal import Journal, steadily
from cowhand.harness.model import Model, Response
from cowhand.harness.profiles.base import Profile
from cowhand.harness.slots import NoSlots, Slots
from cowhand.harness.stream import ModelError
from cowhand.harness.window import Purpose
from cowhand.session import events as ev
from cowhand.session.events import NewEvent
from cowhand.session.gate import OpenGate, RateGate
from cowhand.session.log import HandRecord, Parked, SessionLog, State, WorkerLog
from cowhand.session.preview import Kind
from cowhand.telemetry.metrics import RESCHEDULED

log = logging.getLogger(__name__)

T = TypeVar("T")

TOUCH_S: Final = 60.0
"""How often a session that appends nothing pushes its progress deadline."""

MAX_TOOL_TIMEOUT_MS: Final = 3_600_000

TOO_LARGE: Final = "response_too_large"
"""Error type of a response that the log cannot hold; a repeat would be as long, so it ends the turn."""


class End(Enum):
    """How the work on a session ended."""

    PARKED = "parked"
    CLOSED = "closed"
    DRAINED = "drained"


class Stopped(Exception):
    """An interrupt, the end of the log or a drain stopped what was running."""


@dataclass(frozen=True)
class LoopSettings:
    """Limits of the loop.

    Attributes:
        tool_timeout_ms: time limit of a call that names none.
        wait_s: longest wait for a model request, seconds, that keeps a place in the worker; a longer one gives the
            session back until then.
    """

    tool_timeout_ms: int = 120_000
    wait_s: float = 5.0


@dataclass(frozen=True)
class Surroundings:
    """What a worker gives each of its sessions.

    Attributes:
        model: the model client.
        make_hands: session -> its hands.
        admit: returns when new work may start (the worker's heartbeat is fresh).
        gate: rate gate of the tenant; by default it is always open.
        slots: turns at the workspace that tenants share; by default nobody waits.
        preview: session id, position of the request, index of the block, text, `text` or `thinking`: called for
            each piece of a turn's response as it streams; must not wait.
        preview_end: session id: the response is over, whole or not.
        probe: called with the name of each point that a crash test may stop at.
        profiles: installed context profiles by name.
    """

    model: Model
    make_hands: Callable[[SessionLoop], Hands]
    admit: Callable[[], Awaitable[None]]
    gate: RateGate = field(default_factory=OpenGate)
    slots: Slots = field(default_factory=NoSlots)
    preview: Callable[[str, int, int, str, Kind], None] = lambda *_: None
    preview_end: Callable[[str], None] = lambda _session: None
    probe: Callable[[str], None] = lambda _point: None
    profiles: Mapping[str, Profile] = field(default_factory=dict)


class SessionLoop:
    """The work on one session under one lease; also the `hands.base.Host` of its hands.

    Args:
        namespace: the tenant.
        worker: the worker's side of the log.
        journal: the claimed session.
        around: model, hands and hooks.
        settings: limits.
    """

    def __init__(
        self,
        namespace: str,
        worker: WorkerLog,
        journal: Journal,
        around: Surroundings,
        settings: LoopSettings,
    ) -> None:
        self._namespace = namespace
        self._worker = worker
        self._journal = journal
        self._around = around
        self._settings = settings
        self._hands = around.make_hands(self)
        self._poked = asyncio.Event()
        self._news = asyncio.Event()
        # What each stops: a stream; tools, which go on in their hands; waiting for anything.
        self._stop_stream = asyncio.Event()
        self._stop_tools = asyncio.Event()
        self._stop_waits = asyncio.Event()
        self._draining = False
        self._streaming = False
        self._fresh: set[str] = set()
        self._provisioned = False
        self._waited: tuple[int, int, str] | None = None
        self._admission = Admission(around.gate, journal.lease.workspace)

    # What the worker calls.

    @property
    def streaming(self) -> bool:
        """A model request is under way."""
        return self._streaming

    def poke(self) -> None:
        """New input, or a hand changed."""
        self._poked.set()

    def drain(self) -> None:
        """Give the session to another worker: at once, or when the running stream has ended."""
        self._draining = True
        self._signal()
        self._news.set()

    async def run(self) -> End:
        """Work until there is nothing to do.

        Raises:
            Fenced, SessionClosed, StoreMismatch.
        """
        try:
            await self._journal.load()
        except LogIncompatible as err:
            return await self._refuse(err)
        self._around.probe("loaded")
        watcher = asyncio.create_task(self._watch())
        try:
            return await self._with(watcher)
        except LogIncompatible as err:
            return await self._refuse(err)
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            await self._admission.close()
            await self._journal.close()

    # Host of the hands.

    @property
    def session_id(self) -> str:
        """See `Host`."""
        return self._journal.lease.session_id

    @property
    def namespace(self) -> str:
        """See `Host`."""
        return self._namespace

    @property
    def lease(self) -> str:
        """See `Host`."""
        return self._journal.lease.value

    @property
    def reader(self) -> SessionLog:
        """Reads events; what an agent reads of its own log comes from here."""
        return self._journal.reader

    def hand_state(self, hand: str) -> tuple[int, str] | None:
        """See `Host`."""
        state = self._journal.conversation.hands.get(hand)
        return None if state is None else (state.instance, state.state)

    async def append(self, events: Sequence[NewEvent]) -> None:
        """See `Host`."""
        await self._journal.append(events)
        self._around.probe("hand")

    async def get_hand(self, hand: str, instance: int) -> HandRecord | None:
        """See `Host`."""
        return await steadily(
            "hand record", lambda: self._worker.get_hand(self.session_id, hand, instance)
        )

    async def changed(self, timeout: float) -> None:
        """See `Host`; a suspended session does not wait for its hands, it asks again later.

        Raises:
            Stopped.
        """
        self._news.clear()
        if self._stop_waits.is_set():
            raise Stopped
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), timeout)
        if self._stop_waits.is_set():
            raise Stopped

    # The loop.

    async def _with(self, watcher: asyncio.Task[None]) -> End:
        """Run the loop; an error of the watcher ends it too."""
        work = asyncio.create_task(self._work())
        try:
            await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                watcher.result()
            return await work
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _watch(self) -> None:
        """Fold input as it is announced; keep the progress deadline away."""
        while True:
            try:
                await asyncio.wait_for(self._poked.wait(), TOUCH_S)
            except TimeoutError:
                await steadily("touch", lambda: self._worker.touch(self._journal.lease))
                continue
            self._poked.clear()
            self._news.set()
            await self._journal.sync()
            self._signal()

    def _signal(self) -> None:
        conversation = self._journal.conversation
        now = conversation.interrupted or conversation.closed
        _put(self._stop_stream, now)
        _put(self._stop_tools, now or self._draining)
        _put(self._stop_waits, now or self._draining or conversation.suspended)

    async def _work(self) -> End:
        conversation = self._journal.conversation
        while True:
            await self._around.admit()
            self._signal()
            if self._draining:
                return await self._hand_over()
            step = next_step(
                conversation,
                provisioned=self._provisioned,
                profiles=self._around.profiles,
                now_ms=self._journal.now_ms(),
            )
            self._around.probe(f"step:{type(step).__name__}")
            match step:
                case Append():
                    await self._journal.append(step.events)
                case SendRequest():
                    await self._request(step)
                case RunTools():
                    await self._tools(step)
                case Provision():
                    await self._provision(step)
                case Stop():
                    return End.CLOSED
                case Park():
                    if (await self._give_back(conversation.last_seq + 1, step.until)).parked:
                        return End.PARKED
                    await self._journal.sync()

    async def _give_back(self, expected: int, until: int | None = None) -> Parked:
        self._around.probe("park")
        lease = self._journal.lease
        state: State = "idle" if until is None else "rescheduling"
        return await steadily(
            "park", lambda: self._worker.park(lease, expected, state=state, wake_at_ms=until)
        )

    async def _hand_over(self) -> End:
        lease = self._journal.lease
        await steadily("handover", lambda: self._worker.handover(lease))
        return End.DRAINED

    async def _refuse(self, reason: LogIncompatible) -> End:
        """A log of another release: say so and park, whatever has arrived."""
        log.error("session %s: %s", self.session_id, reason)
        expected = await self._journal.refuse(reason)
        while True:
            answer = await self._give_back(expected)
            if answer.parked:
                return End.PARKED
            expected = answer.next_seq

    async def _race(self, work: Coroutine[Any, Any, T], stop: asyncio.Event) -> T:
        """The result of `work`, unless `stop` is set or the budget's time is up first: then it is cancelled.

        Raises:
            Stopped.
        """
        left = seconds_left(self._journal.conversation, self._journal.now_ms())
        task = asyncio.ensure_future(work)
        stopper = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait(
                {task, stopper},
                timeout=None if left is None else max(0.0, left),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if task.done():
                return task.result()
            raise Stopped
        finally:
            for pending in (task, stopper):
                pending.cancel()
            await asyncio.gather(task, stopper, return_exceptions=True)

    def _running(self) -> tuple[NewEvent, ...]:
        """`session.status_running`, where the session was idle or rescheduled before."""
        conversation = self._journal.conversation
        waited = conversation.wake_at is not None
        fresh = waited or conversation.idle is not None or conversation.n == 0
        return (NewEvent(ev.STATUS_RUNNING, {}),) if fresh else ()

    async def _provision(self, step: Provision) -> None:
        """An eager hand comes before the first request; without it the first call says why."""
        try:
            outcome = await self._race(self._hands.provision(step.hand), self._stop_waits)
        except Stopped:
            return
        if outcome is not None:
            log.warning("session %s: hand %s: %s", self.session_id, step.hand, outcome.content)
        self._provisioned = True

    # Model requests.

    async def _request(self, step: SendRequest) -> None:
        conversation = self._journal.conversation
        if not await self._may_send(step):
            return
        out = outgoing(
            conversation,
            n=step.n,
            attempt=step.attempt,
            horizon=step.horizon,
            max_tokens=step.max_tokens,
            purpose=step.purpose,
            now_ms=self._journal.now_ms(),
        )
        begin = (*self._running(), NewEvent(ev.MODEL_REQUEST_START, out.start))
        try:
            await self._journal.append(begin)
        except Suspended:
            return
        seq = conversation.open_seq
        self._around.probe("request")
        self._streaming = True
        try:
            # Named nowhere, so that the request is gone once it is sent: the answer may take minutes.
            response = await self._race(
                self._stream(out.render(), out.betas, step.purpose, seq), self._stop_stream
            )
        except Stopped:
            await self._journal.append((_request_end(seq, "interrupted"),))
        except ModelError as err:
            await self._admission.failed(err)
            await self._journal.append(self._request_failed(seq, err))
        else:
            self._admission.answered()
            self._around.probe("response")
            if step.purpose == "turn":
                await self._received(step, seq, response)
            else:
                events = renewal(
                    conversation, step.purpose, seq, response.message, self._cost(response)
                )
                await self._journal.append(events, barrier=True)
        finally:
            self._streaming = False
            self._around.preview_end(self.session_id)

    async def _may_send(self, step: SendRequest) -> bool:
        """Wait for the backoff and for the rate gate; False: something was waited for, so look at the log again."""
        conversation = self._journal.conversation
        attempt = (step.n, step.attempt, step.purpose)
        if step.backoff[1] > 0 and self._waited != attempt:
            failure = conversation.window.side_error or conversation.error or {}
            pause = random.uniform(*step.backoff)  # noqa: S311
            if await self._pause(str(failure.get("type", "")), pause):
                self._waited = attempt
            return False
        entry = await self._admission.enter(str(conversation.base["model"]), conversation.wake_at)
        if not entry.place:
            return await self._turn()
        await self._pause(entry.kind, (entry.place - self._journal.now_ms()) / 1000)
        return False

    async def _turn(self) -> bool:
        """Wait for a slot of the workspace; False: it took a while, so look at the log again, the slot is kept."""
        reserve = self._around.slots.reserve
        waited = False
        with contextlib.suppress(Stopped):
            while not await self._race(reserve(self.session_id, self.lease), self._stop_waits):
                waited = True
            return not waited
        return False

    async def _pause(self, reason: str, pause: float) -> bool:
        """Wait here, or give the session back where that takes long; True if the time has passed."""
        if pause > self._settings.wait_s:
            await self._reschedule(reason, pause)
            return False
        with contextlib.suppress(Stopped):
            await self._race(asyncio.sleep(max(0.0, pause)), self._stop_waits)
            return True
        return False

    async def _reschedule(self, reason: str, pause: float) -> None:
        """Say in the log when the next request may be sent; the step that follows gives the session back till then."""
        wake_at = self._journal.now_ms() + round(pause * 1000)
        data = {"reason": reason, "wake_at": wake_at}
        await self._journal.append((NewEvent(ev.STATUS_RESCHEDULED, data),))
        RESCHEDULED.labels(metering.kind(reason)).inc()

    def _stream(
        self, raw: bytes, betas: Sequence[str], purpose: Purpose, seq: int
    ) -> Coroutine[Any, Any, Response]:
        def on_text(block: int, text: str, kind: Kind = "text", /) -> None:
            if purpose == "turn":  # a summary or notes are no answer to anybody
                self._around.preview(self.session_id, seq, block, text, kind)

        return self._around.model.stream(
            raw,
            session_id=self.session_id,
            lease=self.lease,
            on_text=on_text,
            on_start=self._admission.answered,
            betas=betas,
        )

    def _request_failed(self, seq: int, err: ModelError) -> tuple[NewEvent, ...]:
        log.warning("session %s: model request failed: %s: %s", self.session_id, err.type, err)
        end = _request_end(seq, "error", error=err.data())
        conversation = self._journal.conversation
        side = conversation.window.side is not None
        failures = conversation.window.side_failures if side else conversation.failures
        if decide.retried(err.type, failures + 1):
            return end, decide.error(err.type, str(err), "retrying")
        return (end,)

    async def _received(self, step: SendRequest, seq: int, response: Response) -> None:
        """Append a complete response, and in the same append what may start at once."""
        conversation = self._journal.conversation
        uses = tool_uses(response.message, conversation.custom_tools)
        cut = any(use.cut for use in uses) and response.message["stop_reason"] == "max_tokens"
        if cut and not step.accept_cut:
            spent = {"usage": response.message.get("usage") or {}, **self._cost(response)}
            await self._journal.append((_request_end(seq, "truncated", **spent),))
            return
        data = {
            "message": response.message,
            "start": seq,
            "request_id": response.request_id,
            "ttft_ms": response.ttft_ms,
            "duration_ms": response.duration_ms,
            **self._cost(response),
        }
        events = [NewEvent(ev.MODEL_RESPONSE, data), _request_end(seq, "ok")]
        begin: tuple[ToolCall, ...] = ()
        if uses:
            # What the log held before the response came counts, also when its announcement is still under way.
            await self._journal.sync()
            self._signal()
        if uses and not self._stop_waits.is_set() and response.message["stop_reason"] != "refusal":
            assert conversation.created is not None
            plan = plan_tools(
                conversation.created,
                uses,
                decisions=conversation.decisions,
                left=calls_left(conversation),
            )
            begin = plan.run
            events += plan.events
        try:
            begin = await self._append_and_begin(events, begin)
        except UserError as err:
            await self._journal.append(
                (_request_end(seq, "error", error={"type": TOO_LARGE, "message": str(err)}),)
            )
            return
        self._fresh.update(call.use.id for call in begin)
        self._around.probe("appended")

    def _cost(self, response: Response) -> dict[str, int]:
        """What a response cost at the prices of the session, if they are known."""
        prices = (self._journal.conversation.created or {}).get("prices")
        usage = response.message.get("usage") or {}
        return {"cost_nanousd": cost_nanousd(usage, prices)} if prices else {}

    # Tools.

    async def _append_and_begin(
        self, events: Sequence[NewEvent], calls: tuple[ToolCall, ...]
    ) -> tuple[ToolCall, ...]:
        """Append, and in the same append the start of these calls; answers those that may run now."""
        if calls:
            try:
                await self._journal.append((*events, *self._started(calls)), barrier=True)
            except Suspended:
                log.info("session %s was suspended: nothing new begins", self.session_id)
            else:
                return calls
        await self._journal.append(events)
        return ()

    def _started(self, calls: Sequence[ToolCall]) -> list[NewEvent]:
        """`tool.started` of calls that this worker is about to make."""
        return [
            NewEvent(
                ev.TOOL_STARTED,
                {
                    "tool_use_id": call.use.id,
                    "call_id": f"{self.session_id}/{call.use.id}",
                    "name": call.use.name,
                    "attempt": 1,
                    "hand": call.hand,
                    "instance": next_instance(self.hand_state(call.hand)),
                    "class": call.klass,
                    "timeout_ms": self._timeout_ms(call),
                },
            )
            for call in calls
        ]

    def _timeout_ms(self, call: ToolCall) -> int:
        asked = call.use.input.get("timeout_ms")
        if type(asked) is int and asked > 0:
            return min(asked, MAX_TOOL_TIMEOUT_MS)
        return self._settings.tool_timeout_ms

    async def _tools(self, step: RunTools) -> None:
        conversation = self._journal.conversation
        new = [call for call in step.calls if call.use.id not in conversation.started]
        if new:
            events = (*self._running(), *self._started(new))
            try:
                await self._journal.append(events, barrier=True)
            except Suspended:
                return
            self._fresh.update(call.use.id for call in new)
            self._around.probe("started")
        deliveries = {call.use.id: self._delivery(call) for call in step.calls}
        work = _all([self._call(call, deliveries[call.use.id]) for call in step.calls])
        try:
            await self._race(work, self._stop_tools)
        except Stopped:
            left = seconds_left(conversation, self._journal.now_ms())
            if conversation.interrupted or (left is not None and left <= 0):
                running = [d for use, d in deliveries.items() if use not in conversation.results]
                await self._hands.interrupt(running)

    def _delivery(self, call: ToolCall) -> Delivery:
        started = self._journal.conversation.started[call.use.id]
        return Delivery(
            hand=str(started["hand"]),
            instance=int(started["instance"]),
            call_id=str(started["call_id"]),
            timeout_ms=int(started["timeout_ms"]),
            again=call.use.id not in self._fresh,
        )

    async def _call(self, call: ToolCall, delivery: Delivery) -> None:
        # From here on the call may have been sent: whoever runs it again must ask first.
        self._fresh.discard(call.use.id)
        outcome = await self._hands.execute(call.use.name, call.use.input, delivery=delivery)
        self._around.probe("executed")
        await self._finish(call, delivery, outcome)

    async def _finish(self, call: ToolCall, delivery: Delivery, outcome: Outcome) -> None:
        """Append a result, and with it the start of the call that follows."""
        data: dict[str, Any] = {
            "tool_use_id": call.use.id,
            "content": outcome.content,
            "is_error": outcome.is_error,
            "synthesized": outcome.synthesized,
            "hand": delivery.hand,
            "instance": delivery.instance,
        }
        if outcome.exit_code is not None:
            data["exit_code"] = outcome.exit_code
        if outcome.duration_ms is not None:
            data["duration_ms"] = outcome.duration_ms
        conversation = self._journal.conversation
        begin: tuple[ToolCall, ...] = ()
        if not self._stop_waits.is_set() and call.klass != "pure":
            begin = plan_open(conversation, resolved=(call.use.id,)).run
        begin = tuple(item for item in begin if item.use.id not in conversation.started)
        begin = await self._append_and_begin((NewEvent(ev.TOOL_RESULT, data),), begin)
        self._fresh.update(item.use.id for item in begin)
        self._around.probe("result")


def _put(event: asyncio.Event, value: bool) -> None:
    if value:
        event.set()
    else:
        event.clear()


async def _all(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all at the same time; the first error cancels the others."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _request_end(
    start: int, outcome: Literal["ok", "error", "interrupted", "truncated"], **more: Any
) -> NewEvent:
    return NewEvent(ev.MODEL_REQUEST_END, {"start": start, "outcome": outcome, **more})
