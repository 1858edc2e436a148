"""The client through three real Sentinels: it finds the primary, and the next one when that is gone."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cowhand.errors import StoreUnavailable
from cowhand.session import connect
from cowhand.session import link as link_module
from cowhand.session.log import StoreConfig
from support import sessions as make
from support.store import Store as Server
from support.store import free_port, installed

NAME = "cowhand"


@dataclass
class Watched:
    primary: Server
    replica: Server
    url: str
    ports: list[int]


def sentinel(binary: str, folder: Path, port: int, primary: int) -> subprocess.Popen[bytes]:
    """A Sentinel that counts a server as gone after half a second."""
    path = folder / f"{port}.conf"
    path.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
        f"sentinel monitor {NAME} 127.0.0.1 {primary} 2\n"
        f"sentinel down-after-milliseconds {NAME} 500\n"
        f"sentinel failover-timeout {NAME} 3000\n"
    )
    with (folder / f"{port}.log").open("wb") as log:
        return subprocess.Popen(
            [binary, str(path), "--sentinel"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def knows_all(port: int) -> bool:
    """Whether a Sentinel knows the two others and the replica."""
    probe = Server()
    probe.port = port
    try:
        found = probe.command("SENTINEL", "MASTER", NAME)
    except (OSError, AssertionError):
        return False
    words = found.split(b"\r\n")
    values = {words[i]: words[i + 2] for i in range(2, len(words) - 2, 4)}
    return values.get(b"num-slaves") == b"1" and values.get(b"num-other-sentinels") == b"2"


@pytest.fixture
async def watched() -> AsyncIterator[Watched]:
    binary = next(iter(installed().values()))
    primary, replica = Server(binary), Server(binary)
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="cowhand-sentinel-") as folder:
        try:
            await asyncio.to_thread(primary.start)
            await asyncio.to_thread(replica.start)
            await asyncio.to_thread(replica.follow, primary)
            ports = [free_port() for _ in range(3)]
            processes = [sentinel(binary, Path(folder), port, primary.port) for port in ports]
            async with asyncio.timeout(120):
                for port in ports:
                    while not await asyncio.to_thread(knows_all, port):  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
            places = ",".join(f"127.0.0.1:{port}" for port in ports)
            yield Watched(primary, replica, f"redis+sentinel://{places}/{NAME}", ports)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            primary.stop()
            replica.stop()


async def test_work_goes_on_at_the_server_that_sentinels_make_the_primary(watched):
    """Also the blocking reader, the nudges and a worker's lease."""
    async with connect(StoreConfig(watched.url, profile="standard"), namespace="team-a") as store:
        log, worker = store.session_log(), store.worker_log("pod-1")
        sid = await make.start(log)
        await worker.beat()
        work = worker.work()
        assert await anext(work) == sid
        lease = await make.take(worker, sid)
        await worker.append(lease, [make.result("before")])
        await worker.barrier(lease)
        follow = log.follow(sid, 5)
        following = asyncio.create_task(anext(follow))

        await asyncio.to_thread(watched.primary.kill)
        # The replica has no replica: what waits for a barrier does not pass, so it is asked without one.
        async with connect(StoreConfig(watched.url), namespace="team-a") as other:
            late = make.new_sid()
            for _ in range(60):
                with contextlib.suppress(StoreUnavailable):
                    await make.start(other.session_log(), sid=late)
                    break
            assert (await other.session_log().get_session(late)).next_seq == 3
            assert f"port={watched.replica.port}," in str(other.writes.link)

            async def next_work() -> str:
                await worker.beat()
                return await anext(work)

            assert await asyncio.wait_for(next_work(), 60) == late
            for _ in range(60):
                with contextlib.suppress(StoreUnavailable):
                    await worker.append(lease, [make.result("after")])
                    break
            assert (await asyncio.wait_for(following, 60)).data["content"] == "after"
        await follow.aclose()
        await work.aclose()


async def test_a_server_that_is_no_primary_is_not_used(watched, monkeypatch):
    """Sentinels may be behind: here all of them say what is not true any more."""
    monkeypatch.setattr(link_module, "RETRY_SECONDS", 0.0)
    fake = await asyncio.start_server(
        lambda reader, writer: _says(reader, writer, watched.replica.port), "127.0.0.1", 0
    )
    port = fake.sockets[0].getsockname()[1]
    async with connect(StoreConfig(f"redis+sentinel://127.0.0.1:{port}/{NAME}")) as store:
        with pytest.raises(StoreUnavailable, match="not the primary yet"):
            await store.check()
    fake.close()
    nobody = f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{watched.ports[0]}/other"
    async with connect(StoreConfig(nobody)) as store:
        with pytest.raises(StoreUnavailable, match="knows no primary 'other'"):
            await store.check()


async def _says(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    """A Sentinel that names a fixed server, whatever it is asked."""
    while await reader.read(4096):
        text = str(port).encode()
        writer.write(b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%s\r\n" % (len(text), text))
