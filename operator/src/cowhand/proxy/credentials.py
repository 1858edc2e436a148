"""Model credentials in the harness proxy: one per session and lease, cached briefly, fetched once at a time."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cowhand.errors import BrokerUnavailable, CowhandError
from cowhand.proxy.client import Origin
from cowhand.proxy.http1 import Headers

EXPIRY_MARGIN_S: Final = 60.0
"""A credential is not used any more this long before it expires."""

REFRESH_AT: Final = 0.8
"""Share of the usable life after which it is fetched again in the background."""

MAX_ENTRIES: Final = 4096


@dataclass(frozen=True)
class Credential:
    """What the broker gave for one session.

    Attributes:
        origin: the only place it may go to.
        headers: header lines that carry it; never shown by repr.
        credential_id: a name that can be logged.
        refresh_at: clock reading from which on a new one is fetched ahead.
        usable_until: clock reading from which on it is not used.
        pool: name of the workspace that its requests need slots of, empty if they need none.
    """

    origin: Origin
    headers: Headers = field(repr=False)
    credential_id: str
    refresh_at: float
    usable_until: float
    pool: str = ""


def parse_credential(answer: Mapping[str, Any], now: float) -> Credential:
    """The broker's answer as a Credential.

    Raises:
        BrokerUnavailable: the answer is not what docs/interfaces.md section 8 says.
        UserError: its base URL is not valid.
    """
    try:
        origin = Origin.parse(str(answer["base_url"]))
        headers = [
            (str(name).lower().encode("ascii"), str(value).encode("ascii"))
            for name, value in answer["headers"].items()
        ]
        usable_s = float(answer["expires_in_s"]) - EXPIRY_MARGIN_S
        credential_id = str(answer["credential_id"])
        pool = str(answer.get("pool") or "")
    except (KeyError, TypeError, ValueError, AttributeError):
        # Without the cause: it could quote a header's value.
        raise BrokerUnavailable("The broker's answer is not a credential.", after=5) from None
    refresh_at, usable_until = now + usable_s * REFRESH_AT, now + usable_s
    return Credential(origin, headers, credential_id, refresh_at, usable_until, pool)


class CredentialCache:
    """Credentials by (session, lease).

    Args:
        fetch: asks the broker; gets session id, lease and the id of a credential that upstream
            refused (or empty), and answers the broker's document.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        fetch: Callable[[str, str, str], Awaitable[Mapping[str, Any]]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._clock = clock
        self._entries: OrderedDict[tuple[str, str], Credential] = OrderedDict()
        self._flights: dict[tuple[str, str], asyncio.Task[Credential]] = {}
        self._rejected: OrderedDict[str, None] = OrderedDict()
        self._reject_next: dict[tuple[str, str], str] = {}

    async def get(self, session_id: str, lease: str) -> Credential:
        """A credential that is usable now.

        Raises:
            BrokerRefusal, BrokerUnavailable, UserError: it could not be had.
        """
        key = (session_id, lease)
        entry = self._entries.get(key)
        now = self._clock()
        if entry is None or now >= entry.usable_until:
            return await asyncio.shield(self._flight(key))
        self._entries.move_to_end(key)
        if now >= entry.refresh_at:
            self._flight(key)
        return entry

    def reject(self, credential_id: str) -> bool:
        """Upstream answered 401 to this credential: forget it.

        Returns:
            True the first time for a credential: a new one will be fetched. False if this one had
            been rejected before: fetching again brought the same, so the 401 is the answer.
        """
        for key, entry in list(self._entries.items()):
            if entry.credential_id == credential_id:
                del self._entries[key]
                self._reject_next[key] = credential_id
        if len(self._reject_next) > MAX_ENTRIES:
            self._reject_next.clear()
        first = credential_id not in self._rejected
        self._rejected[credential_id] = None
        if len(self._rejected) > MAX_ENTRIES:
            self._rejected.popitem(last=False)
        return first

    def _flight(self, key: tuple[str, str]) -> asyncio.Task[Credential]:
        flight = self._flights.get(key)
        if flight is None:
            flight = asyncio.create_task(self._load(key))
            self._flights[key] = flight
            flight.add_done_callback(lambda done: self._landed(key, done))
        return flight

    def _landed(self, key: tuple[str, str], flight: asyncio.Task[Credential]) -> None:
        self._flights.pop(key, None)
        if not flight.cancelled():
            flight.exception()  # A refresh ahead has no waiter; its failure shows when the entry ends.

    async def _load(self, key: tuple[str, str]) -> Credential:
        rejected = self._reject_next.pop(key, "")
        try:
            answer = await self._fetch(*key, rejected)
            credential = parse_credential(answer, self._clock())
        except CowhandError:
            if rejected:
                self._reject_next[key] = rejected
            raise
        if credential.usable_until > self._clock():
            self._entries[key] = credential
            self._entries.move_to_end(key)
            if len(self._entries) > MAX_ENTRIES:
                self._entries.popitem(last=False)
        return credential
