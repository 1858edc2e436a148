"""The operator's access to the session log: every call ends soon, and a dead store costs one wait, not many.

Sandboxes and deletions go on while the store is down, so no call may block for longer than `LIMIT_S`, and
after a failure calls fail at once for `PAUSE_S`: otherwise a thousand sessions would wait one after the
other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from cowhand.controller.breaker import Breaker
from cowhand.errors import (
    ArchiveUnavailable,
    Denied,
    QuotaExceeded,
    StoreMismatch,
    StoreUnavailable,
)
from cowhand.session.log import ControlLog, SessionLog

T = TypeVar("T")

LIMIT_S: Final = 5.0
"""Longest wait for one call."""

PAUSE_S: Final = 1.0
"""How long calls fail at once after one failed."""


class Logs:
    """Both roles of the log, behind one time limit and one breaker."""

    def __init__(
        self,
        control: ControlLog,
        sessions: Callable[[str], SessionLog],
        *,
        limit_s: float = LIMIT_S,
    ) -> None:
        """`sessions` answers the `SessionLog` of a namespace."""
        self.control = control
        self._sessions = sessions
        self._breaker = Breaker(
            "The store of the log",
            StoreUnavailable,
            limit_s,
            PAUSE_S,
            failures=(StoreUnavailable, StoreMismatch, Denied),
            # One tenant's or one session's trouble; the store itself answers.
            passing=(QuotaExceeded, ArchiveUnavailable),
        )

    def sessions(self, namespace: str) -> SessionLog:
        """The log of a tenant."""
        return self._sessions(namespace)

    async def call(self, start: Callable[[], Awaitable[T]], *, limit_s: float | None = None) -> T:
        """Start and await one call of the log.

        Args:
            start: makes the call.
            limit_s: how long a call that copies much may take; that it takes longer says nothing of the store.

        Raises:
            StoreUnavailable: it failed, took too long, or another call failed a moment ago.
            QuotaExceeded: this tenant has no room left.
            ArchiveUnavailable: this call needs the archive, which does not answer.
        """
        return await self._breaker.call(start, limit_s=limit_s)
