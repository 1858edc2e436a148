"""Calls by id: each runs once, whoever asks and however often. Called by `server`; results lie in the journal."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sandboxd.journal import Journal
from sandboxd.tools import PURE, Result, Tools


class Mismatch(Exception):
    """The call id was used before with another tool or another input."""


@dataclass
class Running:
    """A call in work."""

    task: asyncio.Task[Result]
    interrupt: asyncio.Event = field(default_factory=asyncio.Event)


class Calls:
    """All calls of this sandbox."""

    def __init__(self, tools: Tools, journal: Journal) -> None:
        self._tools = tools
        self._journal = journal
        self._running: dict[str, Running] = {}
        self._unwritten: dict[str, Result] = {}

    async def execute(
        self, call_id: str, name: str, given: Mapping[str, Any], timeout_ms: int
    ) -> Result:
        """The result of the call: run now, waited for, or stored.

        A caller that goes away does not stop the call.

        Raises:
            Mismatch: the id belongs to another call.
            OSError: the journal cannot be written; the call was not started.
        """
        digest = _digest(name, given)
        known = self._journal.digest(call_id)
        if known is None:
            self._journal.begin(call_id, digest, durable=name not in PURE)
            interrupt = asyncio.Event()
            task = asyncio.create_task(self._run(call_id, name, given, timeout_ms, interrupt))
            self._running[call_id] = Running(task, interrupt)
        elif known != digest:
            raise Mismatch(f"call {call_id} was started with another name or input")
        if running := self._running.get(call_id):
            return await asyncio.shield(running.task)
        result = self.result(call_id)
        assert result is not None
        return result

    async def look(self, call_id: str, wait_ms: int) -> tuple[str, Result | None]:
        """Status (`running`, `done`, `unknown`) and result, after waiting for the end at most `wait_ms`."""
        if running := self._running.get(call_id):
            if wait_ms > 0:
                await asyncio.wait({running.task}, timeout=wait_ms / 1000)
            if not running.task.done():
                return "running", None
        result = self.result(call_id)
        return ("unknown", None) if result is None else ("done", result)

    async def interrupt(self, call_id: str) -> tuple[str, Result | None]:
        """Stop a running call and wait for its result, which says so."""
        if running := self._running.get(call_id):
            running.interrupt.set()
        return await self.look(call_id, 10_000)

    def result(self, call_id: str) -> Result | None:
        """The result of a call that has ended."""
        return self._unwritten.get(call_id) or self._journal.result(call_id)

    async def close(self) -> None:
        """Stop all running calls; a later sandboxd reports them as partly executed."""
        tasks = [r.task for r in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(
        self,
        call_id: str,
        name: str,
        given: Mapping[str, Any],
        timeout_ms: int,
        interrupt: asyncio.Event,
    ) -> Result:
        try:
            result = await self._tools.run(name, given, timeout_ms, interrupt)
        except Exception as err:  # a bug of ours must still end the call with a result
            result = {
                "content": f"sandboxd failed: {type(err).__name__}: {err}; the call may have partly executed",
                "is_error": True,
                "exit_code": None,
                "truncated": False,
                "duration_ms": 0,
            }
        finally:
            self._running.pop(call_id, None)
        try:
            self._journal.finish(call_id, result)
        except OSError:
            self._unwritten[call_id] = (
                result  # disk full: this process still knows, a new one says "may have"
            )
            while len(self._unwritten) > 32:
                self._unwritten.pop(next(iter(self._unwritten)))
        return result


def _digest(name: str, given: Mapping[str, Any]) -> str:
    canonical = json.dumps([name, given], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]
