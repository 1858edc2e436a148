"""`cowhand broker`: connect to Kubernetes and the store, keep the signing keys, serve until cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import ssl
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from cowhand import session
from cowhand.broker.app import Broker, Names, Sharing
from cowhand.broker.keys import RELOAD_S, KeyStore
from cowhand.errors import CowhandError, Retryable, UserError
from cowhand.kube import client
from cowhand.session.log import StoreConfig
from cowhand.settings import BrokerSettings
from cowhand.telemetry import metrics
from cowhand.wire.tls import ServerCertificate

log = logging.getLogger(__name__)

SHUTDOWN_S: Final = 5.0


async def run(settings: BrokerSettings) -> None:
    """Serve until cancelled; requests in work get a moment to end.

    Raises:
        UserError: a setting is wrong, or a file cannot be read.
    """
    if not settings.tenants:
        raise UserError("COWHAND_TENANTS names no namespace.", field="TENANTS")
    certificate = ServerCertificate(settings.tls_cert, settings.tls_key)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(metrics.serving(settings.metrics_port))
        watch = asyncio.create_task(certificate.watch())
        stack.callback(watch.cancel)
        kube = await client.connect()
        stack.push_async_callback(kube.close)
        keys = KeyStore(kube, settings.namespace, settings.keys_secret)
        await _retried(keys.load)
        config = StoreConfig(**dataclasses.asdict(settings.store))
        store = await stack.enter_async_context(session.connect(config))
        store.keep_scripts()
        await store.require_durability()
        limit = settings.max_concurrent_requests
        broker = Broker(
            kube=kube,
            sessions=store.session_log,
            control=store.control_log(),
            keys=keys,
            names=Names(
                settings.tenants,
                settings.gateway_account,
                settings.harness_account,
                settings.sandbox_account,
            ),
            sharing=Sharing(store.model_slots(), limit, settings.tenant_weights) if limit else None,
        )
        reload = asyncio.create_task(_reload(keys))
        stack.callback(reload.cancel)
        await serve(broker, settings.listen_port, certificate.context)


async def serve(broker: Broker, port: int, tls: ssl.SSLContext) -> None:
    """Serve until cancelled."""
    runner = web.AppRunner(
        broker.application(), access_log=None, shutdown_timeout=SHUTDOWN_S, keepalive_timeout=75
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, None, port, ssl_context=tls).start()
        log.info("serving", extra={"port": port})
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


async def _retried(load: Callable[[], Awaitable[None]]) -> None:
    pause = 0.5
    while True:
        try:
            await load()
        except Retryable as err:
            log.warning("signing keys not loaded yet", extra={"reason": str(err)})
            await asyncio.sleep(pause)
            pause = min(pause * 2, 10.0)
        else:
            return


async def _reload(keys: KeyStore) -> None:
    while True:
        await asyncio.sleep(RELOAD_S)
        try:
            await keys.load()
        except CowhandError as err:
            # The old keys go on signing.
            log.warning("signing keys not reloaded", extra={"reason": str(err)})
