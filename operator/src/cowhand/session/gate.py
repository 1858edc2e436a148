"""The rate gate: one line for all model requests of a tenant to the same workspace and model.

An endpoint limits a workspace, not a worker: when it answers 429, or says when to come back, every worker of the
tenant must stop, not only the one that heard it. The gate is a hash in the store that all of them ask before a
request. While it is shut each session gets a place in a line, the earliest first, whatever worker it is on; when
its time is over one request goes first, and its answer opens the gate or shuts it for longer. What opens is let
through slowly at first. The harness calls it; a tenant's gate is the tenant's own, as all of its keys.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from cowhand.session.keys import Keys
from cowhand.telemetry.metrics import GATE_ENTRIES, GATE_SHUT

if TYPE_CHECKING:
    from cowhand.session.store import Store

PROBE_MS: Final = 10_000
"""The first request after a pause has so long to be answered; then another one goes first."""

LOOK_MS: Final = 500
"""While a first request is under way the others ask again after so long."""

RAMP_MS: Final = 30_000
"""The line is no longer than this; more sessions share its last place."""

GAP_MS: Final = 200
"""Between two places of the line, at first."""

FIRST_MS: Final = 1_000
CAP_MS: Final = 60_000
"""Pauses where the endpoint names none: twice as long each time, at most so long."""

LONGEST_MS: Final = 600_000
"""A longer `retry-after` is cut to this: the endpoint is asked again then."""

EXPIRE_MS: Final = 600_000
"""A gate that nothing has shut for so long is forgotten: it is open."""

JITTER: Final = 0.1
"""Pauses are longer by up to this share, so that tenants with one workspace do not come back together."""


@dataclass(frozen=True)
class Entry:
    """Answer of `RateGate.enter`.

    Attributes:
        place: 0: send now; else milliseconds of the store's clock at which to ask again, with this place.
        round: how often the gate was shut so far; goes back with `opened` and `shut`.
        tell: the gate wants to know when the request is answered.
        kind: error type that shut it, empty if none did.
    """

    place: int = 0
    round: int = 0
    tell: bool = False
    kind: str = ""


class RateGate(Protocol):
    """Asked before each model request; every method may raise StoreUnavailable and be repeated."""

    async def enter(self, workspace: str, model: str, *, place: int = 0) -> Entry:
        """May a request be sent now?

        Args:
            workspace: where the endpoint counts, `Lease.workspace`.
            model: model id.
            place: what the last answer gave, 0 for none.
        """

    async def opened(self, workspace: str, model: str, entry: Entry) -> None:
        """The endpoint has begun to answer a request that `entry` let through."""

    async def shut(
        self, workspace: str, model: str, entry: Entry, *, kind: str, retry_after_s: float | None
    ) -> None:
        """The endpoint has refused a request that `entry` let through.

        Args:
            workspace: as for `enter`.
            model: as for `enter`.
            entry: of the request.
            kind: error type, for those who wait.
            retry_after_s: seconds that the endpoint named, None if it named none.
        """


class OpenGate:
    """A `RateGate` that lets everything through: for tools that have no store."""

    async def enter(self, workspace: str, model: str, *, place: int = 0) -> Entry:
        """See `RateGate`."""
        return Entry()

    async def opened(self, workspace: str, model: str, entry: Entry) -> None:
        """See `RateGate`."""

    async def shut(
        self, workspace: str, model: str, entry: Entry, *, kind: str, retry_after_s: float | None
    ) -> None:
        """See `RateGate`."""


class RedisRateGate:
    """`RateGate` in the store."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys

    def key(self, workspace: str, model: str) -> tuple[str, str]:
        """(base, key) of a gate."""
        digest = hashlib.sha256(f"{workspace}\n{model}".encode()).hexdigest()[:32]
        base = self._keys.base_of(digest)
        return base, f"{base}gate:{digest}"

    async def enter(self, workspace: str, model: str, *, place: int = 0) -> Entry:
        """See `RateGate`."""
        base, key = self.key(workspace, model)
        reply = await self._store.writes.script(
            "gate_enter", [key], base, "", place or "", PROBE_MS, RAMP_MS, LOOK_MS
        )
        if reply[0] == b"GO":
            GATE_ENTRIES.labels("probe" if reply[2] else "go").inc()
            return Entry(round=reply[1], tell=bool(reply[2]))
        GATE_ENTRIES.labels("wait").inc()
        return Entry(place=reply[2], round=reply[1], kind=reply[3].decode())

    async def opened(self, workspace: str, model: str, entry: Entry) -> None:
        """See `RateGate`."""
        base, key = self.key(workspace, model)
        await self._store.writes.script("gate_open", [key], base, "", entry.round)

    async def shut(
        self, workspace: str, model: str, entry: Entry, *, kind: str, retry_after_s: float | None
    ) -> None:
        """See `RateGate`."""
        base, key = self.key(workspace, model)
        longer = 1 + random.uniform(0, JITTER)  # noqa: S311
        delay: int | str = ""
        if retry_after_s is not None:
            delay = round(min(LONGEST_MS, max(0.0, retry_after_s) * 1000) * longer)
        await self._store.writes.script(
            "gate_shut", [key], base, "", entry.round, delay, kind,
            round(FIRST_MS * longer), round(CAP_MS * longer), GAP_MS, EXPIRE_MS,
        )  # fmt: skip
        GATE_SHUT.labels(kind).inc()
