"""The persistent bash of the sandbox.

One `bash --noprofile --norc` lives as long as nothing kills it: working directory, variables, functions and
background jobs stay from call to call. Called by `tools` for the bash tool, one command at a time.

How a command's end and output are told apart from everything else:

* the shell's own stdin is the pipe that we write to, its own stdout is the control pipe, its own stderr is
  /dev/null. A command runs in `eval` with all three replaced: stdin /dev/null, stdout and stderr a new FIFO;
* after it the shell prints a random word and `$?` to the control pipe. No output of a command can look like it,
  because no command holds that pipe;
* what a background job writes later goes to the FIFO of the call that started it. It is read and thrown away
  until the last writer is gone: a full pipe would stop the job, a closed one would kill it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import secrets
import shlex
import struct
import termios
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sandboxd.output import Collector
from sandboxd.procs import Child, Reaper, kill_session

_CHUNK = 1 << 16
_CONTROL_KEEP = 1 << 12
_BASH = "/bin/bash"
_DIED = (
    "[the shell had ended since the last command; this one ran in a new shell: variables, functions and"
    " background processes of the old one are gone, files are kept]"
)


@dataclass(frozen=True)
class ShellResult:
    """What one command did."""

    output: str
    exit_code: int | None
    """None when it did not end by itself."""
    truncated: bool
    note: str = ""
    """Why the shell is not the one it was before; empty if it is."""


class Shell:
    """The one bash of this sandbox.

    Args:
        reaper: starts and reaps the process.
        workdir: where a new shell begins.
        env: its whole environment.
        state: directory for the FIFOs.
    """

    def __init__(self, reaper: Reaper, workdir: Path, env: Mapping[str, str], state: Path) -> None:
        self._reaper = reaper
        self._workdir = workdir
        self._env = env
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._child: Child | None = None
        self._stdin = -1
        self._control = -1
        self._control_seen = bytearray()
        self._wanted: tuple[re.Pattern[bytes], asyncio.Future[int]] | None = None
        self._drains: set[int] = set()

    def start(self, cwd: Path | None = None) -> None:
        """Start the shell unless it runs; in the working directory if `cwd` is gone.

        Raises:
            OSError: there is no bash, or no process can be made.
        """
        if self._child is not None and not self._child.exit.done():
            return
        self._close_pipes()
        where = cwd if cwd is not None and cwd.is_dir() else self._workdir
        commands_read, commands_write = os.pipe2(os.O_CLOEXEC)
        control_read, control_write = os.pipe2(os.O_CLOEXEC)
        try:
            self._child = self._reaper.spawn(
                [_BASH, "--noprofile", "--norc"],
                cwd=where,
                env=self._env,
                stdin=commands_read,
                stdout=control_write,
            )
        except OSError:
            os.close(commands_write)
            os.close(control_read)
            raise
        finally:
            os.close(commands_read)
            os.close(control_write)
        self._stdin, self._control = commands_write, control_read
        os.set_blocking(self._stdin, False)
        os.set_blocking(self._control, False)
        self._control_seen.clear()
        self._loop.add_reader(self._control, self._on_control)

    async def run(self, command: str, timeout_s: float, interrupt: asyncio.Event) -> ShellResult:
        """Run one command to its end, its timeout or its interruption. Calls must not overlap.

        Raises:
            OSError: the shell cannot be started or the state directory cannot be written.
        """
        died = self._child is not None and self._child.exit.done()
        self.start()
        assert self._child is not None
        child, output = self._child, Collector()
        fifo, path, keeper = self._open_fifo(output)
        word = secrets.token_hex(16)
        done: asyncio.Future[int] = self._loop.create_future()
        self._wanted = (re.compile(rb"\n%s (\d+)\n" % word.encode()), done)
        script = (
            f"builtin eval {shlex.quote(command)} </dev/null >{shlex.quote(str(path))} 2>&1\n"
            f"builtin printf '\\n%s %d\\n' {word} $?\n"
        )
        feed = self._loop.create_task(self._feed(script.encode()))
        stop = self._loop.create_task(interrupt.wait())
        try:
            ends: set[asyncio.Future[Any]] = {done, stop, child.exit}
            await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if child.exit.done() and not done.done():
                self._on_control()  # the command may have ended before the shell did
            result = await self._finish(child, done, stop.done(), timeout_s, output, fifo)
            if died and not result.note:
                return replace(result, note=_DIED)
            return result
        finally:
            self._wanted = None
            for task in (feed, stop):
                task.cancel()
            await asyncio.gather(feed, stop, return_exceptions=True)
            os.close(keeper)
            self._drain_later(fifo)
            with contextlib.suppress(OSError):
                path.unlink()

    async def _finish(
        self,
        child: Child,
        done: asyncio.Future[int],
        interrupted: bool,
        timeout_s: float,
        output: Collector,
        fifo: int,
    ) -> ShellResult:
        note, code = "", None
        if done.done():
            code = done.result()
        else:
            cwd = self._cwd(child)
            if child.exit.done():
                code = child.exit.result()
                how = (
                    f"the shell exited with code {code}"
                    if code >= 0
                    else f"the shell was killed by signal {-code}"
                )
            elif interrupted:
                how = "the command was interrupted; it and the processes it started were killed"
            else:
                how = (
                    f"the command timed out after {round(timeout_s * 1000)} ms; it and the processes it started were"
                    " killed"
                )
            await self._reaper.kill(child)
            self.start(cwd)
            note = (
                f"[{how}. A new shell was started in {self._cwd(self._child)}: variables, functions and background"
                " processes of the old one are gone, files are kept]"
            )
        _read_available(fifo, output)
        text, truncated = output.render()
        return ShellResult(text, code, truncated, note)

    async def restart(self) -> None:
        """Kill the shell with all its processes and start one in the working directory."""
        if self._child is not None:
            await self._reaper.kill(self._child)
        self.start(self._workdir)

    def close(self) -> None:
        """Kill the shell with all its processes; for the end of this program."""
        if self._child is not None and not self._child.exit.done():
            kill_session(self._child.pid)
        self._close_pipes()
        for fd in list(self._drains):
            self._drop_drain(fd)

    def _close_pipes(self) -> None:
        if self._control >= 0:
            self._loop.remove_reader(self._control)
            os.close(self._control)
        if self._stdin >= 0:
            self._loop.remove_writer(self._stdin)
            os.close(self._stdin)
        self._control = self._stdin = -1

    def _open_fifo(self, output: Collector) -> tuple[int, Path, int]:
        """A new FIFO: the reading end (its data goes to `output`), its path, and a writing end.

        The writing end is ours: it keeps the reading end from seeing an end of file before the shell opens it.
        """
        path = self._state / f"out-{secrets.token_hex(8)}"
        try:
            os.mkfifo(path, 0o600)
        except FileNotFoundError:
            self._state.mkdir(parents=True, exist_ok=True)
            os.mkfifo(path, 0o600)
        fifo = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(
            OSError
        ):  # larger pipe: fewer switches for large output; a limit may forbid it
            fcntl.fcntl(fifo, fcntl.F_SETPIPE_SZ, 1 << 20)
        keeper = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

        def read() -> None:
            with contextlib.suppress(BlockingIOError):
                output.add(os.read(fifo, _CHUNK))

        self._loop.add_reader(fifo, read)
        return fifo, path, keeper

    def _drain_later(self, fifo: int) -> None:
        """Read and throw away what background jobs still write, until the last of them is gone."""

        def read() -> None:
            try:
                data = os.read(fifo, _CHUNK)
            except BlockingIOError:
                return
            if not data:
                self._drop_drain(fifo)

        self._loop.remove_reader(fifo)
        self._drains.add(fifo)
        read()  # without a background job this is the end of file already
        if fifo in self._drains:
            self._loop.add_reader(fifo, read)

    def _drop_drain(self, fifo: int) -> None:
        self._drains.discard(fifo)
        self._loop.remove_reader(fifo)
        os.close(fifo)

    async def _feed(self, data: bytes) -> None:
        """Write to the shell's stdin as fast as it reads."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._stdin, view) :]
            except BlockingIOError:
                ready = asyncio.Event()
                self._loop.add_writer(self._stdin, ready.set)
                try:
                    await ready.wait()
                finally:
                    if self._stdin >= 0:
                        self._loop.remove_writer(self._stdin)
            except OSError:
                return  # the shell is gone: its exit is what ends the call

    def _on_control(self) -> None:
        try:
            data = os.read(self._control, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._control)
            return
        self._control_seen += data
        if self._wanted is not None:
            pattern, done = self._wanted
            if match := pattern.search(bytes(self._control_seen)):
                del self._control_seen[: match.end()]
                if not done.done():
                    done.set_result(int(match.group(1)))
        # Traps of the user's may print here; only the end can hold the word that is waited for.
        del self._control_seen[:-_CONTROL_KEEP]

    @staticmethod
    def _cwd(child: Child | None) -> Path | None:
        if child is None:
            return None
        with contextlib.suppress(OSError):
            return Path(f"/proc/{child.pid}/cwd").readlink()
        return None


def _read_available(fifo: int, output: Collector) -> None:
    """Read exactly what lies in the pipe now: a background job that never stops writing must not hold the call."""
    size = bytearray(4)
    fcntl.ioctl(fifo, termios.FIONREAD, size)
    left = struct.unpack("i", size)[0]
    while left > 0:
        try:
            data = os.read(fifo, min(left, _CHUNK))
        except BlockingIOError:
            return
        if not data:
            return
        output.add(data)
        left -= len(data)
