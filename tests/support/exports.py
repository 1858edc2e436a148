"""Exports of sessions that really ran (in memory), for tests of verify, replay, fork and restore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cowhand.harness import status as st
from cowhand.harness.fold import fold
from cowhand.session.events import Event
from cowhand.session.export import Export, Header
from cowhand.session.log import SessionMeta
from support.harness_rig import (
    NAMESPACE,
    SID,
    Rig,
    Script,
    World,
    message,
    text,
    tool_use,
    user,
    world,
)

NOW = 1_800_000_000_000


def two_tools(request: dict[str, Any]) -> dict[str, Any]:
    """A turn with a pure and an effect call, one after the other."""
    uses = sum(entry["role"] == "assistant" for entry in request["messages"])
    if uses % 3 == 2:
        return message(text("done"))
    use = tool_use(f"t{uses}", "bash" if uses % 3 else "read", file_path="x", command="y")
    return message(text("hm"), use, stop_reason="tool_use")


async def ran(*turns: str, script: Script = two_tools) -> World:
    """A world after these turns, each by a worker of its own."""
    made = world(user(turns[0], "m0"))
    for number, said in enumerate(turns):
        if number:
            made.emit(user(said, f"m{number}"))
        await Rig(made, script, name=f"w{number}").run()
    return made


def with_ids(events: Sequence[Event]) -> tuple[Event, ...]:
    """The events with ids as the real log gives them, and times near now."""
    return tuple(
        replace(event, id=event.id or f"{event.seq}.0@{event.lease}", ts=NOW + event.seq)
        for event in events
    )


def export_of(events: Sequence[Event], **changes: Any) -> Export:
    """An export of these events: idle, running, with the status that they make."""
    listed = with_ids(events)
    header = Header(
        meta=SessionMeta(SID, NAMESPACE, "s", "u", {"base_url": "http://m", "secret": None}),
        state="idle",
        mode="running",
        last_seq=len(listed),
        created_ms=NOW,
        exported_ms=NOW + 1000,
        status=fold(SID, listed).status if "status" not in changes else st.empty_status(),
    )
    return Export(replace(header, **changes), listed)
