"""Runs one tool call: check of the input, the tool, its timeout, its result. Called by `calls`.

Every outcome is a result; nothing a caller sends makes `run` raise.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from sandboxd import files
from sandboxd.grep import grep
from sandboxd.inputs import ToolError, check
from sandboxd.output import cap_text
from sandboxd.procs import Reaper
from sandboxd.settings import Settings
from sandboxd.shell import Shell

DEFAULT_TIMEOUT_MS = 120_000
MAX_TIMEOUT_MS = 24 * 3600 * 1000
PURE = frozenset({"read", "glob", "grep"})
"""Tools without an effect: they run at once, and twice does no harm."""

Result = dict[str, Any]


class Tools:
    """The tools of one sandbox. Bash commands queue, and so do writes and edits; pure tools run side by side."""

    def __init__(self, settings: Settings, reaper: Reaper) -> None:
        self._settings = settings
        self._reaper = reaper
        self.shell = Shell(reaper, settings.workdir, settings.command_env, settings.state)
        self._bash_turn = asyncio.Lock()
        self._files_turn = asyncio.Lock()

    async def run(
        self, name: str, given: Mapping[str, Any], timeout_ms: int, interrupt: asyncio.Event
    ) -> Result:
        """Run a tool; the result is `{content, is_error, exit_code, truncated, duration_ms}`."""
        start = time.monotonic()
        try:
            tool_input = check(name, given)
            limit = min(timeout_ms, MAX_TIMEOUT_MS, tool_input.get("timeout_ms", MAX_TIMEOUT_MS))
            if name == "bash":
                result = await self._bash(tool_input, limit / 1000, interrupt)
            else:
                result = await self._bounded(name, tool_input, limit / 1000, interrupt)
        except ToolError as err:
            result = _failed(str(err))
        except OSError as err:
            result = _failed(f"{name}: the sandbox cannot run this: {err.strerror or err}")
        result["duration_ms"] = round((time.monotonic() - start) * 1000)
        return result

    async def _bash(
        self, given: Mapping[str, Any], timeout_s: float, interrupt: asyncio.Event
    ) -> Result:
        if given.get("restart"):
            if given.get("command"):
                raise ToolError("bash: give either command or restart, not both")
            async with self._bash_turn:
                await self.shell.restart()
            return _done("bash session restarted")
        command = given.get("command", "")
        if not command.strip():
            raise ToolError("bash: field 'command' is required (or restart: true)")
        if not await _turn(self._bash_turn, interrupt):
            return _failed("the call was interrupted before its command started")
        try:
            ran = await self.shell.run(command, timeout_s, interrupt)
        finally:
            self._bash_turn.release()
        content = ran.output
        if ran.note:
            content += ("\n" if content and not content.endswith("\n") else "") + ran.note
        return {
            "content": content,
            "is_error": ran.exit_code != 0,
            "exit_code": ran.exit_code,
            "truncated": ran.truncated,
        }

    async def _bounded(
        self, name: str, given: Mapping[str, Any], timeout_s: float, interrupt: asyncio.Event
    ) -> Result:
        work = asyncio.ensure_future(self._file_tool(name, given))
        stop = asyncio.ensure_future(interrupt.wait())
        try:
            await asyncio.wait({work, stop}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if stop.done():
                return _failed(f"{name}: the call was interrupted")
            return _failed(f"{name}: timed out after {round(timeout_s * 1000)} ms")
        finally:
            stop.cancel()
            work.cancel()
            await asyncio.gather(stop, work, return_exceptions=True)

    async def _file_tool(self, name: str, given: Mapping[str, Any]) -> Result:
        workdir = self._settings.workdir
        if name == "grep":
            text, truncated = await grep(
                self._reaper,
                workdir,
                self._settings.command_env,
                given["pattern"],
                given.get("path"),
            )
            return {**_done(text), "truncated": truncated}
        if name == "read":
            return await _threaded(files.read, workdir, given["file_path"], given.get("view_range"))
        if name == "glob":
            stop = threading.Event()
            try:
                return await _threaded(
                    files.glob, workdir, given["pattern"], given.get("path"), stop
                )
            finally:
                stop.set()
        async with self._files_turn:
            if name == "write":
                return await _threaded(files.write, workdir, given["file_path"], given["content"])
            replace_all = given.get("replace_all", False)
            texts = given["old_string"], given["new_string"]
            return await _threaded(
                lambda: files.edit(workdir, given["file_path"], *texts, replace_all=replace_all)
            )


async def _turn(lock: asyncio.Lock, interrupt: asyncio.Event) -> bool:
    """Take the lock; False, without it, when the call is interrupted first."""
    if not lock.locked() and not interrupt.is_set():
        return await lock.acquire()
    mine = asyncio.ensure_future(lock.acquire())
    stop = asyncio.ensure_future(interrupt.wait())
    try:
        await asyncio.wait({mine, stop}, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        if mine.done() and not mine.cancelled():
            lock.release()
        mine.cancel()
        raise
    finally:
        stop.cancel()
    if not interrupt.is_set():
        return True
    if mine.done():
        lock.release()
    mine.cancel()
    return False


async def _threaded(function: Callable[..., str], *args: object) -> Result:
    text, truncated = cap_text(await asyncio.to_thread(function, *args))
    return {**_done(text), "truncated": truncated}


def _done(content: str) -> Result:
    return {"content": content, "is_error": False, "exit_code": None, "truncated": False}


def _failed(message: str) -> Result:
    return {"content": message, "is_error": True, "exit_code": None, "truncated": False}
