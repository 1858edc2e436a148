"""How many harness pods a tenant needs.

Up at once, down by one pod after a calm time: a new pod costs seconds, a drained one moves every session
that it holds. Called every few seconds by the operator's scaling loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

CALM = timedelta(minutes=5)
"""How long fewer pods must have been enough before one goes."""

WAITED_TOO_LONG_MS = 2000
"""A session that waits longer, although every pod works, asks for one pod more than the work does."""


@dataclass(frozen=True)
class Demand:
    """Work of a tenant.

    Attributes:
        ready: sessions that wait for a harness.
        leased: sessions in work.
        oldest_ready_ms: age of the oldest that waits.
        available: harness pods that are ready to work.
    """

    ready: int
    leased: int
    oldest_ready_ms: int
    available: int


@dataclass(frozen=True)
class ScaleSettings:
    """Bounds: pods at least and at most, sessions in work per pod that are aimed at."""

    minimum: int
    maximum: int
    sessions_per_harness: int


@dataclass(frozen=True)
class Scale:
    """A decision: how many pods, and since when fewer would have been enough (None: they are needed)."""

    replicas: int
    surplus_since: datetime | None = None


def scale_harness(
    demand: Demand,
    current: int,
    settings: ScaleSettings,
    now: datetime,
    surplus_since: datetime | None = None,
) -> Scale:
    """The number of harness pods to have now.

    Args:
        demand: the tenant's work.
        current: pods asked for now.
        settings: bounds.
        now: the clock.
        surplus_since: what the last decision said.
    """
    work = demand.ready + demand.leased
    wanted = -(-work // max(1, settings.sessions_per_harness))
    # One more in all, not one more each time: a session that no pod can help must not fill the cluster.
    if (
        demand.ready
        and demand.oldest_ready_ms >= WAITED_TOO_LONG_MS
        and demand.available >= current
    ):
        wanted += 1
    wanted = min(max(wanted, settings.minimum), max(settings.maximum, settings.minimum))
    if wanted >= current:
        return Scale(wanted)
    if current > settings.maximum:
        return Scale(settings.maximum)
    since = surplus_since or now
    if now - since < CALM:
        return Scale(current, since)
    return Scale(current - 1, now if current - 1 > wanted else None)
