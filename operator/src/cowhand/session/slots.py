"""Slots of model workspaces: how many requests may be under way at once, in fair shares among the tenants.

A tenant's rate gate (`gate`) knows nothing of other tenants; these slots lie in keys that no tenant's login reaches.
The broker asks here for the harness proxies, which add the key to every request of every tenant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from cowhand.session import keys

if TYPE_CHECKING:
    from cowhand.session.store import Store

HOLD_MS: Final = 30_000
"""A slot whose proxy has not been heard of for so long is free."""

WANT_MS: Final = 2_000
"""A proxy that has not asked for so long keeps nobody's turn."""


@dataclass(frozen=True)
class Asked:
    """What one proxy says of its requests to one workspace.

    Attributes:
        client: the proxy process, random.
        waiting: requests that have no slot.
        wanted: ids of the first of them; those may get one now.
        held: ids of requests that are under way.
        done: ids of requests that have ended.
        pause_ms: the endpoint said that nothing should be sent for so long, 0 if it did not.
    """

    client: str
    waiting: int = 0
    wanted: Sequence[str] = ()
    held: Sequence[str] = ()
    done: Sequence[str] = ()
    pause_ms: int = 0


@dataclass(frozen=True)
class Answered:
    """What it gets.

    Attributes:
        granted: ids of `wanted` that may be sent, in order.
        pause_ms: nobody gets a slot before, 0 if nothing stands against it.
    """

    granted: tuple[str, ...]
    pause_ms: int


class ModelSlots(Protocol):
    """Asked by the broker; may raise StoreUnavailable and be repeated."""

    async def ask(
        self, pool: str, namespace: str, asked: Asked, *, limit: int, weight: float
    ) -> Answered:
        """Tell what became of requests, and ask for slots of those that wait.

        Whose turn it is: of the tenants with waiting requests the one that had its last turn longest ago, counted in
        requests divided by weight. A tenant that has not asked lately comes next, and gains nothing by having waited.

        Args:
            pool: hex digest that names the workspace.
            namespace: the tenant, which the caller has proved.
            asked: see `Asked`.
            limit: slots of the workspace.
            weight: share of the tenant.
        """


class RedisModelSlots:
    """`ModelSlots` in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def ask(
        self, pool: str, namespace: str, asked: Asked, *, limit: int, weight: float
    ) -> Answered:
        """See `ModelSlots`."""
        config = self._store.config
        key = keys.slots(config.prefix, pool, config.partitions)
        reply = await self._store.writes.script(
            "slots", [key], "", "", namespace, asked.client, limit, f"{weight:g}", asked.waiting,
            HOLD_MS, WANT_MS, asked.pause_ms, len(asked.done), len(asked.held),
            *asked.done, *asked.held, *asked.wanted,
        )  # fmt: skip
        return Answered(tuple(item.decode() for item in reply[1:]), int(reply[0]))
