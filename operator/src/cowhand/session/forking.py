"""Where a session may be forked, and who wrote what is copied: pure, used by the operator.

A fork begins between two turns of its source. Inside a turn something is open (a request, a tool call in a sandbox
that the fork does not have), and a copy that ends there would begin with an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from cowhand.errors import UserError
from cowhand.session import events as ev
from cowhand.session.events import Event

_OPENS: Final = frozenset({ev.STATUS_RUNNING, ev.MODEL_REQUEST_START, ev.TOOL_STARTED})

MARKS: Final = _OPENS | {ev.STATUS_IDLE, ev.SESSION_DELETED, ev.STATUS_TERMINATED}
"""Types of the events that `position` must see; the others do not matter."""


def turns(marks: Iterable[Event]) -> list[tuple[int, int | None]]:
    """First and last position of each turn; the last is None where it has not ended."""
    found: list[tuple[int, int | None]] = []
    begun: int | None = None
    for event in marks:
        if event.type in _OPENS and begun is None:
            begun = event.seq
        elif event.type == ev.STATUS_IDLE and begun is not None:
            found.append((begun, event.seq))
            begun = None
    return found if begun is None else [*found, (begun, None)]


def position(session: str, marks: Sequence[Event], last: int, at: int | None) -> int:
    """The position to fork at.

    Args:
        session: how the user calls the source.
        marks: its events of the types `MARKS`, in order.
        last: its newest position.
        at: the position that was asked for, None for the newest possible one.

    Raises:
        UserError: there is no such position, or it lies inside a turn; the message names the nearest ones.
    """
    ends = [one.seq for one in marks if one.type in (ev.SESSION_DELETED, ev.STATUS_TERMINATED)]
    last = min(last, *(seq - 1 for seq in ends)) if ends else last
    wanted = last if at is None else at
    if wanted > last:
        raise UserError(
            f"session {session} has the positions 1 to {last}, there is no {wanted}: "
            f"{_nearest(marks, last, last)}",
            field="spec.fork.at",
        )
    for first, end in turns(marks):
        if first <= wanted and (end is None or wanted < end):
            if at is None:
                return first - 1
            where = f"{first} to {end}" if end is not None else f"from {first} on, not ended yet"
            raise UserError(
                f"position {wanted} of session {session} lies inside a turn ({where}): "
                f"{_nearest(marks, last, wanted)}",
                field="spec.fork.at",
            )
    return wanted


def _nearest(marks: Sequence[Event], last: int, wanted: int) -> str:
    below, above = wanted, None
    for first, end in turns(marks):
        if first <= wanted and (end is None or wanted < end):
            below, above = first - 1, end if end is not None and end <= last else None
    return f"fork at {below} or {above}" if above is not None else f"fork at {below}"


def lineage(created: dict[str, Any], source: str, at: int) -> list[dict[str, Any]]:
    """Who wrote the positions that a fork copies (`session.created`, member `lineage`).

    Args:
        created: payload of the source's `session.created`.
        source: id of the source.
        at: last position that is copied.
    """
    found: list[dict[str, Any]] = []
    for item in created.get("lineage") or ():
        if int(item["position"]) >= at:
            return [*found, {"session": item["session"], "position": at}]
        found.append(dict(item))
    return [*found, {"session": source, "position": at}]
