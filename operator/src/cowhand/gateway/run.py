"""`cowhand gateway`: serve the API over TLS until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from dataclasses import asdict

from aiohttp import web

from cowhand.errors import UserError
from cowhand.gateway.app import Gateway, build
from cowhand.gateway.auth import Authority
from cowhand.gateway.broker import HttpBroker
from cowhand.gateway.exec import Executor, PinnedHands
from cowhand.kube import client
from cowhand.session import connect
from cowhand.session.log import StoreConfig
from cowhand.session.remote import HttpArchive
from cowhand.settings import GatewaySettings
from cowhand.telemetry import metrics
from cowhand.wire.tls import ServerCertificate

SHUTDOWN_S = 5.0
"""How long requests in work may go on after SIGTERM; streams end at once."""

logger = logging.getLogger(__name__)


async def run(settings: GatewaySettings) -> None:
    """Serve until cancelled.

    Raises:
        UserError: certificate or key cannot be read, or no tenant is set.
        StoreTooWeak: the store keeps less than its profile promises.
        StoreMismatch, Denied: the store is not ours. A store that is only away is not an error: requests
            answer 503 until it is back.
    """
    if not settings.tenants:
        raise UserError("COWHAND_TENANTS names no namespace", field="TENANTS")
    certificate = ServerCertificate(settings.tls_cert, settings.tls_key)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(metrics.serving(settings.metrics_port))
        watch = asyncio.create_task(certificate.watch())
        stack.callback(watch.cancel)
        kube = await client.connect()
        stack.push_async_callback(kube.close)
        config = StoreConfig(**asdict(settings.store))
        access, archive = settings.archive, None
        if access.url:
            archive = HttpArchive(access.url, ca_file=access.ca_file, token_file=access.token_file)
            stack.push_async_callback(archive.close)
        store = await stack.enter_async_context(connect(config, archive=archive))
        store.keep_scripts()
        await store.require_durability()
        logs = {namespace: store.session_log(namespace) for namespace in settings.tenants}
        shown = {namespace: store.previews(namespace) for namespace in settings.tenants}
        broker = HttpBroker(settings.broker_url, settings.ca_file, settings.token_file)
        stack.push_async_callback(broker.close)
        hands = PinnedHands()
        stack.push_async_callback(hands.close)
        executor = Executor(kube, store.control_log(), logs, broker, hands)
        await serve(
            Gateway(
                *(Authority(kube), logs, executor, broker, archive),
                event_limit=store.payloads.event_limit,
                previews=shown,
                durability=store.durability.as_dict,
            ),
            settings.listen_port,
            certificate.context,
        )


async def serve(gateway: Gateway, port: int, tls: ssl.SSLContext) -> None:
    """Serve an application until cancelled; then streams end at once, and other requests get a moment."""
    runner = web.AppRunner(build(gateway), shutdown_timeout=SHUTDOWN_S, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, None, port, ssl_context=tls).start()
        logger.info("serving", extra={"port": port, "tenants": sorted(gateway.logs)})
        await asyncio.Event().wait()
    finally:
        gateway.stopping.set()
        await runner.cleanup()
