"""Scales the harness Deployment of each tenant by the work that waits in its log.

The chart writes no `replicas`; this loop writes the scale subresource, unless a HorizontalPodAutoscaler or
a KEDA ScaledObject owns it. The decision is `reconcile.scaling`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Final

from cowhand.api import labels
from cowhand.controller.logs import Logs
from cowhand.errors import CowhandError, StoreUnavailable
from cowhand.kube import kinds
from cowhand.kube.client import Kube
from cowhand.kube.errors import Forbidden, NotServed
from cowhand.kube.kinds import Kind
from cowhand.reconcile.scaling import Demand, ScaleSettings, scale_harness
from cowhand.session.log import Backlog
from cowhand.telemetry import metrics

INTERVAL_S: Final = 5.0

log = logging.getLogger(__name__)


def _show(namespace: str, backlog: Backlog) -> None:
    metrics.TENANT_SESSIONS.labels(namespace, "ready").set(backlog.ready)
    metrics.TENANT_SESSIONS.labels(namespace, "leased").set(backlog.leased)
    metrics.TENANT_WORKERS.labels(namespace).set(backlog.workers)
    metrics.TENANT_OLDEST_READY.labels(namespace).set(backlog.oldest_ready_ms / 1000)


class Scaler:
    """One decision per tenant and interval."""

    def __init__(
        self,
        kube: Kube,
        logs: Logs,
        *,
        tenants: tuple[str, ...],
        settings: ScaleSettings,
        clock: Callable[[], datetime],
    ) -> None:
        self._kube = kube
        self._logs = logs
        self._tenants = tenants
        self._settings = settings
        self._clock = clock
        self._surplus: dict[str, datetime | None] = {}
        self._no_keda = False

    async def run(self) -> None:
        """Scale until cancelled; what fails is tried again at the next interval."""
        while True:
            for namespace in self._tenants:
                try:
                    await self.step(namespace)
                except CowhandError as err:
                    log.warning("scaling of %s: %s", namespace, err)
                except Exception:
                    # A tenant's login can break its own keys: that concerns no other tenant.
                    log.exception("scaling of %s", namespace)
            await asyncio.sleep(INTERVAL_S)

    async def step(self, namespace: str) -> None:
        """Look at one tenant and write its scale if it should change."""
        name = labels.HARNESS_DEPLOYMENT
        deployment = await self._kube.get(kinds.DEPLOYMENT, namespace, name)
        if deployment is None or await self._owned(namespace):
            return
        try:
            backlog = await self._logs.call(lambda: self._logs.control.backlog(namespace))
        except StoreUnavailable:
            return  # without the log there is nothing to scale by
        _show(namespace, backlog)
        current = int((deployment.get("spec") or {}).get("replicas") or 0)
        available = int((deployment.get("status") or {}).get("availableReplicas") or 0)
        scale = scale_harness(
            Demand(backlog.ready, backlog.leased, backlog.oldest_ready_ms, available),
            current,
            self._settings,
            self._clock(),
            self._surplus.get(namespace),
        )
        self._surplus[namespace] = scale.surplus_since
        if scale.replicas != current:
            log.info("harness of %s: %d -> %d pods", namespace, current, scale.replicas)
            body = {"spec": {"replicas": scale.replicas}}
            await self._kube.patch(kinds.DEPLOYMENT, namespace, name, body, subresource="scale")

    async def _owned(self, namespace: str) -> bool:
        """An autoscaler targets the Deployment."""
        if await self._targets(kinds.HORIZONTAL_POD_AUTOSCALER, namespace):
            return True
        if self._no_keda:
            return False
        try:
            return await self._targets(kinds.SCALED_OBJECT, namespace)
        except (NotServed, Forbidden):
            # KEDA is not installed (looked for again when we restart), or its objects are not ours to
            # read; a ScaledObject that is active has a HorizontalPodAutoscaler, which was seen above.
            self._no_keda = True
            return False

    async def _targets(self, kind: Kind, namespace: str) -> bool:
        for item in await self._kube.list(kind, namespace):
            target = (item.get("spec") or {}).get("scaleTargetRef") or {}
            if target.get("name") == labels.HARNESS_DEPLOYMENT and target.get(
                "kind", "Deployment"
            ) in ("Deployment", ""):
                return True
        return False
