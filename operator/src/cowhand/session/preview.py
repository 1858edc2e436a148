"""Previews: text and thoughts of a response that is still being written, for whoever follows the session right now.

They go over a channel of the store and nowhere else: never into the log, never into a key. A lost one costs nothing
but the look of it, for the response itself comes in the log. The harness publishes, the gateway subscribes; a
tenant's login reaches the channels of its own sessions alone.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol

from cowhand.session.keys import Keys

if TYPE_CHECKING:
    from cowhand.session.store import Store

MAX_TEXT: Final = 16_384
"""Characters of one preview."""

MAX_MESSAGE: Final = 8 * MAX_TEXT
"""Bytes of a message; a longer one is not ours."""


Kind = Literal["text", "thinking"]


@dataclass(frozen=True)
class Preview:
    """A piece of text.

    Attributes:
        start: position of the `span.model_request_start` whose response is being written.
        block: index of the text block in the response.
        offset: characters of the block before this piece; 0 begins the block (again).
        text: at most MAX_TEXT characters.
        kind: `text` of the answer, or `thinking`.
    """

    start: int
    block: int
    offset: int
    text: str
    kind: Kind = "text"


class Previews(Protocol):
    """Of one tenant."""

    async def publish(self, session_id: str, preview: Preview) -> int:
        """Show a piece to those who follow now; answers how many processes listen. Raises StoreUnavailable."""

    def follow(self, session_id: str) -> AsyncIterator[Preview]:
        """Pieces as they come, at most once each; endless."""


class RedisPreviews:
    """`Previews` over PUBLISH and SUBSCRIBE."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys

    async def publish(self, session_id: str, preview: Preview) -> int:
        """See `Previews`."""
        body: list[int | str] = [preview.start, preview.block, preview.offset, preview.text]
        if preview.kind != "text":
            body.append(preview.kind)
        message = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        channel = self._keys.session(session_id).previews
        return int(await self._store.reads.call("PUBLISH", channel, message))

    async def follow(self, session_id: str) -> AsyncIterator[Preview]:
        """See `Previews`."""
        channel = self._keys.session(session_id).previews
        async with self._store.hub.subscribe([channel]) as subscription:
            while True:
                found = await subscription.get()
                preview = None if found is None else decode(found[1])
                if preview is not None:
                    yield preview


def decode(raw: bytes) -> Preview | None:
    """A message of the channel; None for anything else (a tenant's login can publish what it likes)."""
    if len(raw) > MAX_MESSAGE:
        return None
    try:
        start, block, offset, text, *more = json.loads(raw)
    except (ValueError, TypeError, RecursionError):
        return None
    numbers = all(type(one) is int and 0 <= one < 2**53 for one in (start, block, offset))
    if not numbers or type(text) is not str or len(text) > MAX_TEXT:
        return None
    if more and more != ["thinking"]:
        return None  # of a newer release
    return Preview(start, block, offset, text, "thinking" if more else "text")
