"""Carries out the plans for AgentSessions: observe, decide (`reconcile.session`), act, write the status once.

Called by the work queue with (namespace, name). Whoever deletes an object while the store is down leaves a
log that has not ended: such sessions are kept in `Orphans` and ended when the store is back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Final

from cowhand.api import labels
from cowhand.api.v1alpha1 import AgentSessionStatus
from cowhand.controller import freeze, observe
from cowhand.controller.freeze import FreezeDefaults
from cowhand.controller.logs import Logs
from cowhand.controller.orphans import Orphans
from cowhand.controller.session_observer import FORK_LIMIT_S, Pass, SessionObserver
from cowhand.desired import names
from cowhand.desired.sandbox import SandboxOf, session_sandbox
from cowhand.errors import QuotaExceeded, SessionClosed, StoreUnavailable
from cowhand.kube import kinds
from cowhand.kube.client import Kube, Manifest
from cowhand.kube.errors import Conflict, NotFound
from cowhand.reconcile.session import reconcile_session
from cowhand.reconcile.session_snapshot import (
    LogView,
    Loss,
    SessionPlan,
    SessionSnapshot,
    Unreachable,
    Wish,
)
from cowhand.reconcile.store_profile import StoreProfile
from cowhand.session.events import SESSION_DELETED, NewEvent
from cowhand.session.log import HandRecord
from cowhand.telemetry.logging import bound

Key = tuple[str, str]

ROUNDS: Final = 4
"""Looks in one pass; what is left then comes with the next."""

log = logging.getLogger(__name__)


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
        store: Callable[[], StoreProfile | None] = lambda: None,
    ) -> None:
        """`store` answers what the store is believed to keep (`controller.store_profile`)."""
        self._kube = kube
        self._logs = logs
        self._retain_s = retain_s
        self._orphans = orphans
        self._clock = clock
        self._written: dict[Key, datetime] = {}
        self._observer = SessionObserver(
            kube, logs, tenants=tenants, defaults=defaults, store=store
        )

    @property
    def waiting(self) -> set[Key]:
        """Objects that wait for an Agent or an Environment."""
        return self._observer.waiting

    async def reconcile(self, key: Key) -> float | None:
        """One pass over one AgentSession; answers when to look again."""
        raw = await self._kube.get(kinds.AGENT_SESSION, *key)
        if raw is None:
            self.forget(key)
            return None
        session, _ = observe.read_session(raw)
        own = names.session_id(session.metadata.uid)
        current = session.status.session_id or own
        state = Pass(raw, current, current != own, set(session.status.delivered_messages))
        plan = SessionPlan()
        for _ in range(ROUNDS):
            snap = await self._observer.observe(key, state, self._written.get(key))
            try:
                plan = reconcile_session(snap, self._clock())
                await self._act(key, snap, plan, state)
            except StoreUnavailable as err:
                unreachable = Unreachable(str(err), full=isinstance(err, QuotaExceeded))
                plan = reconcile_session(replace(snap, log=unreachable), self._clock())
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
        self._observer.waiting.discard(key)

    async def _act(self, key: Key, snap: SessionSnapshot, plan: SessionPlan, state: Pass) -> None:
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

    async def _create(self, namespace: str, snap: SessionSnapshot, state: Pass) -> None:
        frozen = state.frozen
        assert frozen is not None, "create is only planned for what could be frozen"
        sessions = self._logs.sessions(namespace)
        source = frozen.source
        if source is None:
            made = await self._logs.call(
                lambda: sessions.create_session(frozen.meta, list(frozen.events))
            )
        else:
            created, *extra = frozen.events
            made = await self._logs.call(
                lambda: sessions.fork_session(frozen.meta, created, source, extra),
                limit_s=FORK_LIMIT_S,
            )
        logger = bound(log, session=made.session_id, namespace=namespace)
        if made.session_id != state.session_id:
            logger.info("%s adopts a run that was made before", snap.session.metadata.name)
            state.session_id, state.adopted = made.session_id, True
        elif not made.existed:
            logger.info("%s is session %s", snap.session.metadata.name, made.session_id)
            state.delivered |= {message.id for message in snap.session.spec.messages or ()}

    async def _steer(
        self, namespace: str, snap: SessionSnapshot, plan: SessionPlan, state: Pass
    ) -> None:
        """Mode, budget and messages; a message may need the new budget."""
        session, session_id, mode = snap.session, snap.session_id, plan.mode
        if not isinstance(snap.log, LogView):
            return
        last = snap.log.last_seq
        try:
            await self._rolled_back(namespace, snap, plan, state)
            if mode is not None:
                event = freeze.mode_event(session, mode == "suspended", last)
                await self._logs.call(
                    lambda: self._logs.control.set_mode(namespace, session_id, mode, event)
                )
            if plan.budget is not None:
                changed = freeze.budget_event(session, plan.budget, last)
                await self._logs.call(
                    lambda: self._logs.control.set_budget(namespace, session_id, changed)
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

    async def _rolled_back(
        self, namespace: str, snap: SessionSnapshot, plan: SessionPlan, state: Pass
    ) -> None:
        """Stop a log that lost its end, or let it go on where a person accepted that."""
        assert isinstance(snap.log, LogView), "checked by the caller"
        session_id, seen, position = snap.session_id, plan.regress, plan.accept
        logger = bound(log, session=session_id, namespace=namespace)
        if seen is not None:
            by = "status" if snap.session.status.last_seq >= seen else "operator"
            note = freeze.regressed_event(seen, snap.log.last_seq, by)
            logger.error("the log ends at %d, %d was seen", snap.log.last_seq, seen)
            await self._logs.call(
                lambda: self._logs.control.regress(namespace, session_id, note, seen=seen)
            )
        if position is not None:
            logger.warning("the log goes on from %d: its loss was accepted", position)
            await self._logs.call(
                lambda: self._logs.control.accept_regression(namespace, session_id, position)
            )
            # Messages of the spec that were lost are sent again; the others are known by their id.
            state.delivered.clear()

    async def _lose(self, namespace: str, session_id: str, loss: Loss) -> None:
        """End a hand record; who owned it stays in it."""
        old = await self._observer.record(namespace, session_id, loss.hand, loss.instance)
        record = replace(
            old or HandRecord(session_id, loss.hand, loss.instance, loss.state, owner=session_id),
            state=loss.state,
            reason=loss.reason,
            message=loss.message,
            signature="",
        )
        await self._logs.call(lambda: self._logs.control.put_hand(namespace, record))

    async def _provide(
        self, namespace: str, snap: SessionSnapshot, wish: Wish, state: Pass
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
