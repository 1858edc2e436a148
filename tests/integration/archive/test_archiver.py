"""The archiving loop on a real store and a folder: killed anywhere, twice; conflicts; deletion; orphans."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from cowhand.archive import archiver as archiver_module
from cowhand.archive import layout
from cowhand.archive.app import ArchiveServer
from cowhand.archive.archiver import Archiver
from cowhand.archive.layout import Names
from cowhand.archive.objects import FolderObjects, Objects
from cowhand.archive.sweeper import ORPHAN_S, Sweeper
from cowhand.errors import BlobMissing, SessionNotFound
from cowhand.session import archive, connect
from cowhand.session.archiving import RedisArchiveLog
from cowhand.session.blobs import Span, sha256
from cowhand.session.events import Event
from cowhand.session.log import ArchiveLog, StoreConfig
from cowhand.session.store import Store
from support import sessions as make
from support.memory_kube import MemoryKube

NS = "team-a"
BIG = "b" * 70_000


class Direct:
    """`blobs.Archive` on the objects themselves, as the server answers it."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self.server = ArchiveServer(kube=MemoryKube(), objects=objects, names=Names((NS,), (), ""))

    async def put_blob(self, namespace: str, session_id: str, payload: bytes) -> str:
        digest = sha256(payload)
        await self.objects.create(layout.blob_path(namespace, session_id, digest), payload)
        return digest

    async def get_blob(self, namespace: str, session_id: str, sha256: str) -> bytes:
        return await self.objects.get(layout.blob_path(namespace, session_id, sha256))

    async def segments(self, namespace: str, session_id: str) -> list[Span]:
        return await self.server.manifest(namespace, session_id)

    async def segment(self, namespace: str, session_id: str, span: Span) -> bytes:
        return await self.objects.get(layout.segment_path(namespace, session_id, span))


@dataclass
class Rig:
    store: Store
    objects: FolderObjects
    side: ArchiveLog

    def archiver(self, objects: Objects | None = None, side: ArchiveLog | None = None) -> Archiver:
        return Archiver(side or self.side, objects or self.objects, [NS])

    async def session(self, count: int) -> tuple[str, list[Event]]:
        sid = make.new_sid()
        texts = [BIG if number == 3 else f"text {number}" for number in range(count - 1)]
        messages = [make.message(f"m{number}", text) for number, text in enumerate(texts)]
        log = self.store.session_log()
        await log.create_session(make.meta(sid), [make.created(), *messages])
        return sid, await self.fresh(sid)

    async def fresh(self, sid: str) -> list[Event]:
        """The log as a process reads it that has nothing in memory."""
        self.store.cold._spans.clear()
        self.store.cold._segments.clear()
        return await self.store.session_log().get_events(sid)

    async def end(self, sid: str, retain_s: int = 3600) -> None:
        await self.store.control_log().close(NS, sid, make.deleted(), retain_s=retain_s)

    async def stored(self, sid: str) -> int:
        return len(await self.side.stored(NS, sid, 1, 10_000, 10**9))

    async def files(self, sid: str) -> list[str]:
        return [entry.path for entry in await self.objects.entries(f"{NS}/{sid}")]


@pytest.fixture
async def rig(store_url: str, tmp_path: Path) -> AsyncIterator[Rig]:
    objects = FolderObjects(tmp_path)
    async with connect(StoreConfig(store_url), namespace=NS, archive=Direct(objects)) as store:
        yield Rig(store, objects, store.archive_log())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "SEGMENT_EVENTS", 8)


async def test_an_ended_log_goes_at_once_and_reads_the_same(rig: Rig, small: None) -> None:
    sid, _ = await rig.session(20)
    assert await rig.archiver().cycle(NS) == 0, "it is ready: somebody waits for it"
    await rig.end(sid)
    original = await rig.fresh(sid)
    assert await rig.archiver().cycle(NS) == 3
    assert await rig.stored(sid) == 0
    assert await rig.fresh(sid) == original
    assert await rig.archiver().cycle(NS) == 0
    manifest = await rig.store.payloads.archive.segments(NS, sid)  # type: ignore[union-attr]
    assert [(span.first, span.last) for span in manifest] == [(1, 8), (9, 16), (17, 21)]
    # The store expires an ended log with what is left of it: the archive must not make it immortal.
    assert await rig.store.reads.call("PTTL", rig.store.keys().session(sid).meta) > 0


async def parked(rig: Rig, sid: str) -> None:
    worker = rig.store.worker_log("pod-1")
    await worker.beat()
    lease = await make.take(worker, sid)
    await worker.park(lease, lease.next_seq)


async def test_a_log_that_rests_goes_and_its_session_wakes_from_the_archive(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sid, _ = await rig.session(10)
    await parked(rig, sid)
    original = await rig.fresh(sid)
    assert await rig.archiver().cycle(NS) == 0, "it ran lately"
    monkeypatch.setattr(archive, "IDLE_MS", -1)
    assert await rig.archiver().cycle(NS) == 1
    assert await rig.stored(sid) == 0
    monkeypatch.setattr(archive, "IDLE_MS", 10**9)
    log = rig.store.session_log()
    assert await log.emit_event(sid, make.message("more")) == 12
    await parked(rig, sid)
    assert (await rig.fresh(sid))[:11] == original
    assert len(await rig.fresh(sid)) == 13
    monkeypatch.setattr(archive, "IDLE_MS", -1)
    assert await rig.archiver().cycle(NS) == 1
    assert (await rig.fresh(sid))[:11] == original


async def test_a_long_log_of_a_running_session_keeps_its_newest_part(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "HOT_EVENTS", 50)
    monkeypatch.setattr(archive, "KEEP_UNMARKED", 20)
    sid, original = await rig.session(60)
    worker = rig.store.worker_log("pod-1")
    await worker.beat()
    lease = await make.take(worker, sid)
    assert await rig.archiver().cycle(NS) == 1
    assert await rig.stored(sid) == 20
    assert await worker.append(lease, [make.result()]) == 62
    assert (await rig.fresh(sid))[:60] == original


# Killed anywhere


class Killed(BaseException):
    """SIGKILL."""


class Mortal:
    """Objects and store's side that are killed before or after the n-th call that has an effect."""

    def __init__(self, rig: Rig, at: int) -> None:
        self.steps = 0
        self._at = at
        self.objects = cast(Objects, _Wrapped(rig.objects, self, {"create", "delete"}))
        self.side = cast(ArchiveLog, _Wrapped(rig.side, self, {"archived", "forget"}))

    def tick(self) -> None:
        self.steps += 1
        if self.steps == self._at:
            raise Killed


class _Wrapped:
    def __init__(self, inner: Any, mortal: Mortal, effects: set[str]) -> None:
        self._inner, self._mortal, self._effects = inner, mortal, effects

    def __getattr__(self, name: str) -> Any:
        work = getattr(self._inner, name)
        if name not in self._effects:
            return work

        async def mortal(*args: Any) -> Any:
            self._mortal.tick()
            found = await work(*args)
            self._mortal.tick()
            return found

        return mortal


async def test_killed_twice_anywhere_nothing_is_lost_and_nothing_is_doubled(
    rig: Rig, small: None
) -> None:
    died = 0
    for first, second in itertools.product(range(1, 9), (2, 5)):
        sid, _ = await rig.session(12)
        await rig.end(sid)
        original = await rig.fresh(sid)
        for at in (first, second):
            mortal = Mortal(rig, at)
            try:
                await rig.archiver(mortal.objects, mortal.side).cycle(NS)
            except Killed:
                died += 1
            assert await rig.fresh(sid) == original, (first, second)
        await rig.archiver().cycle(NS)
        assert await rig.stored(sid) == 0
        assert await rig.fresh(sid) == original
        assert len([f for f in await rig.files(sid) if "segments" in f]) == 2, (first, second)
    assert died > 18, "each first one, and most second ones"


async def test_control_dropping_before_the_segment_is_durable_loses_events(
    rig: Rig, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Archiver._segment

    async def careless(self: Archiver, ns: str, sid: str, hot: list[Event], until: int) -> Any:
        await self._log.archived(ns, sid, hot[0].seq, archive.cut(hot, until)[-1].seq)
        return await plain(self, ns, sid, hot, until)

    sid, _ = await rig.session(12)
    await rig.end(sid)
    monkeypatch.setattr(Archiver, "_segment", careless)
    mortal = Mortal(rig, 3)
    with pytest.raises(Killed):
        await rig.archiver(mortal.objects, mortal.side).cycle(NS)
    with pytest.raises(BlobMissing):
        await rig.fresh(sid)


class Rival(FolderObjects):
    """Somebody else creates the same segment a moment before; `overwrites`: a store without create-only puts."""

    def __init__(self, root: Path, other: list[Event], *, overwrites: bool) -> None:
        super().__init__(root)
        self._other = other
        self._overwrites = overwrites

    async def create(self, path: str, data: bytes) -> None:
        if self._other:
            await super().create(path, archive.encode(self._other))
            self._other = []
        if self._overwrites:
            await self.delete([path])
        await super().create(path, data)


@pytest.mark.parametrize("overwrites", [False, True])
async def test_a_segment_that_another_archiver_wrote_is_kept(
    rig: Rig, tmp_path: Path, overwrites: bool
) -> None:
    """Of a store that was restored from an older copy. Control: without create-only puts it is lost."""
    sid, _ = await rig.session(10)
    await rig.end(sid)
    original = await rig.fresh(sid)
    stored = await rig.side.stored(NS, sid, 1, 100, 10**9)
    other = [*stored[:-1], Event(11, "user.message", "other", 1, "", b"{}")]
    worker = rig.archiver(Rival(tmp_path, other, overwrites=overwrites))
    assert await worker.cycle(NS) == int(overwrites)
    kept = archive.decode(await Direct(rig.objects).segment(NS, sid, Span(1, 11)))
    assert (kept == other) is not overwrites
    if not overwrites:
        assert await worker.cycle(NS) == 0, "found out by comparing"
        assert await rig.stored(sid) == 11
        assert await rig.fresh(sid) == original


async def test_the_same_segment_of_another_archiver_is_adopted(rig: Rig, tmp_path: Path) -> None:
    sid, _ = await rig.session(10)
    await rig.end(sid)
    original = await rig.fresh(sid)
    stored = await rig.side.stored(NS, sid, 1, 100, 10**9)
    worker = rig.archiver(Rival(tmp_path, stored, overwrites=False))
    assert await worker.cycle(NS) == 0, "lost the race, looks again"
    assert await worker.cycle(NS) == 1
    assert await rig.stored(sid) == 0
    assert await rig.fresh(sid) == original


@pytest.mark.parametrize("damage", ["torn", "foreign", "shorter store"])
async def test_a_log_that_differs_from_its_archive_is_left_alone(
    rig: Rig, tmp_path: Path, damage: str
) -> None:
    sid, original = await rig.session(10)
    file = tmp_path / layout.segment_path(NS, sid, Span(1, 10 if damage != "shorter store" else 15))
    file.parent.mkdir(parents=True)
    data = archive.encode(original)
    if damage == "torn":
        data = data[:-20]
    elif damage == "foreign":
        data = archive.encode([*original[:-1], Event(10, "x", "y", 1, "", b"{}")])
    else:
        data = archive.encode([*original, *(Event(n, "x", "y", 1, "", b"") for n in range(11, 16))])
    file.write_bytes(data)
    await rig.end(sid)
    healthy, _ = await rig.session(5)
    await rig.end(healthy)
    assert await rig.archiver().cycle(NS) == 1, "the others are archived"
    assert (await rig.stored(sid), await rig.stored(healthy)) == (11, 0)
    assert (await rig.fresh(sid))[:10] == original


async def test_a_hole_that_a_tenant_made_in_its_own_keys_stops_only_that_log(rig: Rig) -> None:
    sid, _ = await rig.session(10)
    await rig.store.writes.call("XTRIM", rig.store.keys().session(sid).log, "MINID", "4-0")
    await rig.end(sid)
    other, _ = await rig.session(5)
    await rig.end(other)
    assert await rig.archiver().cycle(NS) == 1
    assert await rig.stored(other) == 0


async def test_the_work_of_one_step_is_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "SEGMENT_EVENTS", 2)
    monkeypatch.setattr(archiver_module, "SEGMENTS_PER_LOG", 3)
    sid, _ = await rig.session(14)
    await rig.end(sid)
    worker = rig.archiver()
    assert [await worker.cycle(NS) for _ in range(4)] == [3, 3, 2, 0]
    assert await rig.stored(sid) == 0


# Deletion


async def test_log_blobs_and_archive_really_go_when_the_policy_says_so(
    rig: Rig, tmp_path: Path
) -> None:
    kept, _ = await rig.session(8)
    gone, _ = await rig.session(8)
    lives, alive = await rig.session(8)
    await rig.end(kept, 3600)
    await rig.end(gone, 0)
    await rig.archiver().cycle(NS)
    assert await Sweeper(rig.side, rig.objects, [NS]).sweep() == 1
    assert await rig.files(gone) == []
    assert not (tmp_path / NS / gone).exists()
    with pytest.raises(SessionNotFound):
        await rig.fresh(gone)
    assert len(await rig.fresh(kept)) == 9
    assert await rig.fresh(lives) == alive
    assert await rig.side.doomed(10) == []
    await rig.end(kept, 0)
    assert await Sweeper(rig.side, rig.objects, [NS]).sweep() == 1
    assert await rig.files(kept) == []


async def test_a_store_that_was_lost_deletes_nothing(rig: Rig, store_server: Any) -> None:
    sid, _ = await rig.session(8)
    await rig.end(sid)
    await rig.archiver().cycle(NS)
    before = await rig.files(sid)
    identity = await rig.store.reads.call("GET", "cowhand:gen")
    store_server.flush()
    await rig.store.writes.call("SET", "cowhand:gen", identity)
    sweeper = Sweeper(rig.side, rig.objects, [NS], clock=lambda: 4e9)
    assert await sweeper.sweep() == 0
    assert await sweeper.sweep_orphans(NS) == 0
    assert await rig.files(sid) == before != []


async def test_deletion_that_is_killed_anywhere_is_finished(rig: Rig) -> None:
    for at in range(1, 5):
        sid, _ = await rig.session(8)
        await rig.end(sid, 0)
        mortal = Mortal(rig, at)
        with pytest.raises(Killed):
            await Sweeper(mortal.side, mortal.objects, [NS]).sweep()
        await Sweeper(rig.side, rig.objects, [NS]).sweep()
        assert await rig.files(sid) == []
        assert await rig.side.doomed(10) == []


async def test_a_record_that_names_no_session_leads_nowhere(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"x")
    for member in ("../precious", "team-a/..", "team-a/", f"team-a/../../{NS}", "precious"):
        await rig.store.writes.call("ZADD", "cowhand:doomed", 1, member)
    sweeper = Sweeper(rig.side, rig.objects, [NS])
    await sweeper.sweep()
    assert (tmp_path / "precious").exists()


def aged(rig: Rig) -> tuple[Sweeper, Callable[[], None]]:
    """A sweeper that lives so late that everything is old, and how an hour passes for it."""
    now = [time.time() + ORPHAN_S + 60]

    def hour() -> None:
        now[0] += 3600

    return Sweeper(rig.side, rig.objects, [NS], clock=lambda: now[0]), hour


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "control"])
async def test_blobs_of_a_log_that_lost_its_end_are_kept(rig: Rig, noticed: bool) -> None:
    """What a restored backup would bring back refers to them; without the mark they would be orphans."""
    sid, _ = await rig.session(1)
    await Direct(rig.objects).put_blob(NS, sid, b"of an event that was lost")
    lost = layout.blob_path(NS, sid, sha256(b"of an event that was lost"))
    if noticed:
        meta = rig.store.keys(NS).session(sid).meta
        await rig.store.writes.call("HSET", meta, "reg", "99:1")
    sweeper, hour = aged(rig)
    assert await sweeper.sweep_orphans(NS) == 0
    hour()
    assert await sweeper.sweep_orphans(NS) == (0 if noticed else 1)
    assert (lost in await rig.files(sid)) is noticed


async def test_a_loss_is_noticed_before_the_second_search(rig: Rig) -> None:
    sid, _ = await rig.session(1)
    await Direct(rig.objects).put_blob(NS, sid, b"of an event that was lost")
    lost = layout.blob_path(NS, sid, sha256(b"of an event that was lost"))
    sweeper, hour = aged(rig)
    assert await sweeper.sweep_orphans(NS) == 0, "the store is back for a second: nobody knows yet"
    await rig.store.writes.call("HSET", rig.store.keys(NS).session(sid).meta, "reg", "99:1")
    hour()
    assert await sweeper.sweep_orphans(NS) == 0
    assert lost in await rig.files(sid)


async def test_control_one_search_is_not_enough(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cowhand.archive.sweeper.CONFIRM_S", 0.0)
    sid, _ = await rig.session(1)
    await Direct(rig.objects).put_blob(NS, sid, b"of an event that was lost")
    sweeper, _ = aged(rig)
    assert await sweeper.sweep_orphans(NS) == 1, "before anybody could notice"


async def test_only_an_old_blob_that_no_event_refers_to_is_an_orphan(rig: Rig) -> None:
    sid, original = await rig.session(8)
    archived, _ = await rig.session(8)
    await rig.end(archived)
    await rig.archiver().cycle(NS)
    direct = Direct(rig.objects)
    for one in (sid, archived):
        await direct.put_blob(NS, one, b"never appended")
    orphan = layout.blob_path(NS, sid, sha256(b"never appended"))
    young = Sweeper(rig.side, rig.objects, [NS])
    assert await young.sweep_orphans(NS) == 0
    old, hour = aged(rig)
    assert await old.sweep_orphans(NS) == 0, "only suspected"
    assert orphan in await rig.files(sid)
    hour()
    assert await old.sweep_orphans(NS) == 2
    assert orphan not in await rig.files(sid)
    assert await rig.fresh(sid) == original
    assert len(await rig.fresh(archived)) == 9
    assert await old.sweep_orphans(NS) == 0


async def test_blobs_of_a_log_that_cannot_be_read_whole_are_kept(rig: Rig, tmp_path: Path) -> None:
    sid, _ = await rig.session(8)
    await rig.end(sid)
    await rig.archiver().cycle(NS)
    for file in (tmp_path / NS / sid / "segments").iterdir():
        file.unlink()
    sweeper, hour = aged(rig)
    before = await rig.files(sid)
    assert await sweeper.sweep_orphans(NS) == 0
    hour()
    assert await sweeper.sweep_orphans(NS) == 0
    assert await rig.files(sid) == before != []


def test_the_store_side_is_the_real_one(rig: Rig) -> None:
    assert isinstance(rig.side, RedisArchiveLog)
