"""A real sandboxd for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.sandboxd_rig import Sandboxd


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Sandboxd]:
    """A running sandboxd with an empty workspace."""
    daemon = Sandboxd(tmp_path).start()
    yield daemon
    if daemon.process is not None:
        daemon.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandboxd]:
    """One sandboxd for tests that leave it as they found it."""
    daemon = Sandboxd(tmp_path_factory.mktemp("shared")).start()
    yield daemon
    daemon.stop()
