"""Quotas of tenants: measures what each has in the store, and writes down how much it may still write.

The scripts that make a log longer read that figure and refuse what goes beyond it (`no_room` in lib.lua). It is
measured, not counted alone, because a tenant's own login can write every key of its own, counters included. The
operator's leader does this, through `ControlLog`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from cowhand.session.log import StoreUsage

if TYPE_CHECKING:
    from cowhand.session.store import Store

SCAN_COUNT: Final = 500
"""Keys that one step looks at; between steps others get their turn."""

QUOTA_MS: Final = 600_000
"""A quota that nobody has measured for so long is not applied any more: the operator is away."""


class Quotas:
    """See the module."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def usage(self, namespaces: Sequence[str]) -> StoreUsage:
        """See `log.ControlLog.store_usage`."""
        memories = await self.memory()
        return StoreUsage(
            max_bytes=sum(int(memory.get("maxmemory", "0")) for memory in memories),
            used_bytes=sum(int(memory.get("used_memory", "0")) for memory in memories),
            tenants=await self._measure(namespaces),
        )

    async def memory(self) -> list[Mapping[str, str]]:
        """The fields of INFO memory of each server; empty where it does not tell."""
        return [_fields(raw) for raw in await self._store.reads.everywhere("INFO", "memory")]

    async def _measure(self, namespaces: Sequence[str]) -> dict[str, int]:
        """Bytes of all keys of each tenant, in one pass over the keys."""
        call, prefix = self._store.reads.call, self._store.config.prefix
        total = dict.fromkeys(namespaces, 0)
        cursor = 0
        while True:
            cursor, keys = await self._store.reads.scan(cursor, f"{prefix}:*", SCAN_COUNT)
            sizes = await asyncio.gather(*(call("MEMORY", "USAGE", key) for key in keys))
            for key, size in zip(keys, sizes, strict=True):
                namespace = key.split(b":", 2)[1].decode(errors="replace")
                if namespace in total:
                    total[namespace] += int(size or 0)
            if not cursor:
                return total

    async def put(self, namespace: str, used: int, limit: int | None) -> None:
        """See `log.ControlLog.put_quota`."""
        keys, call = self._store.keys(namespace).quotas(), self._store.writes.call
        if limit is None:
            await asyncio.gather(*(call("DEL", key) for key in keys))
            return
        seconds, micros = await call("TIME")
        value = f"{int(seconds) * 1000 + int(micros) // 1000} {limit - used} {limit} {used}"
        await asyncio.gather(*(call("SET", key, value, "PX", QUOTA_MS) for key in keys))

    async def get(self, namespace: str) -> tuple[int, int] | None:
        """See `log.ControlLog.get_quota`."""
        raw = await self._store.reads.call("GET", self._store.keys(namespace).quotas()[0])
        try:
            _, _, limit, used = (int(word) for word in raw.split())
        except (AttributeError, ValueError):
            return None
        return used, limit


def _fields(raw: bytes) -> Mapping[str, str]:
    lines = raw.decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line and line[0] != "#")


def share(quota: int | None, usage: StoreUsage, tenants: int) -> int | None:
    """The limit of each tenant in bytes, None for none.

    Args:
        quota: what was set; 0 for no limit, None for an equal share of 80 % of the store's memory.
        usage: what the store tells of itself; a store without a limit of memory has no shares.
        tenants: number of tenants.
    """
    if quota == 0:
        return None
    if quota is not None:
        return quota
    return usage.max_bytes * 8 // 10 // max(1, tenants) or None
