"""The broker's public keys as a sandbox's proxy knows them, fetched again when a token names an unknown one.

Apart from `brokerclient.py`, so that the harness proxy does not load `cryptography`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from cowhand.wire.keys import PublicKeys, load_keys
from cowhand.wire.tokens import HandClaims, UnknownKey, verify

KEYS_MIN_INTERVAL_S: Final = 5.0
"""Tokens with invented key ids make us ask the broker at most this often."""


class KeyRing:
    """Public keys by id.

    Args:
        fetch: answers the broker's key document.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        fetch: Callable[[], Awaitable[dict[str, Any]]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._clock = clock
        self._keys: PublicKeys = {}
        self._asked: float | None = None
        self._lock = asyncio.Lock()

    async def refresh(self) -> None:
        """Fetch the keys now; raises BrokerUnavailable or UserError and keeps the old ones."""
        self._asked = self._clock()
        self._keys = load_keys(await self._fetch())

    async def verify(self, token: str, now: float) -> HandClaims:
        """`wire.tokens.verify` with the newest keys.

        Raises:
            Unauthenticated: the token is not good.
            BrokerUnavailable: its key is unknown and the broker cannot be asked.
        """
        try:
            return verify(token, self._keys, now)
        except UnknownKey:
            async with self._lock:
                if self._asked is None or self._clock() - self._asked >= KEYS_MIN_INTERVAL_S:
                    await self.refresh()
            return verify(token, self._keys, now)
