"""Measures what each tenant has in the store, tells the store how much that may be, and shows both in metrics."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from cowhand.errors import CowhandError
from cowhand.session.log import ControlLog
from cowhand.session.quota import share
from cowhand.telemetry import metrics

INTERVAL_S: Final = 15.0
"""Shortest time between two measurements."""

SHARE_OF_TIME: Final = 20
"""A measurement that takes long is made less often: one part in so many of the time."""

log = logging.getLogger(__name__)


class QuotaController:
    """One for the leader.

    Args:
        control: the log.
        tenants: namespaces.
        quota: bytes for each tenant; 0 for no limit, None for an equal share of the store's memory.
    """

    def __init__(self, control: ControlLog, tenants: tuple[str, ...], quota: int | None) -> None:
        self._control = control
        self._tenants = tenants
        self._quota = quota
        self._full: set[str] = set()

    async def run(self) -> None:
        """Measure until cancelled; what fails is tried again."""
        clock = asyncio.get_running_loop()
        while True:
            began = clock.time()
            try:
                await self.step()
            except CowhandError as err:
                log.warning("quotas not measured: %s", err)
            took = clock.time() - began
            await asyncio.sleep(max(INTERVAL_S, took * SHARE_OF_TIME))

    async def step(self) -> None:
        """Measure once, and write every tenant's quota. Raises StoreUnavailable."""
        usage = await self._control.store_usage(self._tenants)
        limit = share(self._quota, usage, len(self._tenants))
        metrics.STORE_MEMORY.labels("used").set(usage.used_bytes)
        metrics.STORE_MEMORY.labels("limit").set(usage.max_bytes)
        for namespace, used in usage.tenants.items():
            await self._control.put_quota(namespace, used, limit)
            metrics.TENANT_STORE_BYTES.labels(namespace).set(used)
            metrics.TENANT_STORE_QUOTA_BYTES.labels(namespace).set(limit or 0)
            self._tell(namespace, used, limit)

    def _tell(self, namespace: str, used: int, limit: int | None) -> None:
        """Log the moments at which a tenant runs out of room, and has some again."""
        full = limit is not None and used >= limit
        if full and namespace not in self._full:
            log.warning(
                "namespace %s has no room left in the store: %d of %s bytes", namespace, used, limit
            )
        elif not full and namespace in self._full:
            log.info("namespace %s has room in the store again", namespace)
        (self._full.add if full else self._full.discard)(namespace)
