"""A real store server for tests and benchmarks: Valkey or Redis on loopback, with a data folder of its own.

`find()` looks on PATH and in the cache folder, as `hack/store.sh` does. Nothing is skipped when no server is
there: the log is what is tested, so a machine without one fails with the command that installs it.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("valkey-server", "redis-server")


def cache_bin() -> Path:
    """The folder where `hack/` keeps binaries."""
    base = os.environ.get("COWHAND_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
        "cowhand",
    )
    return Path(base) / "bin"


FLOORS = {"valkey-server": (8, 0), "redis-server": (7, 2)}
"""Oldest version of each that Cowhand works with; an older one counts as missing."""


def version(path: str) -> tuple[int, ...]:
    """Version of a server's program; empty if it does not say."""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r" v=([0-9.]+)", said)
    return tuple(int(part) for part in found.group(1).split(".")) if found else ()


@functools.cache
def installed() -> dict[str, str]:
    """Server name -> path, of every server on this machine, the preferred one first."""
    found = {}
    for name in NAMES:
        for path in (shutil.which(name), shutil.which(name, path=str(cache_bin()))):
            if path and version(path) >= FLOORS[name]:
                found.setdefault(name, path)
    return found


def find() -> str:
    """Path of the preferred server; AssertionError that names the remedy if there is none."""
    servers = installed()
    assert servers, (
        "no valkey-server or redis-server on PATH or in the cache: run `hack/store.sh ensure`"
    )
    return next(iter(servers.values()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Store:
    """One server process; `start` and `kill` may alternate, the data folder stays.

    `acl` is the text of a users.acl; `tls` is (certificate, key, ca) as PEM paths, and makes the port TLS only.
    `fsync` is appendfsync: with `everysec` a kill loses what the server put off writing while an fsync ran.
    """

    def __init__(
        self,
        binary: str | None = None,
        *,
        acl: str | None = None,
        tls: tuple[str, str, str] | None = None,
        fsync: str = "always",
        aof: bool = True,
    ) -> None:
        self.binary = binary or find()
        self.folder = Path(tempfile.mkdtemp(prefix="cowhand-store-"))
        self.port = 0
        self.acl = acl
        self.tls = tls
        self.fsync = fsync
        self.aof = aof
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"{'rediss' if self.tls else 'redis'}://127.0.0.1:{self.port}/0"

    def _arguments(self) -> list[str]:
        port = ["--port", str(self.port)]
        if self.tls:
            cert, key, ca = self.tls
            port = ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            port += ["--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", ca]
        if self.acl is not None:
            path = self.folder / "users.acl"
            path.write_text(self.acl)
            port += ["--aclfile", str(path)]
        return [
            self.binary,
            *port,
            *("--bind", "127.0.0.1", "--dir", str(self.folder), "--daemonize", "no"),
            *(
                "--appendonly",
                "yes" if self.aof else "no",
                "--appendfsync",
                self.fsync,
                "--save",
                "",
            ),
            *("--maxmemory-policy", "noeviction", "--loglevel", "warning"),
            # A replica that asks for a copy gets it at once.
            *("--repl-diskless-sync-delay", "0"),
        ]

    def start(self) -> Store:
        """Start the server and wait until its port answers; tries another port if this one is taken."""
        again = self.port != 0
        for _ in range(5):
            self.port = self.port if again else free_port()
            with (self.folder / "server.log").open("ab") as log:
                self._process = subprocess.Popen(
                    self._arguments(), stdout=log, stderr=log, stdin=subprocess.DEVNULL
                )
            if self._answers():
                return self
        raise AssertionError(f"{self.binary} does not start: {self.log_tail()}")

    def _answers(self) -> bool:
        assert self._process is not None
        for _ in range(3000):
            if self._process.poll() is not None:
                return False
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as conn:
                    if self.tls:
                        return True
                    conn.sendall(b"PING\r\n")
                    reply = conn.recv(100)
                    if reply.startswith((b"+PONG", b"-NOAUTH")):
                        return True
            except OSError:
                pass
            time.sleep(0.01)
        return False

    def log_tail(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")[-1500:]

    def command(self, *words: str) -> bytes:
        """One command over a plain connection (no TLS, no ACL); answers the raw reply."""
        return self.commands(words)[0]

    def commands(self, *commands: tuple[str, ...]) -> list[bytes]:
        """Commands over one plain connection, one after the other; answers the raw replies."""
        replies = []
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as conn:
            for words in commands:
                encoded = b"".join(b"$%d\r\n%s\r\n" % (len(w.encode()), w.encode()) for w in words)
                conn.sendall(b"*%d\r\n%s" % (len(words), encoded))
                replies.append(conn.recv(65536))
                assert not replies[-1].startswith(b"-"), replies[-1]
        return replies

    def follow(self, primary: Store) -> None:
        """Become a replica of another server, in step with it."""
        self.follow_at(primary.port)

    def follow_at(self, port: int) -> None:
        """As `follow`, of whoever listens on a port of loopback."""
        self.command("REPLICAOF", "127.0.0.1", str(port))
        for _ in range(3000):
            if b"master_link_status:up" in self.command("INFO", "replication"):
                return
            time.sleep(0.01)
        raise AssertionError(f"no replica: {self.log_tail()}")

    def wait_in_step(self) -> None:
        """Until a replica has all that was written so far."""
        for _ in range(300):
            if self.commands(("SET", "in-step", "1"), ("WAIT", "1", "100"))[1] == b":1\r\n":
                return
        raise AssertionError("no replica in step")

    def promote(self) -> None:
        """Become a primary."""
        self.command("REPLICAOF", "NO", "ONE")

    def freeze(self) -> None:
        """Stand still (SIGSTOP) until `thaw`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on (SIGCONT)."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def flush(self) -> None:
        self.command("FLUSHALL")

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Stop and remove the data folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def restart(self, *, empty: bool = False) -> None:
        """Crash and come back on the same port; `empty` loses the data, as a reborn volume does."""
        self.kill()
        if empty:
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
        self.start()

    def _end(self) -> None:
        """SIGTERM: the server writes what it still holds (`everysec`) before it ends."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def swap_for_empty(self) -> Path:
        """Stop, and come back on the same port without the data; answers where that is kept (see `swap_back`)."""
        self._end()
        aside = self.folder / "aside"
        aside.mkdir()
        for path in self.folder.iterdir():
            if path.is_dir() and path != aside:
                path.rename(aside / path.name)
        self.start()
        return aside

    def swap_back(self, aside: Path) -> None:
        """Stop, and come back with the data of before `swap_for_empty`."""
        self._end()
        for path in self.folder.iterdir():
            if path.is_dir() and path != aside:
                shutil.rmtree(path)
        for path in aside.iterdir():
            path.rename(self.folder / path.name)
        aside.rmdir()
        self.start()
