"""A time limit and a breaker for calls of something that may be away: one wait, not one for each object.

Called by `logs` and `archive`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from cowhand.errors import CowhandError

T = TypeVar("T")


@dataclass
class Breaker:
    """Calls end soon, and after a failure they fail at once for a moment.

    Attributes:
        name: what is called; the text of a timeout begins with it.
        unavailable: what is raised when it does not answer.
        limit_s: longest wait for one call, seconds.
        pause_s: how long calls fail at once after one failed, seconds.
        failures: errors that say so too; those that are not `unavailable` are raised as that.
        passing: errors among these that concern only the call itself.
    """

    name: str
    unavailable: type[CowhandError]
    limit_s: float
    pause_s: float
    failures: tuple[type[CowhandError], ...]
    passing: tuple[type[CowhandError], ...] = ()
    _down: tuple[float, str] | None = None

    async def call(self, start: Callable[[], Awaitable[T]], *, limit_s: float | None = None) -> T:
        """Start and await one call.

        Args:
            start: makes the call.
            limit_s: how long a call that copies much may take; that it takes longer says nothing of what is called.

        Raises:
            CowhandError: `unavailable` if it failed, took too long, or another call failed a moment ago; else
                whatever the call raises.
        """
        if self._down is not None and self._now() < self._down[0]:
            raise self.unavailable(self._down[1])
        try:
            async with asyncio.timeout(limit_s or self.limit_s):
                answer = await start()
        except TimeoutError as err:
            if limit_s is not None:
                raise self.unavailable(f"{self.name} was not done within {limit_s:g} s") from err
            text = f"{self.name} did not answer within {self.limit_s:g} s"
            self._trip(text)
            raise self.unavailable(text) from err
        except self.passing:
            raise
        except self.failures as err:
            self._trip(str(err))
            if isinstance(err, self.unavailable):
                raise
            raise self.unavailable(str(err)) from err
        self._down = None
        return answer

    def _trip(self, text: str) -> None:
        self._down = (self._now() + self.pause_s, text)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
