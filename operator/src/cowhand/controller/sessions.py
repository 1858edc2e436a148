"""Carries out the plans for AgentSessions: observe, decide (`reconcile.session`), act, write the status once.

Called by the work queue with (namespace, name). Whoever deletes an object while the store is down leaves a
log that has not ended: such sessions are kept in `Orphans` and ended when the store is back.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from cowhand.api import labels
from cowhand.api.v1alpha1 import (
    Agent,
    AgentSession,
    AgentSessionStatus,
    Environment,
    EnvironmentSpec,
    PinnedAgent,
)
from cowhand.controller import freeze, observe
from cowhand.controller.freeze import AgentSource, FreezeDefaults, Frozen
from cowhand.controller.logs import Logs
from cowhand.desired import names
from cowhand.desired.sandbox import SandboxOf, session_sandbox
from cowhand.errors import SessionClosed, SessionNotFound, StoreUnavailable, UserError
from cowhand.kube import kinds
from cowhand.kube.client import Kube, Manifest
from cowhand.kube.errors import Conflict, NotFound
from cowhand.reconcile.session import reconcile_session
from cowhand.reconcile.session_snapshot import (
    Absent,
    LogView,
    Loss,
    RecordState,
    Refusal,
    SessionPlan,
    SessionSnapshot,
    Unreachable,
    Wish,
)
from cowhand.session.events import SESSION_DELETED, NewEvent
from cowhand.session.log import HandRecord
from cowhand.telemetry.logging import bound

Key = tuple[str, str]

ROUNDS: Final = 4
"""Looks in one pass; what is left then comes with the next."""

CREATED_CACHE: Final = 2000
"""Sessions whose `session.created` is kept in memory."""

log = logging.getLogger(__name__)


class Orphans:
    """Sessions whose object is gone and whose log may not have ended.

    In memory: a restart of the operator forgets them, and the projection finds those that still run.
    """

    def __init__(self, logs: Logs, retain_s: int) -> None:
        self._logs = logs
        self._retain_s = retain_s
        self._waiting: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, namespace: str, session_id: str, *, keep: bool = True) -> None:
        """End this session's log when that is possible; `keep` retains it for the usual time."""
        self._waiting[(namespace, session_id)] = self._retain_s if keep else 0

    async def sweep(self) -> None:
        """Try each; what fails stays."""
        for (namespace, session_id), retain_s in tuple(self._waiting.items()):
            event = NewEvent(
                SESSION_DELETED,
                {"actor": {"user": "operator", "via": "kubernetes"}},
                id=f"deleted:{session_id}",
            )
            try:
                await self._logs.call(
                    lambda ns=namespace, sid=session_id, ev=event, keep=retain_s: (  # type: ignore[misc]
                        self._logs.control.close(ns, sid, ev, retain_s=keep)
                    )
                )
            except StoreUnavailable:
                return
            except (SessionNotFound, SessionClosed):
                pass
            self._waiting.pop((namespace, session_id), None)


@dataclass
class _Pass:
    """What one pass over one object learned; never kept."""

    raw: Manifest
    session_id: str
    adopted: bool
    delivered: set[str]
    frozen: Frozen | None = None
    created: Mapping[str, Any] | None = None


class SessionController:
    """Reconciles AgentSessions."""

    def __init__(
        self,
        kube: Kube,
        logs: Logs,
        *,
        tenants: frozenset[str],
        defaults: FreezeDefaults,
        retain_s: int,
        orphans: Orphans,
        clock: Callable[[], datetime],
    ) -> None:
        self._kube = kube
        self._logs = logs
        self._tenants = tenants
        self._defaults = defaults
        self._retain_s = retain_s
        self._orphans = orphans
        self._clock = clock
        self._written: dict[Key, datetime] = {}
        self._created: OrderedDict[str, Mapping[str, Any]] = OrderedDict()
        self.waiting: set[Key] = set()
        """Objects that wait for an Agent or an Environment."""

    async def reconcile(self, key: Key) -> float | None:
        """One pass over one AgentSession; answers when to look again."""
        raw = await self._kube.get(kinds.AGENT_SESSION, *key)
        if raw is None:
            self.forget(key)
            return None
        session, _ = observe.read_session(raw)
        own = names.session_id(session.metadata.uid)
        current = session.status.session_id or own
        state = _Pass(raw, current, current != own, set(session.status.delivered_messages))
        plan = SessionPlan()
        for _ in range(ROUNDS):
            snap = await self._observe(key, state)
            try:
                plan = reconcile_session(snap, self._clock())
                await self._act(key, snap, plan, state)
            except StoreUnavailable as err:
                plan = reconcile_session(replace(snap, log=Unreachable(str(err))), self._clock())
                await self._act_without_store(key, snap, plan)
                break
            if not plan.observe_again:
                break
        if plan.status is not None:
            await self._write_status(key, state.raw, plan.status)
        return plan.requeue_after

    def forget(self, key: Key) -> None:
        """The object is gone."""
        self._written.pop(key, None)
        self.waiting.discard(key)

    # -- observe -----------------------------------------------------------------------------------

    async def _observe(self, key: Key, state: _Pass) -> SessionSnapshot:
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
            written=self._written.get(key),
        )
        if not snap.served:
            return snap
        view = await self._look(key[0], state.session_id)
        snap = replace(snap, log=view)
        if isinstance(view, LogView):
            snap = replace(snap, pinned=await self._pinned(key[0], session, state))
        if isinstance(view, Absent) and not snap.deleting and not session.status.session_id:
            snap = await self._resolve(key, snap, state)
        needs_hands = isinstance(view, LogView) and (view.document.get("hands") or view.ended)
        if needs_hands or snap.deleting:
            snap = await self._look_at_hands(key[0], snap, state)
        if snap.adopted and isinstance(view, LogView):
            snap = await self._look_at_messages(key[0], snap)
        return snap

    async def _look(self, namespace: str, session_id: str) -> LogView | Absent | Unreachable:
        sessions = self._logs.sessions(namespace)
        try:
            found = await self._logs.call(lambda: sessions.get_session(session_id))
            return await self._logs.call(lambda: observe.log_view(sessions, found))
        except SessionNotFound:
            return Absent()
        except StoreUnavailable as err:
            return Unreachable(str(err))

    async def _resolve(self, key: Key, snap: SessionSnapshot, state: _Pass) -> SessionSnapshot:
        """Agent and Environments, and the frozen session made of them."""
        if snap.refusal is not None:
            return snap
        session = snap.session
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
        self, namespace: str, snap: SessionSnapshot, state: _Pass
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
                record = await self._record(namespace, snap.session_id, *which)
                if record is not None:
                    records[which] = record.state
        except (StoreUnavailable, SessionNotFound) as err:
            return replace(snap, log=Unreachable(str(err)))
        timeouts = {
            hand["name"]: int(hand["environment"]["idleTimeoutSeconds"])
            for hand in state.created["hands"]
            if hand["environment"].get("idleTimeoutSeconds")
        }
        return replace(snap, records=records, idle_timeouts=timeouts)

    async def _record(
        self, namespace: str, session_id: str, hand: str, instance: int
    ) -> HandRecord | None:
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
        self, namespace: str, session: AgentSession, state: _Pass
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

    # -- act ---------------------------------------------------------------------------------------

    async def _act(self, key: Key, snap: SessionSnapshot, plan: SessionPlan, state: _Pass) -> None:
        """Carry out a plan in its order. StoreUnavailable leaves the rest for the next pass."""
        namespace = key[0]
        if plan.add_finalizer:
            state.raw = await self._finalize(state.raw, add=True)
        if plan.create:
            await self._create(namespace, snap, state)
        await self._drop(namespace, plan)
        await self._steer(namespace, snap, plan, state)
        for loss in plan.losses:
            await self._lose(namespace, snap.session_id, loss)
        for wish in plan.wishes:
            await self._provide(namespace, snap, wish, state)
        if plan.close:
            await self._close(namespace, snap)
        await self._let_go(key, snap, plan)

    async def _act_without_store(self, key: Key, snap: SessionSnapshot, plan: SessionPlan) -> None:
        """The part of a plan that needs no store: deletions go on."""
        await self._drop(key[0], plan)
        await self._let_go(key, snap, plan)

    async def _drop(self, namespace: str, plan: SessionPlan) -> None:
        for name, uid in plan.drop:
            await self._kube.delete(kinds.SANDBOX, namespace, name, uid=uid)

    async def _let_go(self, key: Key, snap: SessionSnapshot, plan: SessionPlan) -> None:
        meta = snap.session.metadata
        if plan.delete_self:
            await self._kube.delete(kinds.AGENT_SESSION, *key, uid=meta.uid)
        if not plan.remove_finalizer:
            return
        if isinstance(snap.log, Unreachable):
            keep = snap.session.spec.deletion_policy == "Retain"
            self._orphans.add(key[0], snap.session_id, keep=keep)
        raw = await self._kube.get(kinds.AGENT_SESSION, *key)
        if raw is not None and raw["metadata"]["uid"] == meta.uid:
            await self._finalize(raw, add=False)

    async def _finalize(self, raw: Manifest, *, add: bool) -> Manifest:
        """Add or remove our finalizer, on exactly the version that was read."""
        meta = raw["metadata"]
        others = [name for name in meta.get("finalizers") or () if name != labels.FINALIZER]
        body = {
            "metadata": {
                "resourceVersion": meta["resourceVersion"],
                "finalizers": [*others, labels.FINALIZER] if add else others,
            }
        }
        try:
            return await self._kube.patch(
                kinds.AGENT_SESSION, meta["namespace"], meta["name"], body
            )
        except NotFound:
            return raw

    async def _create(self, namespace: str, snap: SessionSnapshot, state: _Pass) -> None:
        frozen = state.frozen
        assert frozen is not None, "create is only planned for what could be frozen"
        sessions = self._logs.sessions(namespace)
        made = await self._logs.call(
            lambda: sessions.create_session(frozen.meta, list(frozen.events))
        )
        logger = bound(log, session=made.session_id, namespace=namespace)
        if made.session_id != state.session_id:
            logger.info("%s adopts a run that was made before", snap.session.metadata.name)
            state.session_id, state.adopted = made.session_id, True
        elif not made.existed:
            logger.info("%s is session %s", snap.session.metadata.name, made.session_id)
            state.delivered |= {message.id for message in snap.session.spec.messages or ()}

    async def _steer(
        self, namespace: str, snap: SessionSnapshot, plan: SessionPlan, state: _Pass
    ) -> None:
        """Mode and messages."""
        session, session_id, mode = snap.session, snap.session_id, plan.mode
        try:
            if mode is not None:
                event = freeze.mode_event(session, suspended=mode == "suspended")
                await self._logs.call(
                    lambda: self._logs.control.set_mode(namespace, session_id, mode, event)
                )
            sessions = self._logs.sessions(namespace)
            for send in plan.send:
                message = freeze.user_message(session, send.id, send.content)
                await self._logs.call(
                    lambda one=message: sessions.emit_event(session_id, one)  # type: ignore[misc]
                )
                state.delivered.add(send.id)
        except SessionClosed:
            return  # it ended meanwhile: the next look says so

    async def _lose(self, namespace: str, session_id: str, loss: Loss) -> None:
        """End a hand record; who owned it stays in it."""
        old = await self._record(namespace, session_id, loss.hand, loss.instance)
        record = replace(
            old or HandRecord(session_id, loss.hand, loss.instance, loss.state, owner=session_id),
            state=loss.state,
            reason=loss.reason,
            message=loss.message,
            signature="",
        )
        await self._logs.call(lambda: self._logs.control.put_hand(namespace, record))

    async def _provide(
        self, namespace: str, snap: SessionSnapshot, wish: Wish, state: _Pass
    ) -> None:
        """Apply the Sandbox of a hand; a name that somebody else uses fails the hand."""
        created = state.created
        assert created is not None, "wishes come from a look at the hands"
        frozen = next((hand for hand in created["hands"] if hand["name"] == wish.hand), None)
        if frozen is None:
            text = f"The session has no hand called {wish.hand!r}."
            loss = Loss(wish.hand, wish.instance, "Failed", "UnknownHand", text)
            await self._lose(namespace, snap.session_id, loss)
            return
        meta = snap.session.metadata
        of = SandboxOf(
            namespace=namespace,
            session_id=snap.session_id,
            hand=wish.hand,
            instance=wish.instance,
            environment=frozen["environment"],
            resources=created["resources"],
            owner_name=meta.name,
            owner_uid=meta.uid,
        )
        manifest = session_sandbox(of, wish.mode)
        name = manifest["metadata"]["name"]
        there = await self._kube.get(kinds.SANDBOX, namespace, name)
        holder = ((there or {}).get("spec") or {}).get("holder") or {}
        if there is not None and holder.get("sessionID") != snap.session_id:
            text = f"A Sandbox named {name} exists that is not this session's: delete it."
            loss = Loss(wish.hand, wish.instance, "Failed", "ForeignSandbox", text)
            await self._lose(namespace, snap.session_id, loss)
            return
        await self._kube.apply(manifest, manager=labels.FIELD_MANAGER)

    async def _close(self, namespace: str, snap: SessionSnapshot) -> None:
        session, session_id = snap.session, snap.session_id
        event = NewEvent(
            SESSION_DELETED, {"actor": freeze.actor(session)}, id=f"deleted:{session.metadata.uid}"
        )
        retain_s = self._retain_s if session.spec.deletion_policy == "Retain" else 0
        await self._logs.call(
            lambda: self._logs.control.close(namespace, session_id, event, retain_s=retain_s)
        )

    async def _write_status(self, key: Key, raw: Manifest, status: AgentSessionStatus) -> None:
        meta = raw["metadata"]
        try:
            await self._kube.apply(
                {
                    "apiVersion": labels.API_VERSION,
                    "kind": "AgentSession",
                    "metadata": {"namespace": key[0], "name": key[1], "uid": meta["uid"]},
                    "status": status.to_json(),
                },
                manager=labels.STATUS_FIELD_MANAGER,
                subresource="status",
            )
        except (NotFound, Conflict):
            return  # it is gone, or another object of this name has come: that one has its own pass
        self._written[key] = self._clock()
