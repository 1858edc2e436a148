"""The world of the local figures: a real store, the scripted model server and real `cowhand harness` processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from support import harness_stack
from support.harness_stack import Stack
from support.store import Store as Server

TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """CPU and memory of a running process, from /proc."""

    pid: int

    def cpu(self) -> float:
        """Seconds of CPU so far, user and system."""
        stat = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(stat[11]) + int(stat[12])) / TICK

    def rss(self) -> float:
        """MiB."""
        for line in pathlib.Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS")


@dataclass
class World:
    """A `Stack` with its server, and harness processes that can be measured."""

    stack: Stack
    server: Server

    async def harness(self, **settings: Any) -> tuple[str, Process]:
        """Start `cowhand harness`; its pod uid, and the process to measure."""
        pod = await self.stack.worker(**{key: str(value) for key, value in settings.items()})
        return pod, Process(self.stack.workers[pod].pid)

    def used_memory(self) -> int:
        """Bytes that the store uses, as it says."""
        info = self.server.command("INFO", "memory").decode()
        line = next(one for one in info.splitlines() if one.startswith("used_memory:"))
        return int(line.split(":")[1])

    async def arrivals(self) -> list[tuple[str, float]]:
        """(session, seconds since the epoch) of every model request so far."""
        found = await self.stack.control("GET", "requests?bodies=0")
        assert not found["dropped"], "the model server forgot requests"
        return [(one["session"], one["received_at"]) for one in found["requests"]]

    def model_process(self) -> Process:
        """The model server, to see whether it was the one that could not keep up."""
        return Process(self.stack.model.pid)


@contextlib.asynccontextmanager
async def world() -> AsyncIterator[World]:
    """Everything but harness processes; 16 partitions and profile dev, as the chart has it."""
    server = Server().start()
    try:
        with tempfile.TemporaryDirectory(prefix="cowhand-bench-") as folder:
            async with harness_stack.stack(
                server.url, pathlib.Path(folder), partitions=16
            ) as stack:
                yield World(stack, server)
    finally:
        server.stop()


async def until(what: str, check: Any, seconds: float = 300.0, every: float = 0.05) -> Any:
    """The first true answer of `check`."""
    deadline = time.monotonic() + seconds
    while not (found := await check()):
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        await asyncio.sleep(every)
    return found


def host() -> str:
    """The machine, as the conditions name it."""
    return f"{os.cpu_count()} shared cores, everything on one host"
