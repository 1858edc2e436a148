"""Sessions with a past: logs as a harness would have written them, without running the turns.

Every event is folded as it is made, and the last request carries the hash that a worker will check when it wakes
the session.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

from cowhand.harness.fold import Conversation
from cowhand.harness.journal import steadily
from cowhand.harness.request import prefix_sha
from cowhand.session import events as ev
from cowhand.session.events import Event, NewEvent
from cowhand.session.log import Lease, SessionMeta, WorkerLog
from cowhand.session.store import Store
from support.harness_rig import NAMESPACE, created, message, text, tool_use, user

EVENTS_PER_CALL = 5
BATCH = 100


class _Log:
    """Events of one session, folded as they are made."""

    def __init__(self, session_id: str, first: str) -> None:
        self.conversation = Conversation(session_id)
        self.first = (
            NewEvent(ev.SESSION_CREATED, created(), id="created"),
            user(first, "msg:0"),
        )
        self.rest: list[NewEvent] = []
        for event in self.first:
            self._fold(event)
        self._fold(NewEvent(ev.SESSION_WAKE, {}))  # the claim of the seeding worker writes it

    def _fold(self, event: NewEvent) -> None:
        seq = self.conversation.last_seq + 1
        self.conversation.apply(Event(seq, event.type, "", 0, "", event.payload()))

    def add(self, kind: str, data: dict[str, Any]) -> None:
        event = NewEvent(kind, data)
        self.rest.append(event)
        self._fold(event)

    def request(self, *, last: bool = False) -> None:
        """A wake checks the hash of the last request alone; those of the others are not made."""
        talk, sha, count = self.conversation, "0" * 64, 2 * self.conversation.n + 1
        if last:
            prompt = talk.prompt(talk.last_seq)
            sha = prefix_sha(talk.base, talk.session_id, talk.max_tokens, prompt)
            assert len(prompt) == count
        data = {
            "n": talk.n + 1, "attempt": 1, "horizon": talk.last_seq, "n_messages": count,
            "prefix_sha": sha,
        }  # fmt: skip
        self.add(ev.MODEL_REQUEST_START, data)

    def response(self, answer: dict[str, Any]) -> None:
        request = self.conversation.request
        assert request is not None
        times = {"request_id": "req_seed", "ttft_ms": 1, "duration_ms": 2}
        self.add(ev.MODEL_RESPONSE, {"message": answer, **times})
        self.add(ev.MODEL_REQUEST_END, {"start": request.seq, "outcome": "ok"})


def history(session_id: str, first: str, calls: int, result: int) -> _Log:
    """A finished turn: `calls` tool calls with results of `result` characters, then an answer."""
    log = _Log(session_id, first)
    words = random.Random(session_id)
    log.add(ev.STATUS_RUNNING, {})
    for number in range(calls):
        use = f"toolu_{number:05}"
        log.request()
        log.response(message(tool_use(use, command=f"make {number}"), stop_reason="tool_use"))
        log.add(
            ev.TOOL_STARTED,
            {
                "tool_use_id": use, "call_id": f"{session_id}/{use}", "name": "bash", "attempt": 1,
                "hand": "main", "instance": 1, "class": "effect", "timeout_ms": 120_000,
            },
        )  # fmt: skip
        content = words.randbytes(result // 2).hex()
        log.add(
            ev.TOOL_RESULT,
            {"tool_use_id": use, "content": content, "is_error": False, "synthesized": False},
        )
    log.request(last=True)
    log.response(message(text("done")))
    log.add(ev.STATUS_IDLE, {"stop_reason": {"type": "end_turn"}})
    return log


async def put(store: Store, worker: WorkerLog, log: _Log) -> str:
    """Write the log and leave the session idle."""
    sid = log.conversation.session_id
    meta = SessionMeta(sid, NAMESPACE, "", sid[5:], {"base_url": "", "secret": None})
    await steadily("seed", lambda: store.session_log().create_session(meta, log.first))
    lease = await steadily("seed", lambda: worker.claim(sid))
    assert isinstance(lease, Lease), lease
    for at in range(0, len(log.rest), BATCH):
        batch = log.rest[at : at + BATCH]
        status = log.conversation.status if at + BATCH >= len(log.rest) else None
        await steadily("seed", partial(worker.append, lease, batch, status=status))
    parked = await steadily("seed", lambda: worker.park(lease, log.conversation.last_seq + 1))
    assert parked.parked
    return sid


async def idle_sessions(
    store: Store,
    count: int,
    *,
    first: str = "[[script:echo]] hi",
    calls: int = 2,
    result: int = 200,
) -> list[str]:
    """So many idle sessions, each with one finished turn."""
    worker = store.worker_log("seed")
    await worker.beat()
    done: list[str] = []

    async def some(share: int) -> None:
        for _ in range(share):
            sid = f"sesn_{uuid.uuid4().hex}"
            done.append(await put(store, worker, history(sid, first, calls, result)))

    async def beats() -> None:
        while True:
            await worker.beat()
            await asyncio.sleep(2)

    beating = asyncio.create_task(beats())
    try:
        lanes = 50 if calls < 10 else 4  # long logs are made at the cost of the heartbeat
        await asyncio.gather(*(some(count // lanes + (i < count % lanes)) for i in range(lanes)))
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
    await worker.retire()
    return done


async def wake_all(store: Store, sids: Sequence[str], words: str = "go on") -> None:
    """A message to each, as fast as the log takes them."""
    log = store.session_log()
    for at in range(0, len(sids), 500):
        part = sids[at : at + 500]
        await asyncio.gather(*(log.emit_event(sid, user(words, uuid.uuid4().hex)) for sid in part))
