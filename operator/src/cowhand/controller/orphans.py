"""Sessions whose object is gone and whose log has not ended.

Where the deletion was seen, the log is ended, when the store is back. Where an object is only missing, nothing proves
that somebody deleted it: the cluster may have been restored from a time before it. Such a session is suspended, and
goes on when its object, or one of the same name and spec, is there again.
"""

from __future__ import annotations

import logging

from cowhand.controller.logs import Logs
from cowhand.errors import SessionClosed, SessionNotFound, StoreUnavailable
from cowhand.session.events import SESSION_DELETED, SESSION_SUSPENDED, NewEvent
from cowhand.session.importing import STRAY

log = logging.getLogger(__name__)


class Orphans:
    """Sessions whose object is gone and whose log may not have ended.

    In memory: a restart of the operator forgets them, and the projection finds those that still run.
    """

    def __init__(self, logs: Logs, retain_s: int) -> None:
        self._logs = logs
        self._retain_s = retain_s
        self._waiting: dict[tuple[str, str], int] = {}
        self._strays: set[tuple[str, str]] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def stray(self, namespace: str, session_id: str) -> None:
        """Suspend this session when that is possible: its object is missing, and nobody said that it was deleted."""
        self._strays.add((namespace, session_id))

    def back(self, namespace: str, session_id: str) -> None:
        """Its object is there: what `stray` was told is no longer so."""
        self._strays.discard((namespace, session_id))

    def add(self, namespace: str, session_id: str, *, keep: bool = True) -> None:
        """End this session's log when that is possible; `keep` retains it for the usual time."""
        self._waiting[(namespace, session_id)] = self._retain_s if keep else 0

    async def sweep(self) -> None:
        """Try each; what fails stays."""
        try:
            for namespace, session_id in tuple(self._strays):
                await self._suspend(namespace, session_id)
                self._strays.discard((namespace, session_id))
        except StoreUnavailable:
            return
        for (namespace, session_id), retain_s in tuple(self._waiting.items()):
            event = NewEvent(
                SESSION_DELETED,
                {"actor": {"user": "operator", "via": "kubernetes"}},
                id=f"deleted:{session_id}",
            )
            try:
                await self._logs.call(
                    lambda ns=namespace, sid=session_id, ev=event, keep=retain_s: (  # type: ignore[misc]
                        self._logs.control.close(ns, sid, ev, retain_s=keep)
                    )
                )
            except StoreUnavailable:
                return
            except (SessionNotFound, SessionClosed):
                pass
            self._waiting.pop((namespace, session_id), None)

    async def _suspend(self, namespace: str, session_id: str) -> None:
        sessions = self._logs.sessions(namespace)
        try:
            state = await self._logs.call(lambda: sessions.get_session(session_id))
            if state.mode == "suspended" or state.state in ("closed", "terminated"):
                return
            data = {"actor": {"user": "operator", "via": "kubernetes"}}
            event = NewEvent(SESSION_SUSPENDED, data, id=f"{STRAY}{state.next_seq - 1}")
            await self._logs.call(
                lambda: self._logs.control.set_mode(namespace, session_id, "suspended", event)
            )
        except (SessionNotFound, SessionClosed):
            return
        log.warning("session %s of %s has no AgentSession: suspended", session_id, namespace)
