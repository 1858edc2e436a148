"""What the harness publishes while a response streams: at once, in order, bounded, and nothing that holds it up."""

from __future__ import annotations

import asyncio

import pytest

from cowhand.errors import StoreUnavailable
from cowhand.harness import previews as module
from cowhand.harness.previews import KEPT, Previewer
from cowhand.session.preview import MAX_TEXT, Preview


class Channel:
    """`Previews` of a test: `listens` is what a publish answers."""

    def __init__(self) -> None:
        self.listens = 1
        self.error: Exception | None = None
        self.sent: list[Preview] = []
        self.published = asyncio.Event()

    async def publish(self, session_id: str, preview: Preview) -> int:
        self.published.set()
        if self.error is not None:
            raise self.error
        if self.listens:
            self.sent.append(preview)
        return self.listens

    def text(self) -> str:
        return "".join(piece.text for piece in self.sent)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERVAL_S", 0)
    monkeypatch.setattr(module, "NOBODY_S", 0)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_the_first_piece_goes_out_at_once_and_the_others_follow_without_a_gap() -> None:
    channel = Channel()
    previewer = Previewer(channel)
    previewer("s", 5, 1, "Hel")
    await settle()
    assert channel.sent == [Preview(5, 1, 0, "Hel")], "before the message ends"
    previewer("s", 5, 1, "lo ")
    previewer("s", 5, 1, "you")
    await settle()
    assert channel.sent[1:] == [Preview(5, 1, 3, "lo you")], "what waits goes out together"
    previewer("s", 5, 3, "Next")
    await settle()
    assert channel.sent[2:] == [Preview(5, 3, 0, "Next")]
    previewer("s", 9, 0, "Again")
    await settle()
    assert channel.sent[3:] == [Preview(9, 0, 0, "Again")]
    previewer.end("s")
    await previewer.close()


async def test_thinking_is_a_block_of_its_own_kind() -> None:
    channel = Channel()
    previewer = Previewer(channel)
    previewer("s", 5, 0, "hm", "thinking")
    await settle()
    previewer("s", 5, 0, "m", "thinking")
    await settle()
    previewer("s", 5, 1, "Hello")
    await settle()
    assert channel.sent == [
        Preview(5, 0, 0, "hm", "thinking"),
        Preview(5, 0, 2, "m", "thinking"),
        Preview(5, 1, 0, "Hello"),
    ]
    await previewer.close()


async def test_who_comes_later_gets_the_block_from_its_beginning() -> None:
    channel = Channel()
    channel.listens = 0
    previewer = Previewer(channel)
    previewer("s", 5, 0, "Hello ")
    await settle()
    previewer("s", 5, 0, "you")
    await settle()
    channel.listens = 1
    await settle()
    assert channel.sent == [Preview(5, 0, 0, "Hello you")]
    await previewer.close()


async def test_what_is_kept_is_bounded_and_a_piece_too() -> None:
    channel = Channel()
    channel.listens = 0
    previewer = Previewer(channel)
    for _ in range(10):
        previewer("s", 5, 0, "x" * MAX_TEXT)
        await settle()
    assert len(previewer._streams["s"].text) <= KEPT
    channel.listens = 1
    await settle()
    assert channel.sent == [], "the beginning is gone: no preview of this block"
    previewer("s", 5, 1, "y" * (2 * MAX_TEXT + 1))
    await settle()
    assert [len(piece.text) for piece in channel.sent] == [MAX_TEXT, MAX_TEXT, 1]
    for _ in range(20):
        previewer("s", 5, 1, "z" * MAX_TEXT)
        await settle()
    assert len(previewer._streams["s"].text) <= KEPT
    assert len(channel.text()) == 22 * MAX_TEXT + 1
    await previewer.close()


async def test_a_store_that_does_not_answer_holds_up_nothing() -> None:
    channel = Channel()
    channel.error = StoreUnavailable("gone")
    previewer = Previewer(channel)
    previewer("s", 5, 0, "Hello")
    await channel.published.wait()
    channel.error = None
    await settle()
    assert channel.text() == "Hello", "from the beginning"
    await previewer.close()
    assert not previewer._tasks
