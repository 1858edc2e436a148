"""Whether what the gateway needs answers it: for `GET /healthz`, and so for `cowhand doctor`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from cowhand.errors import CowhandError, SessionNotFound
from cowhand.gateway.broker import Broker
from cowhand.session.log import SessionLog
from cowhand.session.remote import HttpArchive

TIMEOUT_S: Final = 2.0
NO_SESSION: Final = "sesn_" + "0" * 32


async def examine(
    logs: Mapping[str, SessionLog], broker: Broker, archive: HttpArchive | None
) -> dict[str, str]:
    """`store`, `broker` and `archive`: `ok`, or what is wrong; `none` where there is no archive."""
    names = ("store", "broker", "archive")
    found = await asyncio.gather(_store(logs), _broker(broker), _archive(archive))
    return dict(zip(names, found, strict=True))


async def _store(logs: Mapping[str, SessionLog]) -> str:
    for log in logs.values():
        try:
            await asyncio.wait_for(log.get_session(NO_SESSION), TIMEOUT_S)
        except SessionNotFound:
            return "ok"
        except (CowhandError, TimeoutError) as err:
            return str(err) or "no answer"
    return "ok"


async def _broker(broker: Broker) -> str:
    try:
        healthy = await asyncio.wait_for(broker.healthy(), TIMEOUT_S)
    except TimeoutError:
        healthy = False
    return "ok" if healthy else "no answer"


async def _archive(archive: HttpArchive | None) -> str:
    if archive is None:
        return "none"
    try:
        await asyncio.wait_for(archive.check(), TIMEOUT_S)
    except (CowhandError, TimeoutError) as err:
        return str(err) or "no answer"
    return "ok"
