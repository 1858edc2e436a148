"""What a hand is: anything that answers `execute(name, input) -> string`.

The harness speaks to hands only through these types. A hand that dies is an outcome that Claude
sees, never an exception; only a lost lease (`Fenced`) ends the caller.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from cowhand.session.events import NewEvent
from cowhand.session.log import HandRecord

MAX_BYTES: Final = 512 * 1024
"""Largest result as JSON bytes, whatever the limit in characters: an event of the log holds 1 MiB."""

LOST_RUNNING: Final = (
    "the sandbox was lost while the call ran; it may have partly executed; the next call starts a "
    "new, empty sandbox"
)
LOST_BEFORE: Final = (
    "the sandbox was lost before the call started, so the call did not run; the next call starts a "
    "new, empty sandbox"
)


@dataclass(frozen=True)
class Call:
    """One tool call.

    Attributes:
        call_id: `<session id>/<tool_use_id>`: the key of the hand's journal.
        name: tool name.
        input: the tool's input, as Claude gave it.
        instance: instance of the hand that `tool.started` names.
        timeout_ms: time limit of the run.
    """

    call_id: str
    name: str
    input: Mapping[str, Any]
    instance: int
    timeout_ms: int


@dataclass(frozen=True)
class Outcome:
    """What came of a call: exactly what Claude sees, and how it ended.

    Attributes:
        content: text for Claude, already cut to its limit.
        is_error: the call failed, or could not be made.
        exit_code: exit status of a command, None for other tools.
        duration_ms: how long the tool ran, None if it did not.
        synthesized: the text is Cowhand's, not the tool's.
    """

    content: str
    is_error: bool
    exit_code: int | None = None
    duration_ms: int | None = None
    synthesized: bool = False


class Host(Protocol):
    """What a session gives its hands: its identity, its log, its records."""

    @property
    def session_id(self) -> str:
        """The session."""

    @property
    def namespace(self) -> str:
        """Its tenant."""

    @property
    def lease(self) -> str:
        """The whole lease string."""

    def hand_state(self, hand: str) -> tuple[int, str] | None:
        """Newest instance in the log and its state (Pending, Ready, Lost), None before the first."""

    async def append(self, events: Sequence[NewEvent]) -> None:
        """Append under the lease. Raises Fenced."""

    async def get_hand(self, hand: str, instance: int) -> HandRecord | None:
        """The record of a hand instance."""

    async def changed(self, timeout: float) -> None:
        """Return when something of this session may have changed, at the latest after `timeout` s."""


class Hand(Protocol):
    """One hand of one session."""

    async def execute(self, call: Call) -> Outcome:
        """Run a call that was never sent before. Raises Fenced."""

    async def attach(self, call: Call) -> Outcome:
        """The result of a call that an earlier worker may have sent: asks first, runs if unknown."""

    async def interrupt(self, call_id: str) -> None:
        """Stop a running call, best effort."""

    async def provision(self) -> Outcome | None:
        """Make the hand and wait until it is usable; an outcome says why it is not."""


def next_instance(state: tuple[int, str] | None) -> int:
    """The instance that the next call uses: a lost hand's successor has the next number."""
    if state is None:
        return 1
    instance, what = state
    return instance + 1 if what == "Lost" else instance


def cut_output(text: str, limit: int) -> str:
    """At most about `limit` characters and `MAX_BYTES` of JSON: head, a note of what is missing, tail."""
    keep = limit
    while True:
        found = text if len(text) <= keep else _cut(text, keep)
        size = len(json.dumps(found, ensure_ascii=False).encode())
        if size <= MAX_BYTES:
            return found
        # An event must fit the log: wide characters and escapes count for more than one.
        keep = min(keep, len(text)) * MAX_BYTES // (size + 1)


def _cut(text: str, keep: int) -> str:
    head = keep // 2
    tail = text[len(text) - (keep - head) :]
    return f"{text[:head]}\n\n[... {len(text) - keep} of {len(text)} characters left out ...]\n\n{tail}"


def printable(text: str) -> str:
    """Text that UTF-8 can carry: lone surrogates become U+FFFD."""
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text
