"""Gathers what is known about one AgentSession: the resource, what it refers to, its log, its hands.

Used by `controller.sessions`, which decides on the snapshot and acts.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from cowhand.api import labels
from cowhand.api.v1alpha1 import (
    Agent,
    AgentSession,
    Environment,
    EnvironmentSpec,
    Fork,
    PinnedAgent,
)
from cowhand.controller import freeze, observe
from cowhand.controller.freeze import AgentSource, FreezeDefaults, Frozen
from cowhand.controller.logs import Logs
from cowhand.desired import names
from cowhand.errors import LogIncompatible, SessionNotFound, StoreUnavailable, UserError
from cowhand.kube import kinds
from cowhand.kube.client import Kube, Manifest
from cowhand.reconcile.session_snapshot import (
    Absent,
    LogView,
    RecordState,
    Refusal,
    SessionSnapshot,
    Unreachable,
)
from cowhand.reconcile.store_profile import StoreProfile
from cowhand.session import forking
from cowhand.session.events import Event
from cowhand.session.log import HandRecord, SessionState

Key = tuple[str, str]

CREATED_CACHE: Final = 2000
"""Sessions whose `session.created` is kept in memory."""

FORK_LIMIT_S: Final = 120.0
"""Longest time that one look at the source of a fork, and its copy, may take."""


@dataclass
class Pass:
    """What one pass over one object learned; never kept."""

    raw: Manifest
    session_id: str
    adopted: bool
    delivered: set[str]
    frozen: Frozen | None = None
    created: Mapping[str, Any] | None = None


class SessionObserver:
    """Reads, and never writes.

    Attributes:
        waiting: objects that wait for an Agent or an Environment.
    """

    def __init__(
        self,
        kube: Kube,
        logs: Logs,
        *,
        tenants: frozenset[str],
        defaults: FreezeDefaults,
        store: Callable[[], StoreProfile | None],
    ) -> None:
        """`store` answers what the store is believed to keep."""
        self._kube = kube
        self._logs = logs
        self._tenants = tenants
        self._defaults = defaults
        self._store = store
        self._created: OrderedDict[str, Mapping[str, Any]] = OrderedDict()
        self._seen: OrderedDict[str, int] = OrderedDict()
        self.waiting: set[Key] = set()

    async def observe(self, key: Key, state: Pass, written: datetime | None) -> SessionSnapshot:
        """The snapshot of one AgentSession; `written` is when its status was written last."""
        session, problem = observe.read_session(state.raw)
        snap = SessionSnapshot(
            session=session,
            served=key[0] in self._tenants,
            session_id=state.session_id,
            adopted=state.adopted,
            log=Absent(),
            delivered=frozenset(state.delivered),
            refusal=Refusal("InvalidSpec", problem) if problem else None,
            finalized=labels.FINALIZER in session.metadata.finalizers,
            written=written,
            store=self._store(),
        )
        if not snap.served:
            return snap
        view = await self._look(key[0], state.session_id)
        snap = replace(snap, log=view)
        if isinstance(view, LogView):
            snap = replace(snap, seen=self._remember(state.session_id, view.last_seq))
            snap = replace(snap, pinned=await self._pinned(key[0], session, state))
        if isinstance(view, Absent) and not snap.deleting and not session.status.session_id:
            snap = await self._resolve(key, snap, state)
        needs_hands = isinstance(view, LogView) and (view.document.get("hands") or view.ended)
        if needs_hands or snap.deleting:
            snap = await self._look_at_hands(key[0], snap, state)
        if snap.adopted and isinstance(view, LogView):
            snap = await self._look_at_messages(key[0], snap)
        return snap

    def _remember(self, session_id: str, last_seq: int) -> int:
        """The highest position seen before; a log never becomes shorter but by a loss."""
        before = self._seen.pop(session_id, 0)
        self._seen[session_id] = max(before, last_seq)
        while len(self._seen) > CREATED_CACHE:
            self._seen.popitem(last=False)
        return before

    async def _look(self, namespace: str, session_id: str) -> LogView | Absent | Unreachable:
        sessions = self._logs.sessions(namespace)
        try:
            found = await self._logs.call(lambda: sessions.get_session(session_id))
            return await self._logs.call(lambda: observe.log_view(sessions, found))
        except SessionNotFound:
            return Absent()
        except (StoreUnavailable, LogIncompatible) as err:
            # A log that was broken by hand must not keep its object from being deleted.
            return Unreachable(str(err))

    async def _resolve(self, key: Key, snap: SessionSnapshot, state: Pass) -> SessionSnapshot:
        """Agent and Environments, and the frozen session made of them."""
        if snap.refusal is not None:
            return snap
        session = snap.session
        if session.spec.fork is not None:
            return await self._resolve_fork(key[0], session.spec.fork, snap, state)
        agent = await self._agent(session)
        if isinstance(agent, Refusal):
            return replace(snap, refusal=agent)
        spec = agent.spec if agent is not None else None
        wanted = {
            ref.name
            for ref in (
                session.spec.environment_ref,
                *(hand.sandbox.environment_ref for hand in (spec.hands if spec else ())),
            )
            if ref is not None
        }
        found, problem = await self._environments(key[0], wanted)
        missing = tuple(sorted(wanted - set(found))) if problem is None else ()
        ref = session.spec.agent_ref
        if agent is None or missing or problem is not None:
            self.waiting.add(key)
            return replace(
                snap,
                missing_agent=ref.name if agent is None and ref else None,
                missing_environments=missing,
                refusal=problem,
            )
        self.waiting.discard(key)
        try:
            state.frozen = freeze.freeze(session, state.session_id, agent, found, self._defaults)
        except freeze.TooLarge as err:
            return replace(snap, refusal=Refusal("TooLarge", str(err)))
        except UserError as err:
            return replace(snap, refusal=Refusal("InvalidSpec", str(err)))
        return replace(snap, pinned=state.frozen.pinned)

    async def _resolve_fork(
        self, namespace: str, fork: Fork, snap: SessionSnapshot, state: Pass
    ) -> SessionSnapshot:
        """The session to branch off from, the position, and the frozen session made of them."""
        sessions = self._logs.sessions(namespace)
        source = await self._source(namespace, fork.session)
        if source is None:
            return replace(snap, missing_source=fork.session)

        async def read() -> tuple[SessionState, list[Event], list[Event]]:
            found = await sessions.get_session(source)
            created = await sessions.get_events(source, 1, 1)
            marks = await sessions.get_events(source, 1, found.next_seq - 1, types=forking.MARKS)
            return found, created, marks

        try:
            there, created, marks = await self._logs.call(read, limit_s=FORK_LIMIT_S)
            last = there.next_seq - 1
            at = forking.position(fork.session, marks, last, fork.at)
            state.frozen = freeze.fork(
                snap.session,
                state.session_id,
                (source, at),
                created[0].data,
                there.meta.model,
                self._defaults,
            )
        except SessionNotFound:
            return replace(snap, missing_source=fork.session)
        except (StoreUnavailable, LogIncompatible) as err:
            return replace(snap, log=Unreachable(str(err)))
        except freeze.TooLarge as err:
            return replace(snap, refusal=Refusal("TooLarge", str(err)))
        except UserError as err:
            reason = "InvalidFork" if err.field == "spec.fork.at" else "InvalidSpec"
            return replace(snap, refusal=Refusal(reason, str(err)))
        return replace(snap, pinned=state.frozen.pinned)

    async def _source(self, namespace: str, name: str) -> str | None:
        """Session id of what spec.fork names, None if there is no such object."""
        if name.startswith("sesn_"):
            return name
        raw = await self._kube.get(kinds.AGENT_SESSION, namespace, name)
        if raw is None:
            return None
        source, _ = observe.read_session(raw)
        return source.status.session_id or names.session_id(source.metadata.uid)

    async def _agent(self, session: AgentSession) -> AgentSource | Refusal | None:
        """The agent to pin, None if it does not exist."""
        if session.spec.agent is not None:
            return AgentSource(session.spec.agent)
        assert session.spec.agent_ref is not None, "the model validates that one of both is set"
        raw = await self._kube.get(
            kinds.AGENT, session.metadata.namespace, session.spec.agent_ref.name
        )
        if raw is None:
            return None
        try:
            agent = Agent.model_validate(raw)
        except ValueError as err:
            return Refusal("InvalidSpec", f"Agent {session.spec.agent_ref.name!r}: {err}")
        meta = agent.metadata
        return AgentSource(agent.spec, meta.name, meta.uid, meta.generation)

    async def _environments(
        self, namespace: str, wanted: set[str]
    ) -> tuple[dict[str, EnvironmentSpec], Refusal | None]:
        order = sorted(wanted)
        raws = await asyncio.gather(
            *(self._kube.get(kinds.ENVIRONMENT, namespace, name) for name in order)
        )
        found: dict[str, EnvironmentSpec] = {}
        for name, raw in zip(order, raws, strict=True):
            if raw is None:
                continue
            try:
                found[name] = Environment.model_validate(raw).spec
            except ValueError as err:
                return found, Refusal("InvalidSpec", f"Environment {name!r}: {err}")
        return found, None

    async def _look_at_hands(
        self, namespace: str, snap: SessionSnapshot, state: Pass
    ) -> SessionSnapshot:
        """Sandboxes of the session, the records of its hands, and their idle timeouts."""
        raws = await self._kube.list(
            kinds.SANDBOX, namespace, label_selector=observe.session_selector(snap.session_id)
        )
        views = [observe.sandbox_view(raw, snap.session_id) for raw in raws]
        snap = replace(snap, sandboxes=tuple(view for view in views if view is not None))
        if not isinstance(snap.log, LogView) or snap.deleting or snap.log.ended:
            return snap
        records: dict[tuple[str, int], RecordState] = {}
        try:
            state.created = await self._session_created(namespace, snap.session_id)
            for hand in snap.log.document.get("hands") or ():
                which = (str(hand["name"]), int(hand["instance"]))
                record = await self.record(namespace, snap.session_id, *which)
                if record is not None:
                    records[which] = record.state
                    snap = await self._confirm_absence(namespace, snap, *which)
        except (StoreUnavailable, SessionNotFound) as err:
            return replace(snap, log=Unreachable(str(err)))
        timeouts = {
            hand["name"]: int(hand["environment"]["idleTimeoutSeconds"])
            for hand in state.created["hands"]
            if hand["environment"].get("idleTimeoutSeconds")
        }
        return replace(snap, records=records, idle_timeouts=timeouts)

    async def _confirm_absence(
        self, namespace: str, snap: SessionSnapshot, hand: str, instance: int
    ) -> SessionSnapshot:
        """Ask for the Sandbox of a hand by its name where the list had none: only then it is lost."""
        views = snap.sandboxes or ()
        if any(view.ours and (view.hand, view.instance) == (hand, instance) for view in views):
            return snap
        name = names.sandbox_name(snap.session_id, hand, instance)
        raw = await self._kube.get(kinds.SANDBOX, namespace, name)
        view = None if raw is None else observe.sandbox_view(raw, snap.session_id)
        if view is None or not view.ours or (view.hand, view.instance) != (hand, instance):
            return snap
        return replace(snap, sandboxes=(*views, view))

    async def record(
        self, namespace: str, session_id: str, hand: str, instance: int
    ) -> HandRecord | None:
        """The record of one hand instance."""
        control = self._logs.control
        return await self._logs.call(
            lambda: control.get_hand(namespace, session_id, hand, instance)
        )

    async def _session_created(self, namespace: str, session_id: str) -> Mapping[str, Any]:
        """The frozen copy, `d` of the event at position 1."""
        if session_id not in self._created:
            sessions = self._logs.sessions(namespace)
            found = await self._logs.call(lambda: sessions.get_events(session_id, 1, 1))
            self._created[session_id] = found[0].data
            while len(self._created) > CREATED_CACHE:
                self._created.popitem(last=False)
        return self._created[session_id]

    async def _pinned(
        self, namespace: str, session: AgentSession, state: Pass
    ) -> PinnedAgent | None:
        """The agent as the log has it, unless the status says so already."""
        if state.frozen is not None and not state.adopted:
            return state.frozen.pinned
        if session.status.agent is not None:
            return session.status.agent
        try:
            created = await self._session_created(namespace, state.session_id)
        except (StoreUnavailable, SessionNotFound):
            return None
        return PinnedAgent.model_validate(created["agent"])

    async def _look_at_messages(self, namespace: str, snap: SessionSnapshot) -> SessionSnapshot:
        """Which messages of an adopted object stand in the log of the run that was made."""
        ids = {message.id for message in snap.session.spec.messages or ()}
        if ids <= snap.delivered:
            return snap
        sessions = self._logs.sessions(namespace)
        try:
            found = await self._logs.call(lambda: sessions.get_events(snap.session_id))
        except (StoreUnavailable, SessionNotFound):
            return snap
        sent = {event.id.removeprefix("msg:") for event in found if event.id.startswith("msg:")}
        return replace(snap, delivered=snap.delivered | (sent & ids))
