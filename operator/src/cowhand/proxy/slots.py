"""Slots of the model's workspace: a request goes on when the broker says that its turn has come.

The harness proxy adds the key to every request of its tenant, so here no harness gets past. The broker knows all
tenants (`session/slots`); this module speaks for all requests of the pod with one call, keeps their order, and lets
everything through while the broker does not answer: fair shares are not worth a stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cowhand.errors import CowhandError

log = logging.getLogger(__name__)

POLL_S: Final = 0.2
"""How often the broker is asked while requests wait."""

RENEW_S: Final = 10.0
"""How often it hears of requests that are under way; it forgets them after 30 s."""

UNUSED_S: Final = 10.0
"""A request that does not come for so long, or is not asked for while it waits, loses its slot or its place."""

ANSWER_S: Final = 3.0
"""A broker that takes longer does not answer."""

AWAY_S: Final = 2.0
"""After a call that failed everybody passes for so long; then the broker is asked again."""

WANTED: Final = 16
"""Requests that are named in one call, the first ones; of the others it hears their number."""

Key = tuple[str, str]
"""Session and lease: a session has one model request at a time."""

Ask = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]


@dataclass
class _Request:
    """A request that waits, or has a slot.

    Attributes:
        id: its name towards the broker.
        needed_until: clock reading at which it loses slot or place unless somebody comes for it.
        granted: set once it may be sent.
    """

    id: str
    needed_until: float
    granted: asyncio.Event = field(default_factory=asyncio.Event)


class Line:
    """The requests of this pod to one workspace.

    Args:
        pool: name of the workspace.
        ask: `POST /v1/model-slots` of the broker.
        client: name of this process.
        clock: monotonic seconds.
    """

    def __init__(self, pool: str, ask: Ask, client: str, clock: Callable[[], float]) -> None:
        self._pool = pool
        self._ask = ask
        self._client = client
        self._clock = clock
        self._ids = itertools.count(1)
        self._requests: dict[str, _Request] = {}  # by id, the first that came first
        self._reserved: dict[Key, _Request] = {}  # those of them that no exchange has taken yet
        self._done: list[str] = []
        self._pause_s = 0.0
        self._news = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._away_until = 0.0

    @property
    def idle(self) -> bool:
        """Nothing is kept here: the line can be forgotten."""
        return self._keeper is None

    def close(self) -> None:
        """Stop; the broker forgets what it knows by itself."""
        if self._keeper is not None:
            self._keeper.cancel()

    async def wait(self, key: Key, wait_s: float) -> bool:
        """Stand in the line for at most `wait_s`; True once there is a slot, which `slot` takes.

        Who asks again within `UNUSED_S` keeps place and slot.
        """
        request = self._reserved.get(key)
        if request is None:
            request = self._reserved[key] = self._join()
        request.needed_until = self._clock() + wait_s + UNUSED_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await request.granted.wait()
        request.needed_until = self._clock() + UNUSED_S
        return request.granted.is_set()

    @contextlib.asynccontextmanager
    async def slot(self, key: Key) -> AsyncIterator[None]:
        """Wait for a slot, in the place that `wait` has kept, and give it back in the end."""
        request = self._reserved.pop(key, None) or self._join()
        request.needed_until = float("inf")
        try:
            await request.granted.wait()
            yield
        finally:
            self._end(request)

    def paused(self, pause_s: float) -> None:
        """The endpoint said that nothing should be sent for so long."""
        if pause_s > 0:
            self._pause_s = max(self._pause_s, pause_s)
            self._news.set()

    def _join(self) -> _Request:
        request = _Request(format(next(self._ids), "x"), self._clock() + UNUSED_S)
        self._requests[request.id] = request
        if self._clock() < self._away_until:
            request.granted.set()
        self._news.set()
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep())
        return request

    def _end(self, request: _Request) -> None:
        if self._requests.pop(request.id, None) is not None:
            self._done.append(request.id)
            self._news.set()

    async def _keep(self) -> None:
        """Ask the broker as long as there is anything to tell."""
        try:
            while self._requests or self._done or self._pause_s:
                self._forget_unused()
                self._news.clear()
                pause_s = await self._exchange()
                waits = any(not request.granted.is_set() for request in self._requests.values())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(POLL_S, pause_s) if waits else RENEW_S):
                        await self._news.wait()
        finally:
            self._keeper = None

    def _forget_unused(self) -> None:
        now = self._clock()
        for key, request in list(self._reserved.items()):
            if request.needed_until < now:
                del self._reserved[key]
                self._end(request)

    async def _exchange(self) -> float:
        """One call; answers the seconds that it makes no sense to ask again for."""
        waiting = [item for item in self._requests.values() if not item.granted.is_set()]
        held = [item.id for item in self._requests.values() if item.granted.is_set()]
        done, self._done = self._done, []
        pause_s, self._pause_s = self._pause_s, 0.0
        body = {
            "pool": self._pool,
            "client": self._client,
            "waiting": len(waiting),
            "wanted": [item.id for item in waiting[:WANTED]],
            "held": held,
            "done": done,
            "pause_ms": round(pause_s * 1000),
        }
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await self._ask(body)
            granted = {str(item) for item in answer["granted"]}
            pause_ms = int(answer["pause_ms"])
        except Exception as err:  # whatever it is, nobody must wait for ever
            return self._away(waiting, done, err)
        self._away_until = 0.0
        for item in waiting:
            if item.id in granted:
                item.granted.set()
        if granted and any(not item.granted.is_set() for item in waiting):
            self._news.set()  # there may be more
        return pause_ms / 1000

    def _away(self, waiting: list[_Request], done: list[str], err: Exception) -> float:
        """The broker does not answer: everybody passes."""
        if not self._away_until:
            why = str(err) if isinstance(err, CowhandError) else type(err).__name__
            log.warning("no slots of the model's workspace: everybody passes", extra={"why": why})
        self._away_until = self._clock() + AWAY_S
        # Not for ever: what it does not hear of ends by itself.
        self._done = [*done, *self._done][-1000:]
        for item in waiting:
            item.granted.set()
        return AWAY_S


class Slots:
    """The lines of a harness pod, one for each workspace.

    Args:
        ask: `POST /v1/model-slots` of the broker.
        clock: monotonic seconds.
    """

    def __init__(self, ask: Ask, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._clock = clock
        self._client = secrets.token_hex(8)
        self._lines: dict[str, Line] = {}

    def line(self, pool: str) -> Line:
        """The line of a workspace."""
        found = self._lines.get(pool)
        if found is None:
            self._lines = {name: line for name, line in self._lines.items() if not line.idle}
            found = self._lines[pool] = Line(pool, self._ask, self._client, self._clock)
        return found

    def close(self) -> None:
        """Stop asking."""
        for line in self._lines.values():
            line.close()
