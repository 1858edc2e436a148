"""Previews on a real store: who follows hears them, and nothing of them stays."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from cowhand.session.preview import MAX_TEXT, Preview, decode
from support import sessions as make

PIECE = Preview(5, 0, 0, "Hello")


async def following(store, stream):
    """A task that waits for the next piece, once the server has confirmed its channel."""
    task = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    await asyncio.gather(*(event.wait() for event in store.hub._confirmed.values()))
    return task


async def test_who_follows_hears_it_and_the_store_keeps_nothing(log_roles):
    sid, other = await make.start(log_roles.log), await make.start(log_roles.log)
    previews = log_roles.store.previews()
    before = await log_roles.log.get_events(sid)
    keys = await log_roles.store.reads.call("DBSIZE")
    assert await previews.publish(sid, PIECE) == 0, "nobody listens"
    stream, elsewhere = previews.follow(sid), previews.follow(other)
    task, quiet = (
        await following(log_roles.store, stream),
        await following(log_roles.store, elsewhere),
    )
    assert await previews.publish(sid, PIECE) == 1
    assert await asyncio.wait_for(task, 60) == PIECE
    assert not quiet.done(), "another session's"
    assert await log_roles.log.get_events(sid) == before
    assert await log_roles.store.reads.call("DBSIZE") == keys
    quiet.cancel()
    await asyncio.gather(quiet, return_exceptions=True)
    await stream.aclose()
    await elsewhere.aclose()
    assert await previews.publish(sid, PIECE) == 0


async def test_what_is_no_preview_is_passed_over(log_roles):
    sid = await make.start(log_roles.log)
    previews = log_roles.store.previews()
    stream = previews.follow(sid)
    task = await following(log_roles.store, stream)
    channel = log_roles.store.keys().session(sid).previews
    for junk in (b"", b"x", b"[1,2]", b'["a",0,0,"x"]'):
        await log_roles.store.reads.call("PUBLISH", channel, junk)
    await previews.publish(sid, PIECE)
    assert await asyncio.wait_for(task, 60) == PIECE
    thought = replace(PIECE, kind="thinking")
    await previews.publish(sid, thought)
    assert await asyncio.wait_for(anext(stream), 60) == thought
    await stream.aclose()


@pytest.mark.parametrize(
    "body",
    [
        [1, 0, 0],
        [1, 0, 0, "x", 1],
        [1, 0, 0, "x", "of a newer release"],
        [1, 0, 0, "x", "thinking", 1],
        [True, 0, 0, "x"],
        [1, -1, 0, "x"],
        [1, 0, 2**60, "x"],
        [1, 0, 0, "x" * (MAX_TEXT + 1)],
        [1, 0, 0, None],
        {"start": 1},
    ],
)
def test_only_previews_are_decoded(body):
    assert decode(json.dumps([1, 0, 0, "x"]).encode()) == Preview(1, 0, 0, "x")
    thought = decode(json.dumps([1, 0, 0, "x", "thinking"]).encode())
    assert thought == Preview(1, 0, 0, "x", "thinking")
    assert decode(json.dumps(body).encode()) is None
