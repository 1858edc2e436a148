"""The error envelope of the Claude API, and the HTTP status of each of our errors.

Official clients choose their exception class by status, and retry 408, 409, 429 and every 5xx unless
`x-should-retry` says otherwise: a real conflict must say so, or it is sent three times.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from cowhand.errors import (
    CowhandError,
    Denied,
    HandLost,
    QuotaExceeded,
    Retryable,
    SessionClosed,
    SessionNotFound,
    StoreMismatch,
    Unauthenticated,
    UserError,
)

RETRY_AFTER_S: Final = 1.0
"""What a client is told to wait when the error itself does not say."""

TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "api_error",
    504: "timeout_error",
}


class NotFound(CowhandError):
    """What the path names does not exist (404)."""


class Conflict(CowhandError):
    """The state of the thing does not allow this, and asking again will not help (409)."""


class Forbidden(Denied):
    """The caller lacks a right (403)."""


class Unknown(Unauthenticated):
    """The caller has shown no token that Kubernetes accepts (401)."""


class TooLarge(UserError):
    """An event or a body over its limit (413)."""


@dataclass(frozen=True)
class Answer:
    """An error as it goes over the wire."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]

    def encode(self) -> bytes:
        """The body as JSON."""
        return json.dumps(self.body, ensure_ascii=False).encode()


def envelope(status: int, message: str, request_id: str) -> dict[str, Any]:
    """`{"type":"error","error":{"type","message"},"request_id"}`."""
    kind = TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {
        "type": "error",
        "error": {"type": kind, "message": message},
        "request_id": request_id,
    }


def status_of(error: BaseException) -> int:
    """HTTP status of an error; 500 for whatever was not raised on purpose."""
    if isinstance(error, TooLarge):
        return 413
    if isinstance(error, QuotaExceeded):
        return 429
    if isinstance(error, UserError):
        return 400
    if isinstance(error, Unknown):
        return 401
    if isinstance(error, Forbidden):
        return 403
    if isinstance(error, SessionNotFound | NotFound):
        return 404
    if isinstance(error, SessionClosed | Conflict | HandLost):
        return 409
    # Any other refusal is of the gateway itself, by the store, Kubernetes or the broker: not the caller's fault.
    # So is another store in the place of ours: the caller's request is right when that is mended.
    if isinstance(error, Retryable | Denied | StoreMismatch):
        return 503
    return 500


def answer(error: BaseException, request_id: str) -> Answer:
    """The answer for an error; the text of unexpected ones stays in our log."""
    status = status_of(error)
    if status == 500:
        message = f"internal error; the gateway's log has it under {request_id}"
    elif status == 503 and isinstance(error, Denied):
        message = f"the gateway itself is refused, its installation is not complete: {error}"
    elif isinstance(error, UserError) and error.field and error.field not in str(error):
        message = f"{error.field}: {error}"
    else:
        message = str(error)
    headers: dict[str, str] = {}
    if status in (409, 429):
        headers["x-should-retry"] = "false"
    if status == 503:
        after = error.after if isinstance(error, Retryable) else None
        headers["retry-after"] = str(max(1, round(after or RETRY_AFTER_S)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Answer(status, envelope(status, message, request_id), headers)
