"""Fixtures: the three roles on a real store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from cowhand.session import connect
from cowhand.session.log import ControlLog, SessionLog, StoreConfig, WorkerLog
from cowhand.session.store import Store

NAMESPACE = "team-a"


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
