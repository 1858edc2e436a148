"""The events of a session log: envelope, type names, and who may write which.

Everything that reads or writes a log uses these names: the operator (creates, suspends, closes),
the harness (appends), the gateway (ingests and projects). The payload schema of each type stands in
`docs/interfaces.md`; unknown types are kept and ignored, unknown versions of known types are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from cowhand.session import rawjson
from cowhand.session.rawjson import RawObject

PAYLOAD_VERSION: Final = 1
"""Version written into `v` of each payload."""

INLINE_LIMIT: Final = 1024 * 1024
"""Largest payload in bytes where there is no archive: all of it stands inline (docs/adr/0008)."""

INLINE_WITH_BLOBS: Final = 64 * 1024
"""Largest payload in bytes that stands in the store where there is an archive; larger ones become blobs."""

EVENT_LIMIT: Final = 16 * 1024 * 1024
"""Largest payload in bytes where there is an archive."""

CREATE_LIMIT: Final = 2 * INLINE_LIMIT
"""Most bytes of all payloads that a session begins with: one script writes them."""

# External events: anybody with the right may ingest them (they are deduplicated by id).
SESSION_CREATED: Final = "session.created"
SESSION_SUSPENDED: Final = "session.suspended"
SESSION_RESUMED: Final = "session.resumed"
SESSION_UPDATED: Final = "session.updated"
SESSION_DELETED: Final = "session.deleted"
SESSION_EXEC: Final = "session.exec"
SESSION_FORKED: Final = "session.forked"
LOG_REGRESSED: Final = "log.regressed"
USER_MESSAGE: Final = "user.message"
USER_INTERRUPT: Final = "user.interrupt"
USER_TOOL_CONFIRMATION: Final = "user.tool_confirmation"
USER_CUSTOM_TOOL_RESULT: Final = "user.custom_tool_result"
SYSTEM_MESSAGE: Final = "system.message"

# Written by the claim script itself.
SESSION_WAKE: Final = "session.wake"

# Worker events: only the holder of the lease appends them.
MODEL_REQUEST_START: Final = "span.model_request_start"
MODEL_REQUEST_END: Final = "span.model_request_end"
MODEL_RESPONSE: Final = "model.response"
CONTEXT_SELECTED: Final = "context.selected"
CONTEXT_COMPACTED: Final = "context.compacted"
CONTEXT_RESET: Final = "context.reset"
CONTEXT_CLEARED: Final = "context.cleared"
TOOL_PENDING: Final = "tool.pending"
TOOL_STARTED: Final = "tool.started"
TOOL_RESULT: Final = "tool.result"
HAND_REQUESTED: Final = "hand.requested"
HAND_PROVISIONED: Final = "hand.provisioned"
HAND_LOST: Final = "hand.lost"
STATUS_RUNNING: Final = "session.status_running"
STATUS_IDLE: Final = "session.status_idle"
STATUS_RESCHEDULED: Final = "session.status_rescheduled"
STATUS_TERMINATED: Final = "session.status_terminated"
SESSION_ERROR: Final = "session.error"

EXTERNAL: Final = frozenset(
    {
        SESSION_CREATED,
        SESSION_SUSPENDED,
        SESSION_RESUMED,
        SESSION_UPDATED,
        SESSION_DELETED,
        SESSION_EXEC,
        SESSION_FORKED,
        LOG_REGRESSED,
        USER_MESSAGE,
        USER_INTERRUPT,
        USER_TOOL_CONFIRMATION,
        USER_CUSTOM_TOOL_RESULT,
        SYSTEM_MESSAGE,
    }
)

CONFIRMATION: Final = "confirmation"
"""`kind` of a `tool.pending` that waits for a person."""

CUSTOM_TOOL: Final = "custom_tool"
"""`kind` of a `tool.pending` that waits for its client, and of a custom tool's `tool.result`."""


def input_sha256(arguments: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a call's arguments as canonical JSON: keys sorted, compact, UTF-8.

    Binds an approval to what the person saw; see `user.tool_confirmation`.
    """
    text = json.dumps(arguments, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


BEGINS: Final = frozenset({MODEL_REQUEST_START, TOOL_STARTED})
"""Worker events that begin work: the log takes none of them while the session is suspended."""


@dataclass(frozen=True)
class NewEvent:
    """An event that is about to be written.

    Attributes:
        type: one of the names above.
        data: JSON object, the `d` of the payload.
        id: external events: the caller's id, the key of deduplication (required for them); worker
            events: empty, the log makes `<wseq>.<i>@<lease>`.
        cause: id of the event that caused this one, or empty.
    """

    type: str
    data: Mapping[str, Any]
    id: str = ""
    cause: str = ""

    def payload(self) -> bytes:
        """The bytes stored in field `p`: `{"v","th","c","d"}`, compact JSON, UTF-8.

        A `RawObject` among the values of `data` is written as the text it came with.
        """
        kept = {key: value.raw for key, value in self.data.items() if isinstance(value, RawObject)}
        parts = (
            rawjson.dumps(key).encode() + b":" + (kept.get(key) or rawjson.dumps(value).encode())
            for key, value in self.data.items()
        )
        head = {"v": PAYLOAD_VERSION, "th": "main", "c": self.cause}
        return rawjson.dumps(head)[:-1].encode() + b',"d":{' + b",".join(parts) + b"}}"


@dataclass(frozen=True)
class Event:
    """An event as it stands in the log; `payload` is never re-serialised.

    Attributes:
        seq: dense position, from 1.
        type: type name; may be unknown to this release.
        id: event id.
        ts: milliseconds since the epoch, by the store's clock.
        lease: lease string of the writer, empty for external events.
        payload: raw bytes of the payload, empty for `session.wake`.
    """

    seq: int
    type: str
    id: str
    ts: int
    lease: str
    payload: bytes

    @cached_property
    def body(self) -> Mapping[str, Any]:
        """The decoded payload `{"v","th","c","d"}` (empty for `session.wake`)."""
        if not self.payload:
            return {"v": PAYLOAD_VERSION, "th": "main", "c": "", "d": {}}
        loaded: Mapping[str, Any] = json.loads(self.payload)
        return loaded

    @property
    def data(self) -> Mapping[str, Any]:
        """The decoded `d` of the payload."""
        data: Mapping[str, Any] = self.body["d"]
        return data
