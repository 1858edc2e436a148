"""An in-memory session log for tests of the operator: `SessionLog` and `ControlLog` without a store.

Keeps what the operator depends on: idempotent creation by id and tombstone, deduplication, mode, close, hand
records that never go back from Lost, the projection set, and a switch that turns the store off (`down`).
`finish`, `write` and `hand` play the harness.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from cowhand.errors import QuotaExceeded, SessionClosed, SessionNotFound, StoreUnavailable
from cowhand.session import events
from cowhand.session.events import Event, NewEvent
from cowhand.session.log import (
    Backlog,
    Created,
    HandRecord,
    Mode,
    SessionMeta,
    SessionState,
    State,
    from_end,
)


@dataclass
class _Session:
    meta: SessionMeta
    state: State = "idle"
    mode: Mode = "running"
    log: list[Event] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    hands: dict[tuple[str, int], HandRecord] = field(default_factory=dict)
    retain_s: int | None = None
    budget: dict[str, int] = field(default_factory=dict)
    regressed: tuple[int, int] | None = None
    accepted: int = 0

    def append(self, event: NewEvent) -> int:
        if event.id and event.id in self.ids:
            return self.ids[event.id]
        seq = len(self.log) + 1
        self.log.append(Event(seq, event.type, event.id or f"w{seq}", 0, "", event.payload()))
        if event.id:
            self.ids[event.id] = seq
        return seq


class MemoryLog:
    """Both roles for one or more tenants.

    Attributes:
        down: every call raises StoreUnavailable.
        hang: every call blocks until cancelled.
        backlogs: namespace -> what `backlog` answers.
        dropped: pod uids that `drop_worker` was called with.
        calls: how many calls were made.
    """

    def __init__(self) -> None:
        self.down = False
        self.hang = False
        self.full = False
        self.backlogs: dict[str, Backlog] = {}
        self.dropped: list[tuple[str, str]] = []
        self.calls = 0
        self.sandbox_records: dict[tuple[str, str], HandRecord] = {}
        self._sessions: dict[tuple[str, str], _Session] = {}
        self._tombs: dict[tuple[str, str], str] = {}
        self._projections: dict[str, set[str]] = defaultdict(set)

    def of(self, namespace: str) -> MemorySessions:
        """The `SessionLog` of a tenant."""
        return MemorySessions(self, namespace)

    # -- the harness and the observer --------------------------------------------------------------

    def write(
        self, namespace: str, session_id: str, kind: str, data: dict[str, Any], **status: Any
    ) -> None:
        """Append a worker event and change the status document."""
        session = self._sessions[(namespace, session_id)]
        session.append(NewEvent(kind, data))
        session.status = {**session.status, **status}
        self._projections[namespace].add(session_id)

    def run(self, namespace: str, session_id: str) -> None:
        """A harness claims the session."""
        self._sessions[(namespace, session_id)].state = "running"
        self.write(namespace, session_id, events.STATUS_RUNNING, {}, stop_reason=None)

    def finish(
        self, namespace: str, session_id: str, reason: str = "end_turn", **more: Any
    ) -> None:
        """A turn ends."""
        stop = {"type": reason}
        session = self._sessions[(namespace, session_id)]
        turns = session.status.get("turns", 0) + 1
        self.write(
            namespace,
            session_id,
            events.STATUS_IDLE,
            {"stop_reason": stop},
            stop_reason=stop,
            turns=turns,
            **more,
        )
        session.state = "idle"

    def hand(self, namespace: str, session_id: str, name: str, instance: int, state: str) -> None:
        """The status document names a hand."""
        hands = [{"name": name, "instance": instance, "state": state, "sandbox": ""}]
        data = {"hand": name, "instance": instance, "reason": "first_call"}
        self.write(namespace, session_id, events.HAND_REQUESTED, data, hands=hands)

    def types(self, namespace: str, session_id: str) -> list[str]:
        """Types of the events of a session."""
        return [event.type for event in self._sessions[(namespace, session_id)].log]

    def ids(self, namespace: str, session_id: str) -> list[str]:
        """Ids of the external events of a session."""
        return list(self._sessions[(namespace, session_id)].ids)

    def session(self, namespace: str, session_id: str) -> _Session:
        """The session itself."""
        return self._sessions[(namespace, session_id)]

    def __len__(self) -> int:
        return len(self._sessions)

    def lose(self, namespace: str, session_id: str) -> None:
        """The store loses a session."""
        del self._sessions[(namespace, session_id)]

    # -- ControlLog --------------------------------------------------------------------------------

    async def enter(self) -> None:
        self.calls += 1
        if self.hang:
            await asyncio.Event().wait()
        if self.down:
            raise StoreUnavailable("the store does not answer")

    def find(self, namespace: str, session_id: str) -> _Session:
        try:
            return self._sessions[(namespace, session_id)]
        except KeyError:
            raise SessionNotFound(f"there is no session {session_id}") from None

    async def set_mode(self, namespace: str, session_id: str, mode: Mode, event: NewEvent) -> int:
        await self.enter()
        session = self.find(namespace, session_id)
        if session.state in ("closed", "terminated"):
            raise SessionClosed(session_id)
        if event.id in session.ids:
            return session.ids[event.id]
        session.mode = mode
        self._projections[namespace].add(session_id)
        return session.append(event)

    async def set_budget(self, namespace: str, session_id: str, event: NewEvent) -> int:
        await self.enter()
        session = self.find(namespace, session_id)
        if event.id in session.ids:
            return session.ids[event.id]
        if session.state in ("closed", "terminated"):
            raise SessionClosed(session_id)
        session.budget = dict(event.data["budget"] or {})
        return session.append(event)

    async def regress(self, namespace: str, session_id: str, event: NewEvent, *, seen: int) -> int:
        await self.enter()
        session = self.find(namespace, session_id)
        position = len(session.log)
        if session.regressed is None and seen > max(position, session.accepted):
            session.append(event)
            session.mode, session.regressed = "suspended", (seen, position)
            self._projections[namespace].add(session_id)
        return len(session.log)

    async def accept_regression(self, namespace: str, session_id: str, position: int) -> bool:
        await self.enter()
        session = self.find(namespace, session_id)
        if session.regressed is None or session.regressed[1] != position:
            return False
        session.accepted, session.regressed = session.regressed[0], None
        self._projections[namespace].add(session_id)
        return True

    def roll_back(self, namespace: str, session_id: str, last: int) -> None:
        """The store comes back as it was at this position."""
        session = self._sessions[(namespace, session_id)]
        session.log = session.log[:last]
        session.ids = {name: seq for name, seq in session.ids.items() if seq <= last}

    async def close(
        self, namespace: str, session_id: str, event: NewEvent, *, retain_s: int
    ) -> None:
        await self.enter()
        session = self._sessions.get((namespace, session_id))
        if session is None:
            return
        if session.state != "closed":
            session.append(event)
            session.state = "closed"
            session.retain_s = retain_s
            self._projections[namespace].add(session_id)
        if retain_s == 0:
            del self._sessions[(namespace, session_id)]

    async def drop_worker(self, namespace: str, pod_uid: str) -> int:
        await self.enter()
        self.dropped.append((namespace, pod_uid))
        return 0

    async def sweep(self, namespace: str) -> int:
        await self.enter()
        return 0

    async def backlog(self, namespace: str) -> Backlog:
        await self.enter()
        return self.backlogs.get(namespace, Backlog(0, 0, 0, 0))

    async def take_projections(self, namespace: str, limit: int = 100) -> list[str]:
        await self.enter()
        taken = sorted(self._projections[namespace])[:limit]
        self._projections[namespace] -= set(taken)
        return taken

    async def projection_nudges(self, namespaces: Sequence[str]) -> AsyncIterator[str]:
        for namespace in namespaces:
            yield namespace
        await asyncio.Event().wait()

    async def put_hand(self, namespace: str, record: HandRecord) -> None:
        await self.enter()
        hands = self.find(namespace, record.session_id).hands
        key = (record.hand, record.instance)
        old = hands.get(key)
        if old is not None and old.state == "Lost":
            return
        if old is not None and old.state == "Ready" and record.state in ("Pending", "Failed"):
            return
        hands[key] = record
        self.sandbox_records[(namespace, record.sandbox_uid)] = record

    async def get_hand(
        self, namespace: str, session_id: str, hand: str, instance: int
    ) -> HandRecord | None:
        await self.enter()
        session = self._sessions.get((namespace, session_id))
        return session.hands.get((hand, instance)) if session else None

    async def get_sandbox(self, namespace: str, sandbox_uid: str) -> HandRecord | None:
        await self.enter()
        return self.sandbox_records.get((namespace, sandbox_uid))


class MemorySessions:
    """`SessionLog` of one tenant."""

    def __init__(self, log: MemoryLog, namespace: str) -> None:
        self._log = log
        self._namespace = namespace

    async def create_session(self, meta: SessionMeta, new: Sequence[NewEvent]) -> Created:
        await self._log.enter()
        if self._log.full:
            raise QuotaExceeded(self._namespace, used=2, limit=1)
        assert new[0].type == events.SESSION_CREATED
        tombs, sessions = self._log._tombs, self._log._sessions
        tomb = (self._namespace, meta.tombstone)
        if meta.tombstone and tombs.get(tomb, meta.session_id) != meta.session_id:
            return Created(tombs[tomb], existed=True)
        key = (self._namespace, meta.session_id)
        if key in sessions:
            return Created(meta.session_id, existed=True)
        session = sessions[key] = _Session(meta)
        session.budget = dict(new[0].data.get("budget") or {})
        for event in new:
            session.append(event)
        if any(event.type == events.SESSION_SUSPENDED for event in new):
            session.mode = "suspended"
        tombs[tomb] = meta.session_id
        self._log._projections[self._namespace].add(meta.session_id)
        return Created(meta.session_id, existed=False)

    async def emit_event(self, session_id: str, event: NewEvent) -> int:
        await self._log.enter()
        session = self._log.find(self._namespace, session_id)
        if session.state in ("closed", "terminated"):
            raise SessionClosed(session_id)
        return session.append(event)

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
        await self._log.enter()
        log = self._log.find(self._namespace, session_id).log
        start, end = from_end(start, end, len(log) + 1)
        found = log[max(start, 1) - 1 : end]
        found = [event for event in found if types is None or event.type in types]
        if max_bytes is not None:
            found = fitting(found, max_bytes)
        return found if limit is None else found[:limit]

    async def get_session(self, session_id: str) -> SessionState:
        await self._log.enter()
        session = self._log.find(self._namespace, session_id)
        return SessionState(
            meta=session.meta,
            state=session.state,
            mode=session.mode,
            lease="",
            epoch=0,
            next_seq=len(session.log) + 1,
            status=dict(session.status),
            created_ms=0,
            budget=dict(session.budget),
            regressed=session.regressed,
            accepted=session.accepted,
        )

    async def follow(self, session_id: str, start: int = 1) -> AsyncIterator[Event]:
        for event in await self.get_events(session_id, start):
            yield event


def fitting(events: list[Event], max_bytes: int) -> list[Event]:
    """The first events that have so many bytes together, or the first one."""
    total, whole = 0, []
    for event in events:
        total += len(event.payload)
        if whole and total > max_bytes:
            break
        whole.append(event)
    return whole
