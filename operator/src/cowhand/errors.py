"""Every error that Cowhand raises on purpose, as one tree.

Callers decide by class, never by text; the text is for the person who reads it and says what to do.

    CowhandError
    ├── Retryable                 try again, after `after` seconds
    │   ├── StoreUnavailable      the session log's store does not answer
    │   │   └── QuotaExceeded     the tenant has no room left in it
    │   │   └── ArchiveUnavailable    the archive (large payloads, old events) does not answer
    │   ├── BrokerUnavailable     the credential broker does not answer
    │   └── HandUnavailable       a hand cannot be reached now
    ├── Terminal                  trying again cannot help
    │   ├── SessionNotFound
    │   ├── SessionClosed         the log has ended; nothing can be appended
    │   ├── Suspended             the session was suspended: nothing new may begin
    │   ├── Fenced                another worker holds the session: drop everything at once
    │   ├── StoreMismatch         this is not the store that we were started with
    │   ├── StoreTooWeak          the store keeps less than the durability profile that was set
    │   ├── LogIncompatible       an event of a version that this release cannot read
    │   │   └── BlobMissing           a large payload or an archived part of the log is gone
    │   └── HandLost              the hand is gone, with what ran in it
    ├── UserError                 the caller asked for something wrong (`field` names it, if there is one)
    └── Denied                    authenticated, but not allowed
        └── Unauthenticated
"""

from __future__ import annotations


class CowhandError(Exception):
    """Base of every error that Cowhand raises on purpose."""


class Retryable(CowhandError):
    """Trying again may help.

    Attributes:
        after: seconds to wait before the next try, or None to leave it to the caller.
    """

    def __init__(self, message: str, *, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class StoreUnavailable(Retryable):
    """The store of the session log does not answer or refuses writes for now."""


class ArchiveUnavailable(StoreUnavailable):
    """The archive does not answer: large payloads and old events cannot be read or written for now."""


class QuotaExceeded(StoreUnavailable):
    """The tenant's share of the store is full: to its own writers the store is not available, to others it is.

    Attributes:
        used: bytes that the tenant has in the store, as last measured and counted on.
        limit: its quota, bytes.
    """

    def __init__(self, namespace: str, *, used: int, limit: int) -> None:
        super().__init__(
            f"namespace {namespace} uses {used} of the {limit} bytes that it may have in the store of the log"
            " (store.tenantQuota): delete sessions that are not needed (deletionPolicy Delete frees their log at"
            " once), or have the quota raised",
            after=10.0,
        )
        self.used = used
        self.limit = limit


class BrokerUnavailable(Retryable):
    """The credential broker does not answer."""


class HandUnavailable(Retryable):
    """A hand exists but cannot be reached now."""


class Terminal(CowhandError):
    """Trying again cannot help.

    Attributes:
        reason: CamelCase word, usable as the reason of a Kubernetes condition.
    """

    reason = "Error"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class SessionNotFound(Terminal):
    """No session with this id exists in this tenant."""

    reason = "SessionNotFound"


class SessionClosed(Terminal):
    """The log of this session has ended."""

    reason = "SessionClosed"


class Suspended(Terminal):
    """The session was suspended a moment ago: an event that begins work was not written."""

    reason = "Suspended"


class Fenced(Terminal):
    """The lease is no longer ours: another worker holds the session."""

    reason = "Fenced"


class StoreMismatch(Terminal):
    """The store's identity is not the one that this process started with."""

    reason = "StoreMismatch"


class StoreTooWeak(Terminal):
    """The store is too old, or keeps less than the durability profile that was set."""

    reason = "StoreTooWeak"


class LogIncompatible(Terminal):
    """The log holds an event of a version that this release cannot read."""

    reason = "NeedsUpgrade"


class BlobMissing(LogIncompatible):
    """A payload or an archived part of the log is neither in the store nor in the archive."""

    reason = "BlobMissing"


class HandLost(Terminal):
    """The hand is gone, and with it whatever ran in it."""

    reason = "HandLost"


class UserError(CowhandError):
    """The caller asked for something wrong.

    Attributes:
        field: path of the offending field, for example `spec.message`, or None.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class Denied(CowhandError):
    """The caller is known but not allowed to do this."""


class Unauthenticated(Denied):
    """The caller showed no credential that we accept."""
