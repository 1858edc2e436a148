"""Small makers of sessions and events for tests of the log and of its users."""

from __future__ import annotations

import uuid
from typing import Any

from cowhand.session import events as ev
from cowhand.session.events import NewEvent
from cowhand.session.log import Held, Lease, SessionLog, SessionMeta, WorkerLog


def new_sid() -> str:
    return f"sesn_{uuid.uuid4().hex}"


def meta(sid: str, namespace: str = "team-a", **more: Any) -> SessionMeta:
    model = {"base_url": "http://model.test", "secret": None}
    return SessionMeta(sid, namespace, "fix-it", sid[5:], model, **more)


def created() -> NewEvent:
    return NewEvent(ev.SESSION_CREATED, {"name": "fix-it"}, id="created")


def message(event_id: str = "msg:0", text: str = "Hello") -> NewEvent:
    return NewEvent(ev.USER_MESSAGE, {"content": [{"type": "text", "text": text}]}, id=event_id)


def result(text: str = "done") -> NewEvent:
    return NewEvent(ev.TOOL_RESULT, {"tool_use_id": "toolu_1", "content": text, "is_error": False})


def suspended(number: int = 1) -> NewEvent:
    return NewEvent(ev.SESSION_SUSPENDED, {}, id=f"mode:{number}")


def resumed(number: int = 2) -> NewEvent:
    return NewEvent(ev.SESSION_RESUMED, {}, id=f"mode:{number}")


def deleted() -> NewEvent:
    return NewEvent(ev.SESSION_DELETED, {}, id="deleted")


async def start(log: SessionLog, *, sid: str = "", namespace: str = "team-a") -> str:
    """A session with one message; answers its id."""
    sid = sid or new_sid()
    await log.create_session(meta(sid, namespace), [created(), message()])
    return sid


async def take(worker: WorkerLog, sid: str) -> Lease:
    lease = await worker.claim(sid)
    assert not isinstance(lease, Held), lease
    return lease


async def first(iterator: Any) -> Any:
    """The next item of an async iterator."""
    return await anext(aiter(iterator))
