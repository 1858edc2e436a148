"""One `get_events` over store and archive (I9): any range is what was written, also while it is being archived."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from cowhand.errors import ArchiveUnavailable, BlobMissing, SessionNotFound, UserError
from cowhand.session import connect
from cowhand.session import events as ev
from cowhand.session import scripts as lua
from cowhand.session.archive import HotLog
from cowhand.session.events import Event, NewEvent
from cowhand.session.log import ArchiveLog, Lease, StoreConfig
from cowhand.session.sessions import RedisSessionLog
from cowhand.session.store import Store
from support import sessions as make
from support.memory_archive import MemoryArchive

NS = "team-a"
BIG = "b" * 100_000


@dataclass
class Rig:
    store: Store
    archive: MemoryArchive
    log: RedisSessionLog
    hot: ArchiveLog

    async def session(self, count: int) -> tuple[str, list[Event]]:
        """A session with `count` events, some of them large; answers all of them."""
        sid = make.new_sid()
        first = [make.created(), make.message(text=BIG)]
        await self.log.create_session(make.meta(sid), first)
        for number in range(count - 2):
            text = BIG + str(number) if number % 60 == 7 else f"text {number}"
            await self.log.emit_event(sid, make.message(f"m{number}", text))
        found = await self.log.get_events(sid)
        assert [event.seq for event in found] == list(range(1, count + 1))
        return sid, found

    async def put(self, sid: str, first: int, last: int) -> bool:
        """Archive these positions, as the archive process does: the segment first."""
        self.archive.put(NS, sid, await self.hot.stored(NS, sid, first, last - first + 1, 10**9))
        return await self.hot.archived(NS, sid, first, last)

    async def length(self, sid: str) -> int:
        found: int = await self.store.reads.call("XLEN", self.store.keys().session(sid).log)
        return found


@pytest.fixture
async def rig(store_url: str) -> AsyncIterator[Rig]:
    archive = MemoryArchive()
    async with connect(StoreConfig(store_url), namespace=NS, archive=archive) as store:
        log = store.session_log()
        assert isinstance(log, RedisSessionLog)
        yield Rig(store, archive, log, store.archive_log())


async def ranges_are_equal(rig: Rig, sid: str, original: list[Event], rounds: int) -> None:
    """Readers of random ranges see the original while everything is archived step by step."""
    chance = random.Random(rounds)
    done = asyncio.Event()

    async def read() -> None:
        while not done.is_set():
            start, end = chance.randint(1, len(original)), chance.randint(1, len(original) + 3)
            limit = chance.choice([None, 1, 7, 100])
            cut = original[start - 1 : max(end, start - 1)][:limit]
            assert await rig.log.get_events(sid, start, end, limit=limit) == cut

    async def archive() -> None:
        first = 1
        while first <= len(original):
            last = min(len(original), first + chance.randint(1, 60))
            assert await rig.put(sid, first, last)
            first = last + 1
            for _ in range(5):
                await rig.log.get_events(sid, first - 1, first + 1)
        done.set()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(archive())
        for _ in range(2):
            tasks.create_task(read())


async def test_any_range_is_the_original_while_it_is_archived(rig: Rig) -> None:
    sid, original = await rig.session(200)
    await ranges_are_equal(rig, sid, original, 1)
    assert await rig.length(sid) == 0
    assert await rig.log.get_events(sid) == original
    assert await rig.log.get_events(sid, 201) == []
    assert await rig.log.get_events(sid, 7, 5) == []


async def naive(
    self: RedisSessionLog,
    session_id: str,
    start: int,
    end: int | None,
    limit: int | None,
    types: object = None,
    max_bytes: object = None,
) -> list[Event]:
    """Cold below the first position as it was before the read, hot above: no second look."""
    first = await self._first(session_id)
    cold = []
    if start < first:
        cold = await self._store.cold.events(NS, session_id, start, first - 1, limit)
    return [*cold, *await self._hot(session_id, max(start, first), end, 1000)]


@pytest.mark.parametrize("careless", [False, True])
async def test_a_trim_in_the_middle_of_a_read_leaves_no_hole(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, careless: bool
) -> None:
    """And the control: a reader that looks only once misses what was archived in between."""
    sid, original = await rig.session(200)
    assert await rig.put(sid, 1, 10)
    plain = RedisSessionLog._hot
    steps = iter([(11, 60), (61, 150)])

    async def racing(self: RedisSessionLog, *args: object) -> list[Event]:
        if step := next(steps, None):
            assert await rig.put(sid, *step)
        return await plain(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(RedisSessionLog, "_hot", racing)
    if careless:
        monkeypatch.setattr(RedisSessionLog, "_range", naive)
    found = await rig.log.get_events(sid)
    assert (found == original) is not careless
    assert next(steps, None) is None or careless


async def test_a_follower_sees_everything_once_and_in_order(rig: Rig) -> None:
    sid, original = await rig.session(120)
    assert await rig.put(sid, 1, 50)
    seen = []
    async for event in rig.log.follow(sid):
        seen.append(event)
        if event.seq == 60:
            assert await rig.put(sid, 51, 110)
        if event.seq == 120:
            await rig.store.control_log().close(NS, sid, make.deleted(), retain_s=60)
    assert seen[:-1] == original
    assert seen[-1].type == ev.SESSION_DELETED


async def test_a_log_whose_store_part_is_empty_goes_on_at_the_next_position(rig: Rig) -> None:
    sid, original = await rig.session(5)
    assert await rig.put(sid, 1, 5)
    assert await rig.length(sid) == 0
    assert await rig.log.emit_event(sid, make.message("m0")) == 3, "an old id is known still"
    assert await rig.log.emit_event(sid, make.message("new")) == 6
    worker = rig.store.worker_log("pod-1")
    await worker.beat()
    lease = await make.take(worker, sid)
    assert await worker.append(lease, [make.result()]) == 8
    assert (await rig.log.get_events(sid))[:5] == original
    assert [event.seq for event in await rig.log.get_events(sid, 4)] == [4, 5, 6, 7, 8]


async def test_the_store_drops_only_what_follows_and_what_was_written(rig: Rig) -> None:
    sid, original = await rig.session(20)
    assert await rig.put(sid, 1, 10)
    for first, last in ((1, 10), (12, 15), (10, 15), (11, 21), (11, 10), (0, 12)):
        assert not await rig.hot.archived(NS, sid, first, last), (first, last)
    assert await rig.length(sid) == 10
    assert await rig.log.get_events(sid) == original
    with pytest.raises(SessionNotFound):
        await rig.hot.archived(NS, make.new_sid(), 1, 1)


async def test_control_without_the_check_of_the_first_position_events_are_lost(
    rig: Rig, store_url: str
) -> None:
    sid, original = await rig.session(20)
    scripts = lua.load()
    text = scripts["archived"].source.replace("first ~= low or ", "")
    assert text != scripts["archived"].source
    scripts["archived"] = lua.Script("archived", text)
    broken = Store(StoreConfig(store_url), NS, scripts, rig.archive)
    rig.archive.put(NS, sid, original[10:15])
    assert await broken.archive_log().archived(NS, sid, 11, 15)
    with pytest.raises(BlobMissing, match=f"position 1 of {sid}"):
        await rig.log.get_events(sid)
    await broken.aclose()


async def test_what_the_archive_cannot_give_is_an_error_and_never_a_hole(
    rig: Rig, store_url: str
) -> None:
    sid, original = await rig.session(20)
    assert await rig.put(sid, 1, 10)
    rig.archive.down = True
    with pytest.raises(ArchiveUnavailable):
        await rig.log.get_events(sid)
    # What is hot needs no archive: a session that ran lately wakes without it.
    assert await rig.log.get_events(sid, 11) == original[10:]
    rig.archive.down = False
    async with connect(StoreConfig(store_url), namespace=NS) as store:
        with pytest.raises(ArchiveUnavailable, match="COWHAND_ARCHIVE_URL"):
            await store.session_log().get_events(sid)
    rig.archive.files.clear()
    with pytest.raises(BlobMissing, match="position 1"):
        await rig.log.get_events(sid)


async def test_large_payloads_of_every_writer_are_blobs_in_the_store(
    rig: Rig, store_url: str
) -> None:
    sid = make.new_sid()
    big = [make.created(), make.message(text=BIG), make.message("m2", BIG * 2)]
    await rig.log.create_session(make.meta(sid), big)
    await rig.log.emit_event(sid, make.message("m3", "c" * 2_000_000))
    worker = rig.store.worker_log("pod-1")
    await worker.beat()
    lease = await make.take(worker, sid)
    assert await worker.append(lease, [make.result(BIG), make.result("small")]) == 6
    stored = await rig.hot.stored(NS, sid, 1, 100, 10**9)
    assert max(len(event.payload) for event in stored) < 500
    assert len(rig.archive.blobs[NS, sid]) == 4
    async with connect(StoreConfig(store_url), namespace=NS, archive=rig.archive) as other:
        read = await other.session_log().get_events(sid)
    assert read[1].payload == big[1].payload()
    assert read[3].data["content"][0]["text"] == "c" * 2_000_000
    assert read[5].payload == make.result(BIG).payload()
    with pytest.raises(UserError, match="limit is 16777216"):
        await worker.append(lease, [make.result("x" * ev.EVENT_LIMIT)])


async def test_the_scripts_hold_to_the_smaller_limit(rig: Rig) -> None:
    sid = await make.start(rig.log)
    keys = rig.store.keys().session(sid)
    limit = rig.store.payloads.inline_limit
    big = b"x" * (limit + 1)
    with pytest.raises(UserError, match=f"limit is {64 * 1024}"):
        await rig.store.script("ingest", keys, "big", ev.USER_MESSAGE, big, limit, 1)


async def test_a_blob_is_durable_before_the_append_and_nothing_is_written_without_it(
    rig: Rig,
) -> None:
    sid = await make.start(rig.log)
    worker = rig.store.worker_log("pod-1")
    await worker.beat()
    lease: Lease = await make.take(worker, sid)
    rig.archive.down = True
    with pytest.raises(ArchiveUnavailable):
        await rig.log.emit_event(sid, make.message("m1", BIG))
    with pytest.raises(ArchiveUnavailable):
        await worker.append(lease, [make.result(BIG)])
    with pytest.raises(ArchiveUnavailable):
        await rig.log.create_session(
            make.meta(make.new_sid()), [make.created(), make.message("m", BIG)]
        )
    assert len(await rig.hot.stored(NS, sid, 1, 100, 10**9)) == 3
    assert await worker.append(lease, [make.result("small")]) == 4, "small ones need no archive"
    rig.archive.down = False
    assert await worker.append(lease, [make.result(BIG)]) == 5
    assert await rig.log.emit_event(sid, make.message("m1", BIG)) == 6
    assert await rig.log.emit_event(sid, make.message("m1", BIG)) == 6


async def test_what_the_archive_is_told_of_a_log(rig: Rig) -> None:
    sid, _ = await rig.session(30)
    assert await rig.put(sid, 1, 10)
    cursor, found = await rig.hot.hot_logs(NS, 0)
    while cursor:
        cursor, more = await rig.hot.hot_logs(NS, cursor)
        found += more
    (log,) = found
    assert log.size > 1000
    assert abs(log.newest_ms - await rig.hot.now_ms()) < 600_000
    assert replace(log, size=0, newest_ms=0) == HotLog(sid, False, True, 11, 31, 0, 0)
    await rig.store.writes.call("HSET", rig.store.keys().session(sid).meta, "min", "nonsense")
    assert (await rig.hot.hot_logs(NS, 0))[1] == []


async def test_an_ended_session_is_doomed_at_its_time_and_never_one_that_lives(
    rig: Rig, store_url: str
) -> None:
    control = rig.store.control_log()
    kept, gone, never = (await make.start(rig.log), await make.start(rig.log), make.new_sid())
    await control.close(NS, kept, make.deleted(), retain_s=3600)
    await control.close(NS, gone, make.deleted(), retain_s=0)
    await control.close(NS, never, make.deleted(), retain_s=0)
    assert sorted(await rig.hot.doomed(10)) == sorted([(NS, gone), (NS, never)])
    # The earliest time counts: Delete after Retain, and Retain again.
    await control.close(NS, kept, make.deleted(), retain_s=0)
    await control.close(NS, kept, make.deleted(), retain_s=3600)
    assert (NS, kept) in await rig.hot.doomed(10)
    assert len(await rig.hot.doomed(2)) == 2
    # A copy of the store in which it lives was restored: its archive is still needed.
    await rig.log.create_session(make.meta(gone), [make.created(), make.message()])
    assert (NS, gone) not in await rig.hot.doomed(10)
    await rig.hot.forget(NS, never)
    assert await rig.hot.doomed(10) == [(NS, kept)]
    # Without an archive nothing is written that nobody would ever take away.
    async with connect(StoreConfig(store_url), namespace=NS) as store:
        sid = await make.start(rig.log)
        await store.control_log().close(NS, sid, make.deleted(), retain_s=0)
    assert (NS, sid) not in await rig.hot.doomed(10)


def test_new_event_ids_are_not_part_of_a_blob() -> None:
    """The same content under another id is the same blob: a retry under a new id stores nothing twice."""
    one, two = (NewEvent("user.message", {"x": 1}, id=name) for name in "ab")
    assert one.payload() == two.payload()
