"""Fixtures of all tests: a real store server."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

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


REAL: Final = ("adversarial", "chaos", "contract", "e2e", "integration")
"""Folders whose tests run real processes, servers and clusters."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test of real processes that fails gets a second try; the summary names it (see docs/adr/0018)."""
    tries = int(os.environ.get("COWHAND_RERUNS", "1"))
    folders = [config.rootpath / "tests" / name for name in REAL]
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in folders):
            item.add_marker(pytest.mark.flaky(reruns=tries))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What `make soak` has done, from the `record_property` of its tests, whichever process ran them."""
    counted: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                for name, value in report.user_properties:
                    counted[name] += value if isinstance(value, int) else 0
    if counted:
        terminalreporter.section("soak")
        for name, number in counted.items():
            terminalreporter.write_line(f"{number:>8}  {name}")
