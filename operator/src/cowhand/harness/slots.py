"""Asks this pod's proxy whether a session's next model request has its turn, before the log says that it is sent.

The proxy would make the request wait as well, but then with its body in memory, on the request's clock, and as a
stream that a drain has to wait for. Nothing here keeps a request from being sent: the proxy decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

import aiohttp

from cowhand.telemetry.metrics import SLOT_WAIT_SECONDS

WAIT_S: Final = 15.0
"""For one answer; the proxy takes up to 5 s for it."""

UNSHARED_S: Final = 60.0
"""After the proxy said that nobody needs a slot it is not asked for so long."""

MAX_WAITING: Final = 10_000
"""Sessions whose wait is measured."""


class Slots(Protocol):
    """Turns at the model's workspace."""

    async def reserve(self, session_id: str, lease: str) -> bool:
        """Stand in the line for some seconds; True if the request may be sent now. Never raises.

        Ask again at once to keep the place. What was reserved and is not used is free again after 10 s.
        """


class NoSlots:
    """`Slots` where nobody waits: for tools and tests without a proxy."""

    async def reserve(self, session_id: str, lease: str) -> bool:
        """See `Slots`."""
        return True


class ProxySlots:
    """`Slots` from `POST /cowhand/model-slot` of this pod's proxy.

    Args:
        base_url: for example `http://127.0.0.1:8181`.
        clock: monotonic seconds.
    """

    def __init__(self, base_url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = f"{base_url.rstrip('/')}/cowhand/model-slot"
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None
        self._unshared_until = float("-inf")
        self._since: dict[str, float] = {}

    async def reserve(self, session_id: str, lease: str) -> bool:
        """See `Slots`."""
        if self._clock() < self._unshared_until:
            return True
        asked = self._clock()
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0)  # each session that waits has one
            self._session = aiohttp.ClientSession(trust_env=False, connector=connector)
        body = {"session_id": session_id, "lease": lease}
        timeout = aiohttp.ClientTimeout(total=WAIT_S)
        try:
            async with self._session.post(self._url, json=body, timeout=timeout) as answer:
                told = await answer.json() if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return True  # the request itself finds out what is wrong
        if not isinstance(told, dict):
            return True
        now, granted = self._clock(), told.get("granted") is not False
        if told.get("shared") is False:
            self._unshared_until = now + UNSHARED_S
        elif granted:
            SLOT_WAIT_SECONDS.observe(now - self._since.pop(session_id, asked))
        else:
            self._since.setdefault(session_id, asked)
            if len(self._since) > MAX_WAITING:
                self._since.clear()  # of sessions that went away; only the figures suffer
        return granted

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
