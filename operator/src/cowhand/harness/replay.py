"""Replaying a log: every model request that it tells of, with the bytes that went out, made again.

Used by `cowhand replay` and, for each request, by `verify`. Pure: the same fold that a worker uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cowhand.harness.fold import Conversation
from cowhand.harness.request import Message, body
from cowhand.harness.window import Purpose, SideRequest
from cowhand.session.events import MODEL_REQUEST_START, Event


@dataclass(frozen=True)
class Replayed:
    """One model request, rebuilt from the log.

    Attributes:
        seq: position of its `span.model_request_start`.
        n: number of the request, from 1.
        attempt: from 1.
        horizon: last position that it could see.
        body: the bytes that went out.
        messages: its messages.
        purpose: a turn of the conversation, or what renews the context window.
        logged_sha: `prefix_sha` as it was logged.
        rebuilt_sha: the same hash over what was rebuilt.
    """

    seq: int
    n: int
    attempt: int
    horizon: int
    body: bytes
    messages: tuple[Message, ...]
    purpose: Purpose
    logged_sha: str
    rebuilt_sha: str

    @property
    def matches(self) -> bool:
        """What was rebuilt is what was sent."""
        return self.logged_sha == self.rebuilt_sha


def replayed(conversation: Conversation) -> Replayed | None:
    """The newest request of a conversation, rebuilt; None before the first."""
    sent = conversation.sent()
    if sent is None:
        return None
    request = sent.request
    return Replayed(
        seq=request.seq,
        n=request.n,
        attempt=request.attempt,
        horizon=request.horizon,
        body=body(sent.base, sent.writer, request.max_tokens, sent.messages, request.ttl),
        messages=sent.messages,
        purpose=request.purpose if isinstance(request, SideRequest) else "turn",
        logged_sha=request.prefix_sha,
        rebuilt_sha=sent.rebuilt_sha,
    )


def replay(session_id: str, events: Iterable[Event]) -> Iterator[Replayed]:
    """Every request of a log from position 1, in order.

    Raises:
        LogIncompatible: an event that this release cannot read.
    """
    conversation = Conversation(session_id)
    for event in events:
        conversation.apply(event)
        if event.type == MODEL_REQUEST_START and (found := replayed(conversation)) is not None:
            yield found
