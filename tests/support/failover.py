"""Failover rig: a primary and a replica as processes, a replication link that can freeze, clients, and an auditor.

The link and the clients' way to the primary are TCP relays, so that a freeze holds back bytes that were already
sent (a replica that is merely stopped finds them in its socket when it goes on), and so that the clients keep
their address when another server takes over. Everything is on loopback.

Writers do what the product does: clients emit messages, workers append results with a barrier. Each notes what
was acknowledged to it; `audit` counts what of that is not in the log of the server that took over.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from cowhand.errors import Fenced, StoreUnavailable
from cowhand.session import connect
from cowhand.session.log import Held, Lease, Profile, StoreConfig, WorkerLog
from cowhand.session.store import Store
from support import sessions as make
from support.store import Store as Server

NAMESPACE = "team-a"


class Relay:
    """TCP to one target; `freeze` holds back all bytes, `turn` ends all connections and takes another target."""

    def __init__(self, target: int) -> None:
        self.port = 0
        self._target = target
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._pumps: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> Relay:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def freeze(self) -> None:
        self._open.clear()

    def turn(self, target: int) -> None:
        """Everything under way is lost, as with a machine that is gone."""
        for writer in self._writers:
            writer.transport.abort()
        self._target = target
        self._open.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, back)
        self._writers.update(pair)
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
        self._writers.discard(writer)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._pumps):
            task.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)


@dataclass
class Writer:
    """One session and what was acknowledged of it: contents of messages and of results, in order.

    `refused` is what the store answered last when it acknowledged nothing.
    """

    sid: str
    acked: list[str] = field(default_factory=list)
    refused: str = ""
    healed: bool = False
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, text: str) -> None:
        """It was acknowledged."""
        self.acked.append(text)
        self._more.set()

    async def reached(self, count: int) -> None:
        """Wait for so many acknowledgements."""
        while len(self.acked) < count:
            self._more.clear()
            await self._more.wait()


@dataclass
class Outcome:
    """What one run counted.

    Attributes:
        acked: acknowledged events, all.
        before: acknowledged before the primary died.
        in_cut: of these, acknowledged while the link was frozen.
        missing: acknowledged, and not in the log of the server that took over.
        healed: sessions of workers that were taken up again on it, and appended to.
        sessions: sessions of workers.
        rejoined: whether the old primary has the same logs after it came back as a replica.
    """

    acked: int
    before: int
    in_cut: int
    missing: int
    healed: int
    sessions: int
    rejoined: bool


class Rig:
    """See the module; make it with `rig`."""

    def __init__(self, profile: Profile, binary: str | None, writers: int) -> None:
        fsync = "always" if profile == "strict" else "everysec"
        self.profile = profile
        self.count = writers
        self.primary = Server(binary, fsync=fsync)
        self.replica = Server(binary, fsync=fsync)
        self.link = Relay(0)
        self.front = Relay(0)
        self.writers: list[Writer] = []
        self._stop = False
        self._tasks: list[asyncio.Task[None]] = []

    def config(self) -> StoreConfig:
        return StoreConfig(
            f"redis://127.0.0.1:{self.front.port}/0", profile=self.profile, partitions=2
        )

    async def start(self) -> None:
        await asyncio.to_thread(self.primary.start)
        await asyncio.to_thread(self.replica.start)
        self.link = await Relay(self.primary.port).start()
        self.front = await Relay(self.primary.port).start()
        await asyncio.to_thread(self.replica.follow_at, self.link.port)

    async def close(self) -> None:
        self._stop = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.link.close()
        await self.front.close()
        self.primary.stop()
        self.replica.stop()

    # Writers

    async def write(self, store: Store) -> None:
        """Start the writers: half of them clients, half of them workers."""
        worker = store.worker_log("pod-1")
        for number in range(self.count):
            one = Writer(await self._session(store))
            self.writers.append(one)
            if number % 2:
                lease = await self._again(worker, one.sid)
                task = self._work(worker, lease, one)
            else:
                task = self._send(store, one)
            self._tasks.append(asyncio.create_task(task))

    async def _session(self, store: Store) -> str:
        """A new session; a replica confirms writes on its disk only when it has written its file anew."""
        sid = make.new_sid()
        while True:
            with contextlib.suppress(StoreUnavailable):
                return await make.start(store.session_log(), sid=sid)

    async def _send(self, store: Store, one: Writer) -> None:
        number = 0
        while not self._stop:
            text = f"{one.sid} {number}"
            try:
                await store.session_log().emit_event(
                    one.sid, make.message(f"msg:{number + 1}", text)
                )
            except StoreUnavailable as err:
                one.refused = str(err)
                continue
            one.note(text)
            number += 1

    async def _work(self, worker: WorkerLog, lease: Lease, one: Writer) -> None:
        number = 0
        event = make.result(f"{one.sid} 0")
        appended = False
        while not self._stop:
            try:
                if not appended:
                    await worker.append(lease, [event])
                    appended = True
                await worker.barrier(lease)
            except StoreUnavailable as err:
                one.refused = str(err)
                continue
            except Fenced as err:
                one.refused = str(err)
                lease = await self._again(worker, one.sid)
                one.healed, appended = True, False
                continue
            one.note(f"{one.sid} {number}")
            number += 1
            event, appended = make.result(f"{one.sid} {number}"), False

    async def _again(self, worker: WorkerLog, sid: str) -> Lease:
        """What the harness does with a session that it lost: claim it again, from what is there."""
        while True:
            with contextlib.suppress(StoreUnavailable):
                await worker.beat()
                lease = await worker.claim(sid)
                if not isinstance(lease, Held):
                    return lease

    async def until(self, more: int, seconds: float = 60.0) -> bool:
        """Wait until each writer has `more` acknowledgements than now; False: the time went by without."""
        goal = [len(one.acked) + more for one in self.writers]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for one, count in zip(self.writers, goal, strict=True):
                    await one.reached(count)
                return True
        return False

    # The fault

    async def fail_over(self, *, cut: bool, appends: int = 20) -> Outcome:
        """Writers at work; freeze the link (`cut`), kill the primary, promote the replica, go on, rejoin, count."""
        async with connect(self.config(), namespace=NAMESPACE) as store:
            await self.write(store)
            assert await self.until(appends), "no acknowledgements while all is well"
            # The relay shares this process with the writers: the replica may have nothing at all yet.
            await asyncio.to_thread(self.primary.wait_in_step)
            before = self._acked()
            if cut:
                self.link.freeze()
                await self.until(appends, seconds=1.0)
            in_cut = self._acked() - before
            await asyncio.to_thread(self.primary.kill)
            self.link.turn(0)
            await asyncio.to_thread(self.replica.promote)
            known = [len(one.acked) for one in self.writers]
            self.front.turn(self.replica.port)
            await asyncio.to_thread(self.primary.start)
            await asyncio.to_thread(self.primary.follow, self.replica)
            await self._settled(min(appends, 3))
            self._stop = True
            await asyncio.gather(*self._tasks)
            missing = await self._missing(store, known)
            workers = self.writers[1::2]
            return Outcome(
                acked=self._acked(),
                before=sum(known),
                in_cut=in_cut,
                missing=missing,
                healed=sum(one.healed for one in workers),
                sessions=len(workers),
                rejoined=await self._same(),
            )

    def _acked(self) -> int:
        return sum(len(one.acked) for one in self.writers)

    async def _settled(self, more: int) -> None:
        """Until every writer was acknowledged something by the new primary."""
        for _ in range(3):
            if await self.until(more):
                return
        said = {one.sid: (len(one.acked), one.refused) for one in self.writers}
        ended = [repr(task.exception()) for task in self._tasks if task.done()]
        raise AssertionError(f"no acknowledgements after the failover: {said}, ended: {ended}")

    async def _missing(self, store: Store, known: list[int]) -> int:
        """Acknowledged before the primary died, and not in the log."""
        missing = 0
        for one, count in zip(self.writers, known, strict=True):
            log = await store.session_log().get_events(one.sid)
            there = {_content(event.data) for event in log}
            missing += sum(text not in there for text in one.acked[:count])
        return missing

    async def _same(self) -> bool:
        """Whether the old primary has the logs of the new one."""
        await asyncio.to_thread(self.replica.wait_in_step)
        for one in self.writers:
            logs = []
            for server in (self.replica, self.primary):
                config = StoreConfig(server.url, partitions=2)
                async with connect(config, namespace=NAMESPACE) as store:
                    logs.append(await store.session_log().get_events(one.sid))
            if logs[0] != logs[1]:
                return False
        return True


def _content(data: dict[str, object]) -> str:
    content = data.get("content")
    return content[0]["text"] if isinstance(content, list) else str(content)


@contextlib.asynccontextmanager
async def rig(profile: Profile, binary: str | None = None, writers: int = 8) -> AsyncIterator[Rig]:
    """A rig with both servers up and in step."""
    made = Rig(profile, binary, writers)
    try:
        await made.start()
        yield made
    finally:
        await made.close()
