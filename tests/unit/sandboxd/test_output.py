"""The collector keeps head and tail within its cap, and text intact at the cuts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sandboxd.output import Collector, cap_text

CAP = 1024


@given(st.lists(st.binary(max_size=700), max_size=12))
def test_never_above_the_cap_and_whole_when_it_fits(chunks: list[bytes]) -> None:
    collector = Collector(CAP)
    for chunk in chunks:
        collector.add(chunk)
    text, truncated = collector.render()
    whole = b"".join(chunks)
    assert len(text.encode()) <= CAP
    if not truncated:
        assert text == whole.decode("utf-8", "replace")
    else:
        assert len(whole.decode("utf-8", "replace").encode()) > CAP - 128


@given(st.text(alphabet="aé€😀", min_size=1200, max_size=1500))
def test_cuts_do_not_break_characters(text: str) -> None:
    cut, truncated = cap_text(text, CAP)
    assert truncated
    assert "\ufffd" not in cut
    head, tail = cut.split("\n[")[0], cut.split("...]\n")[1]
    assert text.startswith(head)
    assert text.endswith(tail)


def test_mark_says_how_much_is_missing() -> None:
    collector = Collector(CAP)
    for _ in range(1000):
        collector.add(b"0123456789")
    text, truncated = collector.render()
    assert truncated
    assert "about 9104 bytes left out" in text


def test_small_texts_pass() -> None:
    assert cap_text("hello", CAP) == ("hello", False)
    assert cap_text("x" * 500, CAP) == ("x" * 500, False)
