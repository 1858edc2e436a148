"""State that tests steer and read: scripts, gates, faults, and the record of all requests. Used by `app` alone."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from model_server.scripts import Fault, Turn

Json = dict[str, Any]


@dataclass
class Recorded:
    """One request as it came in."""

    session: str
    received_at: float
    """Arrival of the last byte, seconds since the epoch."""
    body: bytes
    headers: dict[str, str]
    """`anthropic-*` and `user-agent`."""
    turn: int | None = None
    status: int | None = None
    outcome: str = "running"
    """`ok`, `refused`, `fault:<kind>`, or `gone` when the client went away."""

    def as_json(self, *, body: bool = True) -> Json:
        """The form of the control API; without its body on request, for there may be many."""
        return {
            "session": self.session,
            "received_at": self.received_at,
            "body": self.body.decode("utf-8", "replace") if body else None,
            "headers": self.headers,
            "turn": self.turn,
            "status": self.status,
            "outcome": self.outcome,
        }


@dataclass
class Control:
    """Everything that the control API reaches.

    Args:
        record_bytes: bytes of bodies that are kept.
    """

    record_bytes: int
    scripts: dict[str, list[Turn]] = field(default_factory=dict)
    records: deque[Recorded] = field(default_factory=deque)
    dropped: int = 0
    _bytes: int = 0
    _open: set[str] = field(default_factory=set)
    _waiting: list[Json] = field(default_factory=list)
    _faults: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def record(self, entry: Recorded) -> None:
        """Keep a request; the oldest go when there is no room."""
        self.records.append(entry)
        self._bytes += len(entry.body)
        while self._bytes > self.record_bytes and len(self.records) > 1:
            self._bytes -= len(self.records.popleft().body)
            self.dropped += 1

    def fault(self, session: str, script: str, turn: int, fault: Fault | None) -> str | None:
        """The fault that this request meets; it is counted."""
        key = (session, script, turn)
        if fault is None or self._faults[key] >= fault.times:
            return None
        self._faults[key] += 1
        return fault.kind

    async def wait(self, gate: str | None, place: str, session: str, turn: int, now: float) -> None:
        """Wait until the gate is open; at once if there is none or it was released before."""
        if gate is None or gate in self._open:
            return
        waiter = {"gate": gate, "place": place, "session": session, "turn": turn, "since": now}
        self._waiting.append(waiter)
        try:
            async with self._changed:
                await self._changed.wait_for(
                    lambda: gate in self._open or waiter not in self._waiting
                )
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)

    async def release(self, gate: str, *, once: bool) -> int:
        """Open a gate, for good or only for those who wait now; returns how many waited."""
        async with self._changed:
            mine = [w for w in self._waiting if w["gate"] == gate]
            if once:
                self._waiting = [w for w in self._waiting if w["gate"] != gate]
            else:
                self._open.add(gate)
            self._changed.notify_all()
        return len(mine)

    def gates(self) -> Json:
        """Who waits where, and which gates are open."""
        return {"waiting": list(self._waiting), "open": sorted(self._open)}

    async def reset(self) -> None:
        """Forget scripts, records, faults and gates; whoever waits goes on."""
        async with self._changed:
            self.scripts.clear()
            self.records.clear()
            self._bytes = self.dropped = 0
            self._open.clear()
            self._faults.clear()
            self._waiting = []
            self._changed.notify_all()
