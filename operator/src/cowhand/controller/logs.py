"""The operator's access to the session log: every call ends soon, and a dead store costs one wait, not many.

Sandboxes and deletions go on while the store is down, so no call may block for longer than `LIMIT_S`, and
after a failure calls fail at once for `PAUSE_S`: otherwise a thousand sessions would wait one after the
other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

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
        self._limit_s = limit_s
        self._down: tuple[float, str] | None = None

    def sessions(self, namespace: str) -> SessionLog:
        """The log of a tenant."""
        return self._sessions(namespace)

    async def call(self, start: Callable[[], Awaitable[T]]) -> T:
        """Start and await one call of the log.

        Raises:
            StoreUnavailable: it failed, took too long, or another call failed a moment ago.
            QuotaExceeded: this tenant has no room left.
            ArchiveUnavailable: this call needs the archive, which does not answer.
        """
        now = asyncio.get_running_loop().time()
        if self._down is not None and now < self._down[0]:
            raise StoreUnavailable(self._down[1])
        try:
            async with asyncio.timeout(self._limit_s):
                answer = await start()
        except TimeoutError as err:
            text = f"The store of the log did not answer within {self._limit_s:g} s"
            self._trip(text)
            raise StoreUnavailable(text) from err
        except (QuotaExceeded, ArchiveUnavailable):
            raise  # this tenant's or this session's trouble; the store itself answers
        except StoreUnavailable as err:
            self._trip(str(err))
            raise
        except (StoreMismatch, Denied) as err:
            self._trip(str(err))
            raise StoreUnavailable(str(err)) from err
        self._down = None
        return answer

    def _trip(self, text: str) -> None:
        self._down = (asyncio.get_running_loop().time() + PAUSE_S, text)
