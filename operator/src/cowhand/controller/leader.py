"""Leader election by a Lease: of two replicas one works, and it stops before the other may begin.

The holder renews; whoever sees the same renewal for a whole lease duration takes over (its own clock, so
that clocks need not agree). A holder that could not renew for two thirds of the duration is no leader any
more, and `LeaderKube` refuses its writes from that moment, even before the process has ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from cowhand.errors import CowhandError, Retryable, Terminal
from cowhand.kube import kinds
from cowhand.kube.client import Kube, Manifest
from cowhand.kube.errors import AlreadyExists, Conflict, NotFound
from cowhand.kube.kinds import Kind

LEASE_NAME: Final = "cowhand-operator"

log = logging.getLogger(__name__)


class LeadershipLost(Terminal):
    """This replica is no longer the leader: it must stop writing and end."""

    reason = "LeadershipLost"


class Elector:
    """One replica's part in the election.

    Attributes:
        duration_s: how long a lease is good for without renewal.
    """

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        identity: str,
        duration_s: float,
        *,
        clock: Callable[[], float],
    ) -> None:
        """`clock` answers monotonic seconds (the event loop's time)."""
        self._kube = kube
        self._namespace = namespace
        self._identity = identity
        self.duration_s = duration_s
        self._clock = clock
        self._renewed: float | None = None
        self._seen: tuple[str, float] | None = None

    @property
    def retry_s(self) -> float:
        """Seconds between two tries."""
        return self.duration_s / 6

    def leading(self) -> bool:
        """This replica holds the lease, and nobody else can have taken it."""
        if self._renewed is None:
            return False
        return self._clock() - self._renewed < self.duration_s * 2 / 3

    async def step(self) -> bool:
        """Take or renew the lease if that is possible; answers whether we lead.

        Raises:
            LeadershipLost: we led, and the lease is somebody else's now.
        """
        started = self._clock()
        try:
            taken = await self._take()
        except (Conflict, AlreadyExists, NotFound):
            taken = False
        except CowhandError as err:
            log.warning("the leader lease cannot be renewed: %s", err)
            return self.leading()
        if taken:
            # From before the request: the others count from when the server wrote it.
            self._renewed = started
        elif self._renewed is not None:
            holder = await self._holder()
            if holder != self._identity:
                self._renewed = None
                raise LeadershipLost(f"the lease {LEASE_NAME} is held by {holder or 'nobody'}")
        return self.leading()

    async def _holder(self) -> str:
        lease = await self._kube.get(kinds.LEASE, self._namespace, LEASE_NAME)
        return str(((lease or {}).get("spec") or {}).get("holderIdentity") or "")

    async def _take(self) -> bool:
        lease = await self._kube.get(kinds.LEASE, self._namespace, LEASE_NAME)
        if lease is None:
            await self._kube.create(
                {
                    "apiVersion": kinds.LEASE.api_version,
                    "kind": kinds.LEASE.kind,
                    "metadata": {"namespace": self._namespace, "name": LEASE_NAME},
                    "spec": self._spec(None),
                }
            )
            return True
        if not self._free(lease):
            return False
        await self._kube.patch(
            kinds.LEASE,
            self._namespace,
            LEASE_NAME,
            {
                "metadata": {"resourceVersion": lease["metadata"]["resourceVersion"]},
                "spec": self._spec(lease),
            },
        )
        return True

    def _free(self, lease: Manifest) -> bool:
        """Ours, released, or not renewed for a whole duration while we looked."""
        spec = lease.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        if holder in ("", self._identity):
            return True
        version = lease["metadata"]["resourceVersion"]
        if self._seen is None or self._seen[0] != version:
            self._seen = (version, self._clock())
            return False
        return self._clock() - self._seen[1] >= self.duration_s

    def _spec(self, lease: Manifest | None) -> dict[str, Any]:
        old = (lease or {}).get("spec") or {}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        same = old.get("holderIdentity") == self._identity
        turns = int(old.get("leaseTransitions") or 0)
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": max(1, round(self.duration_s)),
            "acquireTime": old.get("acquireTime") if same else now,
            "renewTime": now,
            "leaseTransitions": turns if same or lease is None else turns + 1,
        }

    async def acquire(self) -> None:
        """Wait until we lead."""
        while not await self.step():  # noqa: ASYNC110 - the lease is elsewhere
            await asyncio.sleep(self.retry_s)

    async def hold(self) -> None:
        """Renew until it fails for too long.

        Raises:
            LeadershipLost: we lead no more.
        """
        while True:
            await asyncio.sleep(self.retry_s)
            if not await self.step():
                raise LeadershipLost("the lease could not be renewed in time")

    async def release(self) -> None:
        """Let another replica take over at once (a clean end)."""
        if self._renewed is None:
            return
        self._renewed = None
        try:
            lease = await self._kube.get(kinds.LEASE, self._namespace, LEASE_NAME)
            spec = (lease or {}).get("spec") or {}
            if lease is None or spec.get("holderIdentity") != self._identity:
                return
            version = lease["metadata"]["resourceVersion"]
            body = {"metadata": {"resourceVersion": version}, "spec": {"holderIdentity": ""}}
            await self._kube.patch(kinds.LEASE, self._namespace, LEASE_NAME, body)
        except CowhandError as err:
            log.info("the leader lease was not released: %s", err)


class LeaderKube:
    """`Kube` that writes only while this replica leads; reads always."""

    def __init__(self, kube: Kube, leading: Callable[[], bool]) -> None:
        self._kube = kube
        self._leading = leading

    def _check(self) -> None:
        if not self._leading():
            raise Retryable("this replica does not lead: nothing is written")

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Manifest | None:
        """See `Kube.get`."""
        return await self._kube.get(kind, namespace, name)

    async def list(
        self, kind: Kind, namespace: str | None, *, label_selector: str = ""
    ) -> list[Manifest]:
        """See `Kube.list`."""
        return await self._kube.list(kind, namespace, label_selector=label_selector)

    async def apply(
        self, manifest: Manifest, *, manager: str, force: bool = True, subresource: str = ""
    ) -> Manifest:
        """See `Kube.apply`."""
        self._check()
        return await self._kube.apply(
            manifest, manager=manager, force=force, subresource=subresource
        )

    async def create(self, manifest: Manifest) -> Manifest:
        """See `Kube.create`."""
        self._check()
        return await self._kube.create(manifest)

    async def patch(
        self, kind: Kind, namespace: str | None, name: str, body: Manifest, *, subresource: str = ""
    ) -> Manifest:
        """See `Kube.patch`."""
        self._check()
        return await self._kube.patch(kind, namespace, name, body, subresource=subresource)

    async def delete(
        self,
        kind: Kind,
        namespace: str | None,
        name: str,
        *,
        uid: str | None = None,
        grace_s: int | None = None,
    ) -> bool:
        """See `Kube.delete`."""
        self._check()
        return await self._kube.delete(kind, namespace, name, uid=uid, grace_s=grace_s)

    async def close(self) -> None:
        """See `Kube.close`."""
        await self._kube.close()
