"""Pages of a list, frames of a stream, the raw log, and a client that reads slowly."""

from __future__ import annotations

import asyncio
import json

import pytest
from multidict import MultiDict

from cowhand.errors import Denied, UserError
from cowhand.gateway import log as rawlog
from cowhand.gateway import paging, pump, sse
from cowhand.gateway.projection import Context, project
from cowhand.gateway.window import CHUNK, context_at
from cowhand.session import events as ev
from cowhand.session.events import Event
from support.gateway_rig import SID, ListLog, at, created, events_of, response, turn, user_message


def query(**params):
    return paging.parse(MultiDict(params))


def long_log(turns=40):
    rows = turn()
    for number in range(turns):
        seq = len(rows) + 1
        rows += [
            (ev.USER_MESSAGE, user_message(f"message {number}")),
            (ev.MODEL_REQUEST_START, {"horizon": seq}),
            (
                ev.MODEL_RESPONSE,
                response({"type": "text", "text": f"answer {number}"}, tokens=number),
            ),
            (ev.MODEL_REQUEST_END, {"start": seq + 1, "outcome": "ok"}),
            (ev.STATUS_IDLE, {"stop_reason": {"type": "end_turn"}}),
        ]
    return ListLog(events_of(rows))


async def read_all(log, **params):
    pages = []
    while True:
        found = await paging.page(log, SID, query(**params))
        pages.append(found["data"])
        if not found["next_page"]:
            return pages
        params["page"] = found["next_page"]


def reference(log):
    context = Context(SID)
    for event in log.events:
        context.feed(event)
    return [public for event in log.events for public in project(event, context)]


@pytest.mark.parametrize("limit", [1, 7, 50, 1000])
@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_pages_are_the_whole_projection_in_order(limit, order):
    log = long_log()
    pages = await read_all(log, limit=str(limit), order=order)
    rows = [row for page in pages for row in page]
    expected = reference(log)
    assert len(expected) > 2 * CHUNK
    assert rows == (expected if order == "asc" else expected[::-1])
    assert all(len(page) == limit for page in pages[:-1])


async def test_types_filter():
    pages = await read_all(long_log(), **{"types[]": "user.message", "limit": "10"})
    assert {row["type"] for page in pages for row in page} == {"user.message"}
    assert sum(map(len, pages)) == 41


async def test_time_filter():
    log = long_log()
    bound = reference(log)[30]["processed_at"]
    later = await read_all(log, **{"created_at[gt]": bound})
    earlier = await read_all(log, **{"created_at[lte]": bound})
    rows = [row["id"] for pages in (earlier, later) for page in pages for row in page]
    assert sorted(rows) == sorted(row["id"] for row in reference(log))


async def test_a_heavy_page_ends_early(monkeypatch):
    monkeypatch.setattr(paging, "PAGE_BYTES", 2000)
    pages = await read_all(long_log())
    assert len(pages) > 3
    assert [row for page in pages for row in page] == reference(long_log())


async def test_a_scan_that_finds_nothing_goes_on_at_the_next_page(monkeypatch):
    monkeypatch.setattr(paging, "SCAN_EVENTS", 20)
    for order in ("asc", "desc"):
        pages = await read_all(long_log(), **{"types[]": "agent.thinking", "order": order})
        assert len(pages) > 5
        assert sum(map(len, pages)) == 1


@pytest.mark.parametrize(
    "params",
    [
        {"limit": "0"},
        {"limit": "1001"},
        {"limit": "x"},
        {"order": "up"},
        {"page": "%%%"},
        {"page": "WzFd"},
        {"created_at[gt]": "yesterday"},
    ],
)
def test_bad_parameters_are_named(params):
    with pytest.raises(UserError) as caught:
        query(**params)
    assert caught.value.field == next(iter(params))
    assert str(caught.value).startswith(f"{caught.value.field}: ")


async def test_a_cursor_belongs_to_its_order():
    found = await paging.page(long_log(), SID, query(limit="1"))
    with pytest.raises(UserError, match="made with order=asc"):
        query(page=found["next_page"], order="desc")


def parse_frames(raw):
    frames = []
    for block in raw.decode().split("\n\n"):
        if block:
            fields = dict(line.split(": ", 1) for line in block.split("\n"))
            frames.append((fields["event"], fields.get("id"), json.loads(fields["data"])))
    return frames


async def test_a_stream_shows_a_user_event_when_it_comes_and_when_it_is_taken_up():
    log = ListLog(events_of(turn()))
    render = sse.Renderer(await context_at(log, SID, 1))
    frames = parse_frames(b"".join(render(event) for event in log.events))
    messages = [data for kind, _, data in frames if kind == "user.message"]
    assert [bool(data["processed_at"]) for data in messages] == [False, True]
    assert messages[0]["id"] == messages[1]["id"]
    assert all(kind == data["type"] for kind, _, data in frames)


async def test_resuming_after_any_frame_gives_exactly_the_rest():
    log = ListLog(events_of(turn()))
    whole = parse_frames(b"".join(map(sse.Renderer(await context_at(log, SID, 1)), log.events)))
    for done, (_, position, _) in enumerate(whole, start=1):
        after = sse.resume_position(position, MultiDict())
        start = max(1, after[0])
        render = sse.Renderer(await context_at(log, SID, start), after)
        rest = parse_frames(b"".join(render(event) for event in log.events[start - 1 :]))
        assert rest == whole[done:]


def test_resume_positions():
    assert sse.resume_position(None, MultiDict()) is None
    assert sse.resume_position("7.2", MultiDict(after="1")) == (7, 2)
    assert sse.resume_position(None, MultiDict(after="7"))[0] == 7
    for bad in ("x", "-1", "1.2.3", "9" * 20):
        with pytest.raises(UserError, match="is not a position"):
            sse.resume_position(bad, MultiDict())


def test_raw_lines_keep_the_payload_byte_for_byte():
    event = Event(3, "user.message", "e", 5, "", b'{"v":1,"d":{"z":1,"a":"\xc3\xa9"}}')
    raw = rawlog.line(event)
    assert event.payload in raw
    assert json.loads(raw) == {
        "seq": 3,
        "type": "user.message",
        "id": "e",
        "ts": 5,
        "lease": "",
        "payload": {"v": 1, "d": {"z": 1, "a": "é"}},
    }
    assert json.loads(rawlog.line(Event(1, "session.wake", "w", 5, "l", b"")))["payload"] is None
    assert rawlog.line(Event(1, "x", "w", 5, "", b'{"a":\n1}')).count(b"\n") == 1


class Client:
    """Stands for a response: `write` waits while `reading` is not set."""

    def __init__(self):
        self.got = []
        self.reading = asyncio.Event()
        self.reading.set()
        self.closed = False
        self.more = asyncio.Event()

    async def write(self, data):
        await self.reading.wait()
        self.got.append(data)
        self.more.set()

    async def until(self, count):
        while len(self.got) < count:
            self.more.clear()
            await self.more.wait()

    def force_close(self):
        self.closed = True


async def allowed():
    return None


def follower(client, *, render=lambda event: b"%d " % event.seq, check=allowed, stopping=None):
    return pump.Follower(client, None, render, b"ping", check, stopping or asyncio.Event())


async def test_following_ends_after_the_session_does():
    log = ListLog(
        [*events_of(turn()), at(14, ev.SESSION_DELETED, {}), at(15, ev.USER_INTERRUPT, {})]
    )
    client = Client()
    await follower(client).run(log.follow(SID, 12))
    assert b"".join(client.got) == b"12 13 14 "


async def test_a_client_that_does_not_read_holds_one_event():
    log = long_log()
    client = Client()
    client.reading.clear()
    task = asyncio.ensure_future(follower(client).run(log.follow(SID, 1)))
    for _ in range(200):
        await asyncio.sleep(0)
    assert log.taken == 1
    client.reading.set()
    await client.until(len(log.events))
    task.cancel()


async def test_a_client_that_takes_nothing_for_long_is_cut_off(monkeypatch):
    monkeypatch.setattr(pump, "STALLED_S", 0.01)
    client = Client()
    client.reading.clear()
    await follower(client).run(long_log().follow(SID, 1))
    assert client.closed


class Gone(asyncio.Transport):
    """A TLS transport whose connection is gone: asyncio's `abort` fails with AttributeError then."""

    def abort(self):
        raise AttributeError("'NoneType' object has no attribute '_abort'")

    def is_closing(self):
        return True


async def test_a_client_that_has_gone_is_no_error_of_ours():
    class Reset(Client):
        async def write(self, data):
            raise ConnectionResetError("Cannot write to closing transport")

    client = Reset()
    one = follower(client)
    one.transport = Gone()
    await one.run(long_log().follow(SID, 1))
    assert client.closed


async def test_silence_is_filled_with_pings(monkeypatch):
    monkeypatch.setattr(pump, "PING_S", 0.001)
    stopping = asyncio.Event()
    client = Client()
    log = ListLog([at(1, ev.SESSION_CREATED, created())])
    task = asyncio.ensure_future(follower(client, stopping=stopping).run(log.follow(SID, 2)))
    await client.until(3)
    stopping.set()
    await task
    assert set(client.got) == {b"ping"}


async def test_a_revoked_right_ends_a_stream(monkeypatch):
    monkeypatch.setattr(pump, "PING_S", 0.001)
    monkeypatch.setattr(pump, "CHECK_S", 0.001)

    async def refuse():
        raise Denied("no longer")

    log = ListLog([at(1, ev.SESSION_CREATED, created())])
    with pytest.raises(Denied):
        await follower(Client(), check=refuse).run(log.follow(SID, 2))


async def test_stopping_ends_streams_at_once():
    stopping = asyncio.Event()
    log = ListLog([at(1, ev.SESSION_CREATED, created())])
    task = asyncio.ensure_future(follower(Client(), stopping=stopping).run(log.follow(SID, 2)))
    await asyncio.sleep(0)
    stopping.set()
    await asyncio.wait_for(task, 60)
