"""The fold: events of a log -> the state of the conversation, all that a harness knows of a session.

Pure: no I/O, no clock, no randomness. `loop` folds the whole log after a claim and each event it
appends afterwards; `decide` reads the result. Two workers that fold the same events hold the same
state, and so send the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cowhand.errors import LogIncompatible
from cowhand.harness import status as st
from cowhand.harness import window as win
from cowhand.harness.request import (
    ASSEMBLERS,
    Block,
    Message,
    Ttl,
    block,
    content_blocks,
    prefix_sha,
    response_blocks,
    tool_result_block,
)
from cowhand.harness.window import Purpose, Result, SideRequest, Window
from cowhand.session import events as ev
from cowhand.session import rawjson
from cowhand.session.events import Event

CONTEXT_EXCEEDED: Final = "model_context_window_exceeded"
"""Stop reason of a response that the context window cut."""

CONTINUE: Final = "Your answer was cut off by the output limit. Continue where it stopped."
"""What stands in for the user after a text that `max_tokens` or the window cut."""


@dataclass(frozen=True)
class ToolUse:
    """A `tool_use` block of the newest response.

    Attributes:
        cut: the output limit ended the response inside this block: its input is not complete.
        custom: a custom tool: the client answers it.
    """

    id: str
    name: str
    input: Mapping[str, Any]
    cut: bool = False
    custom: bool = False


@dataclass(frozen=True)
class Queued:
    """A user or system message that no request has seen yet."""

    seq: int
    blocks: tuple[Block, ...]
    system: bool = False


@dataclass(frozen=True)
class Decision:
    """A person's answer to a tool call that asks; any deny wins.

    Attributes:
        input_sha256: digest of the arguments that the person saw, empty if they did not say.
    """

    allow: bool
    message: str = ""
    input_sha256: str = ""


@dataclass(frozen=True)
class Answer:
    """A client's result of a custom tool: the first one counts."""

    content: list[dict[str, Any]]
    is_error: bool


@dataclass(frozen=True)
class Request:
    """The newest model request as it was logged.

    Attributes:
        seq: position of its `span.model_request_start`.
        max_tokens: output limit that it was sent with.
        ttl: life of its cache entries.
    """

    seq: int
    n: int
    attempt: int
    horizon: int
    prefix_sha: str
    n_messages: int
    max_tokens: int
    ttl: Ttl = "5m"


@dataclass(frozen=True)
class Sent:
    """A request as it was sent, rebuilt from the log.

    Attributes:
        base: everything but the messages.
        writer: the session that sent it.
    """

    request: Request | SideRequest
    base: Mapping[str, Any]
    messages: tuple[Message, ...]
    writer: str

    @property
    def rebuilt_sha(self) -> str:
        """Hash of what was rebuilt, empty if messages are missing."""
        if len(self.messages) != self.request.n_messages:
            return ""
        return prefix_sha(self.base, self.writer, self.request.max_tokens, self.messages)


@dataclass(frozen=True)
class HandState:
    """What the log says of one hand: instance counts from 1, `state` is Pending, Ready or Lost."""

    name: str
    instance: int
    state: str


@dataclass
class Conversation:
    """State of a session, folded from its log.

    Attributes:
        session_id: the session.
        created: data of `session.created`, None before it.
        last_seq: position of the newest event that was folded.
        messages: prompt as committed by the requests so far.
        queued: user and system messages that wait for the next request.
        uses: `tool_use` blocks of the newest response, in order; empty once their results were sent.
        results: tool_use_id -> its block, for `uses`.
        started: tool_use_id -> data of `tool.started`, for `uses`.
        asked: tool_use_ids with a `tool.pending`.
        decisions: tool_use_id -> answer of a person.
        answers: tool_use_id of a custom tool -> answer of its client.
        hands: name -> newest instance.
        request: newest model request, None before the first or after a refused turn was cut.
        n: number of the newest request.
        open_request: its start has no end yet.
        stop_reason: of the newest response, until a newer request starts.
        error: data of the newest failed `span.model_request_end` since the last response, or None.
        failures: failed attempts of the request in a row.
        limit_step: 0 the frozen output limit, 1 doubled after a cut tool call, 2 back again.
        continuations: responses in a row that were cut or paused.
        ended: no turn is open.
        idle: stop reason of the last idle, None while running.
        interrupted: an interrupt waits to be carried out.
        silenced: queued messages up to this position start no turn of their own: an interrupt or a
            final error came after them. The next request shows them all the same.
        suspended: the session is suspended.
        closed: the log has ended.
        budget: limits in force, of `session.created` or the newest `session.updated`.
        ran_ms: milliseconds of running, up to the newest idle.
        running_since: when it began to run after that, milliseconds; None while idle.
        context_tokens: input and output tokens of the newest response; 0: none counts any more.
        counted_messages: messages that `context_tokens` counts.
        wake_at: milliseconds of the store's clock before which the next request must not be sent
            (`session.status_rescheduled`); None when no wait is under way.
        refused: the budget stopped the session after the newest message came.
        wakes: wakes in a row without progress.
        lineage: of a fork: (session, last position that it wrote), oldest first.
        forked: position of the newest `session.forked`, 0 for none.
        status: status document, see `status`.
        window: state of the context window.
    """

    session_id: str
    created: Mapping[str, Any] | None = None
    last_seq: int = 0
    messages: list[Message] = field(default_factory=list)
    queued: list[Queued] = field(default_factory=list)
    uses: tuple[ToolUse, ...] = ()
    results: dict[str, Block] = field(default_factory=dict)
    started: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    decisions: dict[str, Decision] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    hands: dict[str, HandState] = field(default_factory=dict)
    request: Request | None = None
    n: int = 0
    open_request: bool = False
    stop_reason: str | None = None
    error: Mapping[str, Any] | None = None
    failures: int = 0
    limit_step: int = 0
    continuations: int = 0
    ended: bool = True
    idle: Mapping[str, Any] | None = None
    interrupted: bool = False
    silenced: int = 0
    suspended: bool = False
    closed: bool = False
    budget: Mapping[str, Any] = field(default_factory=dict)
    ran_ms: int = 0
    running_since: int | None = None
    context_tokens: int = 0
    counted_messages: int = 0
    wake_at: int | None = None
    refused: bool = False
    wakes: int = 0
    lineage: tuple[tuple[str, int], ...] = ()
    forked: int = 0
    status: dict[str, Any] = field(default_factory=st.empty_status)
    window: Window = field(default_factory=Window)
    _turn_start: int = 0
    _turn_results: tuple[Block, ...] = ()
    _asked_at: int = 0
    _payload: bytes = field(default=b"", repr=False, compare=False)

    # What follows from the state.

    @property
    def base(self) -> Mapping[str, Any]:
        """The frozen base of each request."""
        assert self.created is not None, "a log begins with session.created"
        base: Mapping[str, Any] = self.created["request"]
        return {**base, **self.window.fields} if self.window.fields else base

    @property
    def open_seq(self) -> int:
        """Position of the request that has no end yet."""
        if self.window.side is not None:
            return self.window.side.seq
        assert self.request is not None, "asked only while open_request"
        return self.request.seq

    @property
    def custom_tools(self) -> frozenset[str]:
        """Names of the tools that the client answers."""
        return frozenset((self.created or {}).get("custom_tools") or ())

    @property
    def _readable(self) -> bool:
        """The agent has the tool `read_log`."""
        tools = (self.created or {})["request"].get("tools") or []
        return any(tool.get("name") == "read_log" for tool in tools)

    @property
    def unresolved(self) -> tuple[ToolUse, ...]:
        """Tool calls without a result, in order."""
        return tuple(use for use in self.uses if use.id not in self.results)

    @property
    def orphaned(self) -> tuple[ToolUse, ...]:
        """Open tool calls of the session that this one was forked from."""
        return self.unresolved if self.forked > self._asked_at else ()

    @property
    def triggered(self) -> bool:
        """A user message waits that may start a turn."""
        return any(item.seq > self.silenced and not item.system for item in self.queued)

    @property
    def max_tokens(self) -> int:
        """Output limit of the next request."""
        limit = int(self.base["max_tokens"])
        return limit * 2 if self.limit_step == 1 else limit

    @property
    def wanted_tokens(self) -> int:
        """Output limit that the next request would like; a new one begins with the frozen limit."""
        return self.max_tokens if self.retry else int(self.base["max_tokens"])

    @property
    def paused(self) -> bool:
        """The newest response is to be sent back as it is."""
        return self.stop_reason == "pause_turn" and not self.ended and not self.uses

    @property
    def unanswered(self) -> bool:
        """The open turn's newest message was sent and got no response, and its request is not repeated."""
        waits = bool(self.messages) and self.messages[-1].role != "assistant"
        return waits and not self.ended and self.request is None and self.stop_reason is None

    @property
    def retry(self) -> bool:
        """The newest request got no response and belongs to the open turn: send the same again."""
        return (
            self.request is not None
            and not self.ended
            and self.stop_reason is None
            and not self.open_request
            and self.n == self.request.n
        )

    def pending_messages(self, horizon: int) -> list[Message]:
        """The messages that the next new request adds, from what is known up to `horizon`.

        One user message: tool results first, in the order of the tool_use blocks, then what a renewed
        window begins with, then queued text. Behind it, and never without it (the API takes none directly
        after an assistant's), one system message.
        """
        if self.paused:
            return []
        seen = [item for item in self.queued if item.seq <= horizon]
        blocks = [self.results[use.id] for use in self.uses]
        blocks += self.window.carry
        blocks += [one for item in seen if not item.system for one in item.blocks]
        if not blocks and self.stop_reason in _CUTTING and not self.ended:
            blocks.append(block({"type": "text", "text": CONTINUE}))
        if not blocks:
            return []
        system = tuple(one for item in seen if item.system for one in item.blocks)
        user = Message("user", tuple(blocks))
        return [user, Message("system", system)] if system else [user]

    def prompt(self, horizon: int) -> list[Message]:
        """All messages of the next request."""
        if self.retry:
            return list(self.messages)
        kept, added = self._grown(horizon)
        return [*kept, *added]

    def _grown(self, horizon: int) -> tuple[list[Message], list[Message]]:
        """What stays of the prompt and what the next new request adds.

        A system message that got no answer (the turn failed or was interrupted) moves behind the user
        message that comes next: the API takes none directly before a user message.
        """
        kept, added = list(self.messages), self.pending_messages(horizon)
        if added and kept and kept[-1].role == "system":
            system = [*kept.pop().blocks, *(one for item in added[1:] for one in item.blocks)]
            added = [added[0], Message("system", tuple(system))]
        return kept, added

    def side_prompt(self, purpose: Purpose) -> list[Message]:
        """All messages of a request that renews the window; queued text is not among them.

        Nor is, after a prompt that did not fit, what was new in it: it follows the summary or the notes.
        """
        blocks = [self.results[use.id] for use in self.uses if use.id in self.results]
        blocks.extend(win.question(self.window, purpose))
        kept = list(self.messages)
        if self.window.overflow == "prompt":
            kept, _, system = win.split_newest(kept)
            ids = set(win.newest_results(self.messages))
            kept = [*win.cleared(kept, self.window.results, ids, self._readable), *system]
        if not blocks:
            return kept
        unanswered = [kept.pop()] if kept and kept[-1].role == "system" else []
        return [*kept, Message("user", tuple(blocks)), *unanswered]

    def sent(self) -> Sent | None:
        """The newest request of the log, rebuilt; None before the first and once its prompt is gone."""
        request: Request | SideRequest
        if self.window.side is not None:
            request = self.window.side
            base: Mapping[str, Any] = {
                **self.base,
                **win.extra_fields(self.window, request.purpose),
            }
            messages = self.side_prompt(request.purpose)
        elif self.request is not None:
            request, base = self.request, self.base
            messages = self.messages[: request.n_messages]
        else:
            return None
        return Sent(request, base, tuple(messages), self.writer_of(request.seq))

    def prefix_matches(self) -> bool:
        """The newest request, rebuilt from what is folded, is the one that was logged."""
        sent = self.sent()
        return sent is None or sent.rebuilt_sha == sent.request.prefix_sha

    def writer_of(self, seq: int) -> str:
        """The session that wrote this position: of a fork's copied events that of the source.

        A request names it in `metadata.user_id`.
        """
        for session_id, last in self.lineage:
            if seq <= last:
                return session_id
        return self.session_id

    # Folding.

    def apply(self, event: Event) -> None:
        """Fold one event; positions must be dense.

        Raises:
            LogIncompatible: a known type in an unknown version, or another assembler.
        """
        assert event.seq == self.last_seq + 1, f"gap: {event.seq} after {self.last_seq}"
        handler = _HANDLERS.get(event.type)
        if handler is not None:
            _check(event)
            data = event.data
            self.status = st.after(self.status, [(event.type, data)])
            self._time(event)
            self._payload = event.payload
            handler(self, event.seq, data)
        self.last_seq = event.seq

    def running_ms(self, now_ms: int) -> int:
        """Milliseconds that the session has run up to a time of the store; idle time does not count."""
        since = self.running_since
        return self.ran_ms + (0 if since is None else max(0, now_ms - since))

    def _time(self, event: Event) -> None:
        if event.type == ev.SESSION_FORKED:
            self.ran_ms, self.running_since = 0, None
        elif event.type in (ev.STATUS_IDLE, ev.STATUS_RESCHEDULED):
            self.ran_ms, self.running_since = self.running_ms(event.ts), None
        elif event.type in _RUNNING and self.running_since is None:
            self.running_since = event.ts

    def _created(self, seq: int, data: Mapping[str, Any]) -> None:
        if data.get("assembler") not in ASSEMBLERS:
            raise LogIncompatible(
                f"session {self.session_id} is pinned to assembler {data.get('assembler')!r}, this "
                f"release has {', '.join(map(str, ASSEMBLERS))}: wake it with the release that made it"
            )
        self.created = data
        self.lineage = tuple(
            (str(item["session"]), int(item["position"])) for item in data.get("lineage") or ()
        )
        self.window.asked = data.get("context")
        self.budget = data.get("budget") or {}

    def _updated(self, seq: int, data: Mapping[str, Any]) -> None:
        if "budget" in data:
            self.budget = data["budget"] or {}

    def _message(self, seq: int, data: Mapping[str, Any]) -> None:
        blocks = content_blocks(data["content"])
        if blocks:
            self.queued.append(Queued(seq, blocks))
            self.window.first = self.window.first or blocks
            self.refused = False
            self.wakes = 0

    def _system_message(self, seq: int, data: Mapping[str, Any]) -> None:
        blocks = content_blocks(data["content"])
        if blocks:
            self.queued.append(Queued(seq, blocks, system=True))

    def _interrupt(self, seq: int, data: Mapping[str, Any]) -> None:
        if not self.ended or self.triggered:
            self.interrupted = True
        self.silenced = seq

    def _confirmation(self, seq: int, data: Mapping[str, Any]) -> None:
        # Kept whatever the log has seen of the call: an answer may come before its question.
        use_id = str(data.get("tool_use_id", ""))
        allow = data.get("result") == "allow"
        old = self.decisions.get(use_id)
        if old is None or (old.allow and not allow):
            self.decisions[use_id] = Decision(
                allow, str(data.get("deny_message") or ""), str(data.get("input_sha256") or "")
            )
        self.wakes = 0

    def _custom_result(self, seq: int, data: Mapping[str, Any]) -> None:
        answer = Answer(list(data.get("content") or ()), bool(data.get("is_error")))
        self.answers.setdefault(str(data.get("custom_tool_use_id", "")), answer)
        self.wakes = 0

    def _forked(self, seq: int, data: Mapping[str, Any]) -> None:
        """The events before were another session's: its hands, its budget and its mode stay with it."""
        self.forked = seq
        self.hands = {}
        self.suspended = False
        self.refused = False
        self.budget = data.get("budget") or {}
        self.wake_at = None
        self.wakes = 0

    def _suspended(self, seq: int, data: Mapping[str, Any]) -> None:
        self.suspended = True

    def _resumed(self, seq: int, data: Mapping[str, Any]) -> None:
        self.suspended = False
        self.wakes = 0

    def _deleted(self, seq: int, data: Mapping[str, Any]) -> None:
        self.closed = True

    def _wake(self, seq: int, data: Mapping[str, Any]) -> None:
        self.wakes += 1

    def _running(self, seq: int, data: Mapping[str, Any]) -> None:
        self.idle = None

    def _rescheduled(self, seq: int, data: Mapping[str, Any]) -> None:
        at = data.get("wake_at")
        self.wake_at = at if type(at) is int else None
        self.wakes = 0

    def _request_start(self, seq: int, data: Mapping[str, Any]) -> None:
        self.idle = None
        self.wake_at = None
        if data.get("purpose", "turn") != "turn":
            self.window.side_started(seq, data, int(data["max_tokens"]))
            self.open_request = True
            return
        self.window.turn_started(data)
        if data["n"] > self.n:
            self._commit(int(data["horizon"]))
            self.n = int(data["n"])
        self.request = Request(
            seq=seq,
            n=int(data["n"]),
            attempt=int(data["attempt"]),
            horizon=int(data["horizon"]),
            prefix_sha=str(data["prefix_sha"]),
            n_messages=int(data["n_messages"]),
            max_tokens=int(data.get("max_tokens") or self.max_tokens),
            ttl=data.get("cache_ttl", "5m"),
        )
        self.open_request = True
        self.error = None

    def _commit(self, horizon: int) -> None:
        """A new request begins: what it adds to the prompt becomes part of the conversation."""
        kept, added = self._grown(horizon)
        if self.ended:
            self._turn_start = len(kept)
            self._turn_results = tuple(self.results[use.id] for use in self.uses)
            self.window.turn_begins()
            self.continuations = 0
        self.messages = [*kept, *added]
        if added:
            self.window.committed()
            self.queued = [item for item in self.queued if item.seq > horizon]
        self._clear_tools()
        self.ended = False
        self.stop_reason = None
        self.failures = 0
        self.limit_step = 0

    def _clear_tools(self) -> None:
        self.uses = ()
        self.results = {}
        self.started = {}
        self.asked = set()
        self.decisions = {}
        self.answers = {}

    def _response(self, seq: int, data: Mapping[str, Any]) -> None:
        message = data["message"]
        self.stop_reason = str(message.get("stop_reason"))
        self.error = None
        self.failures = 0
        self.wakes = 0
        if self.stop_reason == "refusal":
            self._cut_turn()
            return
        blocks = response_blocks(self._payload)
        if blocks:
            self.messages.append(Message("assistant", blocks))
        self.window.answered(cut=self.stop_reason == CONTEXT_EXCEEDED)
        self.context_tokens = st.context_tokens(message)
        self.counted_messages = len(self.messages)
        self.uses = tool_uses(message, self.custom_tools)
        self._asked_at = seq
        continued = self.stop_reason == "pause_turn" or (
            self.stop_reason in _CUTTING and not self.uses
        )
        self.continuations = self.continuations + 1 if continued else 0

    def _cut_turn(self) -> None:
        """A refused turn leaves the prompt; results of the turn before it and system messages must stay."""
        cut = self.messages[self._turn_start :]
        system = (Queued(0, one.blocks, system=True) for one in cut if one.role == "system")
        self.queued = [*system, *self.queued]
        del self.messages[self._turn_start :]
        self.context_tokens = 0
        if self._turn_results:
            self.messages.append(Message("user", self._turn_results))
        self._clear_tools()
        self.request = None
        self.window.refused()

    def _request_end(self, seq: int, data: Mapping[str, Any]) -> None:
        self.open_request = False
        if self.window.side is not None and data["start"] == self.window.side.seq:
            self.window.side_ended(data)
            return
        outcome = data["outcome"]
        if outcome != "lost":
            self.wakes = 0
        if outcome == "truncated":
            self.limit_step = 1
        elif outcome == "error":
            self.error = data["error"]
            if self.limit_step == 1 and self.error["type"] == "invalid_request_error":
                # The model may not allow twice the limit: take the cut answer at the old one.
                self.limit_step = 2
                self.error = None
            else:
                self.failures += 1
                if win.too_long(self.error):
                    self.window.overflow = "prompt"

    def _pending(self, seq: int, data: Mapping[str, Any]) -> None:
        self.asked.add(data["tool_use_id"])

    def _started(self, seq: int, data: Mapping[str, Any]) -> None:
        self.idle = None
        self.started[data["tool_use_id"]] = data

    def _result(self, seq: int, data: Mapping[str, Any]) -> None:
        use_id = data["tool_use_id"]
        if use_id not in self.results and any(use.id == use_id for use in self.uses):
            content = data["content"]
            content = content if isinstance(content, list) else str(content)
            self.results[use_id] = tool_result_block(use_id, content, bool(data["is_error"]))
            name = next(use.name for use in self.uses if use.id == use_id)
            self.window.results[use_id] = Result(seq, name, len(self.results[use_id].raw))
        self.wakes = 0

    # The context window.

    def _selected(self, seq: int, data: Mapping[str, Any]) -> None:
        self.window.selected = data

    def _compacted(self, seq: int, data: Mapping[str, Any]) -> None:
        raw = rawjson.members(rawjson.members(self._payload.decode())["d"])["block"]
        carry = () if self.ended else content_blocks(str(data["continue"]))
        self._renew([Message("assistant", (Block("compaction", raw.encode()),))], carry)

    def _reset(self, seq: int, data: Mapping[str, Any]) -> None:
        notes = [{"type": "text", "text": str(data[key])} for key in ("notes", "continue")]
        self._renew([], (*self.window.first, *content_blocks(notes)))

    def _renew(self, messages: list[Message], carry: tuple[Block, ...]) -> None:
        """The prompt up to here is gone, and with it what may be compared with it."""
        system = (
            Queued(0, one.blocks, system=True) for one in self.messages if one.role == "system"
        )
        held: tuple[Block, ...] = ()
        if self.window.overflow == "prompt":
            _, text, _ = win.split_newest(self.messages)
            held = (*win.retold(self.messages, self.window), *text)
        waiting = (Queued(0, held),) if held else ()
        self.queued = [*system, *waiting, *self.queued]
        self.messages = messages
        self._turn_start, self._turn_results = len(messages), ()
        self._clear_tools()
        self.request = None
        self.error, self.failures = None, 0
        self.stop_reason = None
        self.continuations = 0
        self.wakes = 0
        self.context_tokens = self.counted_messages = 0
        self.window.renewed(self.n, carry)

    def _cleared(self, seq: int, data: Mapping[str, Any]) -> None:
        ids = {str(use_id) for use_id in data["tool_use_ids"]}
        before = sum(len(item.raw) for message in self.messages for item in message.blocks)
        self.messages = win.cleared(self.messages, self.window.results, ids, self._readable)
        after = sum(len(item.raw) for message in self.messages for item in message.blocks)
        self.window.cleared |= ids
        if self.context_tokens:
            freed = (before - after) // win.BYTES_PER_TOKEN
            self.context_tokens = max(1, self.context_tokens - freed)
        self.request = None
        self.error, self.failures = None, 0
        self.window.overflow = ""
        self.wakes = 0

    # Hands.

    def _hand_requested(self, seq: int, data: Mapping[str, Any]) -> None:
        self._hand(data, "Pending")

    def _hand_provisioned(self, seq: int, data: Mapping[str, Any]) -> None:
        self._hand(data, "Ready")

    def _hand_lost(self, seq: int, data: Mapping[str, Any]) -> None:
        self._hand(data, "Lost")

    def _hand(self, data: Mapping[str, Any], state: str) -> None:
        name, instance = str(data["hand"]), int(data["instance"])
        old = self.hands.get(name)
        if old is None or instance >= old.instance:
            self.hands[name] = HandState(name, instance, state)

    def _status_idle(self, seq: int, data: Mapping[str, Any]) -> None:
        self.idle = data["stop_reason"]
        self.refused = self.idle["type"] == "budget_reached"
        self.wake_at = None
        self.wakes = 0
        if self.idle["type"] in st.ENDS_TURN:
            self.ended = True
            self.window.overflow = ""
            self.interrupted = False
            self.error = None
            self.failures = 0

    def _session_error(self, seq: int, data: Mapping[str, Any]) -> None:
        self.wakes = 0
        if data["error"]["retry_status"]["type"] != "retrying":
            # What was waiting then must not start the failed turn over by itself, only new input may.
            self.silenced = max(self.silenced, int(data.get("horizon", 0)))


def tool_uses(
    message: Mapping[str, Any], custom: Collection[str] = frozenset()
) -> tuple[ToolUse, ...]:
    """The `tool_use` blocks of a response; the last one is `cut` if the output limit ended in it.

    Args:
        message: the response.
        custom: names of the custom tools.
    """
    content = message.get("content") or []
    uses = []
    for index, item in enumerate(content):
        if item.get("type") != "tool_use":
            continue
        cut = message.get("stop_reason") in _CUTTING and index == len(content) - 1
        name, given = str(item["name"]), item.get("input") or {}
        uses.append(ToolUse(str(item["id"]), name, given, cut, name in custom))
    return tuple(uses)


_RUNNING: Final = frozenset({ev.STATUS_RUNNING, ev.MODEL_REQUEST_START, ev.TOOL_STARTED})
"""Events after which a session runs, until it is idle again."""

_CUTTING: Final = frozenset({"max_tokens", CONTEXT_EXCEEDED})

_HANDLERS: Final[Mapping[str, Callable[[Conversation, int, Mapping[str, Any]], None]]] = {
    ev.SESSION_CREATED: Conversation._created,
    ev.SESSION_SUSPENDED: Conversation._suspended,
    ev.SESSION_RESUMED: Conversation._resumed,
    ev.SESSION_UPDATED: Conversation._updated,
    ev.SESSION_DELETED: Conversation._deleted,
    ev.SESSION_FORKED: Conversation._forked,
    ev.LOG_REGRESSED: Conversation._suspended,
    ev.SESSION_WAKE: Conversation._wake,
    ev.USER_MESSAGE: Conversation._message,
    ev.USER_INTERRUPT: Conversation._interrupt,
    ev.USER_TOOL_CONFIRMATION: Conversation._confirmation,
    ev.USER_CUSTOM_TOOL_RESULT: Conversation._custom_result,
    ev.SYSTEM_MESSAGE: Conversation._system_message,
    ev.MODEL_REQUEST_START: Conversation._request_start,
    ev.MODEL_REQUEST_END: Conversation._request_end,
    ev.MODEL_RESPONSE: Conversation._response,
    ev.CONTEXT_SELECTED: Conversation._selected,
    ev.CONTEXT_COMPACTED: Conversation._compacted,
    ev.CONTEXT_RESET: Conversation._reset,
    ev.CONTEXT_CLEARED: Conversation._cleared,
    ev.TOOL_PENDING: Conversation._pending,
    ev.TOOL_STARTED: Conversation._started,
    ev.TOOL_RESULT: Conversation._result,
    ev.HAND_REQUESTED: Conversation._hand_requested,
    ev.HAND_PROVISIONED: Conversation._hand_provisioned,
    ev.HAND_LOST: Conversation._hand_lost,
    ev.STATUS_RUNNING: Conversation._running,
    ev.STATUS_IDLE: Conversation._status_idle,
    ev.STATUS_RESCHEDULED: Conversation._rescheduled,
    ev.SESSION_ERROR: Conversation._session_error,
}


def _check(event: Event) -> None:
    body = event.body
    if body.get("v") != ev.PAYLOAD_VERSION or body.get("th", "main") != "main" or "d" not in body:
        raise LogIncompatible(
            f"event {event.seq} ({event.type}) has version {body.get('v')!r}, thread "
            f"{body.get('th')!r}; this release reads version {ev.PAYLOAD_VERSION}: upgrade Cowhand"
        )


def fold(session_id: str, events: Iterable[Event]) -> Conversation:
    """Fold a log from position 1."""
    conversation = Conversation(session_id)
    for event in events:
        conversation.apply(event)
    return conversation
