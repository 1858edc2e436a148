"""Fixtures of all tests: a real store server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from support.store import Store

# No test asserts a time: a busy machine may take longer than Hypothesis's 200 ms for an example.
settings.register_profile("cowhand", deadline=None)
settings.load_profile("cowhand")


@pytest.fixture(scope="session")
def store_server() -> Iterator[Store]:
    """One server for the whole run, AOF on, no password. To restart one, make a `Store()` yourself."""
    server = Store().start()
    yield server
    server.stop()


@pytest.fixture
def store_url(store_server: Store) -> str:
    """URL of the server, emptied before each test."""
    store_server.flush()
    return store_server.url
