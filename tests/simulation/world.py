"""The simulated world: store, Claude, sandboxes, operator, clients, and the workers under test.

Workers are the product: `Worker`, `SessionLoop`, `Journal`, the whole `cowhand.session` client and its Lua
scripts, `SandboxHand`. Around them stand a scripted Claude, sandboxes that count what really ran, an operator and
clients that send again what was not acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import secrets
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock
from urllib.parse import unquote

from cowhand.errors import CowhandError, Retryable
from cowhand.hands.registry import Hands
from cowhand.hands.sandbox import SandboxHand, SandboxSettings
from cowhand.hands.transport import Broken, Endpoint, NotSent
from cowhand.harness.fold import Conversation
from cowhand.harness.loop import SessionLoop
from cowhand.harness.model import Response
from cowhand.harness.run import surroundings
from cowhand.harness.status import ENDS_TURN
from cowhand.harness.stream import ModelError
from cowhand.harness.worker import Worker, WorkerSettings
from cowhand.session import events as ev
from cowhand.session import scripts as lua
from cowhand.session import store as store_module
from cowhand.session.events import Event, NewEvent
from cowhand.session.keys import Keys
from cowhand.session.log import HandRecord, SessionMeta, StoreConfig
from cowhand.session.sessions import RedisSessionLog
from cowhand.session.store import Store
from cowhand.wire.records import sign_record
from simulation.loop import Process, SimLoop, Stuck
from simulation.network import StoreServer
from simulation.scenario import Action, Scenario, answer, place
from support.harness_rig import KEY, NAMESPACE, check_request, created
from support.lua_store import CommandError, LuaStore

T = TypeVar("T")

START_MS = 1_700_000_000_000
ACTOR = {"actor": {"user": "u"}}
LIMITS = SandboxSettings(wait_s=60.0)


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits."""
    try:
        work.send(None)
    except StopIteration as end:
        found: T = end.value
        return found
    work.close()
    raise AssertionError("this had to be done at once")


class DirectPipe:
    """In place of `session.link.Pipe`: the server itself, without a network."""

    def __init__(self, store: LuaStore, scripts: Mapping[str, lua.Script]) -> None:
        self._store = store
        self._scripts = scripts
        self.link = SimpleNamespace(generation=1)

    def at(self, key: str) -> DirectPipe:
        return self

    async def scan(self, cursor: int, pattern: str, count: int) -> tuple[int, list[bytes]]:
        following, found = await self.call("SCAN", cursor, "MATCH", pattern, "COUNT", count)
        return int(following), found

    async def call(self, *command: Any) -> Any:
        reply = self._store.execute(command)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def call_on(self, *command: Any) -> tuple[Any, int]:
        return await self.call(*command), 1

    async def script(self, name: str, keys: Any, *args: Any) -> Any:
        return self._store.run_script(self._scripts[name].source, keys, args)

    async def script_on(self, name: str, keys: Any, *args: Any) -> tuple[Any, int]:
        return await self.script(name, keys, *args), 1


@dataclass
class Sandbox:
    """sandboxd with its proxy: the fence, the journal, and what really ran."""

    alive: bool = True
    highest: int = 0
    journal: dict[str, dict[str, Any]] = field(default_factory=dict)
    waiting: dict[str, list[Callable[[], None]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Defences:
    """What the world around the harness does for it; a control takes one away.

    Attributes:
        journal: a sandbox runs a call id once.
        hand_fence: a sandbox refuses an older lease.
        no_late_calls: a call whose connection broke does not arrive after another worker has taken over (it may,
            and the fence is what refuses it then).
    """

    journal: bool = True
    hand_fence: bool = True
    no_late_calls: bool = True


REAL = Defences()


class World:
    """See the module.

    Args:
        scenario: what happens.
        seed: decides latencies, faults and the order of steps.
        scripts: the Lua scripts.
        defences: of the world around the harness.
    """

    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        *,
        scripts: Mapping[str, lua.Script] | None = None,
        defences: Defences = REAL,
    ) -> None:
        self.scenario = scenario
        self.defences = defences
        self.rng = random.Random(f"world {seed}")
        self.loop = SimLoop(seed, limit_s=1500.0)
        self.scripts = dict(lua.load() if scripts is None else scripts)
        self.store = LuaStore(lambda: START_MS + int(self.loop.time() * 1000), seed)
        self.server = StoreServer(self.loop, self.store, self.rng)
        self.sid = f"sesn_{scenario.seed:032x}"
        self.config = StoreConfig(url="redis://simulated", partitions=1, profile="dev")
        self.keys = Keys(self.config.prefix, NAMESPACE, 1)
        self.requests: list[bytes] = []
        self.ran: list[str] = []
        self.sandboxes: dict[str, Sandbox] = {}
        self.acked: dict[str, int] = {}
        self.failed: dict[tuple[int, int], int] = {}
        self.model_faults = 0.0
        self.hand_faults = 0.0
        self.problems: list[str] = []
        self.workers: list[Process] = []
        self.current: dict[Process, Worker] = {}
        self.drain_at: dict[str, int] = {}
        self.hint = 0.7
        self.kills = 0
        self._seen = 0
        self._due: list[Action] = []
        self._hung: set[bytes] = set()
        self._spent: dict[tuple[int, int], int] = {}
        self.ops = self.loop.process("operator")
        self.clients = self.loop.process("clients")
        self.server.before_command = self._before
        self.server.after_command = self._after

    # The log, seen from outside.

    def direct(self) -> Store:
        """The store without a network; its calls never wait."""
        store = Store(self.config, NAMESPACE, self.scripts)
        pipe: Any = DirectPipe(self.store, self.scripts)
        store.writes = store.reads = pipe
        return store

    def log(self) -> list[Event]:
        return at_once(self._direct_log.get_events(self.sid))

    def meta(self) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = self.store.data.get(
            self.keys.session(self.sid).meta.encode(), {}
        )
        return found

    # Input.

    def event_of(self, action: Action) -> NewEvent:
        number = self.scenario.actions.index(action)
        match action.kind:
            case "message":
                content = [{"type": "text", "text": action.data}]
                data = {"content": content, **ACTOR}
                return NewEvent(ev.USER_MESSAGE, data, id=f"msg:{number}")
            case "interrupt":
                return NewEvent(ev.USER_INTERRUPT, ACTOR, id=f"int:{number}")
            case "allow" | "deny":
                data = {"tool_use_id": action.data, "result": action.kind, **ACTOR}
                return NewEvent(ev.USER_TOOL_CONFIRMATION, data, id=f"confirm:{action.data}")
            case "suspend":
                return NewEvent(ev.SESSION_SUSPENDED, ACTOR, id=f"mode:{number}")
            case "resume":
                return NewEvent(ev.SESSION_RESUMED, ACTOR, id=f"mode:{number}")
            case "budget":
                return NewEvent(ev.SESSION_UPDATED, {"budget": None, **ACTOR}, id=f"bud:{number}")
        raise AssertionError(action.kind)

    async def give(self, store: Store, action: Action) -> None:
        """One input over this store; answers when it is acknowledged."""
        if action.kind == "lose":
            self.lose()
            return
        event = self.event_of(action)
        match action.kind:
            case "suspend":
                await store.control_log().set_mode(NAMESPACE, self.sid, "suspended", event)
            case "resume":
                await store.control_log().set_mode(NAMESPACE, self.sid, "running", event)
            case "budget":
                await store.control_log().set_budget(NAMESPACE, self.sid, event)
            case _:
                await store.session_log().emit_event(self.sid, event)
        self.acked[event.id] = 1

    def inject(self, action: Action) -> None:
        """Input that arrives at this very moment."""
        action.done = True
        at_once(self.give(self._direct, action))

    async def send(self, action: Action) -> None:
        """A client that sends until it has an answer."""
        action.done = True
        while True:
            try:
                await self.give(self._client_store, action)
                return
            except Retryable:
                await asyncio.sleep(0.3)

    def _before(self, words: Sequence[bytes]) -> None:
        """A command has arrived at the store: input that comes just before it."""
        if len(words) < 10 or words[1] != self.scripts["append"].sha.encode():
            return
        waiting = [a for a in self.scenario.actions if a.when == "before" and not a.done]
        if not waiting:
            return
        args = words[3 + int(words[2]) :]
        if self.meta().get(b"lease") != args[2] or int(self.meta()[b"wseq"]) + 1 != int(args[3]):
            return
        for at in range(7, len(args) - 1, 2):
            data = json.loads(args[at + 1])["d"] if args[at + 1] else {}
            for action in waiting:
                if not action.done and action.event == args[at].decode() and action.match(data):
                    self.inject(action)

    def _after(self) -> None:
        """A command was carried out: input and reactions that its events bring."""
        stream = self.store.data.get(self.keys.session(self.sid).log.encode())
        while stream is not None and self._seen < len(stream.ids):
            fields = stream.fields[self._seen]
            self._seen += 1
            kind = fields[1].decode()
            data = json.loads(fields[9])["d"] if fields[9] else {}
            if kind == ev.HAND_REQUESTED:
                self.ops.start(self._provision(data["hand"], data["instance"]))
            for action in self.scenario.actions:
                wanted = action.when == "after" and action.event == kind
                if wanted and not action.done and action.match(data):
                    self.inject(action)

    # The operator.

    async def _provision(self, hand: str, instance: int) -> None:
        await asyncio.sleep(self.rng.uniform(0.01, 0.5))
        uid = f"sbx-{hand}-{instance}"
        if uid in self.sandboxes:
            return
        if self.scenario.chaotic and self.rng.random() < 0.1:
            await self._put(HandRecord(self.sid, hand, instance, "Failed", "Test", "for a test"))
            return
        self.sandboxes[uid] = Sandbox()
        record = HandRecord(
            self.sid, hand, instance, "Ready", sandbox=uid, sandbox_uid=uid, pod_uid=f"pod-{uid}",
            address=uid, cert_sha256="00" * 32, owner=self.sid, owner_epoch=1,
        )  # fmt: skip
        await self._put(replace(record, signature=sign_record(record, KEY, namespace=NAMESPACE)))

    async def _put(self, record: HandRecord) -> None:
        while True:
            try:
                await self._ops_store.control_log().put_hand(NAMESPACE, record)
                return
            except Retryable:
                await asyncio.sleep(0.3)

    def lose(self) -> None:
        """The newest sandbox dies, and a moment later the operator says so."""
        living = [uid for uid, sandbox in self.sandboxes.items() if sandbox.alive]
        if not living:
            return
        uid = living[-1]
        self.sandboxes[uid].alive = False
        _, hand, instance = uid.split("-")
        record = HandRecord(
            self.sid, hand, int(instance), "Lost", reason="PodGone", sandbox=uid, sandbox_uid=uid
        )
        self.ops.start(self._later(self.rng.uniform(0, 3), self._put(record)))

    async def _later(self, seconds: float, work: Coroutine[Any, Any, None]) -> None:
        await asyncio.sleep(seconds)
        await work

    # Claude.

    def model_arrives(self, body: bytes) -> tuple[float, Any]:
        """A request at the endpoint; answers how long it takes and what comes, None for nothing."""
        request = json.loads(body)
        try:
            check_request(request)
        except AssertionError as err:
            self.problems.append(f"the API refuses the request: {err}")
        self.requests.append(body)
        spot = place(request)
        plan = self.scenario.round(*spot)
        waiting = [one for one in self.scenario.actions if one.when == "model" and not one.done]
        if plan.hang and (waiting or body in self._hung):
            self._hung.add(body)
            for action in waiting:
                self.inject(action)
            return 0.0, None
        spent = self._spent[spot] = self._spent.get(spot, 0) + 1
        took = self.rng.choice([0.01, 0.1, 0.5]) * self.rng.random()
        if spent <= len(plan.faults):
            return took, _model_error(plan.faults[spent - 1])
        if spent <= 3 and self.rng.random() < self.model_faults:
            return took, ModelError("stream_cut", "for a test")
        return took, answer(self.scenario, request)

    # Sandboxes.

    def hand_arrives(
        self, call: _HandCall, reply: Callable[[int, Any], None], refuse: Callable[[], None]
    ) -> None:
        sandbox = self.sandboxes.get(call.address)
        if sandbox is None or not sandbox.alive:
            refuse()
            return
        if self.defences.hand_fence and call.epoch < sandbox.highest:
            reply(409, {"error": {"type": "fenced", "message": "lower epoch"}})
            return
        sandbox.highest = max(sandbox.highest, call.epoch)
        if call.method == "POST":
            self._execute(sandbox, call.call_id, call.body)
        entry = sandbox.journal.get(call.call_id)
        if entry is None:
            reply(404, {"status": "unknown"})
            return

        def done() -> None:
            if not sandbox.alive:
                refuse()
            elif entry["result"] is None:
                reply(200, {"call_id": call.call_id, "status": "running"})
            else:
                answer = {"call_id": call.call_id, "status": "done", "result": entry["result"]}
                reply(200, answer)

        if call.method == "DELETE":
            self._finish(sandbox, call.call_id, entry, "interrupted", is_error=True)
        if entry["result"] is not None:
            done()
            return
        sandbox.waiting.setdefault(call.call_id, []).append(done)
        if call.method == "GET":
            self.loop.at(call.wait_s, done)

    def late(self, call: _HandCall, pauses: Sequence[float] = (1.0, 5.0, 15.0)) -> None:
        """A call whose connection broke arrives when its sender has been replaced, or never."""
        sandbox = self.sandboxes.get(call.address)
        if sandbox is not None and call.epoch < sandbox.highest:
            self.hand_arrives(call, lambda _status, _body: None, lambda: None)
        elif pauses:
            self.loop.at(pauses[0], self.late, call, pauses[1:])

    def _execute(self, sandbox: Sandbox, call_id: str, body: Mapping[str, Any]) -> None:
        if call_id in sandbox.journal and self.defences.journal:
            return
        self.ran.append(call_id)
        entry: dict[str, Any] = {"result": None}
        sandbox.journal[call_id] = entry
        content = f"{body['name']} {json.dumps(body['input'])}"
        if body["input"].get("hang"):
            self.loop.at(
                body["timeout_ms"] / 1000, self._finish, sandbox, call_id, entry, "late", True
            )
            return
        took = self.rng.choice([0.002, 0.05, 0.4]) * self.rng.random()
        self.loop.at(took, self._finish, sandbox, call_id, entry, content, False)

    def _finish(
        self, sandbox: Sandbox, call_id: str, entry: dict[str, Any], content: str, is_error: bool
    ) -> None:
        if entry["result"] is not None or not sandbox.alive:
            return
        entry["result"] = {
            "content": content, "is_error": is_error, "exit_code": 0, "truncated": False,
            "duration_ms": 1,
        }  # fmt: skip
        for tell in sandbox.waiting.pop(call_id, []):
            tell()

    # Workers.

    def start_worker(self) -> Process:
        process = self.loop.process(f"w{len(self.workers) + 1}")
        self.workers.append(process)
        process.on_end.append(lambda: self._died(process))
        process.start(self._work(process))
        return process

    def _died(self, process: Process) -> None:
        self.kills += 1
        self.current.pop(process, None)
        if self.rng.random() < self.hint:
            self.ops.start(self.drop(process, self.rng.uniform(0.1, 1.5)))
        self.loop.at(self.rng.uniform(0.05, 3.0), self.start_worker)

    async def drop(self, process: Process, seconds: float) -> None:
        """The operator sees a worker's pod gone, or believes so."""
        await asyncio.sleep(seconds)
        while True:
            try:
                await self._ops_store.control_log().drop_worker(NAMESPACE, process.name)
                return
            except Retryable:
                await asyncio.sleep(0.3)

    async def _work(self, process: Process) -> None:
        store = Store(self.config, NAMESPACE, self.scripts)
        transport, clock = SimTransport(self, process), self.loop.time
        around: Any = surroundings(SimModel(self), transport, SimCredentials(self), LIMITS)

        def hands(loop: SessionLoop) -> Hands:
            return Hands(
                lambda name: SandboxHand(
                    name, loop, transport, SimCredentials(self), LIMITS, clock=clock
                )
            )

        worker = Worker(
            store.worker_log(process.name), store.session_log(),
            replace(around, make_hands=hands, gate=store.rate_gate()), WorkerSettings(NAMESPACE), clock=clock,
        )  # fmt: skip
        self.current[process] = worker
        try:
            await worker.run()
        except CowhandError as err:
            self.problems.append(f"worker {process.name} ended: {err!r}")
        # Drained: the process is gone and another takes its place.
        self.current.pop(process, None)
        process.on_end.clear()
        self.loop.at(0.1, self.start_worker)
        self.loop.at(0.0, process.kill)

    # A run.

    async def main(self, workers: int, faults: Callable[[World], None]) -> None:
        self._direct = self.direct()
        self._direct_log = RedisSessionLog(self._direct, self.keys)
        self._client_store = self.clients.context.run(Store, self.config, NAMESPACE, self.scripts)
        self._ops_store = self.ops.context.run(Store, self.config, NAMESPACE, self.scripts)
        await self._direct_greet()
        for _ in range(workers):
            self.start_worker()
        meta = SessionMeta(self.sid, NAMESPACE, "s", self.sid[5:], {"base_url": "", "secret": None})
        data = created(
            permissions={"edit": "Ask"}, budget=self.scenario.budget,
            provisioning=self.scenario.provisioning,
        )  # fmt: skip
        first = {"content": [{"type": "text", "text": "turn 0"}], **ACTOR}
        begin = [
            NewEvent(ev.SESSION_CREATED, data, id="created"),
            NewEvent(ev.USER_MESSAGE, first, id="msg:first"),
        ]
        at_once(self._direct_log.create_session(meta, begin))
        faults(self)
        for action in self.scenario.actions:
            if action.when == "time":
                self.clients.start(self._later(action.at_s, self.send(action)))
        await self._to_the_end()

    async def _direct_greet(self) -> None:
        self.store.data[f"{self.config.prefix}:gen".encode()] = b"identity"

    async def _to_the_end(self) -> None:
        """Give what waits for rest, until the session rests and nothing is left to give."""
        while True:
            await self.rest()
            action = self._next()
            if action is None:
                if any(a.when == "time" and not a.done for a in self.scenario.actions):
                    await asyncio.sleep(0.5)
                    continue
                if self.meta()[b"mode"] == b"suspended":
                    self.scenario.actions.append(Action("resume", "rest", mode="suspended"))
                    continue
                return
            await asyncio.sleep(action.at_s)
            before = self.meta().get(b"next")
            await self.clients.start(self.send(action))
            while self.meta().get(b"next") == before:  # noqa: ASYNC110  time is virtual
                await asyncio.sleep(0.1)

    async def rest(self) -> None:
        """Return when nobody works on the session and nobody is about to."""
        quiet = 0
        while quiet < 3:
            await asyncio.sleep(0.1)
            meta = self.meta()
            still = not meta[b"lease"] and meta[b"rdy"] == b"0" and meta[b"state"] == b"idle"
            if meta[b"mode"] == b"suspended":
                still = not meta[b"lease"]
            quiet = quiet + 1 if still else 0

    def _next(self) -> Action | None:
        conversation = Conversation(self.sid)
        for event in self.log():
            conversation.apply(event)
        reason = conversation.idle or {}
        kind = reason.get("type")
        for action in self.scenario.actions:
            if action.done or action.when != "rest":
                continue
            if self.meta()[b"mode"] == b"suspended":
                fits = action.kind == "resume"
            elif kind == "requires_action":
                fits = action.data in reason["event_ids"]
            elif action.kind == "budget":
                fits = kind == "budget_reached"
            else:
                fits = action.kind == "message" and kind in ENDS_TURN
            if fits:
                return action
        return None

    def run(
        self, *, workers: int = 2, faults: Callable[[World], None] = lambda _world: None
    ) -> None:
        """Run to the end; what went wrong is in `problems`."""
        with _deterministic(self):
            try:
                task = self.loop.world.start(self.main(workers, faults))
                self.loop.run_until_complete(task)
            except Stuck as err:
                self.problems.append(f"stuck: {err}")
            except CommandError as err:
                self.problems.append(f"the store: {err}")
            self.problems += self.loop.errors

    def close(self) -> None:
        with _deterministic(self):
            self.loop.discard()


def _model_error(kind: str) -> ModelError:
    match kind:
        case "429":
            return ModelError("rate_limit_error", "slow down", status=429, retry_after_s=0.2)
        case "529":
            return ModelError("overloaded_error", "overloaded", status=529)
        case "error_in_stream":
            return ModelError("overloaded_error", "overloaded")
    return ModelError("stream_cut", "the stream ended before the response was complete")


class _Alarm(logging.Handler):
    """An unexpected exception in the product is a finding, also where it is survived."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.WARNING)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            err = record.exc_info[1]
            if not isinstance(err, CowhandError):
                self._world.problems.append(f"{record.getMessage()}: {err!r}")


@contextlib.contextmanager
def _deterministic(world: World) -> Iterator[None]:
    """Everything random comes from the seed, and connections lead into the simulation."""
    alarm = _Alarm(world)
    logger = logging.getLogger("cowhand")
    state, level = random.getstate(), logger.level
    random.seed(world.scenario.seed)
    logger.addHandler(alarm)
    logger.setLevel(logging.ERROR)
    propagate, logger.propagate = logger.propagate, False
    rng = world.rng

    def token_hex(count: int = 8) -> str:
        return f"{rng.getrandbits(8 * count):0{2 * count}x}"

    connect = mock.patch.object(store_module, "connection_factory", return_value=world.server.open)
    try:
        with connect, mock.patch.object(secrets, "token_hex", token_hex):
            yield
    finally:
        logger.removeHandler(alarm)
        logger.setLevel(level)
        logger.propagate = propagate
        random.setstate(state)


# What a worker sees of the world.


class SimCredentials:
    """Tokens that name their epoch."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def token(
        self, session_id: str, lease: str, sandbox_uid: str, *, fresh: bool = False
    ) -> str:
        await asyncio.sleep(self._world.server.latency())
        return lease.split(":")[0]

    async def keys(self, *, fresh: bool = False) -> dict[str, Any]:
        return {KEY.kid: KEY.public}


class SimModel:
    """`Model` over the simulated network."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def stream(
        self,
        body: bytes,
        *,
        session_id: str,
        lease: str,
        on_text: Callable[[int, str], None],
        on_start: Callable[..., None],
        betas: Sequence[str] = (),
    ) -> Response:
        world = self._world
        future: asyncio.Future[Any] = world.loop.create_future()

        def settle(value: Any) -> None:
            if not future.done():
                future.set_result(value)

        def arrive() -> None:
            took, value = world.model_arrives(body)
            if value is not None:
                world.loop.at(took + world.server.latency(), settle, value)

        world.loop.at(world.server.latency(), arrive)
        value = await future
        if isinstance(value, Exception):
            raise value
        on_start()
        on_text(0, "text")
        await asyncio.sleep(0)
        return Response(message=value, request_id="req", ttft_ms=1, duration_ms=2)


@dataclass(frozen=True)
class _HandCall:
    address: str
    method: str
    call_id: str
    epoch: int
    body: Mapping[str, Any]
    wait_s: float


class SimTransport:
    """`Transport` to the simulated sandboxes, with the faults of connections."""

    def __init__(self, world: World, process: Process) -> None:
        self._world = world
        self._process = process

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
        world, loop = self._world, self._world.loop
        future: asyncio.Future[tuple[int, Any]] = loop.create_future()
        found = dict(body or {})
        wait_s = 0.0
        if method == "POST":
            call_id = found["call_id"]
        else:
            rest, _, query = path.partition("?")
            call_id = unquote(rest.split("/v1/calls/")[1])
            wait_s = int(query.partition("wait_ms=")[2] or 0) / 1000
        call = _HandCall(endpoint.address, method, call_id, int(token), found, wait_s)

        def end(result: tuple[int, Any] | Exception) -> None:
            if future.done():
                return
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

        def later(result: tuple[int, Any] | Exception) -> None:
            loop.at(world.server.latency(), end, result)

        chance = world.rng.random() / world.hand_faults if world.hand_faults else 9.0
        lost = Broken("connection reset")
        if chance < 0.3:
            later(NotSent("connection refused"))
        elif chance < 0.6:
            later(lost)
            if not world.defences.no_late_calls and method == "POST":
                world.late(call)
        else:
            answered = (
                (lambda _s, _v: later(lost)) if chance < 1.0 else (lambda s, v: later((s, v)))
            )
            loop.at(world.server.latency(), world.hand_arrives, call, answered, lambda: later(lost))
        try:
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            raise Broken("no answer in time") from None

    async def close(self) -> None:
        return None
