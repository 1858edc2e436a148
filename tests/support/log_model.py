"""What the session log promises, as plain Python: the reference that the scripts are compared with.

No store, no time: a worker is alive or not, a session's progress is due or not. Replies are the names that the
real calls map to (`OK` with a position, or the reason).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cowhand.session.events import BEGINS

Reply = tuple[object, ...]


@dataclass
class Entry:
    type: str
    id: str
    lease: str
    payload: bytes


@dataclass
class Session:
    log: list[Entry] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    state: str = "idle"
    mode: str = "running"
    lease: str = ""
    holder: str = ""
    stuck: bool = False
    input: int = 0
    seen: int = 1

    @property
    def next(self) -> int:
        return len(self.log) + 1

    @property
    def ended(self) -> bool:
        return self.state in ("closed", "terminated")

    def put(self, entry: Entry) -> int:
        self.log.append(entry)
        return len(self.log)


class Model:
    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}
        self.alive: dict[str, bool] = {}
        self.dirty: dict[str, set[str]] = {}

    def live(self, session: Session) -> bool:
        return bool(session.lease) and self.alive[session.holder] and not session.stuck

    def nudge(self, sid: str) -> None:
        session = self.sessions[sid]
        if session.lease:
            self.dirty.setdefault(session.holder, set()).add(sid)

    def create(self, sid: str, entries: list[Entry], *, ready: bool, suspended: bool) -> Reply:
        if sid in self.sessions:
            return ("OK", True)
        session = self.sessions[sid] = Session()
        for entry in entries:
            session.ids[entry.id] = session.put(entry)
        session.mode = "suspended" if suspended else "running"
        session.input = len(entries) if ready else 0
        return ("OK", False)

    def ingest(self, sid: str, entry: Entry, *, wakes: bool, mode: str | None = None) -> Reply:
        session = self.sessions.get(sid)
        if session is None:
            return ("NOSESSION",)
        if entry.id in session.ids:
            return ("OK", session.ids[entry.id])
        if session.ended:
            return ("CLOSED",)
        position = session.ids[entry.id] = session.put(entry)
        if wakes:
            session.input = position
        if mode is not None:
            session.mode = mode
        self.nudge(sid)
        return ("OK", position)

    def may_claim(self, sid: str, worker: str) -> str:
        """OK, or why not. `claimed` follows when the store said OK."""
        if not self.alive[worker]:
            return "DEADWORKER"
        session = self.sessions.get(sid)
        if session is None:
            return "NOSESSION"
        if session.ended:
            return "CLOSED"
        if session.mode == "suspended":
            return "SUSPENDED"
        if self.live(session):
            self.nudge(sid)
            return "HELD"
        return "OK"

    def claimed(self, sid: str, worker: str, lease: str) -> int:
        session = self.sessions[sid]
        session.put(Entry("session.wake", lease, lease, b""))
        session.lease, session.holder, session.state, session.stuck = (
            lease,
            worker,
            "running",
            False,
        )
        return session.next

    def append(self, sid: str, lease: str, entries: list[Entry]) -> Reply:
        session = self.sessions[sid]
        if session.lease != lease:
            return ("FENCED",)
        if session.mode == "suspended" and any(entry.type in BEGINS for entry in entries):
            return ("SUSPENDED",)
        first = session.next
        for entry in entries:
            session.put(entry)
        session.stuck = False
        return ("OK", first)

    def park(self, sid: str, lease: str, expected: int, state: str) -> Reply:
        session = self.sessions[sid]
        if session.lease != lease:
            return ("FENCED",)
        if session.next != expected:
            return ("NEW", session.next)
        session.lease, session.state = "", state
        session.seen = 0 if session.mode == "suspended" else session.next
        return ("OK", session.next)

    def handover(self, sid: str, lease: str) -> Reply:
        session = self.sessions[sid]
        if session.lease != lease:
            return ("FENCED",)
        session.lease, session.state, session.seen = "", "rescheduling", 0
        return ("OK",)

    def requeue(self) -> None:
        """What a sweep does to what callers see: a dead holder's session is rescheduling, or free if suspended."""
        for session in self.sessions.values():
            dead = session.lease and not session.ended and not self.live(session)
            if dead and session.mode == "suspended":
                session.lease, session.seen, session.state = "", 0, "rescheduling"

    def close(self, sid: str, entry: Entry) -> Reply:
        session = self.sessions.get(sid)
        if session is None or session.state == "closed":
            return ("OK",)
        session.ids[entry.id] = session.put(entry)
        self.nudge(sid)
        session.state, session.lease = "closed", ""
        return ("OK",)

    def has_work(self, sid: str) -> bool:
        """A worker must get this session: it is not held, may run, and somebody waits for it."""
        session = self.sessions[sid]
        if session.ended or session.mode == "suspended" or self.live(session):
            return False
        return bool(session.lease) or session.state != "idle" or session.input >= session.seen
