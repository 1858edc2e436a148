"""Sentinels and servers that want TLS and passwords, as real processes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cowhand.errors import Denied, StoreUnavailable
from cowhand.session import connect
from cowhand.session import link as link_module
from cowhand.session.log import StoreConfig
from support import sessions as make
from support import tls_rig
from support.store import Store as Server
from support.store import installed

NAME = "cowhand"
SERVER_PASSWORD, SENTINEL_PASSWORD = "of-the-servers", "of-the-sentinels"


class Secure(Server):
    """A server, or a Sentinel (`conf`), that speaks TLS alone and wants a password."""

    def __init__(self, files: tls_rig.Certificates, password: str, conf: str = "") -> None:
        binary = next(iter(installed().values()))
        super().__init__(binary, tls=(str(files.cert), str(files.key), str(files.ca)))
        self._password = password
        self._conf = conf
        self._context = ssl.create_default_context(cafile=str(files.ca))

    def _arguments(self) -> list[str]:
        if self._conf:
            path = self.folder / "sentinel.conf"
            cert, key, ca = self.tls or ("", "", "")
            path.write_text(
                f"port 0\ntls-port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n"
                f"tls-cert-file {cert}\ntls-key-file {key}\ntls-ca-cert-file {ca}\n"
                f"tls-auth-clients no\ntls-replication yes\nrequirepass {self._password}\n{self._conf}"
            )
            return [self.binary, str(path), "--sentinel"]
        secrets = ("--requirepass", self._password, "--masterauth", self._password)
        return [*super()._arguments(), "--tls-replication", "yes", *secrets]

    def commands(self, *commands: tuple[str, ...]) -> list[bytes]:
        replies = []
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=60) as plain,
            self._context.wrap_socket(plain, server_hostname="127.0.0.1") as conn,
        ):
            for words in (("AUTH", self._password), *commands):
                encoded = b"".join(b"$%d\r\n%s\r\n" % (len(w.encode()), w.encode()) for w in words)
                conn.sendall(b"*%d\r\n%s" % (len(words), encoded))
                replies.append(conn.recv(65536))
                assert not replies[-1].startswith(b"-"), replies[-1]
        return replies[1:]

    def knows_all(self) -> bool:
        try:
            words = self.command("SENTINEL", "MASTER", NAME).split(b"\r\n")
        except (OSError, AssertionError):
            return False
        values = {words[i]: words[i + 2] for i in range(2, len(words) - 2, 4)}
        return values.get(b"num-slaves") == b"1" and values.get(b"num-other-sentinels") == b"2"


@dataclass
class Watched:
    primary: Secure
    replica: Secure
    config: StoreConfig


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    files = tls_rig.make(tmp_path)
    primary, replica = Secure(files, SERVER_PASSWORD), Secure(files, SERVER_PASSWORD)
    sentinels: list[Secure] = []
    try:
        await asyncio.to_thread(primary.start)
        await asyncio.to_thread(replica.start)
        await asyncio.to_thread(replica.follow, primary)
        conf = (
            f"sentinel sentinel-pass {SENTINEL_PASSWORD}\n"
            f"sentinel monitor {NAME} 127.0.0.1 {primary.port} 2\n"
            f"sentinel auth-pass {NAME} {SERVER_PASSWORD}\n"
            f"sentinel down-after-milliseconds {NAME} 500\n"
            f"sentinel failover-timeout {NAME} 3000\n"
        )
        sentinels = [Secure(files, SENTINEL_PASSWORD, conf) for _ in range(3)]
        for one in sentinels:
            await asyncio.to_thread(one.start)
        async with asyncio.timeout(120):
            for one in sentinels:
                while not await asyncio.to_thread(one.knows_all):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        places = ",".join(f"127.0.0.1:{one.port}" for one in sentinels)
        config = StoreConfig(
            f"rediss+sentinel://{places}/{NAME}",
            password=SERVER_PASSWORD,
            ca_file=str(files.ca),
            sentinel_password=SENTINEL_PASSWORD,
        )
        yield Watched(primary, replica, config)
    finally:
        for server in (*sentinels, primary, replica):
            server.stop()


async def test_everything_is_found_and_followed_over_tls_with_passwords(watched):
    async with connect(watched.config, namespace="team-a") as store:
        log = store.session_log()
        sid = await make.start(log)
        await asyncio.to_thread(watched.primary.kill)
        async with asyncio.timeout(60):
            while True:
                with contextlib.suppress(StoreUnavailable):
                    await log.emit_event(sid, make.message("msg:1"))
                    break
        assert f"port={watched.replica.port}," in str(store.writes.at("").link)
        assert [event.id for event in await log.get_events(sid)] == ["created", "msg:0", "msg:1"]


async def test_wrong_passwords_say_whose_they_are(watched, monkeypatch):
    monkeypatch.setattr(link_module, "RETRY_SECONDS", 0.0)
    async with connect(replace(watched.config, password="wrong")) as store:
        with pytest.raises(Denied, match="refuses our user or password"):
            await store.check()
    for wrong in ("wrong", ""):
        async with connect(replace(watched.config, sentinel_password=wrong)) as store:
            with pytest.raises(
                StoreUnavailable, match=r"no Sentinel names a primary.*(pass|Authentication)"
            ):
                await store.check()
