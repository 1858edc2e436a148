"""What the gateway's tests share: sample events of a session, a list for a log, a Kubernetes that knows people."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

from cowhand.errors import SessionNotFound
from cowhand.kube import kinds
from cowhand.kube.kinds import Kind
from cowhand.session import events as ev
from cowhand.session.events import Event, NewEvent
from cowhand.session.log import SessionMeta, SessionState, from_end
from support.memory_log import fitting

SID = "sesn_" + "ab" * 16
HEX = "ab" * 16
T0 = 1_790_000_000_000
ACTOR = {"user": "jane", "groups": ["dev"], "via": "gateway"}


def at(seq: int, kind: str, data: dict[str, Any]) -> Event:
    """An event whose time is T0 plus one second a position."""
    payload = NewEvent(kind, data).payload()
    return Event(seq, kind, f"e{seq}", T0 + seq * 1000, "", payload)


def created(
    permissions: dict[str, str] | None = None, custom_tools: Sequence[str] = ()
) -> dict[str, Any]:
    """Payload of `session.created`."""
    names = ("bash", *custom_tools, "read")
    schema = {"type": "object"}
    tools = [{"name": name, "description": "d", "input_schema": schema} for name in names]
    return {
        **({"custom_tools": list(custom_tools)} if custom_tools else {}),
        "namespace": "default",
        "name": "fix",
        "uid": "u",
        "agent": {"name": "coder", "uid": "agent-uid", "generation": 3, "hash": "h"},
        "request": {
            "model": "claude-opus-5-5",
            "max_tokens": 8000,
            "system": [{"type": "text", "text": "Be careful."}],
            "tools": tools,
        },
        "permissions": permissions or {"bash": "Ask", "read": "Allow"},
        "hands": [{"name": "sandbox", "kind": "sandbox", "environment_ref": "python"}],
        "resources": [],
        "budget": {},
        "assembler": 1,
    }


def user_message(text: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text}], "actor": ACTOR}


def tool_use(toolu: str, name: str = "bash", **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": toolu, "name": name, "input": arguments}


def response(*content: dict[str, Any], tokens: int = 10) -> dict[str, Any]:
    usage = {"input_tokens": tokens, "output_tokens": 5, "cache_read_input_tokens": 3}
    message = {"role": "assistant", "content": list(content), "usage": usage}
    return {"message": message, "request_id": "req_1", "ttft_ms": 40, "duration_ms": 90}


def turn() -> list[tuple[str, dict[str, Any]]]:
    """A whole turn with one tool call, as (type, payload) from position 1 on."""
    text = {"type": "text", "text": "Let me look."}
    thinking = {"type": "thinking", "thinking": "hm", "signature": "s"}
    call = {"tool_use_id": "toolu_1", "call_id": f"{SID}/toolu_1", "name": "bash", "attempt": 1}
    return [
        (ev.SESSION_CREATED, created()),
        (ev.USER_MESSAGE, user_message("Fix the tests")),
        (ev.SESSION_WAKE, {}),
        (ev.STATUS_RUNNING, {}),
        (ev.MODEL_REQUEST_START, {"n": 1, "attempt": 1, "horizon": 4, "n_messages": 1}),
        (ev.MODEL_RESPONSE, response(thinking, text, tool_use("toolu_1", command="pytest"))),
        (ev.MODEL_REQUEST_END, {"start": 5, "outcome": "ok"}),
        (ev.TOOL_STARTED, {**call, "hand": "sandbox", "instance": 1, "class": "effect"}),
        (
            ev.TOOL_RESULT,
            {"tool_use_id": "toolu_1", "content": "1 failed", "is_error": True, "exit_code": 1},
        ),
        (ev.MODEL_REQUEST_START, {"n": 2, "attempt": 1, "horizon": 9, "n_messages": 3}),
        (ev.MODEL_RESPONSE, response({"type": "text", "text": "Done."}, tokens=20)),
        (ev.MODEL_REQUEST_END, {"start": 10, "outcome": "ok"}),
        (ev.STATUS_IDLE, {"stop_reason": {"type": "end_turn"}}),
    ]


def events_of(rows: list[tuple[str, dict[str, Any]]]) -> list[Event]:
    return [at(seq, kind, data) for seq, (kind, data) in enumerate(rows, start=1)]


class ListLog:
    """`SessionLog` on a list; `taken` counts the events that a follower took."""

    def __init__(self, events: list[Event], namespace: str = "default") -> None:
        self.events = events
        self.taken = 0
        self.state = "idle"
        self.status: dict[str, Any] = {}
        self.namespace = namespace
        self.reads = 0
        self._grown = asyncio.Event()

    async def create_session(self, meta: Any, events: Any) -> Any:
        raise NotImplementedError

    async def emit_event(self, session_id: str, event: NewEvent) -> int:
        for old in self.events:
            if old.id == event.id:
                return old.seq
        seq = len(self.events) + 1
        self.events.append(Event(seq, event.type, event.id, T0 + seq * 1000, "", event.payload()))
        self._grown.set()
        return seq

    async def get_events(
        self,
        session_id: str,
        start: int = 1,
        end: int | None = None,
        *,
        limit: int | None = None,
        types: Collection[str] | None = None,
        max_bytes: int | None = None,
    ) -> list[Event]:
        self.reads += 1
        start, end = from_end(start, end, len(self.events) + 1)
        found = self.events[start - 1 : end]
        found = [event for event in found if types is None or event.type in types]
        if max_bytes is not None:
            found = fitting(found, max_bytes)
        return found if limit is None else found[:limit]

    async def get_session(self, session_id: str) -> SessionState:
        if session_id != SID:
            raise SessionNotFound(f"no session {session_id}")
        meta = SessionMeta(SID, self.namespace, "fix", "u", {})
        return SessionState(
            meta,
            self.state,  # type: ignore[arg-type]
            "running",
            "",
            1,
            len(self.events) + 1,
            self.status,
            T0,
        )

    async def follow(self, session_id: str, start: int = 1) -> AsyncIterator[Event]:
        position = start
        while True:
            while position <= len(self.events):
                self.taken += 1
                event = self.events[position - 1]
                yield event
                if event.type == ev.SESSION_DELETED:
                    return
                position += 1
            self._grown.clear()
            await self._grown.wait()


class PeopleKube:
    """Answers TokenReview and SubjectAccessReview from two tables, and `get` from a third.

    `tokens`: token -> user info, or None for "not authenticated". `rights`: set of
    (user, verb, subresource, namespace). `audience` is what an accepted token is bound to.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, dict[str, Any] | None] = {
            "jane-token": {"username": "jane", "uid": "1", "groups": ["dev"]},
            "joe-token": {"username": "joe", "groups": []},
        }
        self.rights: set[tuple[str, str, str, str]] = {
            ("jane", "get", "events", "default"),
            ("jane", "create", "messages", "default"),
            ("jane", "create", "approvals", "default"),
            ("jane", "create", "exec", "default"),
        }
        self.audience = "cowhand-gateway"
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.reviews: list[dict[str, Any]] = []
        self.error: Exception | None = None

    async def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        if self.error:
            raise self.error
        self.reviews.append(manifest)
        spec = manifest["spec"]
        if manifest["kind"] == "TokenReview":
            user = self.tokens.get(spec["token"])
            accepted = user is not None and self.audience in spec["audiences"]
            status: dict[str, Any] = {"authenticated": accepted}
            if accepted:
                status |= {"user": user, "audiences": [self.audience]}
            return {**manifest, "status": status}
        asked = spec["resourceAttributes"]
        assert (asked["group"], asked["resource"]) == ("cowhand.dev", "agentsessions")
        key = (spec["user"], asked["verb"], asked["subresource"], asked["namespace"])
        return {**manifest, "status": {"allowed": key in self.rights}}

    def count(self, kind: str) -> int:
        return sum(review["kind"] == kind for review in self.reviews)

    async def get(self, kind: Kind, namespace: str | None, name: str) -> dict[str, Any] | None:
        assert kind is kinds.SANDBOX
        return self.objects.get((namespace or "", name))
