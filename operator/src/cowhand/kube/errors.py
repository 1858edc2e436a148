"""What the Kubernetes API can answer instead of success, as classes of the common error tree.

    CowhandError
    ├── Retryable
    │   ├── KubeUnavailable   no answer, timeout, 429, 5xx
    │   └── Conflict          409: somebody else changed the object, or owns the field; read again
    ├── Terminal
    │   ├── NotFound          404 of an object that had to be there
    │   ├── NotServed         404 of the kind itself: its CRD is not installed
    │   └── AlreadyExists     409 of a create
    ├── UserError
    │   └── Invalid           400, 422: `causes` names the fields
    └── Denied
        ├── Forbidden         403
        └── Unauthorized      401 (also Unauthenticated)

`from_answer` maps an HTTP status and a `Status` object; nobody outside `kube/` looks at either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cowhand.errors import CowhandError, Denied, Retryable, Terminal, Unauthenticated, UserError


class KubeUnavailable(Retryable):
    """The API server does not answer, or asks us to come back later."""


class Conflict(Retryable):
    """The object changed under us, or another manager owns the field."""


class NotFound(Terminal):
    """The object does not exist."""

    reason = "NotFound"


class NotServed(Terminal):
    """The API server does not know this kind: its CustomResourceDefinition is missing."""

    reason = "NotServed"


class AlreadyExists(Terminal):
    """An object of this name exists already."""

    reason = "AlreadyExists"


class Invalid(UserError):
    """The API server refused the object.

    Attributes:
        causes: (field path, message) of each violation that the server named.
    """

    def __init__(self, message: str, *, causes: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message, field=causes[0][0] if causes else None)
        self.causes = causes


class Forbidden(Denied):
    """We may not do this (RBAC, admission policy or quota)."""


class Unauthorized(Unauthenticated):
    """The API server does not accept our identity."""


def _status_of(body: bytes) -> Mapping[str, Any] | None:
    """The `Status` object of an answer, None if the body is something else."""
    try:
        loaded = json.loads(body)
    except ValueError:
        return None
    return loaded if isinstance(loaded, dict) and loaded.get("kind") == "Status" else None


def _causes(status: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    details = status.get("details") or {}
    return tuple(
        (str(cause.get("field", "")), str(cause.get("message", "")))
        for cause in details.get("causes") or ()
    )


def from_answer(
    code: int, body: bytes, *, what: str, retry_after: str | None = None
) -> CowhandError:
    """The error for an HTTP answer that is not a success.

    Args:
        code: HTTP status.
        body: raw body, usually a `Status`.
        what: what was tried, for the message: `apply pods default/web`.
        retry_after: value of that header, seconds.
    """
    status = _status_of(body)
    detail = str(status.get("message", "")) if status else body[:300].decode(errors="replace")
    message = f"{what}: {detail or f'HTTP {code}'}"
    reason = status.get("reason") if status else None
    if code in (400, 422):
        causes = _causes(status) if status else ()
        # An apply with a uid that is no longer the object's: a failed precondition, not a bad object.
        if any(field == "metadata.uid" for field, _ in causes):
            return Conflict(message)
        return Invalid(message, causes=causes)
    if code == 401:
        return Unauthorized(message)
    if code == 403:
        return Forbidden(message)
    if code == 404:
        named = bool(status and (status.get("details") or {}).get("name"))
        return NotFound(message) if named else NotServed(message)
    if code == 409:
        return AlreadyExists(message) if reason == "AlreadyExists" else Conflict(message)
    after = float(retry_after) if retry_after and retry_after.isdigit() else None
    if code in (408, 410, 429) or code >= 500:
        return KubeUnavailable(message, after=after)
    return Invalid(message)
