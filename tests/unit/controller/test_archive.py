"""An archive that is away costs the operator one wait, and nobody who does not need it anything."""

from __future__ import annotations

import asyncio

import pytest

from cowhand.controller.archive import CarefulArchive
from cowhand.controller.logs import Logs
from cowhand.errors import ArchiveUnavailable, BlobMissing
from cowhand.session.blobs import Span
from support.memory_archive import MemoryArchive
from support.memory_log import MemoryLog

SID = "sesn_" + "a" * 32


class Hanging(MemoryArchive):
    """Never answers."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    async def get_blob(self, namespace: str, session_id: str, sha256: str) -> bytes:
        self.asked += 1
        await asyncio.Event().wait()
        raise AssertionError


async def test_it_is_the_archive_itself_while_that_answers() -> None:
    plain = MemoryArchive()
    careful = CarefulArchive(plain)
    digest = await careful.put_blob("ns", SID, b"payload")
    assert await careful.get_blob("ns", SID, digest) == b"payload"
    assert await careful.segments("ns", SID) == []
    with pytest.raises(BlobMissing):
        await careful.get_blob("ns", SID, "0" * 64)
    assert await careful.get_blob("ns", SID, digest) == b"payload", "an answer is no outage"


async def test_a_call_that_hangs_ends_and_the_next_do_not_wait() -> None:
    plain = Hanging()
    careful = CarefulArchive(plain, limit_s=0.01)
    for _ in range(20):
        with pytest.raises(ArchiveUnavailable, match="within"):
            await careful.get_blob("ns", SID, "0" * 64)
    assert plain.asked == 1
    with pytest.raises(ArchiveUnavailable):
        await careful.segment("ns", SID, Span(1, 2))
    careful._breaker._down = None  # the pause is over
    assert await careful.segments("ns", SID) == []


async def test_the_store_is_not_taken_for_dead_because_of_it() -> None:
    plain = MemoryArchive()
    plain.down = True
    careful = CarefulArchive(plain)
    log = MemoryLog()
    logs = Logs(log, log.of)
    with pytest.raises(ArchiveUnavailable):
        await logs.call(lambda: careful.segments("ns", SID))
    assert (await logs.call(lambda: log.backlog("ns"))).ready == 0
