"""Text under way in a terminal: the last lines, taken away before anything else is printed."""

from __future__ import annotations

import re

from cowhand.cli.live import ROWS, Live


def piece(text: str, start: int = 5, block: int = 0, offset: int = 0) -> dict[str, object]:
    return {"start": start, "block": block, "offset": offset, "text": text}


class Screen:
    """What a terminal shows of what was written: lines, cursor up, clear below."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, out: str) -> None:
        up = re.match("\x1b\\[(\\d+)F\x1b\\[J", out)
        if up:
            self.lines = self.lines[: -int(up[1])]
            out = out[up.end() :]
        assert "\x1b" not in out
        self.lines += out.split("\n")[:-1]

    def words(self) -> list[str]:
        return [line.strip() for line in self.lines]


def test_text_grows_in_its_place_and_is_taken_away() -> None:
    live, screen = Live(60), Screen()
    screen.write("an event\n")
    screen.write(live.feed(piece("Hello ")))
    screen.write(live.feed(piece("you\nthere", offset=6)))
    assert screen.words() == ["an event", "Hello you", "there"]
    screen.write(live.clear())
    assert screen.words() == ["an event"]
    assert live.clear() == "", "only once"


def test_thinking_stands_behind_a_bar() -> None:
    live, screen = Live(60), Screen()
    screen.write(live.feed({**piece("hm\nwell"), "kind": "thinking"}))
    assert screen.words() == ["┊ hm", "┊ well"]
    screen.write(live.feed({**piece("x" * 100), "kind": "thinking"}))
    assert [len(word) for word in screen.words()] == [37, 37, 32], "as wide as text"
    screen.write(live.feed(piece("Hello", block=1)))
    assert screen.words() == ["Hello"]


def test_a_long_text_shows_its_end_and_a_new_block_begins_anew() -> None:
    live, screen = Live(60), Screen()
    for number in range(50):
        screen.write(live.feed(piece(f"line {number}\n", offset=number and 1)))
    assert len(screen.lines) == ROWS
    assert screen.words()[-2] == "line 49"
    screen.write(live.feed(piece("x" * 100, start=9)))
    assert [len(word) for word in screen.words()] == [37, 37, 26]


def test_what_a_terminal_would_act_on_is_shown_not_done() -> None:
    out = Live(60).feed(piece("\x1b[2Jgone"))
    assert "\x1b" not in out
    assert "\\x1b[2Jgone" in out
