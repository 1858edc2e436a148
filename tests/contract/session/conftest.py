"""Fixtures: the three roles on a real store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from cowhand.session import connect
from cowhand.session import worker as worker_module
from cowhand.session.log import ControlLog, SessionLog, StoreConfig, WorkerLog
from cowhand.session.store import Store

NAMESPACE = "team-a"


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine must not look like a dead worker; tests that want one make it."""
    monkeypatch.setattr(worker_module, "BEAT_TTL_MS", 600_000)
    monkeypatch.setattr(worker_module, "ORPHAN_MS", 600_000)


@dataclass
class Roles:
    store: Store
    log: SessionLog
    worker: WorkerLog
    control: ControlLog


def roles(store: Store) -> Roles:
    return Roles(store, store.session_log(), store.worker_log("pod-1"), store.control_log())


@pytest.fixture
async def log_roles(store_url: str) -> AsyncIterator[Roles]:
    async with connect(StoreConfig(store_url), namespace=NAMESPACE) as store:
        made = roles(store)
        await made.worker.beat()
        yield made
