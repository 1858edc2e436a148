"""What is known about one AgentSession when it is decided on, and what a decision can ask for.

The controller gathers a `SessionSnapshot` (Kubernetes, log, hand records) and carries out a `SessionPlan`.
Plain values on both sides: this layer knows neither the Kubernetes client nor the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from cowhand.api.v1alpha1 import AgentSession, AgentSessionStatus, OperatingMode, PinnedAgent
from cowhand.reconcile.store_profile import StoreProfile

RecordState = Literal["Pending", "Ready", "Failed", "Lost"]


@dataclass(frozen=True)
class Absent:
    """The store answers and has no such session."""


@dataclass(frozen=True)
class Unreachable:
    """The store does not answer; `message` says how. `full`: it does, but the tenant has no room left in it."""

    message: str
    full: bool = False


@dataclass(frozen=True)
class LogView:
    """The session as the log has it.

    Attributes:
        state: `idle`, `running`, `rescheduling`, `terminated`, `closed`.
        mode: `running` or `suspended`.
        last_seq: position of the newest event.
        document: the harness's status document (docs/interfaces.md section 3), may be empty.
        waiting: input stands in the log that no turn has answered yet.
        budget: limits in force, in the words of the log.
        regressed: (position that was seen, last position that the store had) of a log that was stopped because
            its end was lost.
        accepted: highest position whose loss a person has accepted.
    """

    state: Literal["idle", "running", "rescheduling", "terminated", "closed"]
    mode: Literal["running", "suspended"]
    last_seq: int
    document: Mapping[str, Any]
    waiting: bool = False
    budget: Mapping[str, int] = field(default_factory=dict)
    regressed: tuple[int, int] | None = None
    accepted: int = 0

    @property
    def ended(self) -> bool:
        """Nothing more will happen in this session."""
        return self.state in ("terminated", "closed")


@dataclass(frozen=True)
class SandboxView:
    """A Sandbox that carries the session's label.

    Attributes:
        name: of the Sandbox.
        uid: of the Sandbox.
        hand: of its holder.
        instance: of its holder.
        mode: its operatingMode.
        ours: its holder is this session.
        why: reason and message of its condition Ready while that is not True, else empty.
    """

    name: str
    uid: str
    hand: str
    instance: int
    mode: OperatingMode
    ours: bool = True
    why: str = ""


@dataclass(frozen=True)
class Refusal:
    """The spec cannot be frozen into a session: `reason` is InvalidSpec, InvalidFork or TooLarge."""

    reason: str
    message: str


@dataclass(frozen=True)
class SessionSnapshot:
    """Everything that one decision looks at.

    Attributes:
        session: the resource.
        served: its namespace is a tenant.
        session_id: the session that counts: status' own, else the one made from the uid.
        adopted: this id is that of an earlier object's run.
        log: the session in the log.
        missing_agent: name of the Agent that does not exist, or None.
        missing_environments: names of Environments that do not exist.
        missing_source: the session of spec.fork, which does not exist, or None.
        refusal: why the spec cannot be frozen, or None.
        delivered: ids of spec.messages that are known to be in the log.
        sandboxes: Sandboxes labelled with the session id; None: not looked at.
        records: (hand, instance) -> state of its record in the log, where there is one.
        idle_timeouts: hand -> idleTimeoutSeconds of its frozen environment.
        pinned: the agent as it was frozen, if it was looked at.
        finalized: our finalizer is on the object.
        written: when the status was last written by this process, None for never.
        seen: highest position of the log that this process has seen before, 0 for none.
        store: what the store is believed to keep, None if it was never seen.
    """

    session: AgentSession
    served: bool
    session_id: str
    log: LogView | Absent | Unreachable
    adopted: bool = False
    missing_agent: str | None = None
    missing_environments: tuple[str, ...] = ()
    missing_source: str | None = None
    refusal: Refusal | None = None
    delivered: frozenset[str] = frozenset()
    sandboxes: tuple[SandboxView, ...] | None = None
    records: Mapping[tuple[str, int], RecordState] = field(default_factory=dict)
    idle_timeouts: Mapping[str, int] = field(default_factory=dict)
    pinned: PinnedAgent | None = None
    finalized: bool = True
    written: datetime | None = None
    seen: int = 0
    store: StoreProfile | None = None

    @property
    def waits(self) -> bool:
        """Something that the spec names does not exist yet."""
        missing = (self.missing_agent, self.missing_source)
        return any(one is not None for one in missing) or bool(self.missing_environments)

    @property
    def deleting(self) -> bool:
        """The object is being deleted."""
        return self.session.metadata.deletion_timestamp is not None


@dataclass(frozen=True)
class Send:
    """A user message to append, with its event id `msg:<id>`."""

    id: str
    content: str


@dataclass(frozen=True)
class Wish:
    """A Sandbox that should exist, in this mode."""

    hand: str
    instance: int
    mode: OperatingMode


@dataclass(frozen=True)
class Loss:
    """A hand record to end: `state` Lost or Failed, with reason and text for Claude."""

    hand: str
    instance: int
    state: Literal["Failed", "Lost"]
    reason: str
    message: str


@dataclass(frozen=True)
class SessionPlan:
    """What to do, in this order; then observe again if anything of it changes the log.

    Attributes:
        add_finalizer: before anything is written to the log.
        regress: the log must not go on: it ends before this position, which was seen.
        accept: the log may go on from this position.
        create: make the session in the log.
        mode: mode to set in the log, or None.
        budget: limits to set in the log (empty: no limits), or None.
        send: messages to append.
        close: end the log.
        losses: hand records to end.
        wishes: Sandboxes to apply.
        drop: (name, uid) of Sandboxes to delete.
        remove_finalizer: the log is ended, or given up.
        delete_self: the time to live is over.
        status: the status to write now, None leaves what stands there.
        requeue_after: seconds until the next look, None for no need.
    """

    add_finalizer: bool = False
    create: bool = False
    regress: int | None = None
    accept: int | None = None
    mode: Literal["running", "suspended"] | None = None
    budget: Mapping[str, int] | None = None
    send: tuple[Send, ...] = ()
    close: bool = False
    losses: tuple[Loss, ...] = ()
    wishes: tuple[Wish, ...] = ()
    drop: tuple[tuple[str, str], ...] = ()
    remove_finalizer: bool = False
    delete_self: bool = False
    status: AgentSessionStatus | None = None
    requeue_after: float | None = None

    @property
    def observe_again(self) -> bool:
        """The plan changes the log, so that the status must be computed from a new snapshot."""
        steered = self.mode is not None or self.budget is not None or bool(self.send)
        rolled_back = self.regress is not None or self.accept is not None
        return self.create or steered or rolled_back
