"""The pure part of the archive: segment format, what goes into it and when, references to blobs."""

from __future__ import annotations

import gzip
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowhand.errors import ArchiveUnavailable, BlobMissing, LogIncompatible, UserError
from cowhand.session import archive
from cowhand.session.archive import HotLog
from cowhand.session.blobs import Payloads, Span, reference, reference_of, sha256
from cowhand.session.events import EVENT_LIMIT, INLINE_LIMIT, INLINE_WITH_BLOBS, Event, NewEvent
from support.memory_archive import MemoryArchive

NOW = 1_000_000_000
SID = "sesn_" + "a" * 32


def entries(first: int, last: int, *, payload: bytes = b"{}", kind: str = "x") -> list[Event]:
    return [Event(n, kind, f"e{n}", NOW - 10, "7:w:n", payload) for n in range(first, last + 1)]


def hot(first: int, following: int, **more: object) -> HotLog:
    base = {"closed": False, "held": False, "size": 1000, "newest_ms": NOW - 10} | more
    return HotLog(session_id=SID, first=first, next_seq=following, **base)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.text(), st.binary(), st.text()), min_size=1, max_size=8))
def test_a_segment_gives_back_every_byte(rows: list[tuple[str, bytes, str]]) -> None:
    rows = [
        (a.encode(errors="ignore").decode(), p, b.encode(errors="ignore").decode())
        for a, p, b in rows
    ]
    events = [Event(7 + i, t, e, i, "", p) for i, (t, p, e) in enumerate(rows)]
    assert archive.decode(archive.encode(events), Span(7, 6 + len(events))) == events


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda raw: raw[:-9], "torn"),
        (lambda raw: b"", "torn"),
        (lambda raw: b"not gzip at all", "damaged"),
        (lambda raw: gzip.compress(gzip.decompress(raw).replace(b'"e2"', b'"eX"')), "hash"),
        (lambda raw: gzip.compress(gzip.decompress(raw).replace(b'"last":3', b'"last":4')), "pos"),
        (lambda raw: gzip.compress(gzip.decompress(raw).rpartition(b'{"footer"')[0]), "damaged"),
        (lambda raw: archive.encode(entries(2, 4)), "positions 2-4"),
        (lambda raw: gzip.compress(b"\0" * (archive.MAX_UNPACKED + 1)), "unpacks to more"),
    ],
)
def test_a_segment_that_is_not_what_it_says_is_refused(damage, text) -> None:
    raw = archive.encode(entries(1, 3))
    with pytest.raises(LogIncompatible, match=text):
        archive.decode(damage(raw), Span(1, 3))


def test_only_dense_positions_make_a_segment() -> None:
    for events in ([], [*entries(1, 2), *entries(4, 5)]):
        with pytest.raises(ValueError, match="dense"):
            archive.encode(events)


def test_file_names_say_the_positions_and_nothing_else_is_a_segment() -> None:
    assert archive.span_of(archive.name(Span(1, 5000)), 12) == Span(1, 5000, 12)
    for other in ("1-2.ndjson.gz", "../000000000001-000000000002.ndjson.gz", "x", "", "blobs"):
        assert archive.span_of(other) is None
    assert archive.span_of(archive.name(Span(5, 2))) is None


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 12)), max_size=12))
def test_a_chain_is_dense_from_1_and_as_long_as_it_can_be(raw: list[tuple[int, int]]) -> None:
    spans = [Span(first, first + more) for first, more in raw]
    chosen = archive.chain(spans)
    covered = {n for span in spans for n in range(span.first, span.last + 1)}
    reach = 0
    while reach + 1 in covered:
        reach += 1
    assert (chosen[-1].last if chosen else 0) == reach
    position = 1
    for span in chosen:
        assert span.first <= position <= span.last
        position = span.last + 1


@pytest.mark.parametrize(
    ("log", "until"),
    [
        (hot(1, 11), 0),  # nothing to do
        (hot(11, 11, closed=True), 0),  # nothing left
        (hot(1, 11, closed=True), 10),
        (hot(5, 11, closed=True, held=True), 10),
        (hot(1, 11, newest_ms=NOW - archive.IDLE_MS), 0),  # not yet
        (hot(1, 11, newest_ms=NOW - archive.IDLE_MS - 1), 10),
        (hot(1, 11, newest_ms=NOW - archive.IDLE_MS - 1, held=True), 0),  # a tool runs for an hour
        (hot(1, 2002, held=True), 2001 - archive.KEEP_UNMARKED),
        (hot(1, 2001), 0),
        (hot(1, 301, size=archive.HOT_BYTES + 1), 0),  # large, but all of it is new
        (hot(1, 901, size=archive.HOT_BYTES + 1), 900 - archive.KEEP_UNMARKED),
    ],
)
def test_what_is_archived_when(log: HotLog, until: int) -> None:
    assert archive.archive_until(log, entries(log.first, log.next_seq - 1), NOW) == until
    assert archive.wanted(log, NOW) or until == 0


@pytest.mark.parametrize("kind", sorted(archive.WINDOW_STARTS))
def test_a_long_log_keeps_what_its_window_needs(kind: str) -> None:
    log = hot(1, 2502, held=True)
    events = entries(1, 2501)
    events[999] = entries(1000, 1000, kind=kind)[0]
    assert archive.archive_until(log, events, NOW) == 1000 - archive.KEEP_EVENTS - 1
    events[1] = entries(2, 2, kind=kind)[0]
    assert archive.archive_until(log, events, NOW) == 1000 - archive.KEEP_EVENTS - 1
    events[999] = entries(1000, 1000)[0]
    assert archive.archive_until(log, events, NOW) == 0, "everything since the window began is kept"


def test_a_segment_is_bounded_by_events_and_bytes() -> None:
    assert len(archive.cut(entries(1, 6000), 6000)) == archive.SEGMENT_EVENTS
    assert [e.seq for e in archive.cut(entries(1, 9), 4)] == [1, 2, 3, 4]
    big = entries(1, 20, payload=b"x" * 1024 * 1024)
    assert len(archive.cut(big, 20)) == 7
    assert len(archive.cut(entries(1, 2, payload=b"x" * archive.SEGMENT_BYTES), 2)) == 1


# Blobs


def event_of(size: int) -> NewEvent:
    return NewEvent(
        "user.message", {"content": random.Random(size).randbytes(size // 2).hex()}, id="m"
    )


async def read_back(payloads: Payloads, stored: bytes) -> bytes:
    (event,) = await payloads.resolve("ns", SID, [Event(1, "user.message", "m", 0, "", stored)])
    return event.payload


async def test_a_large_payload_becomes_a_reference_and_comes_back_byte_for_byte() -> None:
    store = MemoryArchive()
    new = event_of(200_000)
    (stored,) = await Payloads(store).pack("ns", SID, [new])
    assert len(stored) < 300
    assert reference_of(stored) == (sha256(new.payload()), len(new.payload()))
    assert await read_back(Payloads(store), stored) == new.payload()


@pytest.mark.parametrize("extra", [0, 1])
async def test_the_limit_of_what_stands_inline(extra: int) -> None:
    store = MemoryArchive()
    frame = len(NewEvent("t", {"x": ""}).payload())
    new = NewEvent("t", {"x": "a" * (INLINE_WITH_BLOBS - frame + extra)})
    (stored,) = await Payloads(store).pack("ns", SID, [new])
    assert (stored == new.payload()) is (extra == 0)
    (inline,) = await Payloads(None).pack("ns", SID, [new])
    assert inline == new.payload()


@pytest.mark.parametrize(("store", "limit"), [(None, INLINE_LIMIT), (MemoryArchive(), EVENT_LIMIT)])
async def test_over_the_limit_nothing_is_stored(store: MemoryArchive | None, limit: int) -> None:
    small = event_of(100_000)
    with pytest.raises(UserError, match=f"limit is {limit}: split it"):
        await Payloads(store).pack("ns", SID, [small, event_of(limit)])
    assert store is None or not store.blobs


async def test_inline_payloads_need_no_archive() -> None:
    store = MemoryArchive()
    store.down = True
    new = event_of(1000)
    (stored,) = await Payloads(store).pack("ns", SID, [new])
    assert await read_back(Payloads(store), stored) == new.payload()
    with pytest.raises(ArchiveUnavailable):
        await Payloads(store).pack("ns", SID, [event_of(100_000)])


async def test_a_blob_that_is_gone_damaged_or_foreign_is_an_error_that_names_it() -> None:
    store = MemoryArchive()
    new = event_of(100_000)
    digest = sha256(new.payload())
    (stored,) = await Payloads(store).pack("ns", SID, [new])
    store.blobs["ns", SID][digest] = new.payload()[:-1] + b"!"
    with pytest.raises(LogIncompatible, match=f"{digest} is damaged"):
        await read_back(Payloads(store), stored)
    del store.blobs["ns", SID][digest]
    with pytest.raises(BlobMissing, match=digest):
        await read_back(Payloads(store), stored)
    with pytest.raises(ArchiveUnavailable, match="COWHAND_ARCHIVE_URL"):
        await read_back(Payloads(None), stored)


@pytest.mark.parametrize(
    "broken",
    [
        b'{"v":1,"ref":{"sha256":"..","n":1,"codec":"none"}}',
        b'{"v":1,"ref":{"sha256":"' + b"a" * 64 + b'","n":"1","codec":"none"}}',
        b'{"v":1,"ref":{"sha256":"' + b"a" * 64 + b'","n":1,"codec":"zstd"}}',
        b'{"v":1,"ref":{}}',
        b'{"v":1,"ref":{',
    ],
)
def test_a_reference_that_makes_no_sense_is_refused(broken: bytes) -> None:
    with pytest.raises(LogIncompatible):
        reference_of(broken)


@given(st.dictionaries(st.text(), st.text()), st.text())
def test_no_inline_payload_is_taken_for_a_reference(data: dict[str, str], cause: str) -> None:
    assert (
        reference_of(NewEvent("t", data, cause=cause.encode(errors="ignore").decode()).payload())
        is None
    )
    assert reference_of(reference(b"x", "c")) is not None


async def test_what_was_read_or_written_lately_is_kept_in_memory_within_bounds() -> None:
    store = MemoryArchive()
    payloads = Payloads(store)
    many = [event_of(3_000_000 + n) for n in range(14)]
    stored = await payloads.pack("ns", SID, many)
    store.reads.clear()
    await read_back(payloads, stored[-1])
    assert store.reads == []
    await read_back(payloads, stored[0])
    assert store.reads == ["get_blob"]
    assert payloads._kept_bytes <= 32 * 1024 * 1024
