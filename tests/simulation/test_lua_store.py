"""The store of the simulation answers as a real server does: same scripts, same histories, every reply compared."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import rule, run_state_machine_as_test

from cowhand.errors import QuotaExceeded
from cowhand.session import events as ev
from cowhand.session import link as link_module
from cowhand.session import scripts as lua
from cowhand.session import worker as worker_module
from cowhand.session.events import Event, NewEvent
from cowhand.session.export import Export, header_of
from cowhand.session.log import HandRecord, StoreConfig
from cowhand.session.slots import Asked
from cowhand.session.store import Store
from support import sessions as make
from support.log_machine import PICK, SESSIONS, LogMachine, World
from support.lua_store import LuaStore
from support.store import Store as Server
from support.twin_store import Twin, scripts

NS = "team-a"


@pytest.fixture
def twin(store_server: Server, monkeypatch: pytest.MonkeyPatch) -> Twin:
    store_server.command("SCRIPT", "FLUSH")  # neither server knows any
    monkeypatch.setattr(link_module, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(worker_module, "ORPHAN_MS", 0)
    monkeypatch.setattr(worker_module, "BEAT_TTL_MS", 600_000)
    made = Twin(scripts())
    made.watch(monkeypatch)
    return made


class TwinMachine(LogMachine):
    """Histories of `LogMachine`, with what it leaves out because its model does not know it."""

    twin: Twin

    @rule(number=SESSIONS, state=PICK)
    def put_hand(self, number: int, state: int) -> None:
        if self.sid(number) not in self.model.sessions:
            return
        kind: Any = ("Pending", "Ready", "Lost", "Failed")[state % 4]
        record = HandRecord(
            self.sid(number), "main", 1 + state // 4, kind, sandbox="s", sandbox_uid=f"u{state}",
            owner_epoch=state % 3,
        )  # fmt: skip
        self.run(self.control.put_hand(self.namespace, record))
        self.run(self.control.get_hand(self.namespace, self.sid(number), "main", 1 + state // 4))

    @rule()
    def project(self) -> None:
        self.run(self.control.take_projections(self.namespace))

    @rule(number=PICK)
    def heal(self, number: int) -> None:
        self.sweep(number)
        self.run(self.pick(number)._upkeep.audit())

    def teardown(self) -> None:
        work = self.twin.compare_data(self.world.reader, f"cowhand:{self.namespace}:")
        assert self.run(work) > 3


def histories(url: str, twin: Twin, count: int) -> None:
    world = World(url, scripts())
    machine = type("Machine", (TwinMachine,), {"world": world, "twin": twin})
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=count,
                stateful_step_count=40,
                phases=[Phase.generate],
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        world.close()


def test_histories_are_the_same_on_both(store_url: str, twin: Twin) -> None:
    histories(store_url, twin, 15)
    # Which rules Hypothesis draws depends on the modules that are loaded: rare scripts may not come up.
    assert {"create", "ingest", "append", "claim", "beat"} <= set(twin.compared)


WRONG: dict[str, Any] = {
    "_zscore": lambda *_args: 0,
    "_hset": lambda *_args: 0,
    "_xrange": lambda *_args: [],
    "_sadd": lambda *_args: 0,
}


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_is_noticed(
    store_url: str, twin: Twin, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The control: a store with one command that does nothing."""
    monkeypatch.setattr(LuaStore, command, WRONG[command])
    with pytest.raises((AssertionError, BaseExceptionGroup)) as found:
        histories(store_url, twin, 25)
    assert "NoScript" not in str(found.value)


async def stream(events: tuple[Event, ...]) -> AsyncIterator[Event]:
    for event in events:
        yield event


async def test_every_script_once(store_url: str, twin: Twin) -> None:
    async with Store(StoreConfig(store_url, partitions=2), NS, scripts()) as store:
        log, control = store.session_log(), store.control_log()
        worker: Any = store.worker_log("pod-1")
        link = store.link()
        await worker._make_groups(link, [base + "rdy" for base in store.keys().bases()])
        await worker.beat()
        sid = make.new_sid()
        first = [make.created(), make.message()]
        await log.create_session(make.meta(sid, tombstone="ab" * 32), first)
        await log.create_session(make.meta(make.new_sid(), tombstone="ab" * 32), first)
        ready = [base + "rdy" for base in store.keys().bases()]
        assert await worker._read(link, ready, block=False) == [sid]
        await worker.retire()
        await worker.beat()
        assert await worker._read(link, ready, block=False) == [sid]
        lease = await make.take(worker, sid)
        await worker.append(lease, [make.result(str(number)) for number in range(5)])
        await worker.touch(lease)
        record = HandRecord(sid, "main", 1, "Ready", sandbox="s", sandbox_uid="u", owner_epoch=1)
        for state in ("Ready", "Pending", "Lost", "Ready"):
            await control.put_hand(NS, replace(record, state=state))
        await control.set_budget(NS, sid, NewEvent(ev.SESSION_UPDATED, {"budget": None}, id="b:1"))
        await worker.append(
            lease, [NewEvent(ev.STATUS_IDLE, {"stop_reason": {"type": "end_turn"}})]
        )
        state = await log.get_session(sid)
        assert (await worker.park(lease, state.next_seq)).parked
        await log.emit_event(sid, make.message("m2"))
        await worker.handover(await make.take(worker, sid))
        await control.set_mode(NS, sid, "suspended", make.suspended(1))
        await control.set_mode(NS, sid, "running", make.resumed(2))
        again = await make.take(worker, sid)
        await worker.append(
            again, [NewEvent(ev.STATUS_IDLE, {"stop_reason": {"type": "end_turn"}})]
        )
        assert (await worker.park(again, (await log.get_session(sid)).next_seq)).parked

        fork = make.new_sid()
        note = NewEvent(ev.SESSION_FORKED, {"session": sid, "position": 4}, id="fork")
        await log.fork_session(make.meta(fork), make.created(), (sid, 4), [note])
        kept = Export(header_of(await log.get_session(sid), 1), tuple(await log.get_events(sid)))
        keys = store.keys().session(sid)
        await store.reads.call("DEL", keys.meta, keys.log, keys.name("dedupe"))
        await log.restore_session(kept.header, stream(kept.events))
        assert tuple(await log.get_events(sid)) == kept.events

        lost = NewEvent(ev.LOG_REGRESSED, {"seen": 99, "position": 9}, id="regressed:99")
        position = await control.regress(NS, sid, lost, seen=99)
        assert not await control.accept_regression(NS, sid, 1)
        assert await control.accept_regression(NS, sid, position - 1)
        archive: Any = store.archive_log()
        assert await archive.archived(NS, sid, 1, 3)
        assert not await archive.archived(NS, sid, 1, 3)

        gate = store.rate_gate()
        entry = await gate.enter("w", "m")
        for round_, after in enumerate((None, 60.0, 0.0)):
            one = replace(entry, round=round_)
            await gate.shut("w", "m", one, kind="rate_limit_error", retry_after_s=after)
            await gate.shut("w", "m", one, kind="rate_limit_error", retry_after_s=after)
            await gate.enter("w", "m", place=(await gate.enter("w", "m")).place)
        await gate.opened("w", "m", replace(entry, round=3))
        await gate.opened("w", "m", replace(entry, round=3))

        slots = store.model_slots()
        for client, namespace in (("1", "a"), ("2", "b"), ("1", "a")):
            asked = Asked(client, 4, ("1", "2", "3"), ("0",))
            await slots.ask("ab" * 32, namespace, asked, limit=4, weight=2)
        ended = Asked("1", 0, (), (), ("0", "1", "2"))
        await slots.ask("ab" * 32, "a", ended, limit=4, weight=2)
        asked = Asked("2", 2, ("1", "4"), ("0",))
        answer = await slots.ask("ab" * 32, "b", asked, limit=4, weight=2)
        assert answer.granted == ("1", "4")

        await control.put_quota(NS, 100, 1000)
        with pytest.raises(QuotaExceeded):
            await log.emit_event(fork, make.message("big", "x" * 900))
        await control.put_quota(NS, 100, None)
        await worker._upkeep.trim()
        await worker._upkeep.requeue()
        await worker._upkeep.audit()
        lease = await make.take(worker, fork)
        await worker.park(lease, lease.next_seq, state="rescheduling", wake_at_ms=1)
        assert await worker._upkeep.due() == 1
        base = store.keys().base_of(sid)
        consumer = worker.worker_id
        await store.writes.script("forget", [base + "rdy"], base, "", worker_module.GROUP, consumer)
        for one in (sid, fork):
            await worker.beat()
            await worker.claim(one)
            await control.drop_worker(NS, "pod-1")
            await worker._upkeep.requeue()
            await control.close(NS, one, make.deleted(), retain_s=0)
        assert await twin.compare_data(link, f"cowhand:{NS}:") > 3
        await link.close()
    assert not set(lua.load()) - set(twin.compared)
