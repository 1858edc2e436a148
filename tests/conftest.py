"""Fixtures of all tests: a real store server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.store import Store


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
