"""Keeps the log's scripts loaded in the store, for those who may only run them.

Tenants have no right to load scripts, and a server forgets all of them when it restarts or a replica takes its
place. So operator, broker and gateway each look every second, and load what is missing: their own scripts,
and those that another release has put down in the key `<prefix>:scripts` in the last days: in the middle of an
upgrade, or after a rollback, harnesses of two releases work side by side.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from cowhand.errors import CowhandError

if TYPE_CHECKING:
    from cowhand.session.scripts import Script
    from cowhand.session.store import Store

LOG = logging.getLogger(__name__)

LOOK_SECONDS: Final = 1.0
"""How often the server is asked whether it still knows the scripts."""

NOTE_SECONDS: Final = 3600.0
"""How often we note that a release still uses its scripts."""

KEEP_MS: Final = 30 * 86_400_000
"""Scripts of a release that nobody has noted for so long are forgotten."""


class ScriptKeeper:
    """See the module; one for each process of the control plane."""

    def __init__(self, store: Store, scripts: Mapping[str, Script]) -> None:
        self._store = store
        self._own = {script.sha: script.source for script in scripts.values()}
        # No colon behind these names: nothing of them begins as a tenant's keys do.
        self._sources = f"{store.config.prefix}:scripts"
        self._noted = f"{store.config.prefix}:scripts-noted"
        self._note_at = float("-inf")

    async def run(self) -> None:
        """Look for ever; what fails is tried again, and told by those who use the store in earnest."""
        while True:
            try:
                await self.look()
            except CowhandError as err:
                LOG.info("scripts not looked after: %s", err)
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> int:
        """Load what the server does not know; answers how many scripts that were."""
        now = asyncio.get_running_loop().time()
        if now - self._note_at >= NOTE_SECONDS:
            await self._note()
            self._note_at = now
        known = await self._store.reads.call("HKEYS", self._sources)
        wanted = sorted({*self._own, *(sha.decode() for sha in known)})
        loaded = 0
        for server in await self._store.reads.pipes():
            there = await server.call("SCRIPT", "EXISTS", *wanted)
            missing = [sha for sha, exists in zip(wanted, there, strict=True) if not exists]
            for sha in missing:
                source = self._own.get(sha)
                if source is None:
                    source = await self._store.reads.call("HGET", self._sources, sha)
                if source is not None:
                    await server.call("SCRIPT", "LOAD", source)
            loaded += len(missing)
        if loaded:
            LOG.info("scripts loaded into the store", extra={"count": loaded})
        return loaded

    async def _note(self) -> None:
        """Put our scripts down for the control plane of another release, and drop those of long ago."""
        call = self._store.writes.call
        seconds, _ = await call("TIME")
        now = int(seconds) * 1000
        old = await call("ZRANGE", self._noted, 0, now - KEEP_MS, "BYSCORE")
        old = [sha for sha in old if sha.decode() not in self._own]
        if old:
            await call("HDEL", self._sources, *old)
            await call("ZREM", self._noted, *old)
        for sha, source in self._own.items():
            await call("HSET", self._sources, sha, source)
            await call("ZADD", self._noted, now, sha)
