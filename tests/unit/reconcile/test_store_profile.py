"""When a change of what the store keeps is believed, and which Events it makes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from cowhand.reconcile.store_profile import STEADY, Belief, Note, StoreProfile, step

NOW = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)
GOOD = StoreProfile("strict", "strict")
DEV = StoreProfile("strict", "dev", True, ("0 of 1 replicas are in step with it",))
NONE = StoreProfile("strict", "none", True, ("it writes no append-only file",))
OTHER = StoreProfile("strict", "dev", True, ("1 of 2 replicas are in step with it",))


def play(*looks: tuple[float, StoreProfile | None]) -> tuple[list[StoreProfile | None], list[Note]]:
    """What is shown after each look, (seconds, what was seen), and all Events."""
    belief, shown, notes = Belief(), [], []
    for seconds, found in looks:
        belief, more = step(belief, found, NOW + timedelta(seconds=seconds))
        shown.append(belief.shown)
        notes += more
    return shown, notes


def reasons(notes: list[Note]) -> list[tuple[str, str]]:
    return [(note.type, note.reason) for note in notes]


def test_the_first_look_counts_at_once():
    assert play((0, None), (5, GOOD)) == ([None, GOOD], [])
    shown, notes = play((0, DEV))
    assert shown == [DEV]
    assert reasons(notes) == [("Warning", "WeakerThanDemanded")]
    assert "keeps dev: 0 of 1 replicas are in step with it." in notes[0].message


def test_a_change_counts_when_it_has_stood():
    shown, notes = play((0, GOOD), (5, DEV), (64, DEV), (65, DEV), (70, DEV))
    assert shown == [GOOD, GOOD, GOOD, DEV, DEV]
    assert reasons(notes) == [("Warning", "WeakerThanDemanded")], "once"


@pytest.mark.parametrize("between", [GOOD, None, NONE])
def test_a_flicker_does_not(between):
    """A replica that restarts again and again, or a store that is away, begins anew."""
    looks = [(second, between if second % 60 < 20 else DEV) for second in range(20, 500, 10)]
    shown, notes = play((0, GOOD), *looks)
    assert set(shown) == {GOOD}
    assert notes == []


def test_control_without_patience_each_flicker_is_a_write_to_every_session(monkeypatch):
    monkeypatch.setattr("cowhand.reconcile.store_profile.STEADY", timedelta(0))
    looks = [(second, GOOD if second % 60 < 20 else DEV) for second in range(20, 500, 10)]
    shown, notes = play((0, GOOD), *looks)
    assert shown.count(DEV) > 5
    assert len(notes) > 5


def test_back_again_is_said_too_and_other_words_for_the_same_are_not():
    end = STEADY.total_seconds()
    shown, notes = play(
        *((0, DEV), (1, OTHER), (1 + end, OTHER), (100, NONE), (100 + end, NONE)),
        *((300, GOOD), (300 + end, GOOD)),
    )
    assert shown[2::2] == [OTHER, NONE, GOOD]
    assert reasons(notes) == [
        ("Warning", "WeakerThanDemanded"),
        ("Warning", "WeakerThanDemanded"),
        ("Normal", "StoreDurable"),
    ]
    assert "keeps nothing that survives its process" in notes[1].message
