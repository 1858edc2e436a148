"""The session log as the rest of Cowhand sees it: small interfaces, so that another store can replace Redis.

Three roles, three protocols, each scoped by what its caller may do:

- `SessionLog` for everybody (gateway, operator, harness): create, emit, read, follow.
- `WorkerLog` for the harness: heartbeat, take work, claim a session, append under the lease, park.
- `ControlLog` for the operator and the broker: mode, close, hints about dead workers, projection, hands.
- `ArchiveLog` for the archive: which logs are to be archived or deleted, and taking archived positions out.

`cowhand.session.connect` makes all four on Redis Streams. Every method may raise StoreUnavailable (no answer within
5 seconds: the call may or may not have happened, and may be repeated with the same arguments), StoreMismatch (the
store's data was replaced or lost: the process must stop) and Denied (the store's ACL or password), besides what
stands with it. Called by operator, broker, gateway and harness.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from cowhand.session.archive import HotLog
from cowhand.session.events import Event, NewEvent

if TYPE_CHECKING:
    from cowhand.session.export import Header

Mode = Literal["running", "suspended"]
Profile = Literal["dev", "standard", "strict", "managed"]
State = Literal["idle", "running", "rescheduling", "terminated", "closed"]


@dataclass(frozen=True)
class SessionMeta:
    """What is fixed when a session is created (stands in the meta hash).

    Attributes:
        session_id: `sesn_` + 32 lower-case hex digits.
        namespace: the tenant.
        name: name of the AgentSession, or empty for a session made over the API.
        uid: uid of the AgentSession, or empty.
        model: {"base_url": str, "secret": {"name": str, "key": str} | None}: where model requests go.
        tombstone: key of "this run was already made": sha256 of name, spec and runID, or empty.
    """

    session_id: str
    namespace: str
    name: str
    uid: str
    model: dict[str, Any]
    tombstone: str = ""


@dataclass(frozen=True)
class SessionState:
    """`get_session`: the state of a session, without its events.

    Attributes:
        meta: the fixed part.
        state: `idle`, `running`, `rescheduling`, `terminated`, `closed`.
        mode: `running` or `suspended`.
        lease: lease string of the holder, empty if there is none.
        epoch: epoch of the newest lease, 0 before the first.
        next_seq: position of the next event; the last one is `next_seq - 1`.
        status: last status the harness wrote with an append (see docs/interfaces.md), empty before.
        created_ms: milliseconds since the epoch, store clock.
        budget: limits in force: those of `session.created`, or of the newest `session.updated`.
        regressed: (position that somebody has seen, last position that the store had) of a log that lost its
            tail, until it is accepted or restored.
        accepted: highest position seen whose loss a person has accepted, 0 for none.
    """

    meta: SessionMeta
    state: State
    mode: Mode
    lease: str
    epoch: int
    next_seq: int
    status: dict[str, Any]
    created_ms: int
    budget: dict[str, int] = field(default_factory=dict)
    regressed: tuple[int, int] | None = None
    accepted: int = 0


@dataclass(frozen=True)
class Restored:
    """Answer of `restore_session`.

    Attributes:
        outcome: `restored` (the session was missing), `extended` (its lost tail came back) or `unchanged` (the
            store has all of the backup, or more).
        before: last position that the store had before, 0 for none.
        last: last position of the backup.
    """

    outcome: Literal["restored", "extended", "unchanged"]
    before: int
    last: int


@dataclass(frozen=True)
class Created:
    """Answer of `create_session`: `existed` says that the session or its tombstone was there before.

    `session_id` is the id of the session that counts: the old one if a tombstone matched.
    """

    session_id: str
    existed: bool


@dataclass(frozen=True)
class Lease:
    """A claimed session.

    Attributes:
        value: the whole lease string `epoch:worker:nonce`; every write is fenced by it.
        epoch: the fencing epoch as a number.
        next_seq: position of the next event at the time of the claim.
        workspace: name for the session's model endpoint and credential: sessions that share both share it.
    """

    session_id: str
    value: str
    epoch: int
    next_seq: int
    workspace: str = ""


@dataclass(frozen=True)
class Parked:
    """Answer of `park`: `parked` False means new input arrived: `next_seq` says how far to read."""

    parked: bool
    next_seq: int


@dataclass(frozen=True)
class HandRecord:
    """One instance of one hand of a session, as the broker or the operator wrote it.

    Attributes:
        session_id: session it was made for, empty for a Sandbox applied by hand.
        hand: name of the hand in the agent.
        instance: counts from 1; a lost hand's successor has the next number.
        state: `Pending`, `Ready`, `Failed` or `Lost`.
        reason: CamelCase reason for Failed, Lost or Pending.
        message: text for Claude and for people.
        sandbox: name of the Sandbox resource.
        sandbox_uid: its uid.
        pod_uid: uid of the pod that answers.
        address: `ip:port` of the hand's proxy.
        cert_sha256: hex SHA-256 of the DER certificate to pin.
        owner: session that may execute in it now, empty for none.
        owner_epoch: grows with each transfer, from 1.
        signature: the broker's signature over the record (wire.records), empty when not Ready.
    """

    session_id: str
    hand: str
    instance: int
    state: Literal["Pending", "Ready", "Failed", "Lost"]
    reason: str = ""
    message: str = ""
    sandbox: str = ""
    sandbox_uid: str = ""
    pod_uid: str = ""
    address: str = ""
    cert_sha256: str = ""
    owner: str = ""
    owner_epoch: int = 0
    signature: str = ""


@dataclass(frozen=True)
class Backlog:
    """How much work waits in a tenant: for scaling.

    Attributes:
        ready: sessions in the ready stream that nobody has taken.
        leased: sessions that a worker holds now.
        workers: live worker incarnations.
        oldest_ready_ms: age of the oldest waiting entry, 0 if none.
    """

    ready: int
    leased: int
    workers: int
    oldest_ready_ms: int


@dataclass(frozen=True)
class Held:
    """A claim that did not succeed: `why` is HELD, SUSPENDED, CLOSED, NOSESSION or DEADWORKER."""

    why: str
    lease: str = ""


class SessionLog(Protocol):
    """Create, emit, read and follow sessions of one tenant (namespace)."""

    async def create_session(self, meta: SessionMeta, events: Sequence[NewEvent]) -> Created:
        """Make a session: meta, the events from position 1 on, and an entry in the ready queue, in one script.

        `events[0]` is `session.created`, each has an id of its own; without a `user.message` among them the
        session starts idle, with a `session.suspended` it starts suspended (and is not made ready).
        Idempotent by session id and by tombstone. The answer may name a session whose log has expired since: a
        tombstone lives at least 30 days after `close`.

        Raises:
            UserError: malformed id, wrong events, or a payload over the limit; nothing was written.
            ArchiveUnavailable: a large payload could not be stored; repeat the call.
        """

    async def fork_session(
        self,
        meta: SessionMeta,
        created: NewEvent,
        source: tuple[str, int],
        extra: Sequence[NewEvent],
    ) -> Created:
        """Make a session from another one of this tenant: its events up to a position, under a new id.

        The source is only read. Position 1 is `created`; the others are copies, payloads byte for byte; then come
        `extra`: `session.forked` and what is to be done next. Ids of external events get `@<source id>`, so that
        the fork's own ids are new. All of it appears at once. Idempotent as `create_session`.

        Args:
            meta: of the new session.
            created: its `session.created`.
            source: session id, and last position to copy.
            extra: external events behind the copies.

        Raises:
            SessionNotFound: there is no such source, or it ends before the position.
            UserError: malformed id, or the source's end is among what is to be copied.
        """

    def session_ids(self) -> AsyncIterator[str]:
        """Ids of all sessions of this tenant that are in the store, each once; for the control plane alone."""

    async def restore_session(
        self, header: Header, events: AsyncIterator[Event], *, dry_run: bool = False
    ) -> Restored:
        """Bring a session back from an export, or the tail that the store has lost.

        Nothing is overwritten: a log that is there must be the beginning of the backup (but for what the operator
        wrote when it noticed the loss: `log.regressed`, or the suspension of a session without its object). The
        session appears, or changes, at once when the last event is in place. One that had work comes back
        suspended: the operator resumes it if its AgentSession says Running and nobody has seen more than the backup
        has. Idempotent.

        Args:
            header: of the export.
            events: all of its events, in order; raises where the export is torn, then nothing is changed.
            dry_run: only answer what would be done.

        Raises:
            UserError: it belongs to another tenant, the logs differ, or a harness holds the session.
        """

    async def emit_event(self, session_id: str, event: NewEvent) -> int:
        """Append an external event and make the session ready; answers its position.

        Deduplicated by `event.id`: the same id again answers the first position, also after the end of the log.
        Takes `user.message`, `user.interrupt`, `user.tool_confirmation`, `user.custom_tool_result`,
        `system.message` and `session.exec`; the last two do not make the session ready. While the session
        is suspended the event is kept, and acted on after resuming.
        Profile standard: durable when this returns.

        Raises:
            SessionNotFound: no such session in this tenant.
            SessionClosed: its state is `closed` or `terminated`.
            UserError: another type, no id, or a payload over the limit (16 MiB, without an archive 1 MiB).
            ArchiveUnavailable: a large payload could not be stored; repeat the call.
        """

    async def get_events(
        self,
        session_id: str,
        start: int = 1,
        end: int | None = None,
        *,
        limit: int | None = None,
        types: Collection[str] | None = None,
        max_bytes: int | None = None,
    ) -> list[Event]:
        """Events `start..end`, both inclusive, positions from 1; `end` None is the newest.

        A negative position counts from the end of the log (rewind): -1 is the newest event. `types` keeps only
        events of these types. An empty range of an existing session is an empty list. `limit` cuts the list at
        its end, after the filter, and so does `max_bytes`: the payloads of what is answered are no larger together,
        unless the first event alone is. What is no longer in the store is read from the archive, also while it is being
        archived; large payloads are the original bytes.

        Raises:
            SessionNotFound: no such session in this tenant.
            ArchiveUnavailable: a part is in the archive, which does not answer.
            BlobMissing, LogIncompatible: a part is gone or damaged.
        """

    async def get_session(self, session_id: str) -> SessionState:
        """State of a session. Raises SessionNotFound."""

    def follow(self, session_id: str, start: int = 1) -> AsyncIterator[Event]:
        """Events from `start` on, first the old, then the new as they come; ends after `session.deleted`.

        Gap-free: a lost nudge costs at most 5 seconds. `start=state.next_seq` gives only new events. Ends too
        when the log is deleted under it. Raises SessionNotFound at the first step; after StoreUnavailable follow
        again from the last position + 1. To leave it early cancel the task that iterates, or `aclose` it.
        """


def from_end(start: int, end: int | None, next_seq: int) -> tuple[int, int | None]:
    """Positions with those from the end (negative, -1 is the newest) made absolute; may be an empty range."""
    if start < 0:
        start = max(1, next_seq + start)
    if end is not None and end < 0:
        end = max(0, next_seq + end)
    return start, end


class WorkerLog(Protocol):
    """What a harness worker does, for one tenant; one incarnation per process."""

    @property
    def worker_id(self) -> str:
        """`<pod uid>.<8 random hex>`."""

    async def beat(self) -> set[str]:
        """Renew this worker's deadline (now + 10 s); answers the sessions with new input (dirty set).

        Call it before the first claim, then every 2 s. The answer heals lost nudges: it may name sessions that
        this worker does not hold, and after a reconnect it names all that it holds.
        """

    async def retire(self) -> None:
        """Take this worker out of the live set (drain): its sessions can be claimed at once.

        Stop iterating `work` and beating first; sessions that were nominated here and not claimed go back. A later
        `beat` makes the worker live again.
        """

    def work(self) -> AsyncIterator[str]:
        """Session ids from the ready queue, as they come (each only nominated: claim it).

        Endless; outlives restarts of the store. May name a session twice. Ask for the next one only when there is
        room for it: what is not claimed within 5 s is nominated elsewhere. Close the iterator when done.
        """

    def nudges(self) -> AsyncIterator[str]:
        """Session ids that have new input or a hand that changed, as they are announced.

        Endless, at most once: `beat` answers what was lost. May name sessions that this worker does not hold.
        """

    async def claim(self, session_id: str) -> Lease | Held:
        """Take the lease; writes `session.wake` into the log, and state `running`.

        A session need not be nominated to be claimed. HELD also if this worker itself holds it. `terminated`
        answers CLOSED. DEADWORKER: beat first. After StoreUnavailable `work` nominates the session again.
        """

    async def append(
        self, lease: Lease, events: Sequence[NewEvent], *, status: dict[str, Any] | None = None
    ) -> int:
        """Append under the lease, exactly once; answers the position of the first event.

        `status` replaces the session's status document in the same script; with it `events` may be empty.
        Appends of one lease are made one after the other. A cancelled append still happens, or not. After
        StoreUnavailable repeat it with the same events and status: it is then written once; if something else is
        appended first, the doubtful events are written before it.

        Raises:
            Suspended: one of the events begins work (`events.BEGINS`) and the session is suspended; nothing was
                written.
            Fenced: the lease is gone (taken over, given back, session deleted, or the store lost our newest events):
                drop the session at once.
            UserError: a payload over the limit (16 MiB, without an archive 1 MiB); nothing was written.
            ArchiveUnavailable: a large payload could not be stored; nothing was written, repeat the call.
        """

    async def barrier(self, lease: Lease | None = None) -> None:
        """Wait until everything appended so far is as durable as the profile promises.

        Profiles dev and managed: returns at once. Profile standard: replicas have it in memory. Profile strict: it is
        on the disk, here and at replicas. With `lease` only that session's appends are checked after a reconnect.

        Raises:
            Fenced: the store lost appends of the lease (with None: of any) before a replica had them.
            StoreUnavailable: no replica confirms; nothing is lost, ask again.
        """

    async def touch(self, lease: Lease) -> None:
        """Push the progress deadline (20 min after the last append or touch) of a long call; raises Fenced."""

    async def park(
        self,
        lease: Lease,
        expected_next: int,
        *,
        state: State = "idle",
        wake_at_ms: int | None = None,
    ) -> Parked:
        """Give the lease back if nothing new has arrived since `expected_next`; raises Fenced.

        Args:
            lease: from `claim`.
            expected_next: position after the last event that the caller has read or written.
            state: `rescheduling` brings the session back, at `wake_at_ms` or else within about a minute;
                `terminated` ends it for input too.
            wake_at_ms: milliseconds of the store's clock at which the session becomes ready again (about a
                second later at most, by the next sweep of anybody). Input makes it ready before.
        """

    async def handover(self, lease: Lease) -> None:
        """Give the lease back and put the session on the ready queue for another worker."""

    async def sweep(self) -> int:
        """Put sessions whose holder is dead or stuck, or whose timer is up, back on the ready queue; answers how many.

        Call it every second or so; the slower parts of the upkeep (trimming) happen in it by themselves.
        """

    async def get_hand(self, session_id: str, hand: str, instance: int) -> HandRecord | None:
        """The record of one hand instance, None while there is none."""


@dataclass(frozen=True)
class StoreUsage:
    """Who uses how much of the store.

    Attributes:
        max_bytes: memory that the store may use for data, 0 if it has no limit or does not tell.
        used_bytes: memory that it uses.
        tenants: namespace -> bytes of its keys.
    """

    max_bytes: int
    used_bytes: int
    tenants: Mapping[str, int]


class ControlLog(Protocol):
    """What the operator and the broker do, across tenants."""

    async def store_usage(self, namespaces: Sequence[str]) -> StoreUsage:
        """Measure what each tenant has in the store: looks at every key, so seconds where there are many."""

    async def put_quota(self, namespace: str, used: int, limit: int | None) -> None:
        """Say how many bytes a tenant has and may have (None: no limit); it holds for ten minutes.

        Beyond the limit `create_session` and `emit_event` of messages raise QuotaExceeded, beyond 9/8 of it a
        worker's `append` too; what ends or stops a session is never refused.
        """

    async def get_quota(self, namespace: str) -> tuple[int, int] | None:
        """(bytes used, limit) as last put, None without a limit."""

    async def set_mode(self, namespace: str, session_id: str, mode: Mode, event: NewEvent) -> int:
        """Suspend or resume; the event is ingested in the same script; answers its position.

        `event` is `session.suspended` or `session.resumed`, deduplicated by id (a repeated id changes nothing).
        A holder is nudged, not fenced: it parks by itself. Resuming makes the session ready if it has work.
        Raises SessionNotFound, SessionClosed (also if `terminated`).
        """

    async def set_budget(self, namespace: str, session_id: str, event: NewEvent) -> int:
        """Ingest a `session.updated` with the new budget; answers its position.

        Deduplicated by id; `SessionState.budget` changes in the same script. A holder is nudged and acts on it
        before its next request; an idle session is not made ready.
        Raises SessionNotFound, SessionClosed (also if `terminated`).
        """

    async def regress(self, namespace: str, session_id: str, event: NewEvent, *, seen: int) -> int:
        """Stop a session whose log ends before a position that somebody has seen; answers its last position.

        Writes `event` (`log.regressed`), and nobody may claim the session until `accept_regression` and `set_mode`,
        or `restore_session`. Does nothing if the log has the position, or its loss was accepted.
        Raises SessionNotFound, SessionClosed.
        """

    async def accept_regression(self, namespace: str, session_id: str, position: int) -> bool:
        """The log may go on from `position`, where it ended when it was stopped; False: it did not end there.

        The session stays suspended until `set_mode`. Raises SessionNotFound.
        """

    async def close(
        self, namespace: str, session_id: str, event: NewEvent, *, retain_s: int
    ) -> None:
        """End the log with `session.deleted`; keys expire after `retain_s` seconds (0: at once).

        Idempotent, also for a session that is not there. The holder is fenced and nudged.
        """

    async def drop_worker(self, namespace: str, pod_uid: str) -> int:
        """A worker's pod is gone: forget its heartbeats and requeue its sessions; answers how many."""

    async def sweep(self, namespace: str) -> int:
        """As `WorkerLog.sweep`."""

    async def backlog(self, namespace: str) -> Backlog:
        """Work that waits in a tenant."""

    async def take_projections(self, namespace: str, limit: int = 100) -> list[str]:
        """Session ids whose state changed since they were last taken (set `proj`).

        They are removed from the set: what is not projected then waits for the next change or the full sweep. May
        name sessions that are gone (`get_session` raises SessionNotFound).
        """

    def projection_nudges(self, namespaces: Sequence[str]) -> AsyncIterator[str]:
        """Namespaces in which something is to be projected, as announced; at the start and after a reconnect all."""

    async def put_hand(self, namespace: str, record: HandRecord) -> None:
        """Write the record of a hand instance and nudge the session's worker.

        A record never goes back from Lost, and a Ready record is not overwritten by Pending or Failed, nor by a lower
        `owner_epoch`; such a write changes nothing. Without a session_id only `get_sandbox` finds the record, without a
        sandbox_uid only `get_hand`. Raises SessionNotFound.
        """

    async def get_hand(
        self, namespace: str, session_id: str, hand: str, instance: int
    ) -> HandRecord | None:
        """The record of one hand instance."""

    async def get_sandbox(self, namespace: str, sandbox_uid: str) -> HandRecord | None:
        """The newest record of a sandbox by its uid."""


class ArchiveLog(Protocol):
    """What the archive process does, across tenants."""

    async def hot_logs(self, namespace: str, cursor: int) -> tuple[int, list[HotLog]]:
        """Some sessions of a tenant with what the store holds of their logs; go on with the cursor until it is 0."""

    async def now_ms(self) -> int:
        """The store's clock."""

    async def stored(
        self, namespace: str, session_id: str, start: int, count: int, size: int
    ) -> list[Event]:
        """Entries from a position on as they stand in the store: references are not resolved.

        At most `count`, and none after those before it have more than `size` bytes of payloads.
        """

    async def whole(self, namespace: str, session_id: str) -> int:
        """Position of the next event of a log whose end nobody misses.

        Raises:
            SessionNotFound: there is no such session.
            LogIncompatible: more of it was seen than there is (`log.regressed`), and nobody has accepted that.
        """

    async def archived(self, namespace: str, session_id: str, first: int, last: int) -> bool:
        """Take positions that are durable in the archive out of the store.

        False, and nothing happens, unless `first` is the first position in the store and `last` one that was
        written. Raises SessionNotFound.
        """

    async def doomed(self, limit: int) -> list[tuple[str, str]]:
        """(namespace, session id) of ended sessions whose time in the archive is over, at most `limit`.

        Never one that the store still holds and that has not ended.
        """

    async def forget(self, namespace: str, session_id: str) -> None:
        """What the archive had of this session is gone."""


@dataclass(frozen=True)
class StoreConfig:
    """How to reach the store.

    Attributes:
        url: `redis://` or `rediss://host:port/db`; `redis+sentinel://host:port,host:port/name` (also `rediss+...`)
            asks Sentinels for the primary; `redis+cluster://host:port,host:port` (also `rediss+...`) is a cluster.
        username: ACL user, empty for none.
        password: its password.
        ca_file: PEM file with the CA of the store's certificate, empty for the system's.
        prefix: first part of every key.
        partitions: number of partitions, fixed for the life of a store.
        profile: durability profile; `dev` and `managed` have no barrier.
        replicas: replicas that confirm a barrier of `standard` and `strict`.
        sentinel_username, sentinel_password: login at the Sentinels, empty for none.
        allow_weaker: go on with a store that keeps less than the profile; a barrier that nobody confirms passes
            after its time is over.
    """

    url: str
    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: str = ""
    prefix: str = "cowhand"
    partitions: int = 16
    profile: Profile = "dev"
    replicas: int = 1
    allow_weaker: bool = False
    sentinel_username: str = ""
    sentinel_password: str = field(default="", repr=False)
