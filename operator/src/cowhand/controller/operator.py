"""The operator without kopf: what each watch event leads to, the queues, resync and sweep.

`handlers` feeds it from kopf, tests feed it directly. It keeps only what events cannot tell again: which
objects were there (so that a missed deletion is found), and which session is which object.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cowhand.api import labels
from cowhand.controller.logs import Logs
from cowhand.controller.orphans import Orphans
from cowhand.controller.sandboxes import SandboxController
from cowhand.controller.sessions import SessionController
from cowhand.controller.workqueue import WorkQueue
from cowhand.desired import names
from cowhand.errors import CowhandError, SessionNotFound, StoreUnavailable
from cowhand.kube import kinds
from cowhand.kube.client import Kube, Manifest
from cowhand.kube.kinds import Kind

Key = tuple[str, str]

RESYNC_S: Final = 600.0
"""Each object is looked at again at least so often."""

PROJECTION_SWEEP_S: Final = 60.0
"""Sessions whose nudge was lost are found after so long."""

PROJECTION_ROUNDS: Final = 50
"""Batches that one pass takes of one tenant: who fills its own set must not keep the others waiting."""

REFRESH_RATE: Final = 20.0
"""Sessions a second that are looked at because of something that all of them show."""

_POD_SELECTOR: Final = f"{labels.APP_NAME}={labels.APP_NAME_VALUE}"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Known:
    """What is remembered of an object."""

    uid: str
    session_id: str = ""
    keep_log: bool = True
    harness: bool = False


class Operator:
    """Events in, reconciled objects out."""

    def __init__(
        self,
        kube: Kube,
        logs: Logs,
        *,
        tenants: tuple[str, ...],
        sessions: SessionController,
        sandboxes: SandboxController,
        orphans: Orphans,
    ) -> None:
        self._kube = kube
        self._logs = logs
        self._tenants = tenants
        self._session_controller = sessions
        self._sandbox_controller = sandboxes
        self.orphans = orphans
        self.sessions: WorkQueue[Key] = WorkQueue("sessions", sessions.reconcile)
        # Queues of their own, so that neither a dead store nor a slow session holds up a pod.
        self.sandboxes: WorkQueue[Key] = WorkQueue("sandboxes", sandboxes.reconcile)
        self.workers: WorkQueue[Key] = WorkQueue("workers", self._drop_worker, workers=2)
        self._known: dict[Kind, dict[Key, Known]] = defaultdict(dict)
        self._by_session: dict[str, Key] = {}

    # -- events ------------------------------------------------------------------------------------

    def seen(self, kind: Kind, change: str | None, body: Manifest) -> None:
        """One watch event: `change` is ADDED, MODIFIED, DELETED, or None for the first list."""
        key = (body["metadata"].get("namespace", ""), body["metadata"]["name"])
        deleted = change == "DELETED"
        if kind == kinds.AGENT_SESSION:
            self._seen_session(key, body, deleted)
        elif kind == kinds.SANDBOX:
            self._remember(kind, key, _sandbox_known(body), deleted)
            self.sandboxes.add(key)
            self._owner(body, "AgentSession", key[0], self.sessions)
        elif kind == kinds.POD:
            self._seen_pod(key, body, deleted)
        elif kind in (kinds.AGENT, kinds.ENVIRONMENT):
            self._wake_waiting(key[0])

    def _seen_session(self, key: Key, body: Manifest, deleted: bool) -> None:
        known = _session_known(body)
        self._remember(kinds.AGENT_SESSION, key, known, deleted)
        self.orphans.back(key[0], known.session_id)
        if deleted:
            # Usually its log has ended; where the finalizer was taken off by force it has not.
            self.orphans.add(key[0], known.session_id, keep=known.keep_log)
            self._by_session.pop(known.session_id, None)
            self._session_controller.forget(key)
        else:
            self._by_session[known.session_id] = key
        self.sessions.add(key)

    def _seen_pod(self, key: Key, body: Manifest, deleted: bool) -> None:
        component = (body["metadata"].get("labels") or {}).get(labels.APP_COMPONENT)
        ended = deleted or (body.get("status") or {}).get("phase") in ("Failed", "Succeeded")
        if component == labels.COMPONENT_HARNESS:
            known = Known(body["metadata"]["uid"], harness=True)
            self._remember(kinds.POD, key, known, deleted)
            if ended:
                self.workers.add((key[0], known.uid))
        elif component == labels.COMPONENT_SANDBOX:
            if ended:
                self._sandbox_controller.pod_gone(body)
            self._owner(body, "Sandbox", key[0], self.sandboxes)
            # A pod of the same name that somebody else made concerns the Sandbox, too.
            if key in self._known[kinds.SANDBOX]:
                self.sandboxes.add(key)

    def _remember(self, kind: Kind, key: Key, known: Known, deleted: bool) -> None:
        if deleted:
            self._known[kind].pop(key, None)
        else:
            self._known[kind][key] = known

    def _owner(self, body: Manifest, kind: str, namespace: str, queue: WorkQueue[Key]) -> None:
        for ref in body["metadata"].get("ownerReferences") or ():
            if ref.get("kind") == kind and ref.get("controller"):
                queue.add((namespace, ref["name"]))

    def _wake_waiting(self, namespace: str) -> None:
        for key in tuple(self._session_controller.waiting):
            if key[0] == namespace:
                self.sessions.add(key)
        for key in tuple(self._sandbox_controller.waiting):
            if key[0] == namespace:
                self.sandboxes.add(key)

    async def _drop_worker(self, key: Key) -> float | None:
        """A harness pod is gone: its sessions can be taken over at once. Only a hint."""
        namespace, uid = key
        count = await self._logs.call(lambda: self._logs.control.drop_worker(namespace, uid))
        if count:
            log.info(
                "harness pod %s of %s is gone: %d sessions go on elsewhere", uid, namespace, count
            )
        return None

    # -- projection --------------------------------------------------------------------------------

    async def project(self, namespace: str) -> None:
        """Put every session of a tenant whose state changed into line.

        What a tenant's login wrote into the log must not stop the others: whatever it breaks is logged.

        Raises:
            StoreUnavailable: the store does not answer, for anybody.
        """
        try:
            await self._project(namespace)
        except StoreUnavailable:
            raise
        except Exception:
            log.exception("projection of %s", namespace)

    async def _project(self, namespace: str) -> None:
        for _ in range(PROJECTION_ROUNDS):
            taken = await self._logs.call(lambda: self._logs.control.take_projections(namespace))
            if not taken:
                return
            for session_id in taken:
                key = self._by_session.get(session_id)
                if key is not None:
                    self.sessions.add(key)
                else:
                    await self._project_unknown(namespace, session_id)

    async def _project_unknown(self, namespace: str, session_id: str) -> None:
        """A session whose object we have not seen: not yet, never (made over the API), or no more."""
        sessions = self._logs.sessions(namespace)
        try:
            found = await self._logs.call(lambda: sessions.get_session(session_id))
        except SessionNotFound:
            return
        if not found.meta.name or found.state == "closed":
            return
        raw = await self._kube.get(kinds.AGENT_SESSION, namespace, found.meta.name)
        if raw is not None and session_id in (
            names.session_id(raw["metadata"]["uid"]),
            (raw.get("status") or {}).get("sessionID"),
        ):
            self.sessions.add((namespace, found.meta.name))
            return
        if found.mode != "suspended":
            self.orphans.stray(namespace, session_id)

    # -- resync and sweep --------------------------------------------------------------------------

    async def resync(self, *, spread_s: float = RESYNC_S) -> None:
        """List everything, look at all of it again, and find deletions that nobody told us.

        No list proves that an object is gone: one that fails or is empty is not looked at further, and what
        another does not contain is asked for by its name.
        """
        for namespace in self._tenants:
            await self._resync_kind(kinds.AGENT_SESSION, namespace, "", spread_s)
            await self._resync_kind(kinds.SANDBOX, namespace, "", spread_s)
            await self._resync_kind(kinds.POD, namespace, _POD_SELECTOR, spread_s)
        await self.orphans.sweep()

    async def _resync_kind(
        self, kind: Kind, namespace: str, selector: str, spread_s: float
    ) -> None:
        try:
            found = await self._kube.list(kind, namespace, label_selector=selector)
        except CowhandError as err:
            log.warning("resync: %s", err)
            return
        there = {item["metadata"]["name"]: item for item in found}
        for item in found:
            key = (namespace, item["metadata"]["name"])
            if kind == kinds.AGENT_SESSION:
                self._by_session[_session_known(item).session_id] = key
                self.orphans.back(namespace, _session_known(item).session_id)
                self._known[kind][key] = _session_known(item)
                self.sessions.add(key, random.uniform(0, spread_s))  # noqa: S311 - spreads load
            elif kind == kinds.SANDBOX:
                self._known[kind][key] = _sandbox_known(item)
                self.sandboxes.add(key, random.uniform(0, spread_s))  # noqa: S311 - spreads load
        if found:
            gone = {
                key: known
                for key, known in self._known[kind].items()
                if key[0] == namespace and _is_other(there.get(key[1]), known)
            }
            self._missed(kind, await self._confirmed(kind, gone))

    async def _confirmed(self, kind: Kind, gone: Mapping[Key, Known]) -> dict[Key, Known]:
        """Those that are gone by name and uid too; a list may be short for reasons of its own."""
        confirmed: dict[Key, Known] = {}
        for key, known in gone.items():
            try:
                item = await self._kube.get(kind, *key)
            except CowhandError as err:
                log.warning("resync: whether %s %s/%s is gone is not known: %s", kind, *key, err)
                continue
            if _is_other(item, known):
                confirmed[key] = known
        return confirmed

    def _missed(self, kind: Kind, gone: Mapping[Key, Known]) -> None:
        """Objects that are not there any more, and whose DELETED event never came.

        Ours do not go without our finalizer: either it was taken off by force, or the cluster was restored from a
        time before the object. So the session is not ended.
        """
        for key, known in gone.items():
            log.info("resync: %s %s/%s is gone unseen", kind, *key)
            if kind == kinds.AGENT_SESSION:
                self.orphans.stray(key[0], known.session_id)
                self._by_session.pop(known.session_id, None)
                self.sessions.add(key)
            elif kind == kinds.SANDBOX:
                self.sandboxes.add(key)
                if known.session_id in self._by_session:
                    self.sessions.add(self._by_session[known.session_id])
            elif known.harness:
                self.workers.add((key[0], known.uid))
            self._known[kind].pop(key, None)

    def refresh_sessions(self) -> None:
        """Look at every known session again, `REFRESH_RATE` a second: what all of them show has changed."""
        for index, key in enumerate(sorted(self._known[kinds.AGENT_SESSION])):
            self.sessions.add(key, index / REFRESH_RATE)

    # -- loops -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """All loops until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.sessions.run())
            group.create_task(self.sandboxes.run())
            group.create_task(self.workers.run())
            group.create_task(self._follow_projections())
            group.create_task(self._sweep_projections())
            group.create_task(self._resync_loop())

    async def _follow_projections(self) -> None:
        while True:
            try:
                async for namespace in self._logs.control.projection_nudges(self._tenants):
                    await self.project(namespace)
            except CowhandError as err:
                log.info("projection: %s", err)
                await asyncio.sleep(1.0)

    async def _sweep_projections(self) -> None:
        """What a lost nudge left behind, orphans, and sessions of dead harnesses."""
        while True:
            await asyncio.sleep(PROJECTION_SWEEP_S)
            try:
                for namespace in self._tenants:
                    await self.project(namespace)
                    await self._sweep(namespace)
                await self.orphans.sweep()
            except StoreUnavailable as err:
                log.warning("projection sweep: %s", err)
            except CowhandError:
                log.exception("projection sweep")

    async def _sweep(self, namespace: str) -> None:
        """One tenant's upkeep; as in `project`, its broken keys concern nobody else."""
        try:
            await self._logs.call(lambda: self._logs.control.sweep(namespace))
        except StoreUnavailable:
            raise
        except Exception:
            log.exception("sweep of %s", namespace)

    async def _resync_loop(self) -> None:
        while True:
            await asyncio.sleep(RESYNC_S * random.uniform(0.8, 1.2))  # noqa: S311 - spreads load
            await self.resync()


def _session_known(body: Manifest) -> Known:
    meta = body["metadata"]
    session_id = (body.get("status") or {}).get("sessionID") or names.session_id(meta["uid"])
    keep = (body.get("spec") or {}).get("deletionPolicy") != "Delete"
    return Known(meta["uid"], session_id, keep)


def _sandbox_known(body: Manifest) -> Known:
    found = body["metadata"].get("labels") or {}
    return Known(body["metadata"]["uid"], found.get(labels.SESSION_ID, ""))


def _is_other(item: Manifest | None, known: Known) -> bool:
    return item is None or item["metadata"]["uid"] != known.uid
