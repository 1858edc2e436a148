"""Turns on a real store, as a harness would write them: for tests of forks, backups and restored stores."""

from __future__ import annotations

from typing import Any

from cowhand.harness.context import outgoing
from cowhand.harness.decide import Append, SendRequest, next_step
from cowhand.harness.journal import Journal
from cowhand.harness.profiles.registry import load
from cowhand.harness.verify import verify
from cowhand.session import events as ev
from cowhand.session.events import Event, NewEvent
from cowhand.session.export import Export, header_of
from support import sessions as make
from support.harness_rig import message, text


async def work(
    store: Any, namespace: str, sid: str, said: str, *, idle: bool = True
) -> list[Event]:
    """A turn whose answer is `said`; answers the whole log. Not `idle`: the turn stays open."""
    log, worker = store.session_log(namespace), store.worker_log("pod", namespace)
    await worker.beat()
    lease = await make.take(worker, sid)
    journal = Journal(worker, log, lease)
    await journal.load()
    step = next_step(journal.conversation, profiles=load())
    while isinstance(step, Append):
        await journal.append(step.events)
        step = next_step(journal.conversation, profiles=load())
    assert isinstance(step, SendRequest), step
    request = outgoing(
        journal.conversation, n=step.n, attempt=step.attempt, horizon=step.horizon,
        max_tokens=step.max_tokens, purpose=step.purpose, now_ms=journal.now_ms(),
    )  # fmt: skip
    begin = [NewEvent(ev.STATUS_RUNNING, {}), NewEvent(ev.MODEL_REQUEST_START, request.start)]
    await journal.append(begin)
    if idle:
        answer = {"message": message(text(said)), "request_id": "", "ttft_ms": 1, "duration_ms": 1}
        seq = journal.conversation.last_seq
        end = NewEvent(ev.MODEL_REQUEST_END, {"start": seq, "outcome": "ok"})
        await journal.append([NewEvent(ev.MODEL_RESPONSE, answer), end])
        step = next_step(journal.conversation, profiles=load())
        assert isinstance(step, Append), step
        await journal.append(step.events)
        await worker.park(lease, journal.conversation.last_seq + 1)
    await journal.close()
    found: list[Event] = await log.get_events(sid)
    return found


async def backup(store: Any, namespace: str, sid: str) -> Export:
    """The session as a file would have it."""
    log = store.session_log(namespace)
    return Export(header_of(await log.get_session(sid), 1), tuple(await log.get_events(sid)))


async def violations(store: Any, namespace: str, sid: str) -> list[str]:
    """What `cowhand verify` finds."""
    return [str(item) for item in verify(await backup(store, namespace, sid)).violations]
