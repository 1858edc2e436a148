"""`cowhand proxy`: wire settings, broker client, server and signals together for either mode.

Each mode is imported only where it runs: a harness's proxy checks no signature, so it does not need
the memory of `cryptography`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import resource
import signal
from pathlib import Path
from typing import Final

from cowhand.errors import UserError
from cowhand.proxy.brokerclient import BrokerClient
from cowhand.proxy.http1 import Limits
from cowhand.proxy.server import Server
from cowhand.settings import ProxySettings

log = logging.getLogger(__name__)

HARNESS_CONNECTIONS: Final = 2048
"""Connections of one harness process: a stream and some hand tokens for each session in work."""

DRAIN_S: Final = {"harness": 20.0, "sandbox": 1.5}
"""How long running exchanges may go on after SIGTERM, in seconds."""

_PR_SET_DUMPABLE: Final = 4


async def run(settings: ProxySettings, *, stop: asyncio.Event | None = None) -> None:
    """Serve until SIGTERM or SIGINT (or `stop`), then drain.

    Raises:
        UserError: a setting is wrong, or the port is taken.
    """
    stop = stop or asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, stop.set)
    broker = BrokerClient(settings.broker_url, settings.ca_file, settings.token_file)
    serve = _serve_sandbox if settings.mode == "sandbox" else _serve_harness
    try:
        await serve(settings, broker, stop)
    finally:
        _not_ready(settings.ready_file)


async def _serve_harness(
    settings: ProxySettings, broker: BrokerClient, stop: asyncio.Event
) -> None:
    from cowhand.proxy import harness
    from cowhand.proxy.archive import ArchiveRelay

    _harden()
    access = settings.archive
    archive = (
        ArchiveRelay(access.url, access.ca_file, access.token_file, settings.namespace)
        if access.url
        else None
    )
    proxy = harness.HarnessProxy(broker, archive=archive)
    limits = Limits(connections=HARNESS_CONNECTIONS)
    server = Server(proxy.app, harness.render, limits=limits)
    await _listen(server, settings)
    _ready(settings.ready_file)
    await stop.wait()
    await server.close(DRAIN_S["harness"])
    proxy.close()


async def _serve_sandbox(
    settings: ProxySettings, broker: BrokerClient, stop: asyncio.Event
) -> None:
    from cowhand.proxy import sandbox
    from cowhand.proxy.tls import self_signed

    tls, cert_sha256 = self_signed()
    _harden()
    proxy = sandbox.SandboxProxy(broker, settings.sandboxd_port)
    server = Server(proxy.app, sandbox.render, tls=tls)
    await _listen(server, settings)

    async def register() -> None:
        await proxy.become_ready(server.port, cert_sha256)
        _ready(settings.ready_file)
        await proxy.keep_keys()

    work = asyncio.create_task(register())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if work.done():
        work.result()
    await server.close(DRAIN_S["sandbox"])
    for task in (work, stopped):
        task.cancel()
    await asyncio.gather(work, stopped, return_exceptions=True)
    proxy.close()


async def _listen(server: Server, settings: ProxySettings) -> None:
    try:
        await server.start(settings.listen_host, settings.listen_port)
    except OSError as err:
        where = f"{settings.listen_host}:{settings.listen_port}"
        raise UserError(f"Cannot listen on {where}: {err.strerror or err}.") from err
    log.info("listening", extra={"host": settings.listen_host, "port": server.port})


def _ready(path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("ready\n", encoding="utf-8")
    log.info("ready")


def _not_ready(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _harden() -> None:
    """No core dump, and no ptrace or /proc/PID/mem by other processes of our own UID."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        log.warning("prctl(PR_SET_DUMPABLE) failed", extra={"errno": ctypes.get_errno()})
