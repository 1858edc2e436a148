"""An event loop in virtual time that holds several processes, each of which can die or stand still at any step.

A process is a set of tasks: whoever starts a task in the context of a process belongs to it. The loop runs one
step (one callback, one resumption of a coroutine) of one process at a time; which process, the seed decides.
Within a process the order is asyncio's own. So every await of a process is a crash point: killed before its
k-th step, nothing of it ever runs again, no `finally` either, as after SIGKILL. When nobody can run, time jumps
to the next timer.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any

PROCESS: ContextVar[Process] = ContextVar("PROCESS")


class Process:
    """Something that may be killed or stopped as a whole.

    Attributes:
        steps: how many of its steps were run.
        kill_at: number of the step before which it dies, 0 for never.
        stop_at: number of the step before which it stands still, 0 for never.
        stop_s: for how long, seconds.
        on_end: called when it was killed.
    """

    def __init__(self, loop: SimLoop, name: str) -> None:
        self.name = name
        self.alive = True
        self.steps = 0
        self.kill_at = 0
        self.stop_at = 0
        self.stop_s = 0.0
        self.stopped_until = 0.0
        self.on_end: list[Callable[[], None]] = []
        self.ready: deque[asyncio.Handle] = deque()
        self.tasks: list[asyncio.Task[Any]] = []
        self._loop = loop
        self.context = copy_context()
        self.context.run(PROCESS.set, self)

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine as part of this process."""
        return self._loop.create_task(work, context=self.context.copy())

    def kill(self) -> None:
        """SIGKILL."""
        if not self.alive:
            return
        self.alive = False
        self.ready.clear()
        for call in self.on_end:
            call()


class Stuck(AssertionError):
    """Nothing can happen any more, or too much did."""


class SimLoop(asyncio.BaseEventLoop):
    """See the module.

    Args:
        seed: decides which process runs next.
        limit_s: virtual seconds after which a run counts as stuck.
        limit_steps: steps after which it does.
    """

    def __init__(self, seed: int, *, limit_s: float = 3600.0, limit_steps: int = 400_000) -> None:
        super().__init__()
        self._now = 0.0
        self._rng = random.Random(seed)
        self._heap: list[tuple[float, int, asyncio.TimerHandle, Process]] = []
        self._number = 0
        self._limit_s = limit_s
        self._limit_steps = limit_steps
        self.steps = 0
        self.stops = 0
        self.errors: list[str] = []
        self.processes: list[Process] = []
        self.world = self.process("world")
        self.set_exception_handler(self._note)
        self.set_task_factory(self._task)

    def process(self, name: str) -> Process:
        """A new process."""
        made = Process(self, name)
        self.processes.append(made)
        return made

    def _note(self, _loop: Any, context: dict[str, Any]) -> None:
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    def _task(self, _loop: Any, work: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(work, loop=self, **options)
        context = options.get("context")
        process = PROCESS.get(self.world) if context is None else context.get(PROCESS, self.world)
        process.tasks.append(task)
        if len(process.tasks) > 512:
            process.tasks = [one for one in process.tasks if not one.done()]
        return task

    # What asyncio asks of a loop.

    def time(self) -> float:
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        context = copy_context() if context is None else context
        handle = events.Handle(callback, args, self, context)
        process = context.get(PROCESS, self.world)
        if process.alive:
            process.ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        context = copy_context() if context is None else context
        timer = events.TimerHandle(when, callback, args, self, context)
        self._number += 1
        process = context.get(PROCESS, self.world)
        heapq.heappush(self._heap, (when, self._number, timer, process))
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, _handle: Any) -> None:
        return

    def _process_events(self, _event_list: Any) -> None:
        return

    def at(self, delay: float, callback: Callable[..., Any], *args: Any) -> None:
        """Call back after so many seconds as the world itself, which nobody kills."""
        self.call_later(delay, callback, *args, context=self.world.context)

    # Steps.

    def _due(self) -> None:
        heap, now = self._heap, self._now
        while heap and heap[0][0] <= now:
            _, _, timer, process = heapq.heappop(heap)
            if not timer._cancelled and process.alive:  # type: ignore[attr-defined]
                process.ready.append(timer)

    def _run_once(self) -> None:
        now = self._now
        if self._heap and self._heap[0][0] <= now:
            self._due()
        able = [one for one in self.processes if one.ready and one.stopped_until <= now]
        if not able:
            self._advance()
            return
        process = able[0] if len(able) == 1 else self._rng.choice(able)
        process.steps += 1
        self.steps += 1
        if self.steps > self._limit_steps:
            raise Stuck(f"{self.steps} steps, {now:.1f} s: something goes round in circles")
        if process.steps == process.kill_at:
            process.kill()
            return
        if process.steps == process.stop_at:
            process.stopped_until = now + process.stop_s
            self.stops += 1
            return
        handle = process.ready.popleft()
        if not handle._cancelled:  # type: ignore[attr-defined]
            handle._run()  # type: ignore[attr-defined]

    def _advance(self) -> None:
        waking = [one.stopped_until for one in self.processes if one.alive and one.ready]
        while self._heap and (self._heap[0][2]._cancelled or not self._heap[0][3].alive):  # type: ignore[attr-defined]
            heapq.heappop(self._heap)
        if self._heap:
            waking.append(self._heap[0][0])
        if not waking:
            raise Stuck("everybody waits for somebody else")
        self._now = max(self._now, min(waking))
        if self._now > self._limit_s:
            raise Stuck(f"not at rest after {self._now:.0f} virtual seconds")

    def discard(self) -> None:
        """End every process without a trace, so that garbage collection has nothing to say."""
        for process in self.processes:
            process.alive = False
            process.ready.clear()
            for task in process.tasks:
                if not task.done():
                    task._log_destroy_pending = False  # type: ignore[attr-defined]
                    _close(task.get_coro())
            process.tasks.clear()
            process.on_end.clear()
        self._heap.clear()
        self.close()


def _close(work: Any) -> None:
    """Unwind a coroutine whose loop is gone; one that awaits in `finally` needs more than one push."""
    for _ in range(20):
        with contextlib.suppress(BaseException):
            work.close()
            return
