"""Publishes the text and the thinking of responses while they stream, if anybody looks.

`loop` hands over each piece without waiting. One task a session that streams puts them together and publishes at
most every 50 ms; when nobody listens it asks again every two seconds, and whoever came meanwhile gets the block from
its beginning, as far as it is kept. Nothing here may hold up or fail a session.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Final

from cowhand.errors import CowhandError
from cowhand.session.preview import MAX_TEXT, Kind, Preview, Previews
from cowhand.telemetry.metrics import PREVIEWS

INTERVAL_S: Final = 0.05
NOBODY_S: Final = 2.0
KEPT: Final = 4 * MAX_TEXT
"""Characters of a block that are kept for those who come later; a longer one has no preview for them."""


@dataclass
class _Stream:
    """A response under way: what is not yet published, block by block.

    Attributes:
        start: position of its request.
        block: of the newest piece.
        text: of that block, from `begin` on.
        begin: characters of the block that are no longer kept.
        sent: characters of the block that were published to somebody.
        kind: of that block.
    """

    start: int
    block: int = -1
    text: str = ""
    begin: int = 0
    sent: int = 0
    kind: Kind = "text"
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, block: int, text: str, kind: Kind) -> None:
        """The next piece; a new block ends the preview of the one before, which the log will bring."""
        if block != self.block:
            self.block, self.text, self.begin, self.sent, self.kind = block, "", 0, 0, kind
        self.text += text
        cut = min(len(self.text) - KEPT, self.sent - self.begin) if self.sent else 0
        if not self.sent and len(self.text) > KEPT:
            cut = len(self.text)  # too late to begin: nobody was there
        if cut > 0:
            self.text = self.text[cut:]
            self.begin += cut
        self.news.set()

    def piece(self) -> Preview | None:
        """What to publish next; None: nothing, or the beginning is gone."""
        at = self.sent - self.begin
        if at < 0 or at >= len(self.text):
            return None
        text = self.text[at : at + MAX_TEXT]
        return Preview(self.start, self.block, self.sent, text, self.kind)


class Previewer:
    """See the module. One a worker.

    Args:
        previews: of the tenant.
    """

    def __init__(self, previews: Previews) -> None:
        self._previews = previews
        self._streams: dict[str, _Stream] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def __call__(
        self, session_id: str, start: int, block: int, text: str, kind: Kind = "text"
    ) -> None:
        """A piece of text or thinking: `Surroundings.preview`."""
        stream = self._streams.get(session_id)
        if stream is None or stream.start != start:
            self.end(session_id)
            stream = self._streams[session_id] = _Stream(start)
            self._tasks[session_id] = asyncio.create_task(self._publish(session_id, stream))
        stream.add(block, text, kind)

    def end(self, session_id: str) -> None:
        """The response is complete, or given up: the log says how."""
        self._streams.pop(session_id, None)
        task = self._tasks.pop(session_id, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """Stop publishing."""
        tasks = list(self._tasks.values())
        for session_id in list(self._tasks):
            self.end(session_id)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _publish(self, session_id: str, stream: _Stream) -> None:
        while True:
            await stream.news.wait()
            stream.news.clear()
            heard = 0
            while (piece := stream.piece()) is not None:
                heard = 0
                with contextlib.suppress(CowhandError):
                    heard = await self._previews.publish(session_id, piece)
                PREVIEWS.labels("heard" if heard else "unheard").inc()
                if stream.block != piece.block:
                    continue  # the next block began meanwhile
                if not heard:
                    # Whoever comes next must get the block from its beginning, which may be gone.
                    stream.sent = 0
                    break
                stream.sent = piece.offset + len(piece.text)
            await asyncio.sleep(INTERVAL_S if heard else NOBODY_S)
            if not heard:
                stream.news.set()
