"""What the log says about the context window: the part of the fold that profiles decide on.

`fold.Conversation` holds one `Window` and keeps it with the events; `context` reads it to ask the
profile and to build the requests that renew the window. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from cowhand.harness.request import Block, Message, Ttl, content_blocks, tool_result_block

Overflow = Literal["", "prompt", "answer"]
"""What did not fit the window: nothing, the newest request, or the newest response, which was cut."""

Purpose = Literal["turn", "compaction", "notes"]
"""What a model request is for: a turn of the conversation, or to renew the window."""

BYTES_PER_TOKEN: Final = 3
"""Text that no response has counted yet: prose has about 4 bytes a token, code less."""

COMPACTION_BETA: Final = "compact-2026-09-04"

GONE: Final = (
    "[This tool result was removed from the context to make room; it had {size} characters. "
    "It stands at position {seq} of this session's log{how}.]"
)
RETOLD: Final = "[Result of the newest call of {name}, position {seq} of this session's log:]"
HOW: Final = ": read_log with start {seq} and end {seq} shows it"


@dataclass(frozen=True)
class SideRequest:
    """The newest request that renews the window; it is no part of the conversation.

    Attributes:
        seq: position of its `span.model_request_start`.
        n: number of the turn request that it comes before.
    """

    seq: int
    n: int
    attempt: int
    purpose: Purpose
    horizon: int
    prefix_sha: str
    n_messages: int
    max_tokens: int
    ttl: Ttl


@dataclass(frozen=True)
class Result:
    """Where a tool result came from, and whether it was cleared."""

    seq: int
    name: str
    size: int


@dataclass
class Window:
    """State of the context window.

    Attributes:
        asked: `context` of `session.created`: what the Agent wants; None for sessions that know nothing of it.
        selected: data of `context.selected`, None before it.
        carry: blocks that go before queued text into the next user message.
        first: blocks of the first user message of the session.
        side: newest side request since the last turn request, None if there is none.
        side_error: why it failed, None while it runs or if it was only lost.
        side_failures: failed attempts of it.
        gave_up: number of the turn request that was sent although a side request had failed, or 0.
        renewed_at: number of turn requests before the newest renewal, -1 if there was none.
        results: tool_use_id -> every tool result of the session, oldest first.
        cleared: tool results that are not shown any more.
        starts: times of the newest turn requests, ms, oldest first.
        overflow: what did not fit, until something was done about it.
        fresh: nothing but overflows was heard since the newest renewal: another one would not help.
        turn_carry: what the open turn took of `carry`; a refused turn gives it back.
    """

    asked: Mapping[str, Any] | None = None
    selected: Mapping[str, Any] | None = None
    carry: tuple[Block, ...] = ()
    first: tuple[Block, ...] = ()
    side: SideRequest | None = None
    side_error: Mapping[str, Any] | None = None
    side_failures: int = 0
    gave_up: int = 0
    renewed_at: int = -1
    results: dict[str, Result] = field(default_factory=dict)
    cleared: set[str] = field(default_factory=set)
    starts: tuple[int, ...] = ()
    overflow: Overflow = ""
    fresh: bool = False
    turn_carry: tuple[Block, ...] = ()

    @property
    def fields(self) -> Mapping[str, Any]:
        """Members that the profile adds to each request."""
        return (self.selected or {}).get("fields") or {}

    @property
    def betas(self) -> tuple[str, ...]:
        """Beta headers that the profile adds to each request."""
        return tuple((self.selected or {}).get("betas") or ())

    def side_started(self, seq: int, data: Mapping[str, Any], max_tokens: int) -> None:
        """`span.model_request_start` with a purpose."""
        again = self.side is not None and int(data["attempt"]) > 1
        self.side = SideRequest(
            seq=seq,
            n=int(data["n"]),
            attempt=int(data["attempt"]),
            purpose=data["purpose"],
            horizon=int(data["horizon"]),
            prefix_sha=str(data["prefix_sha"]),
            n_messages=int(data["n_messages"]),
            max_tokens=max_tokens,
            ttl=data["cache_ttl"],
        )
        self.side_error = None
        if not again:
            self.side_failures = 0

    def side_ended(self, data: Mapping[str, Any]) -> None:
        """Its `span.model_request_end`; a success came with the event that renewed the window."""
        if data["outcome"] == "error":
            self.side_error = data["error"]
            self.side_failures += 1

    def turn_started(self, data: Mapping[str, Any]) -> None:
        """`span.model_request_start` of a turn: what was tried before it is over."""
        self.overflow = ""
        if self.side is not None:
            self.gave_up = int(data["n"])
            self.side, self.side_error, self.side_failures = None, None, 0
        if "at" in data and int(data["attempt"]) == 1:
            self.starts = (*self.starts, int(data["at"]))[-6:]

    def answered(self, *, cut: bool) -> None:
        """`model.response`; `cut`: the window ended it."""
        self.overflow = "answer" if cut else ""
        self.fresh = self.fresh and cut

    def turn_begins(self) -> None:
        """What a refusal of this turn gives back is what it takes from here on."""
        self.turn_carry = ()

    def committed(self) -> None:
        """A user message was added to the prompt, with what had to go into it."""
        self.turn_carry = self.turn_carry or self.carry
        self.carry = ()

    def refused(self) -> None:
        """The open turn left the prompt; a new window begins with its carry all the same."""
        self.carry = self.turn_carry

    def renewed(self, n: int, carry: tuple[Block, ...]) -> None:
        """A summary or notes took the place of the prompt, after `n` turn requests."""
        self.renewed_at = n
        self.turn_begins()
        self.side, self.side_error, self.side_failures, self.gave_up = None, None, 0, 0
        self.carry = carry
        self.overflow, self.fresh = "", True
        self.cleared.update(self.results)


def too_long(error: Mapping[str, Any]) -> bool:
    """This error of a request says that its prompt does not fit, by the words that the API has for it."""
    text = str(error.get("message", "")).lower()
    if error.get("type") == "request_too_large":
        return True
    words = ("prompt is too long", "exceed context limit")
    return error.get("type") == "invalid_request_error" and any(word in text for word in words)


def split_newest(
    messages: Sequence[Message],
) -> tuple[list[Message], tuple[Block, ...], list[Message]]:
    """A prompt that does not fit, without what the newest user message adds to it.

    Results of tools stay, for their calls stand before them.

    Returns:
        What stays, the blocks that were taken out, and the system message behind them, if there is one.
    """
    kept = list(messages)
    system = [kept.pop()] if kept and kept[-1].role == "system" else []
    if not kept or kept[-1].role != "user":
        return kept, (), system
    newest = kept.pop().blocks
    results = tuple(item for item in newest if item.type == "tool_result")
    if results:
        kept.append(Message("user", results))
    return kept, tuple(item for item in newest if item.type != "tool_result"), system


def newest_results(messages: Sequence[Message]) -> tuple[str, ...]:
    """tool_use_ids of the results in the newest message, if it is the user's."""
    kept = [message for message in messages if message.role != "system"]
    if not kept or kept[-1].role != "user":
        return ()
    blocks = (item for item in kept[-1].blocks if item.type == "tool_result")
    return tuple(str(json.loads(item.raw)["tool_use_id"]) for item in blocks)


def retold(messages: Sequence[Message], window: Window) -> tuple[Block, ...]:
    """The results in the newest user message as text of the user: in a renewed window their calls are gone."""
    blocks: list[Block] = []
    newest = set(newest_results(messages)) - window.cleared
    for message in messages[-2:]:
        for item in message.blocks:
            value = json.loads(item.raw) if item.type == "tool_result" else {}
            found = window.results.get(str(value.get("tool_use_id")))
            if found is not None and value["tool_use_id"] in newest:
                blocks += content_blocks(RETOLD.format(name=found.name, seq=found.seq))
                blocks += content_blocks(value.get("content") or "")
    return tuple(blocks)


def cleared(
    messages: Sequence[Message], results: Mapping[str, Result], ids: set[str], readable: bool
) -> list[Message]:
    """The prompt with these tool results replaced by a text that says where they are.

    Args:
        messages: the prompt.
        results: all tool results.
        ids: those to replace.
        readable: the agent has the tool `read_log`.
    """
    return [
        Message(message.role, tuple(_stub(item, results, ids, readable) for item in message.blocks))
        for message in messages
    ]


def _stub(item: Block, results: Mapping[str, Result], ids: set[str], readable: bool) -> Block:
    if item.type != "tool_result":
        return item
    value = json.loads(item.raw)
    use_id = str(value["tool_use_id"])
    found = results.get(use_id)
    if use_id not in ids or found is None:
        return item
    how = HOW.format(seq=found.seq) if readable else ""
    text = GONE.format(size=found.size, seq=found.seq, how=how)
    return tool_result_block(use_id, text, bool(value.get("is_error")))


NOTES: Final = (
    "Your context window is nearly full and will be replaced by a new one. In the new window you will "
    "see the first message of this conversation and what you write now, and nothing else. Write notes "
    "for yourself: the goal, what the user asked for since, what is done, what you found out (names, "
    "paths, values, decisions and why), what is open, and the next step. Do not call tools. Answer "
    "with the notes alone."
)


def question(window: Window, purpose: Purpose) -> tuple[Block, ...]:
    """What a side request asks the model, as blocks of the last user message."""
    if purpose != "notes":
        return ()
    text = str((window.selected or {}).get("instructions") or "") or NOTES
    return content_blocks(text)


def extra_fields(window: Window, purpose: Purpose) -> dict[str, Any]:
    """Members that a side request has beside those of a turn."""
    if purpose != "compaction":
        return {}
    summarize = {"type": "summarize"}
    text = str((window.selected or {}).get("instructions") or "")
    if text:
        summarize["instructions"] = text
    return {"compaction": summarize}
