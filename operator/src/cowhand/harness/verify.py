"""Checking a log against the invariants that Cowhand promises, offline, from its events alone.

`cowhand verify` calls it on an export, and the tests of the harness on what their runs left behind. Pure:
the same fold that a worker uses. What a log alone cannot show is listed as not checkable, never as passed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cowhand.errors import LogIncompatible
from cowhand.harness import status as st
from cowhand.harness.decide import Park, Stop, next_step
from cowhand.harness.fold import Conversation, tool_uses
from cowhand.harness.replay import replayed
from cowhand.harness.request import Message
from cowhand.harness.window import too_long
from cowhand.session import events as ev
from cowhand.session.events import Event
from cowhand.session.export import Export

IDLE_MS: Final = 30_000
"""How long input may stand unanswered in a session that nobody holds."""

INVARIANTS: Final[Mapping[str, str]] = {
    "I1": "positions are dense from 1, no event id occurs twice",
    "I2": "no event of a lease after a later session.wake",
    "I4": "each tool call has exactly one result before the next model request",
    "I6": "each model request rebuilt from the log has the SHA-256 that was logged",
    "I7": "the messages of a request begin with those of the one before, unless a logged event changed them",
    "I8": "no idle session has input that nobody has seen",
    "I10": "the usage of all responses is what the status document says",
    "I11": "what events refer to is in the blob store",
}

NOT_CHECKABLE: Final[Mapping[str, str]] = {
    "I3": "every acknowledged input is there: only who sent it knows what was acknowledged",
    "I5": "no effect ran twice: the journal of the hand knows",
    "I9": "archived and live events read alike: an export holds what was read, not where it lay",
    "I12": "every preview was followed by its event: previews are never logged",
}


@dataclass(frozen=True)
class Violation:
    """One broken promise.

    Attributes:
        invariant: `I1` and so on.
        seq: position at which it shows, 0 for the log as a whole.
        message: what is wrong.
        remedy: what to do.
    """

    invariant: str
    seq: int
    message: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """What was checked.

    Attributes:
        violations: in the order of positions within each invariant.
        checked: invariant -> how many things were compared.
        unchecked: invariant -> why it could not be checked here.
    """

    violations: tuple[Violation, ...]
    checked: Mapping[str, int]
    unchecked: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Nothing that could be checked is broken."""
        return not self.violations


REPORT_BUG: Final = (
    "Please report this with the export of the session: a part of Cowhand broke its promise."
)
RESTORE: Final = (
    "Events were lost, added or changed in the store: restore the session from a backup."
)
WAKE: Final = (
    "Send a message to the session, or restart the operator: its sweep makes the session ready."
)


@dataclass
class _Findings:
    violations: list[Violation] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=lambda: dict(NOT_CHECKABLE))

    def count(self, invariant: str) -> None:
        self.checked[invariant] = self.checked.get(invariant, 0) + 1

    def broken(self, invariant: str, seq: int, message: str, remedy: str) -> None:
        self.violations.append(Violation(invariant, seq, message, remedy))


def verify(export: Export, blobs: Callable[[str], bool] | None = None) -> Report:
    """Check an export.

    Args:
        export: a whole session.
        blobs: whether the blob with this hex SHA-256 is there; None: no blob store at hand.
    """
    out = _Findings()
    events = export.events
    _positions(export, out)
    _leases(events, out)
    _tools(events, out)
    dense = not any(
        item.invariant == "I1" and "position" in item.message for item in out.violations
    )
    conversation = _requests(export, out) if dense else None
    if conversation is None:
        for name in ("I6", "I7", "I8", "I10"):
            out.unchecked.setdefault(name, "the log cannot be folded, see the violations above")
    else:
        _unseen(export, conversation, out)
        _usage(export, conversation, out)
    _references(events, blobs, out)
    return Report(tuple(out.violations), out.checked, out.unchecked)


def _positions(export: Export, out: _Findings) -> None:
    expected, ids = 1, dict[str, int]()
    for event in export.events:
        out.count("I1")
        if event.seq != expected:
            text = f"position {event.seq} stands where position {expected} should"
            out.broken("I1", event.seq, text, RESTORE)
        expected = event.seq + 1
        if event.id in ids:
            text = f"the event id {event.id!r} is that of event {ids[event.id]} too"
            out.broken("I1", event.seq, text, REPORT_BUG)
        ids[event.id] = event.seq
    if expected != export.header.last_seq + 1:
        text = f"the log ends at position {expected - 1}, its meta says {export.header.last_seq}"
        out.broken("I1", expected - 1, text, RESTORE)


def _leases(events: Sequence[Event], out: _Findings) -> None:
    current = ""
    for event in events:
        if event.type == ev.SESSION_WAKE:
            current = event.lease
        elif event.lease:
            out.count("I2")
            if event.lease != current:
                text = (
                    f"{event.type} was written under lease {event.lease}, while {current or 'nobody'} "
                    "held the session"
                )
                out.broken("I2", event.seq, text, REPORT_BUG)


def _tools(events: Sequence[Event], out: _Findings) -> None:
    """I4, from the raw events: what the fold would forgive is a violation here."""
    open_calls: dict[str, int] = {}
    known: dict[str, int] = {}
    results: dict[str, int] = {}
    newest = 0
    for event in events:
        try:
            data = event.data
            if event.type == ev.MODEL_RESPONSE:
                if data["message"].get("stop_reason") != "refusal":
                    calls = {use.id: event.seq for use in tool_uses(data["message"])}
                    open_calls |= calls
                    known |= calls
            elif event.type == ev.TOOL_RESULT:
                out.count("I4")
                use_id = str(data["tool_use_id"])
                _result(event.seq, use_id, known, results, out)
                open_calls.pop(use_id, None)
                results[use_id] = event.seq
            elif event.type == ev.MODEL_REQUEST_START and int(data["n"]) > newest:
                newest = int(data["n"])
                for use_id, seq in open_calls.items():
                    text = (
                        f"request {newest} began while call {use_id} of event {seq} had no result"
                    )
                    out.broken("I4", event.seq, text, REPORT_BUG)
                open_calls.clear()
        except (KeyError, ValueError, TypeError, AttributeError):
            out.broken("I4", event.seq, f"the payload of {event.type} cannot be read", RESTORE)


def _result(
    seq: int, use_id: str, known: Mapping[str, int], results: Mapping[str, int], out: _Findings
) -> None:
    if use_id in results:
        text = f"call {use_id} has a second result; the first is event {results[use_id]}"
        out.broken("I4", seq, text, REPORT_BUG)
    elif use_id not in known:
        text = f"the result of {use_id} answers no call of any response before it"
        out.broken("I4", seq, text, REPORT_BUG)


def _requests(export: Export, out: _Findings) -> Conversation | None:
    """I6 and I7; answers the folded log, None if it cannot be folded."""
    conversation = Conversation(export.header.session_id)
    before: tuple[Message, ...] = ()
    reset = False
    for event in export.events:
        try:
            conversation.apply(event)
            if event.type != ev.MODEL_REQUEST_START:
                reset = reset or _resets(event)
                continue
            found = replayed(conversation)
        except LogIncompatible as err:
            out.broken("I6", event.seq, str(err), "Verify with the release that wrote the log.")
            return None
        except (KeyError, ValueError, TypeError, AttributeError, AssertionError) as err:
            text = f"{event.type} cannot be folded: {err!r}"
            out.broken("I6", event.seq, text, RESTORE)
            return None
        assert found is not None, "a request was just folded"
        out.count("I6")
        if not found.matches:
            text = (
                f"request {found.n} (attempt {found.attempt}) was sent as {found.logged_sha}, the log "
                f"rebuilds {found.rebuilt_sha or 'fewer messages'}"
            )
            out.broken("I6", event.seq, text, REPORT_BUG)
        out.count("I7")
        if not reset and not _continues(before, found.messages):
            text = f"request {found.n} does not begin with the messages of the one before it"
            out.broken("I7", event.seq, text, REPORT_BUG)
        if (
            found.purpose == "turn"
        ):  # what asks for a summary or notes is no part of the conversation
            before, reset = found.messages, False
    return conversation


def _continues(before: tuple[Message, ...], after: tuple[Message, ...]) -> bool:
    """The messages of one request go on in the next one.

    A system message that got no answer may have moved behind the user message that came next (`fold._grown`); it
    must be there, with nothing before it but what was there.
    """
    if after[: len(before)] == before:
        return True
    if not before or before[-1].role != "system":
        return False
    kept, moved = before[:-1], before[-1].blocks
    added = after[len(kept) :]
    return (
        after[: len(kept)] == kept
        and [message.role for message in added[:2]] == ["user", "system"]
        and added[1].blocks[: len(moved)] == moved
    )


def _resets(event: Event) -> bool:
    """The event takes messages out of the prompt, and says so: a refusal, or a change of the context.

    What made a prompt too long is left out when the model is asked for a summary or notes.
    """
    if event.type.startswith("context."):
        return True
    if event.type == ev.MODEL_REQUEST_END and event.data["outcome"] == "error":
        return too_long(event.data["error"])
    refused = event.type == ev.MODEL_RESPONSE and event.data["message"].get("stop_reason")
    return refused == "refusal"


def _unseen(export: Export, conversation: Conversation, out: _Findings) -> None:
    header = export.header
    out.count("I8")
    if header.state != "idle" or header.mode != "running" or not export.events:
        return
    age = header.exported_ms - export.events[-1].ts
    step = next_step(conversation, provisioned=True)
    if age > IDLE_MS and not isinstance(step, Park | Stop):
        text = f"the session was idle for {age // 1000} s, and the log asks for {type(step).__name__} next"
        out.broken("I8", export.events[-1].seq, text, WAKE)


def _usage(export: Export, conversation: Conversation, out: _Findings) -> None:
    logged: Mapping[str, Any] = export.header.status
    folded = conversation.status
    for name in ("usage", "requests", "tool_calls", "turns"):
        out.count("I10")
        said = logged.get(name, st.empty_status()[name])
        if said != folded[name]:
            text = f"the events make {name} {_plain(folded[name])}, the status says {_plain(said)}"
            out.broken("I10", export.header.last_seq, text, REPORT_BUG)


def _plain(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def references(event: Event) -> Iterator[str]:
    """Hex SHA-256 of the blobs that an event needs."""
    try:
        ref = event.body.get("ref")
    except (ValueError, AttributeError):
        return
    if isinstance(ref, dict) and isinstance(ref.get("sha256"), str):
        yield ref["sha256"]


def _references(
    events: Sequence[Event], blobs: Callable[[str], bool] | None, out: _Findings
) -> None:
    wanted = [(event.seq, sha) for event in events for sha in references(event)]
    if wanted and blobs is None:
        out.unchecked["I11"] = f"{len(wanted)} events refer to blobs, and no blob store is at hand"
        return
    out.checked["I11"] = len(wanted)
    for seq, sha in wanted:
        if blobs is not None and not blobs(sha):
            text = f"the blob {sha} is missing"
            out.broken("I11", seq, text, "Restore it into the blob store from a backup.")
