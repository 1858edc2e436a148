"""A dead store costs one wait, not many."""

from __future__ import annotations

import pytest

from cowhand.controller.logs import Logs
from cowhand.errors import QuotaExceeded, SessionNotFound, StoreMismatch, StoreUnavailable
from support.memory_log import MemoryLog


async def test_a_call_that_hangs_ends_and_the_next_do_not_wait() -> None:
    log = MemoryLog()
    log.hang = True
    logs = Logs(log, log.of, limit_s=0.01)
    for _ in range(50):
        with pytest.raises(StoreUnavailable):
            await logs.call(lambda: log.backlog("ns"))
    assert log.calls == 1


async def test_it_is_tried_again_and_works() -> None:
    log = MemoryLog()
    log.down = True
    logs = Logs(log, log.of)
    with pytest.raises(StoreUnavailable):
        await logs.call(lambda: log.backlog("ns"))
    log.down = False
    logs._breaker._down = None  # the pause is over
    assert (await logs.call(lambda: log.backlog("ns"))).ready == 0


async def test_answers_are_no_outage() -> None:
    log = MemoryLog()
    logs = Logs(log, log.of)
    for _ in range(2):
        with pytest.raises(SessionNotFound):
            await logs.call(lambda: log.of("ns").get_session("sesn_x"))
    assert log.calls == 2


async def test_another_store_counts_as_none() -> None:
    async def other() -> None:
        raise StoreMismatch("this is not the store that we started with")

    log = MemoryLog()
    with pytest.raises(StoreUnavailable, match="not the store"):
        await Logs(log, log.of).call(other)


async def test_a_full_tenant_is_no_outage_for_the_others() -> None:
    async def full() -> None:
        raise QuotaExceeded("ns", used=2, limit=1)

    log = MemoryLog()
    logs = Logs(log, log.of)
    with pytest.raises(QuotaExceeded):
        await logs.call(full)
    assert (await logs.call(lambda: log.backlog("other"))).ready == 0
