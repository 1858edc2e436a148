"""Upkeep of a tenant's ready streams: whoever sweeps (every worker, and the operator) does a little of it.

Takes sessions away from dead holders, wakes those whose timer is up, trims what was read, forgets consumers that
are gone, and (operator only, because it lists keys) looks for sessions that should be in a ready stream and are not.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from cowhand.session.codec import pairs
from cowhand.session.keys import GROUP, Keys, SessionKeys
from cowhand.session.scripts import PARTS
from cowhand.telemetry.metrics import TAKEOVERS, TIMERS

if TYPE_CHECKING:
    from cowhand.session.store import Store

DUE_AT_A_TIME: Final = 200
"""Timers of one partition that one sweep looks at: a herd after an outage comes in portions."""

TRIM_SECONDS: Final = 10.0
SLOW_SECONDS: Final = 60.0
CONSUMER_IDLE_MS: Final = 600_000


class Upkeep:
    """Sweeps of one tenant; remembers when the slow parts were last done."""

    def __init__(self, store: Store, keys: Keys, *, audit: bool) -> None:
        self._store = store
        self._keys = keys
        self._audit = audit
        self._trim_at = 0.0
        self._slow_at = 0.0

    async def sweep(self) -> int:
        """Requeue sessions of dead or stuck holders, and what else is due; answers how many were requeued."""
        now = asyncio.get_running_loop().time()
        requeued = sum(await asyncio.gather(self.requeue(), self.due()))
        if now >= self._trim_at:
            self._trim_at = now + TRIM_SECONDS
            await self.trim()
        if now >= self._slow_at:
            self._slow_at = now + SLOW_SECONDS
            await self.forget_consumers()
            if self._audit:
                requeued += await self.audit()
        return requeued

    async def requeue(self) -> int:
        """Put sessions whose holder is dead or stuck back on the ready streams."""
        found = await asyncio.gather(
            *(
                self._store.writes.script("suspects", [base + "own", base + "w"], base, "")
                for base in self._keys.bases()
            )
        )
        sids = [raw.decode() for group in found for raw in group]
        requeued = sum(await asyncio.gather(*(self._one("requeue", sid) for sid in sids)))
        TAKEOVERS.inc(requeued)
        return requeued

    async def due(self) -> int:
        """Put sessions whose timer is up on the ready streams."""
        bases = self._keys.bases()
        counts: list[int] = await asyncio.gather(
            *(
                self._store.writes.script(
                    "due", [base + "tmr", base + "rdy"], base, "", DUE_AT_A_TIME
                )
                for base in bases
            )
        )
        TIMERS.inc(sum(counts))
        return sum(counts)

    async def _one(self, script: str, session_id: str, *args: str) -> int:
        keys = self._keys.session(session_id)
        names = script_keys(script, keys)
        done: int = await self._store.writes.script(script, names, keys.base, session_id, *args)
        return done

    async def trim(self) -> None:
        """Drop the read prefix of the ready streams."""
        await self._ready("trim")

    async def _ready(self, script: str, *args: str) -> None:
        bases = await self._grouped()
        await asyncio.gather(
            *(
                self._store.writes.script(script, [base + "rdy"], base, "", GROUP, *args)
                for base in bases
            )
        )

    async def _grouped(self) -> list[str]:
        """Bases whose ready stream has its group."""
        bases = self._keys.bases()
        found = await asyncio.gather(
            *(self._store.reads.call("EXISTS", base + "rdy") for base in bases)
        )
        there = [base for base, exists in zip(bases, found, strict=True) if exists]
        groups = await asyncio.gather(
            *(self._store.reads.call("XINFO", "GROUPS", base + "rdy") for base in there)
        )
        return [
            base
            for base, names in zip(there, groups, strict=True)
            if any(pairs(group)[b"name"] == GROUP.encode() for group in names)
        ]

    async def forget_consumers(self) -> None:
        """Remove consumers of worker incarnations that are gone and hold no entry."""
        for base in await self._grouped():
            for raw in await self._store.reads.call("XINFO", "CONSUMERS", base + "rdy", GROUP):
                consumer = pairs(raw)
                if int(consumer[b"idle"]) > CONSUMER_IDLE_MS and not int(consumer[b"pending"]):
                    await self._store.writes.script(
                        "forget", [base + "rdy"], base, "", GROUP, consumer[b"name"]
                    )

    async def audit(self) -> int:
        """Put sessions that have work, no holder and no ready entry back on the ready streams."""
        healed = 0
        pattern = f"{self._keys.prefix}:{self._keys.namespace}:*:s:*:m"
        cursor = 0
        while True:
            cursor, found = await self._store.reads.scan(cursor, pattern, 1000)
            sids = [key.decode().split(":")[-2] for key in found]
            healed += sum(await asyncio.gather(*(self._one("audit", sid, GROUP) for sid in sids)))
            if not cursor:
                return healed


def script_keys(script: str, keys: SessionKeys) -> list[str]:
    """The KEYS of a session script, in its order."""
    return [keys.name(part) for part in PARTS[script]]
