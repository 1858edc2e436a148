"""Carries out the plans for Sandboxes: observe, decide (`reconcile.sandbox`), act, write the status once.

Called by the work queue with (namespace, name). The store is needed for the hand record alone: without it
pods are made and deleted all the same, and the record follows.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from cowhand.api import labels
from cowhand.api.v1alpha1 import Environment, EnvironmentSpec, Holder, Sandbox, SandboxStatus
from cowhand.controller import observe
from cowhand.controller.logs import Logs
from cowhand.desired import environment as environments
from cowhand.desired.sandbox_pod import PodConfig, sandbox_pod
from cowhand.errors import SessionNotFound, StoreUnavailable
from cowhand.kube import kinds
from cowhand.kube.client import Kube, Manifest
from cowhand.kube.errors import AlreadyExists, Conflict, Forbidden, Invalid, NotFound
from cowhand.reconcile.sandbox import Mark, SandboxPlan, SandboxSnapshot, reconcile_sandbox
from cowhand.session.log import HandRecord

Key = tuple[str, str]

GONE_CACHE: Final = 512
"""Pods that are remembered after they went away, for the reason of the loss."""

STORE_RETRY_S: Final = 2.0
"""How soon a hand record that could not be written is tried again."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SandboxConfig:
    """What sandboxes get from the chart.

    Attributes:
        pod: images and broker.
        environment: of Sandboxes that name none.
        sandbox_image: of environments that name none.
    """

    pod: PodConfig
    environment: EnvironmentSpec
    sandbox_image: str


class SandboxController:
    """Reconciles Sandboxes."""

    def __init__(
        self,
        kube: Kube,
        logs: Logs,
        *,
        tenants: frozenset[str],
        config: SandboxConfig,
        clock: Callable[[], datetime],
    ) -> None:
        self._kube = kube
        self._logs = logs
        self._tenants = tenants
        self._config = config
        self._clock = clock
        self._gone: OrderedDict[str, Manifest] = OrderedDict()
        self._refused: dict[str, tuple[str, datetime]] = {}
        self.waiting: set[Key] = set()
        """Objects that wait for an Environment."""

    def pod_gone(self, pod: Manifest) -> None:
        """Remember why a pod ended; called with the last we saw of it."""
        for ref in pod["metadata"].get("ownerReferences") or ():
            if ref.get("kind") == "Sandbox":
                self._gone[ref["uid"]] = pod
        while len(self._gone) > GONE_CACHE:
            self._gone.popitem(last=False)

    async def reconcile(self, key: Key) -> float | None:
        """One pass over one Sandbox; answers when to look again."""
        raw = await self._kube.get(kinds.SANDBOX, *key)
        if raw is None:
            self.waiting.discard(key)
            return None
        sandbox, invalid = observe.read_sandbox(raw)
        record, store_ok = await self._record(sandbox)
        snap, environment = await self._observe(key, sandbox, invalid, record)
        plan = reconcile_sandbox(snap, self._clock())
        refused = await self._create_pod(sandbox, environment) if plan.create_pod else None
        if refused is not None:
            now = self._clock()
            plan = reconcile_sandbox(replace(snap, refused=refused, refused_at=now), now)
        marked = await self._mark(sandbox, plan.mark, record) if store_ok else plan.mark is None
        await self._delete(key, sandbox, plan, told=marked)
        if plan.status is not None:
            await self._write_status(key, raw, plan.status)
        if store_ok and marked:
            return plan.requeue_after
        return min(plan.requeue_after or STORE_RETRY_S, STORE_RETRY_S)

    async def _record(self, sandbox: Sandbox) -> tuple[HandRecord | None, bool]:
        """The hand record, and whether the store could say so."""
        holder, namespace = sandbox.spec.holder, sandbox.metadata.namespace
        if holder is None or namespace not in self._tenants:
            return None, True
        control = self._logs.control
        try:
            found = await self._logs.call(
                lambda: control.get_hand(namespace, holder.session_id, holder.hand, holder.instance)
            )
        except SessionNotFound:
            return None, True
        except StoreUnavailable as err:
            log.info("hand record of %s not read: %s", sandbox.metadata.name, err)
            return None, False
        return found, True

    async def _observe(
        self, key: Key, sandbox: Sandbox, invalid: str | None, record: HandRecord | None
    ) -> tuple[SandboxSnapshot, EnvironmentSpec]:
        environment, missing = self._config.environment, None
        refused = self._refused.get(sandbox.metadata.uid)
        snap = SandboxSnapshot(
            sandbox=sandbox,
            served=key[0] in self._tenants,
            pod=None,
            invalid=invalid,
            refused=refused[0] if refused else None,
            refused_at=refused[1] if refused else None,
            record=record.state if record else None,
            record_reason=record.reason if record else "",
            record_message=record.message if record else "",
            last_pod=self._gone.get(sandbox.metadata.uid),
        )
        if not snap.served:
            return snap, environment
        pod = await self._kube.get(kinds.POD, *key)
        wanted = sandbox.spec.environment
        if sandbox.spec.environment_ref is not None:
            name = sandbox.spec.environment_ref.name
            found = await self._kube.get(kinds.ENVIRONMENT, key[0], name)
            if found is None:
                missing = name
                self.waiting.add(key)
            else:
                self.waiting.discard(key)
                try:
                    wanted = Environment.model_validate(found).spec
                except ValueError as err:
                    snap = replace(snap, invalid=f"Environment {name!r}: {err}")
        environment = environments.resolve(
            wanted, self._config.environment, self._config.sandbox_image
        )
        config_map = None
        if pod is None and missing is None and invalid is None:
            config_map = await self._missing_config_map(key[0], sandbox)
        return (
            replace(
                snap,
                pod=pod,
                startup_timeout_s=environment.startup_timeout_seconds,
                missing_environment=missing,
                missing_config_map=config_map,
            ),
            environment,
        )

    async def _missing_config_map(self, namespace: str, sandbox: Sandbox) -> str | None:
        """What is missing of the ConfigMaps that the spec names, in words."""
        for resource in sandbox.spec.resources:
            source = resource.config_map
            if source is None:
                continue
            found = await self._kube.get(kinds.CONFIG_MAP, namespace, source.name)
            if found is None:
                return f"ConfigMap {source.name!r} does not exist in this namespace: create it."
            keys = {*(found.get("data") or {}), *(found.get("binaryData") or {})}
            for item in source.items or ():
                if item.key not in keys:
                    return f"ConfigMap {source.name!r} has no key {item.key!r}: add it."
        return None

    async def _mark(self, sandbox: Sandbox, mark: Mark | None, old: HandRecord | None) -> bool:
        """Write the hand record if it says something new; False if the store could not take it."""
        holder = sandbox.spec.holder
        if mark is None or holder is None:
            return True
        base = old or _fresh(sandbox, holder)
        record = replace(
            base,
            state=mark.state,
            reason=mark.reason,
            message=mark.message,
            sandbox=sandbox.metadata.name,
            sandbox_uid=sandbox.metadata.uid,
            signature="",
        )
        if record == old:
            return True
        try:
            await self._logs.call(
                lambda: self._logs.control.put_hand(sandbox.metadata.namespace, record)
            )
        except SessionNotFound:
            return True  # the session is gone: nobody reads this record
        except StoreUnavailable as err:
            log.info("hand record of %s not written: %s", sandbox.metadata.name, err)
            return False
        return True

    async def _delete(self, key: Key, sandbox: Sandbox, plan: SandboxPlan, *, told: bool) -> None:
        # A pod that could not start is deleted only after its session was told why.
        keep = plan.mark is not None and plan.mark.state == "Failed" and not told
        if plan.delete_pod is not None and not keep:
            await self._kube.delete(kinds.POD, *key, uid=plan.delete_pod)
        if plan.delete_self:
            await self._kube.delete(kinds.SANDBOX, *key, uid=sandbox.metadata.uid)

    async def _create_pod(self, sandbox: Sandbox, environment: EnvironmentSpec) -> str | None:
        """Create, not apply: a pod that somebody made in between is never taken over.

        Answers what the API server said when it refused the pod.
        """
        uid = sandbox.metadata.uid
        try:
            await self._kube.create(sandbox_pod(sandbox, environment, self._config.pod))
        except AlreadyExists:
            pass  # its event brings us back, and the next look says whose it is
        except (Forbidden, Invalid) as err:
            self._refused[uid] = (str(err), self._clock())
            log.warning("the pod of %s was refused: %s", sandbox.metadata.name, err)
            return str(err)
        self._refused.pop(uid, None)
        return None

    async def _write_status(self, key: Key, raw: Manifest, status: SandboxStatus) -> None:
        body: Mapping[str, Any] = status.to_json()
        try:
            await self._kube.apply(
                {
                    "apiVersion": labels.API_VERSION,
                    "kind": "Sandbox",
                    "metadata": {
                        "namespace": key[0],
                        "name": key[1],
                        "uid": raw["metadata"]["uid"],
                    },
                    "status": body,
                },
                manager=labels.STATUS_FIELD_MANAGER,
                subresource="status",
            )
        except (NotFound, Conflict):
            return  # it is gone, or another object of this name has come


def _fresh(sandbox: Sandbox, holder: Holder) -> HandRecord:
    """The first record of an instance."""
    return HandRecord(
        session_id=holder.session_id,
        hand=holder.hand,
        instance=holder.instance,
        state="Pending",
        sandbox=sandbox.metadata.name,
        sandbox_uid=sandbox.metadata.uid,
        owner=holder.session_id,
        owner_epoch=1,
    )
