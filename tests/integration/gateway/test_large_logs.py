"""A log of many large events: what a request of the gateway holds in memory at a time is bounded."""

from __future__ import annotations

import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cowhand.errors import BlobMissing
from cowhand.gateway import window
from cowhand.gateway.log import export_lines, line
from cowhand.gateway.paging import Query, page
from cowhand.gateway.window import chunks, context_at
from cowhand.session import blobs, connect
from cowhand.session import sessions as sessions_module
from cowhand.session.blobs import Span, sha256
from cowhand.session.log import SessionLog, StoreConfig
from support import sessions as make

NS = "team-a"
MIB = 1024 * 1024
SIZE, COUNT = 2 * MIB, 14
"""28 MiB, which nothing may hold at once."""

BOUND = 16 * MIB
"""Payloads are held as bytes, decoded, and as what is answered."""


class Disk:
    """An archive whose blobs are files: each read is new memory, as over the network."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def put_blob(self, namespace: str, session_id: str, payload: bytes) -> str:
        digest = sha256(payload)
        (self._folder / digest).write_bytes(payload)
        return digest

    async def get_blob(self, namespace: str, session_id: str, sha256: str) -> bytes:
        try:
            return (self._folder / sha256).read_bytes()
        except FileNotFoundError:
            raise BlobMissing(f"the blob {sha256} is gone") from None

    async def segments(self, namespace: str, session_id: str) -> list[Span]:
        return []

    async def segment(self, namespace: str, session_id: str, span: Span) -> bytes:
        raise BlobMissing("there is none")


@pytest.fixture
async def heavy(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[SessionLog, str]]:
    """A log whose messages nobody has taken up; the process' own cache of blobs is off, it is not a request's."""
    monkeypatch.setattr(blobs, "CACHE_BYTES", 0)
    async with connect(StoreConfig(store_url), namespace=NS, archive=Disk(tmp_path)) as store:
        log = store.session_log()
        sid = await make.start(log)
        for number in range(COUNT):
            text = f"{number:04d}" * (SIZE // 4)
            await log.emit_event(sid, make.message(f"big:{number}", text))
        yield log, sid


async def measured(work: Callable[[], Awaitable[Any]]) -> tuple[Any, int]:
    """The answer, and the most bytes that were held on the way to it."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        found = await work()
        return found, tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


async def listed(log: SessionLog, sid: str, order: Any) -> list[str]:
    """Ids of all public events, page by page."""
    found: list[str] = []
    query = Query(order=order)
    while True:
        answer = await page(log, sid, query)
        found += [public["id"] for public in answer["data"]]
        if not answer["next_page"]:
            return found
        seq = int(answer["data"][-1]["id"].split("_")[2]) + (1 if order == "asc" else -1)
        query = Query(order=order, begin=(seq, 0 if order == "asc" else 2**31))


async def lines(log: SessionLog, sid: str) -> int:
    return sum([len(line(e)) async for found in chunks(log, sid, 1) for e in found])


async def exported(log: SessionLog, sid: str) -> int:
    state = await log.get_session(sid)
    return sum([len(part) async for part in export_lines(log, state, 0)])


async def followed(log: SessionLog, sid: str) -> int:
    count = 0
    follow = log.follow(sid)
    async for _ in follow:
        count += 1
        if count == COUNT + 2:
            break
    await follow.aclose()  # type: ignore[attr-defined]
    return count


async def context(log: SessionLog, sid: str) -> int:
    """As for a page at the end of the log."""
    await context_at(log, sid, COUNT + 2, light=True)
    return 0


READERS = {"lines": lines, "export": exported, "follow": followed, "context": context}


@pytest.mark.parametrize("reader", READERS)
async def test_a_reader_holds_some_of_a_large_log(heavy, reader):
    found, peak = await measured(lambda: READERS[reader](*heavy))
    assert peak < BOUND, f"{peak / MIB:.1f} MiB"
    assert reader == "context" or found > 0


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_a_page_holds_some_of_a_large_log_and_the_pages_are_all_of_it(heavy, order):
    found, peak = await measured(lambda: listed(*heavy, order))
    assert peak < BOUND, f"{peak / MIB:.1f} MiB"
    positions = [int(one.split("_")[2]) for one in found]
    assert positions == sorted(range(2, COUNT + 3), reverse=order == "desc")


@pytest.mark.parametrize("reader", ["lines", "follow", "asc"])
async def test_control_without_the_bound_they_hold_it_all(heavy, monkeypatch, reader):
    for module in (window, "cowhand.gateway.paging"):
        name = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{name}.CHUNK_BYTES", 10**12)
    monkeypatch.setattr(sessions_module, "FOLLOW_BYTES", 10**12)
    work = READERS.get(reader) or (lambda log, sid: listed(log, sid, reader))
    _, peak = await measured(lambda: work(*heavy))
    assert peak > 1.5 * BOUND, f"{peak / MIB:.1f} MiB"


async def test_bounded_reads_are_short_but_never_empty(heavy):
    log, sid = heavy
    first = await log.get_events(sid, max_bytes=5 * MIB)
    assert [event.seq for event in first] == [1, 2, 3, 4], "two small ones and two large ones"
    (one,) = await log.get_events(sid, 4, max_bytes=1)
    assert one.seq == 4
    assert len(one.payload) > SIZE
    assert len(await log.get_events(sid, 1, 2, max_bytes=10**9)) == 2
    types = await log.get_events(sid, types=["user.message"], max_bytes=3 * MIB)
    assert [event.seq for event in types] == [2, 3]
    assert await log.get_events(sid, 4, 4, types=["none"], max_bytes=1) == []
