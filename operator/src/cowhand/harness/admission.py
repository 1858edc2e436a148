"""The way of one session's model requests through the rate gate, which all workers of the tenant share.

`loop` asks before each request and says what became of it. What the gate is told may be lost with the store's
connection: it then opens by its own clock.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from cowhand.errors import StoreUnavailable
from cowhand.harness.decide import BACKOFF
from cowhand.harness.journal import steadily
from cowhand.harness.stream import ModelError
from cowhand.session.gate import Entry, RateGate

OVERLOADED: Final = "overloaded_error"
RATE_LIMIT: Final = "rate_limit_error"


def shuts(kind: str, retry_after_s: float | None, *, probe: bool) -> bool:
    """An error of this type holds for everybody who sends to this workspace and model.

    A limit always does; an overloaded endpoint if it says when to come back, for else others may have better
    luck. What a first request after a pause meets counts in any case, if another attempt may cure it.
    """
    if kind == RATE_LIMIT or (kind == OVERLOADED and retry_after_s is not None):
        return True
    return probe and kind in BACKOFF


class Admission:
    """See the module.

    Args:
        gate: of the tenant.
        workspace: `Lease.workspace`.
    """

    def __init__(self, gate: RateGate, workspace: str) -> None:
        self._gate = gate
        self._workspace = workspace
        self._place = 0
        self._model = ""
        self._entry = Entry()
        self._telling: set[asyncio.Task[None]] = set()

    async def enter(self, model: str, wake_at: int | None) -> Entry:
        """Ask for a request; see `RateGate.enter`.

        Args:
            model: model id.
            wake_at: place that the session was woken for, None for none.
        """
        place = self._place or wake_at or 0
        entry = await steadily(
            "rate gate", lambda: self._gate.enter(self._workspace, model, place=place)
        )
        self._place, self._model, self._entry = entry.place, model, entry
        return entry

    def answered(self, exhausted_s: float = 0.0) -> None:
        """The endpoint has begun to answer, whatever it says.

        Args:
            exhausted_s: a limit was used up by this request: the gate is shut for so long before anybody is refused.
        """
        if self._entry.place or (not self._entry.tell and not exhausted_s):
            return
        entry, self._entry = self._entry, Entry(round=self._entry.round)
        task = asyncio.create_task(self._tell(entry, exhausted_s))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def failed(self, err: ModelError) -> None:
        """The request that was let through failed."""
        if not shuts(err.type, err.retry_after_s, probe=self._entry.tell):
            self.answered()
            return
        entry = self._entry
        await steadily(
            "rate gate",
            lambda: self._gate.shut(
                self._workspace, self._model, entry, kind=err.type, retry_after_s=err.retry_after_s
            ),
        )

    async def _tell(self, entry: Entry, exhausted_s: float) -> None:
        with contextlib.suppress(StoreUnavailable):
            if exhausted_s:
                await self._gate.shut(
                    self._workspace,
                    self._model,
                    entry,
                    kind=RATE_LIMIT,
                    retry_after_s=exhausted_s,
                )
            else:
                await self._gate.opened(self._workspace, self._model, entry)

    async def close(self) -> None:
        """Wait for what is on its way."""
        await asyncio.gather(*self._telling, return_exceptions=True)
