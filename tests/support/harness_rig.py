"""A small world for the harness: a log, a scripted Claude, sandboxes, and a killer, all in memory.

Every await that leaves the process passes `World.point`. A test counts the points of a quiet run, and
then kills a worker at each of them, or lets the store fail there, or lets input arrive there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cowhand.errors import (
    Fenced,
    SessionClosed,
    SessionNotFound,
    StoreUnavailable,
    Suspended,
    UserError,
)
from cowhand.hands.sandbox import SandboxSettings
from cowhand.hands.toolset import ALL_TOOLS, custom_tool, request_base
from cowhand.hands.transport import Broken, Endpoint, NotSent
from cowhand.harness.journal import Journal
from cowhand.harness.loop import End, LoopSettings, SessionLoop
from cowhand.harness.model import Response
from cowhand.harness.run import surroundings
from cowhand.session import events as ev
from cowhand.session.events import Event, NewEvent
from cowhand.session.log import (
    Created,
    HandRecord,
    Held,
    Lease,
    Parked,
    SessionMeta,
    SessionState,
    State,
)
from cowhand.wire.keys import SigningKey
from cowhand.wire.records import sign_record

SID = "sesn_" + "0" * 32
NAMESPACE = "team-a"
WORKSPACE = "workspace-1"
KEY = SigningKey.generate()


def created(
    *,
    permissions: Mapping[str, str] | None = None,
    provisioning: str = "Lazy",
    budget: Mapping[str, int] | None = None,
    max_tokens: int = 1000,
    hands: bool = True,
    assembler: int = 1,
    custom: Sequence[str] = (),
    prices: Mapping[str, int] | None = None,
    model: str = "m",
    context: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Data of a `session.created`; `custom` are names of custom tools."""
    allowed = {**dict.fromkeys(ALL_TOOLS, "Allow"), **(permissions or {})}
    hand = {"name": "main", "kind": "sandbox", "provisioning": provisioning, "environment": {}}
    return {
        "namespace": NAMESPACE,
        "name": "s",
        "uid": "u",
        "agent": {"name": "a", "uid": "u", "generation": 1, "hash": "h"},
        "request": request_base(
            model=model,
            max_tokens=max_tokens,
            system="be concise",
            tools=allowed,
            custom=[custom_tool(name, "for a test", {"type": "object"}) for name in custom],
        ),
        "custom_tools": list(custom),
        **({"prices": dict(prices)} if prices else {}),
        "permissions": allowed,
        "hands": [hand] if hands else [],
        "resources": [],
        "budget": dict(budget or {}),
        "assembler": assembler,
        **({} if context is None else {"context": dict(context), "assembler": 2}),
    }


def user(text: str, event_id: str = "m") -> NewEvent:
    """A `user.message`."""
    content = [{"type": "text", "text": text}]
    return NewEvent(ev.USER_MESSAGE, {"content": content, "actor": {"user": "u"}}, id=event_id)


def tool_use(use_id: str, name: str = "bash", **data: Any) -> dict[str, Any]:
    """A `tool_use` block."""
    return {"type": "tool_use", "id": use_id, "name": name, "input": data or {"command": use_id}}


def text(value: str) -> dict[str, Any]:
    """A text block."""
    return {"type": "text", "text": value}


def message(*content: dict[str, Any], stop_reason: str = "end_turn", **more: Any) -> dict[str, Any]:
    """A response of the model."""
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": list(content),
        "stop_reason": stop_reason,
        "usage": {"input_tokens": 10, "output_tokens": 5},
        **more,
    }


@dataclass
class World:
    """What outlives a worker: the log, the sandboxes, the requests that the model saw.

    Attributes:
        timer: when the session that was parked last wants to be woken, milliseconds.
        tick: the store's clock, milliseconds; events add a little to it.
        on_point: called with the number and name of each point; may kill, raise or emit.
    """

    events: list[Event] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    lease: str = ""
    epoch: int = 0
    status: dict[str, Any] = field(default_factory=dict)
    records: dict[tuple[str, int], HandRecord] = field(default_factory=dict)
    requests: list[bytes] = field(default_factory=list)
    sandboxes: dict[str, Sandbox] = field(default_factory=dict)
    points: int = 0
    on_point: Callable[[int, str], None] = lambda _number, _name: None
    on_news: Callable[[], None] = lambda: None
    hand_state: Literal["Ready", "Pending", "Failed"] = "Ready"
    fenced_appends: int = 0
    timer: int | None = None
    tick: int = 0

    def put(self, kind: str, payload: bytes, *, event_id: str = "", lease: str = "") -> int:
        seq = len(self.events) + 1
        self.events.append(Event(seq, kind, event_id, self.tick + seq, lease, payload))
        return seq

    def emit(self, event: NewEvent) -> int:
        """Input from outside."""
        if event.id in self.ids:
            return self.ids[event.id]
        seq = self.put(event.type, event.payload(), event_id=event.id)
        self.ids[event.id] = seq
        self.on_news()
        return seq

    def point(self, name: str) -> None:
        self.points += 1
        self.on_point(self.points, name)

    def types(self) -> list[str]:
        return [event.type for event in self.events]

    def data(self, kind: str) -> list[Mapping[str, Any]]:
        return [event.data for event in self.events if event.type == kind]

    def provision(self, hand: str, instance: int) -> None:
        """What operator and broker do after `hand.requested`."""
        if (hand, instance) in self.records:
            return
        uid = f"sbx-{hand}-{instance}"
        record = HandRecord(
            SID, hand, instance, self.hand_state, reason="Test", message="for a test"
        )
        if self.hand_state == "Ready":
            record = HandRecord(
                SID, hand, instance, "Ready", sandbox=uid, sandbox_uid=uid, pod_uid=f"pod-{uid}",
                address=uid, cert_sha256="00" * 32, owner=SID, owner_epoch=1,
            )  # fmt: skip
            record = signed(record)
            self.sandboxes[uid] = Sandbox()
        self.records[hand, instance] = record

    def lose(self, hand: str = "main", instance: int = 1) -> None:
        """The pod is gone and the operator says so."""
        record = self.records[hand, instance]
        self.sandboxes.pop(record.sandbox_uid, None)
        self.records[hand, instance] = replace(record, state="Lost", reason="PodGone", signature="")
        self.on_news()

    def effects(self) -> list[str]:
        """Call ids in the order in which they really ran, over all sandboxes."""
        return [call for sandbox in self.sandboxes.values() for call in sandbox.ran]


def signed(record: HandRecord, namespace: str = NAMESPACE) -> HandRecord:
    """The record with the broker's signature."""
    return replace(record, signature=sign_record(record, KEY, namespace=namespace))


@dataclass
class Sandbox:
    """sandboxd's journal, and what really ran."""

    journal: dict[str, dict[str, Any]] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    run: Callable[[str, Mapping[str, Any]], str] = lambda name, data: f"{name} {json.dumps(data)}"
    highest: int = 0


class FakeLog:
    """`WorkerLog` and `SessionLog` of one worker incarnation on a `World`."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self._name = name
        self._last: tuple[tuple[NewEvent, ...], int] | None = None
        self.dead = asyncio.Event()
        self.paused = asyncio.Event()
        self.resume = asyncio.Event()

    @property
    def worker_id(self) -> str:
        return self._name

    async def _point(self, name: str) -> None:
        if self.dead.is_set():
            await asyncio.Event().wait()
        try:
            self._world.point(f"{self._name}:{name}")
        except Killed:
            self.dead.set()
            await asyncio.Event().wait()
        except Paused:
            self.paused.set()
            await self.resume.wait()
        await asyncio.sleep(0)

    async def beat(self) -> set[str]:
        return set()

    async def retire(self) -> None:
        return None

    async def work(self) -> AsyncIterator[str]:
        await asyncio.Event().wait()
        yield ""

    async def nudges(self) -> AsyncIterator[str]:
        await asyncio.Event().wait()
        yield ""

    async def claim(self, session_id: str) -> Lease | Held:
        world = self._world
        if session_id != SID:
            raise SessionNotFound("no such session")
        world.epoch += 1
        world.lease = f"{world.epoch}:{self._name}:n"
        seq = world.put(ev.SESSION_WAKE, b"", event_id=world.lease, lease=world.lease)
        return Lease(session_id, world.lease, world.epoch, seq + 1, WORKSPACE)

    async def append(
        self, lease: Lease, events: Sequence[NewEvent], *, status: dict[str, Any] | None = None
    ) -> int:
        await self._point("append")
        world, batch = self._world, tuple(events)
        if world.lease != lease.value:
            world.fenced_appends += 1
            raise Fenced("taken over")
        if any(len(event.payload()) > ev.INLINE_LIMIT for event in batch):
            raise UserError("payload over the limit")
        if any(event.type == ev.SESSION_DELETED for event in world.events):
            raise SessionClosed("deleted")
        mode = [
            e.type for e in world.events if e.type in (ev.SESSION_SUSPENDED, ev.SESSION_RESUMED)
        ]
        begins = any(event.type in ev.BEGINS for event in batch)
        if begins and mode[-1:] == [ev.SESSION_SUSPENDED] and self._last is None:
            raise Suspended("suspended")
        if self._last is not None and self._last[0] == batch:
            first = self._last[1]  # repeated after a lost answer
        else:
            first = len(world.events) + 1
            for event in batch:
                world.put(event.type, event.payload(), lease=lease.value)
                if event.type == ev.HAND_REQUESTED:
                    world.provision(event.data["hand"], event.data["instance"])
            if status is not None:
                world.status = status
        self._last = (batch, first)
        await self._point("appended")
        self._last = None
        return first

    async def barrier(self, lease: Lease | None = None) -> None:
        await self._point("barrier")

    async def touch(self, lease: Lease) -> None:
        return None

    async def park(
        self,
        lease: Lease,
        expected_next: int,
        *,
        state: State = "idle",
        wake_at_ms: int | None = None,
    ) -> Parked:
        await self._point("park")
        world = self._world
        if world.lease != lease.value:
            raise Fenced("taken over")
        if len(world.events) + 1 != expected_next:
            return Parked(False, len(world.events) + 1)
        world.lease = ""
        world.timer = wake_at_ms
        return Parked(True, expected_next)

    async def handover(self, lease: Lease) -> None:
        if self._world.lease != lease.value:
            raise Fenced("taken over")
        self._world.lease = ""

    async def sweep(self) -> int:
        return 0

    async def get_hand(self, session_id: str, hand: str, instance: int) -> HandRecord | None:
        await self._point("get_hand")
        return self._world.records.get((hand, instance))

    async def create_session(self, meta: SessionMeta, events: Sequence[NewEvent]) -> Created:
        raise NotImplementedError

    async def emit_event(self, session_id: str, event: NewEvent) -> int:
        raise NotImplementedError

    async def get_session(self, session_id: str) -> SessionState:
        raise NotImplementedError

    def follow(self, session_id: str, start: int = 1) -> AsyncIterator[Event]:
        raise NotImplementedError

    async def get_events(
        self, session_id: str, start: int = 1, end: int | None = None, *, limit: int | None = None
    ) -> list[Event]:
        await self._point("get_events")
        found = self._world.events[start - 1 : end]
        return found if limit is None else found[:limit]


class Killed(BaseException):
    """Raised by `on_point`: this worker is dead from here on."""


class Paused(BaseException):
    """Raised by `on_point`: this worker stands still here until the test sets `resume`."""


def fail(_number: int, _name: str) -> None:
    """For `on_point`: the store does not answer."""
    raise StoreUnavailable("for a test", after=0.0001)


Script = Callable[[dict[str, Any]], dict[str, Any] | Exception]


def check_request(body: dict[str, Any]) -> None:
    """What the real API refuses, as far as the harness could get it wrong."""
    messages = body["messages"]
    assert messages, "no messages"
    compacted = messages[0]["content"][0]["type"] == "compaction"
    assert compacted or messages[0]["role"] == "user", "the first message must be the user's"
    kinds = [block["type"] for entry in messages for block in entry["content"]]
    assert kinds.count("compaction") == int(compacted), "one compaction block, and first"
    assert str(body).count("'cache_control'") <= 4, "more than four cache breakpoints"
    open_ids: list[str] = []
    for entry in messages:
        assert entry["content"], "empty content"
        results = [block for block in entry["content"] if block["type"] == "tool_result"]
        ids = [block["tool_use_id"] for block in results]
        assert ids == open_ids, f"tool results {ids} for tool uses {open_ids}"
        assert entry["content"][: len(results)] == results, "tool results must come first"
        open_ids = [block["id"] for block in entry["content"] if block["type"] == "tool_use"]
    assert not open_ids, "a tool use without a result"


class FakeModel:
    """A scripted Claude: the answer is a function of the request."""

    def __init__(self, world: World, log: FakeLog, script: Script) -> None:
        self._world = world
        self._log = log
        self._script = script

    async def stream(
        self,
        body: bytes,
        *,
        session_id: str,
        lease: str,
        on_text: Callable[[str], None],
        on_start: Callable[..., None],
        betas: Sequence[str] = (),
    ) -> Response:
        await self._log._point("model")
        request = json.loads(body)
        check_request(request)
        self._world.requests.append(body)
        answer = self._script(request)
        await self._log._point("streaming")
        if isinstance(answer, Exception):
            raise answer
        on_start()
        return Response(message=answer, request_id="req", ttft_ms=1, duration_ms=2)


class FakeCredentials:
    """Tokens that name their epoch; the broker's real public key."""

    async def token(
        self, session_id: str, lease: str, sandbox_uid: str, *, fresh: bool = False
    ) -> str:
        return lease.split(":")[0]

    async def keys(self, *, fresh: bool = False) -> dict[str, Any]:
        return {KEY.kid: KEY.public}


class FakeTransport:
    """The sandboxes of a `World`, seen through their proxies; the flags take a defence away."""

    use_journal = True
    check_epoch = True

    def __init__(self, world: World, log: FakeLog) -> None:
        self._world = world
        self._log = log

    async def request(
        self,
        endpoint: Endpoint,
        method: str,
        path: str,
        *,
        token: str,
        body: Mapping[str, Any] | None = None,
        timeout: float,
    ) -> tuple[int, Any]:
        await self._log._point(f"{method} sent")
        sandbox = self._world.sandboxes.get(endpoint.address)
        if sandbox is None:
            raise NotSent("connection refused")
        if self.check_epoch and int(token) < sandbox.highest:
            return 409, {"error": {"type": "fenced", "message": "lower epoch"}}
        sandbox.highest = max(sandbox.highest, int(token))
        if method == "POST":
            assert body is not None
            call_id = body["call_id"]
            if call_id not in sandbox.journal or not self.use_journal:
                sandbox.ran.append(call_id)
                content = sandbox.run(body["name"], body["input"])
                sandbox.journal[call_id] = {
                    "content": content, "is_error": False, "exit_code": 0,
                    "truncated": False, "duration_ms": 1,
                }  # fmt: skip
        else:
            call_id = path.split("/v1/calls/")[1].split("?")[0].replace("%2F", "/")
        await self._log._point(f"{method} ran")
        if endpoint.address not in self._world.sandboxes:
            raise Broken("connection reset")
        if call_id not in sandbox.journal:
            return 404, {"status": "unknown"}
        result = sandbox.journal[call_id]
        return 200, {"call_id": call_id, "status": "done", "result": result}

    async def close(self) -> None:
        return None


LIMITS = SandboxSettings(wait_s=0.2, grace_s=0.05, broker_wait_s=0.05)


class Rig:
    """One worker on a world, with one session loop."""

    def __init__(
        self, world: World, script: Script, *, name: str = "w1", limits: SandboxSettings = LIMITS
    ) -> None:
        self.world = world
        self.log = FakeLog(world, name)
        self.transport = FakeTransport(world, self.log)
        self.around = surroundings(
            FakeModel(world, self.log, script), self.transport, FakeCredentials(), limits
        )
        self.loop: SessionLoop | None = None

    async def run(self) -> End | None:
        """Claim and work; None if the worker was killed."""
        lease = await self.log.claim(SID)
        assert isinstance(lease, Lease)
        journal = Journal(self.log, self.log, lease)
        loop = SessionLoop(NAMESPACE, self.log, journal, self.around, LoopSettings())
        self.loop = loop
        self.world.on_news = loop.poke
        work = asyncio.ensure_future(loop.run())
        killed = asyncio.ensure_future(self.log.dead.wait())
        try:
            await asyncio.wait({work, killed}, return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else None
        finally:
            self.log.dead.set()
            work.cancel()
            killed.cancel()
            await asyncio.gather(work, killed, return_exceptions=True)


def world(*events: NewEvent, **options: Any) -> World:
    """A world whose log begins with `session.created` and this input."""
    made = World()
    made.put(ev.SESSION_CREATED, NewEvent(ev.SESSION_CREATED, created(**options)).payload())
    for event in events or (user("go"),):
        made.emit(event)
    return made
