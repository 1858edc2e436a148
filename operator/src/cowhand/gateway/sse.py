"""Server-sent events in the framing that official clients accept.

Each frame has an `event:` line (a frame without one is dropped by clients), an `id:` line with the position
`<seq>.<i>` to resume from, and one JSON object. A user event comes twice: with `processed_at` null when it
enters the log, and again when the harness takes it up.
"""

from __future__ import annotations

import json
import re
from typing import Final

from multidict import MultiMapping

from cowhand.errors import UserError
from cowhand.gateway.projection import Context, Public, project
from cowhand.session.events import Event

PING: Final = b'event: ping\ndata: {"type":"ping"}\n\n'

_POSITION: Final = re.compile(r"(\d{1,15})(?:\.(\d{1,6}))?")


def resume_position(last_event_id: str | None, query: MultiMapping[str]) -> tuple[int, int] | None:
    """Position after which a client wants to go on: (seq, index), None for "only new events".

    Args:
        last_event_id: header `Last-Event-ID`: `<seq>.<i>` of the last frame, or `<seq>` for all of it.
        query: parameter `after`, the same, for clients that cannot set the header.

    Raises:
        UserError: not a position.
    """
    raw = last_event_id or query.get("after") or ""
    if not raw:
        return None
    match = _POSITION.fullmatch(raw)
    if not match:
        name = "Last-Event-ID" if last_event_id else "after"
        raise UserError(f"{name}: {raw!r} is not a position (`<seq>` or `<seq>.<i>`)", field=name)
    return int(match[1]), int(match[2]) if match[2] is not None else 2**31


def frame(public: Public, seq: int, index: int) -> bytes:
    """One public event as a frame."""
    data = json.dumps(public, ensure_ascii=False, separators=(",", ":"))
    return f"event: {public['type']}\nid: {seq}.{index}\ndata: {data}\n\n".encode()


def error_frame(envelope: Public) -> bytes:
    """An error after the headers were sent; official clients raise it."""
    return f"event: error\ndata: {json.dumps(envelope)}\n\n".encode()


class Renderer:
    """Turns events of a log, in order, into frames.

    Attributes:
        context: folded up to the first event that will be rendered.
        after: frames up to this position are left out.
    """

    def __init__(self, context: Context, after: tuple[int, int] = (0, 0)) -> None:
        self.context = context
        self.after = after

    def __call__(self, event: Event) -> bytes:
        """The frames of one event, empty for an internal one."""
        publics: list[Public] = []
        for taken in self.context.feed(event):
            publics += project(taken, self.context)
        publics += project(event, self.context)
        return b"".join(
            frame(public, event.seq, index)
            for index, public in enumerate(publics)
            if (event.seq, index) > self.after
        )
