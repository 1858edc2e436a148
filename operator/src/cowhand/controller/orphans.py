"""Sessions whose object is gone and whose log has not ended: they are ended when the store is back."""

from __future__ import annotations

from cowhand.controller.logs import Logs
from cowhand.errors import SessionClosed, SessionNotFound, StoreUnavailable
from cowhand.session.events import SESSION_DELETED, NewEvent


class Orphans:
    """Sessions whose object is gone and whose log may not have ended.

    In memory: a restart of the operator forgets them, and the projection finds those that still run.
    """

    def __init__(self, logs: Logs, retain_s: int) -> None:
        self._logs = logs
        self._retain_s = retain_s
        self._waiting: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, namespace: str, session_id: str, *, keep: bool = True) -> None:
        """End this session's log when that is possible; `keep` retains it for the usual time."""
        self._waiting[(namespace, session_id)] = self._retain_s if keep else 0

    async def sweep(self) -> None:
        """Try each; what fails stays."""
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
