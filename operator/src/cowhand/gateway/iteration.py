"""Waiting for the next item of an iterator beside something else. Called by `pump` and `previews`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any


def upcoming(source: AsyncIterator[Any]) -> asyncio.Future[Any]:
    """The next item as a future; at the end it holds StopAsyncIteration."""
    return asyncio.ensure_future(_next(source))


async def _next(source: AsyncIterator[Any]) -> Any:
    return await source.__anext__()


async def leave(pending: Iterable[asyncio.Future[Any] | None], source: AsyncIterator[Any]) -> None:
    """Give up what is waited for, and close the iterator that it may come from."""
    for future in pending:
        if future is not None:
            future.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                await future
    close = getattr(source, "aclose", None)
    if close is not None:
        await close()
