"""The figures that need no cluster: fenced appends on a real store. Called by `bench/run.py`."""

from __future__ import annotations

import asyncio
from typing import Any

from appends import measure as measure_appends
from support.store import Store


def measure() -> list[dict[str, Any]]:
    """Rows of the table, measured on a store server of our own on loopback."""
    server = Store().start()
    try:
        return asyncio.run(measure_appends(server.url))
    finally:
        server.stop()
