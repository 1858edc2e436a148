"""Whether an answer (approval, result of a custom tool) has a question: checked before it is written.

An answer may come as soon as its client has seen the tool use, before the harness has asked in words. So
the status document is looked at first, then the newest part of the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from cowhand.errors import UserError
from cowhand.gateway.errors import Conflict
from cowhand.gateway.incoming import Incoming
from cowhand.gateway.projection import tool_use_event_id
from cowhand.gateway.window import chunks
from cowhand.session import events as ev
from cowhand.session.events import Event, input_sha256
from cowhand.session.log import SessionLog, SessionState

LOOK_BACK: Final = 200
"""Events in which a tool use is looked for that the status does not list as pending yet."""


@dataclass
class _Call:
    """What the log says of one tool call.

    Attributes:
        kind: `confirmation` or `custom_tool`, empty for a call that needs no answer.
        sha256: digest of its arguments, empty if unknown.
        over: it has been started or has its result.
        answered: an answer of this kind was written.
    """

    kind: str
    sha256: str
    over: bool = False
    answered: bool = False


async def check(log: SessionLog, state: SessionState, incoming: Sequence[Incoming]) -> None:
    """Check that each answer has a call that waits for it, or repeats the one it got.

    Raises:
        UserError: no such call, another kind of call, or other arguments; the message says what to do.
        Conflict: the call is over.
    """
    for item in incoming:
        if item.call:
            await _check(log, state, item)


async def _check(log: SessionLog, state: SessionState, item: Incoming) -> None:
    call = _listed(state, item.call) or await _look_up(log, state, item)
    session_id = state.meta.session_id
    where = f"{item.path}.{'custom_' if item.type == ev.USER_CUSTOM_TOOL_RESULT else ''}tool_use_id"
    if call is None or not call.kind:
        waiting = [one["tool_use_id"] for one in state.status.get("pending") or ()]
        listed = ", ".join(tool_use_event_id(session_id, one) for one in waiting) or "none"
        raise _bad(where, f"no call with this id waits for an answer; waiting: {listed}")
    wanted = ev.CUSTOM_TOOL if item.type == ev.USER_CUSTOM_TOOL_RESULT else ev.CONFIRMATION
    if call.kind != wanted:
        needs = {
            ev.CUSTOM_TOOL: "is of a custom tool: answer it with user.custom_tool_result",
            ev.CONFIRMATION: "waits for an approval: answer it with user.tool_confirmation",
        }
        raise _bad(where, f"the call {needs[call.kind]}")
    given = item.data.get("input_sha256") or ""
    if given and call.sha256 and given != call.sha256:
        raise _bad(
            f"{item.path}.input_sha256",
            f"the call's arguments have the digest {call.sha256}: look at them again before you answer",
        )
    if call.over and not call.answered:
        raise Conflict(
            f"{where}: the call is over: it has run, or was interrupted, refused or answered"
        )


def _listed(state: SessionState, tool_use_id: str) -> _Call | None:
    for one in state.status.get("pending") or ():
        if one["tool_use_id"] == tool_use_id:
            return _Call(one.get("kind", ev.CONFIRMATION), one.get("input_sha256", ""))
    return None


async def _look_up(log: SessionLog, state: SessionState, item: Incoming) -> _Call | None:
    """The call in the newest part of the log (the status may be a moment behind)."""
    session_id = state.meta.session_id
    call: _Call | None = None
    created = (await log.get_events(session_id, 1, 1))[0].data
    async for found in chunks(log, session_id, max(1, state.next_seq - LOOK_BACK)):
        for event in found:
            if event.type == ev.MODEL_RESPONSE:
                call = _asked(event, item.call, created) or call
            elif event.type == ev.TOOL_PENDING and event.data.get("tool_use_id") == item.call:
                call = call or _Call(
                    str(event.data.get("kind", ev.CONFIRMATION)),
                    str(event.data.get("input_sha256", "")),
                )
            elif call is not None:
                _follow(call, event, item)
    return call


def _asked(event: Event, tool_use_id: str, created: Any) -> _Call | None:
    for block in (event.data.get("message") or {}).get("content") or ():
        if block.get("type") == "tool_use" and block.get("id") == tool_use_id:
            sha256 = input_sha256(block.get("input") or {})
            if block["name"] in (created.get("custom_tools") or ()):
                return _Call(ev.CUSTOM_TOOL, sha256)
            permission = (created.get("permissions") or {}).get(block["name"], "Deny")
            return _Call("" if permission in ("Allow", "Deny") else ev.CONFIRMATION, sha256)
    return None


def _follow(call: _Call, event: Event, item: Incoming) -> None:
    if event.type in (ev.TOOL_STARTED, ev.TOOL_RESULT):
        call.over = call.over or event.data.get("tool_use_id") == item.call
    elif event.type == item.type and event.id == item.answer_id:
        call.answered = True


def _bad(path: str, message: str) -> UserError:
    return UserError(f"{path}: {message}", field=path)
