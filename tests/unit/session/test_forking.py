"""Where a session may be forked: a table of positions, and who wrote what a fork copies."""

from __future__ import annotations

import pytest

from cowhand.errors import UserError
from cowhand.session import events as ev
from cowhand.session.events import Event
from cowhand.session.forking import lineage, position, turns

TYPES = {
    4: ev.STATUS_RUNNING,
    5: ev.MODEL_REQUEST_START,
    9: ev.STATUS_IDLE,
    12: ev.TOOL_STARTED,
    14: ev.STATUS_IDLE,
}


def marks(**more: str) -> list[Event]:
    types = TYPES | {int(seq[1:]): kind for seq, kind in more.items()}
    return [Event(seq, kind, "", 0, "", b"{}") for seq, kind in sorted(types.items())]


def test_turns_go_from_the_first_sign_of_work_to_idle() -> None:
    assert turns(marks()) == [(4, 9), (12, 14)]
    assert turns(marks(_16=ev.STATUS_RUNNING)) == [(4, 9), (12, 14), (16, None)]
    assert turns([]) == []


@pytest.mark.parametrize("at", [1, 2, 3, 9, 10, 11, 14, 15])
def test_positions_between_turns_are_taken(at: int) -> None:
    assert position("one", marks(), 15, at) == at


@pytest.mark.parametrize(
    ("at", "says"),
    [
        (4, "inside a turn (4 to 9): fork at 3 or 9"),
        (8, "inside a turn (4 to 9): fork at 3 or 9"),
        (13, "inside a turn (12 to 14): fork at 11 or 14"),
        (18, "(from 17 on, not ended yet): fork at 16"),
        (21, "positions 1 to 20, there is no 21: fork at 16"),
    ],
)
def test_others_are_refused_with_the_nearest(at: int, says: str) -> None:
    with pytest.raises(UserError) as caught:
        position("one", marks(_17=ev.STATUS_RUNNING), 20, at)
    assert says in str(caught.value)
    assert caught.value.field == "spec.fork.at"


def test_without_a_position_it_is_the_newest_possible() -> None:
    assert position("one", marks(), 15, None) == 15
    assert position("one", marks(_17=ev.STATUS_RUNNING), 20, None) == 16
    assert position("one", [], 2, None) == 2


def test_the_end_of_a_session_is_not_copied() -> None:
    ended = marks(_16=ev.SESSION_DELETED)
    assert position("one", ended, 16, None) == 15
    with pytest.raises(UserError, match="positions 1 to 15, there is no 16: fork at 15"):
        position("one", ended, 16, 16)


@pytest.mark.parametrize(
    ("at", "wanted"),
    [
        (3, [("a", 3)]),
        (5, [("a", 5)]),
        (7, [("a", 5), ("b", 7)]),
        (9, [("a", 5), ("b", 8), ("c", 9)]),
    ],
)
def test_lineage_of_a_fork_of_a_fork(at: int, wanted: list[tuple[str, int]]) -> None:
    before = [{"session": "a", "position": 5}, {"session": "b", "position": 8}]
    found = lineage({"lineage": before}, "c", at)
    assert [(item["session"], item["position"]) for item in found] == wanted
