"""`cowhand archive`: serve blobs and segments, archive and delete, until cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import ssl
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from cowhand import session
from cowhand.archive.app import ArchiveServer
from cowhand.archive.archiver import Archiver
from cowhand.archive.layout import Names
from cowhand.archive.objects import open_objects
from cowhand.archive.sweeper import Sweeper
from cowhand.errors import UserError
from cowhand.kube import client
from cowhand.session.log import StoreConfig
from cowhand.settings import ArchiveSettings
from cowhand.telemetry import metrics
from cowhand.wire.tls import ServerCertificate

log = logging.getLogger(__name__)

SHUTDOWN_S: Final = 10.0


async def run(settings: ArchiveSettings) -> None:
    """Serve and archive until cancelled; requests in work get a moment to end.

    Raises:
        UserError: a setting is wrong, or a file cannot be read.
        StoreTooWeak: the store keeps less than its profile promises.
        StoreMismatch, Denied: the store is not ours. One that is only away is waited for.
    """
    if not settings.tenants:
        raise UserError("COWHAND_TENANTS names no namespace.", field="TENANTS")
    options = {**settings.objects_options, **_secret_options(settings.objects_config_dir)}
    objects = open_objects(settings.objects_url, options)
    certificate = ServerCertificate(settings.tls_cert, settings.tls_key)
    names = Names(settings.tenants, settings.control_accounts, settings.harness_account)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(metrics.serving(settings.metrics_port))
        kube = await client.connect()
        stack.push_async_callback(kube.close)
        config = StoreConfig(**dataclasses.asdict(settings.store))
        store = await stack.enter_async_context(session.connect(config))
        server = ArchiveServer(kube=kube, objects=objects, names=names)
        store.keep_scripts()
        await store.require_durability()
        side = store.archive_log()
        await _until_first(
            certificate.watch(),
            Archiver(side, objects, settings.tenants).run(),
            Sweeper(side, objects, settings.tenants).run(),
            serve(server, settings.listen_port, certificate.context),
        )


async def _until_first(*parts: Coroutine[Any, Any, None]) -> None:
    """Run all until the first fails, end the others, and raise what it raised."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def serve(server: ArchiveServer, port: int, tls: ssl.SSLContext) -> None:
    """Serve until cancelled."""
    runner = web.AppRunner(
        server.application(), access_log=None, shutdown_timeout=SHUTDOWN_S, keepalive_timeout=75
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, None, port, ssl_context=tls).start()
        log.info("serving", extra={"port": port})
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def _secret_options(folder: str) -> Mapping[str, str]:
    """Options of the bucket from the files of a mounted Secret: the name of each file is that of an option."""
    if not folder:
        return {}
    try:
        files = [file for file in sorted(Path(folder).iterdir()) if not file.name.startswith(".")]
        return {file.name: file.read_text("utf-8").strip() for file in files}
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(
            f"the credentials of the archive's bucket in {folder} cannot be read: {err}",
            field="OBJECTS_CONFIG_DIR",
        ) from err
