"""Pass one request on and stream its answer back, both ways at once, nothing buffered whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import h11

from cowhand.proxy.client import Connection, UpstreamError
from cowhand.proxy.http1 import BadMessage, Headers
from cowhand.proxy.server import Exchange

Answer = Callable[[int, Headers], Headers]
"""Judges the head of an answer and returns the headers for the client; may raise Refusal instead."""


async def relay(
    exchange: Exchange,
    connection: Connection,
    *,
    method: str,
    target: str,
    headers: Headers,
    answer: Answer,
    idle_s: float,
    max_answer: int | None = None,
) -> None:
    """Send the request with the client's body, then stream the answer.

    Args:
        exchange: the client's side.
        connection: the upstream side, fresh or from a pool; its owner releases or closes it.
        method: request method for upstream.
        target: request target for upstream.
        headers: complete header list for upstream, framing included.
        answer: makes the client's header list.
        idle_s: silence of upstream that is tolerated, in seconds.
        max_answer: most bytes of the answer's body, None for no limit.

    Raises:
        UpstreamError: upstream failed before the answer began.
        ConnectionError: either side failed in the middle; the client's connection must be cut.
    """
    await connection.start(method, target, headers)
    upload = asyncio.create_task(_upload(exchange, connection))
    try:
        try:
            response = await connection.response(idle_s)
        except UpstreamError:
            if upload.done() and not upload.cancelled() and upload.exception() is not None:
                upload.result()
            raise
        await _download(exchange, connection, response, answer, idle_s, max_answer)
    finally:
        upload.cancel()
        await asyncio.gather(upload, return_exceptions=True)


async def _upload(exchange: Exchange, connection: Connection) -> None:
    try:
        async for piece in exchange.body():
            await connection.send(piece)
        await connection.finish()
    except (BadMessage, OSError):
        # The client's fault: upstream must not take what came so far for the whole.
        connection.close()
        raise
    except UpstreamError:
        # Upstream may have answered early and closed: its answer decides.
        return


async def _download(
    exchange: Exchange,
    connection: Connection,
    response: h11.Response,
    answer: Answer,
    idle_s: float,
    max_answer: int | None,
) -> None:
    await exchange.start(response.status_code, answer(response.status_code, list(response.headers)))
    sent = 0
    try:
        async for piece in connection.body(idle_s):
            sent += len(piece)
            if max_answer is not None and sent > max_answer:
                raise UpstreamError(f"The answer is longer than {max_answer} bytes.")
            await exchange.send(piece)
    except UpstreamError as err:
        # The head is out: only a cut connection can still tell the client that this is not all.
        raise ConnectionAbortedError(str(err)) from err
    await exchange.finish()
