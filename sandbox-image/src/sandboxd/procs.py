"""Child processes: start, wait, kill with descendants, and reap what nobody waits for.

sandboxd is PID 1 of its container, so that orphans of killed commands become its children. One SIGCHLD handler
reaps all of them with waitpid(-1); therefore nothing in this program may use subprocess.run or Popen.wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36

KILL_S = 5.0
"""Longest wait for killed processes to end."""

KILL_ROUNDS = 1000
"""How often it looks for them meanwhile."""


class Child:
    """A started process. `exit` resolves to its exit code, negative for a signal."""

    def __init__(self, popen: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop) -> None:
        self.popen = popen
        self.pid = popen.pid
        self.exit: asyncio.Future[int] = loop.create_future()


class Reaper:
    """Starts children and resolves their `exit`; one a process, in the main thread's event loop."""

    def __init__(self) -> None:
        self._children: dict[int, Child] = {}
        self._loop = asyncio.get_running_loop()

    def install(self) -> None:
        """Take over SIGCHLD, and the orphans of commands where we are not PID 1."""
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)
        if os.getpid() != 1:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def close(self) -> None:
        """Give SIGCHLD back."""
        self._loop.remove_signal_handler(signal.SIGCHLD)

    def spawn(
        self,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
    ) -> Child:
        """Start a process in a session of its own; descriptors are given to it, the caller closes its copies.

        Raises:
            OSError: the program or the directory does not exist, or no process can be made.
        """
        popen = subprocess.Popen(  # noqa: S603  running what it is told to is this program's purpose
            argv,
            cwd=cwd,
            env=dict(env),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        child = Child(popen, self._loop)
        self._children[child.pid] = child
        return child

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            child = self._children.pop(pid, None)
            if child is not None:
                code = os.waitstatus_to_exitcode(status)
                child.popen.returncode = code  # keeps Popen from waiting for a pid that is gone
                if not child.exit.done():
                    child.exit.set_result(code)

    async def kill(self, child: Child) -> None:
        """SIGKILL the session of the child: its process group, and groups that job control made in it."""
        # One look is not enough: a process may fork between it and its signal, and a signal takes its time.
        for _ in range(KILL_ROUNDS):
            if not kill_session(child.pid):
                break
            await asyncio.sleep(KILL_S / KILL_ROUNDS)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(child.exit), KILL_S)


def kill_session(leader: int) -> bool:
    """SIGKILL every process of the session that `leader` leads; whether there was one."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
    members = session_members(leader)
    for pid in members:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return bool(members)


def session_members(leader: int) -> list[int]:
    """Process ids in the session of `leader` that have not ended, read from /proc."""
    members = []
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            stat = Path("/proc", name, "stat").read_bytes()
            # Fields after the command name, which may itself hold blanks and parentheses.
            state, _, _, session = stat.rsplit(b")", 1)[1].split()[:4]
            if int(session) == leader and state not in (b"Z", b"X"):
                members.append(int(name))
    return members
