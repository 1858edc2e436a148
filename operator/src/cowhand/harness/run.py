"""`cowhand harness`: wires store, proxy, model and hands to one worker, and drains on SIGTERM.

The process has no credential but its store login: the model key and hand tokens come from the proxy
of this pod.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from dataclasses import replace
from pathlib import Path
from typing import Final

from cowhand import session
from cowhand.hands import session_log
from cowhand.hands.base import Hand
from cowhand.hands.registry import Hands
from cowhand.hands.sandbox import SandboxHand, SandboxSettings
from cowhand.hands.session_log import SessionLogHand
from cowhand.hands.transport import Credentials, PinnedTransport, ProxyCredentials, Transport
from cowhand.harness.loop import LoopSettings, SessionLoop, Surroundings
from cowhand.harness.metering import MeteredModel
from cowhand.harness.model import AnthropicModel, Model
from cowhand.harness.previews import Previewer
from cowhand.harness.profiles import registry
from cowhand.harness.slots import ProxySlots
from cowhand.harness.worker import Worker, WorkerSettings
from cowhand.session.log import StoreConfig
from cowhand.session.remote import HttpArchive
from cowhand.settings import HarnessSettings, StoreSettings
from cowhand.telemetry import metrics

log = logging.getLogger(__name__)

READY_FILE: Final = "/run/cowhand/ready"


def store_config(settings: StoreSettings) -> StoreConfig:
    """The store as the session package wants it."""
    return StoreConfig(
        url=settings.url,
        username=settings.username,
        password=settings.password,
        ca_file=settings.ca_file,
        prefix=settings.prefix,
        partitions=settings.partitions,
        profile=settings.profile,
        replicas=settings.replicas,
        allow_weaker=settings.allow_weaker,
    )


def surroundings(
    model: Model, transport: Transport, credentials: Credentials, limits: SandboxSettings
) -> Surroundings:
    """Model and sandbox hands for the sessions of a worker."""

    def make_hands(loop: SessionLoop) -> Hands:
        def make(name: str) -> Hand:
            if name == session_log.HAND:
                return SessionLogHand(loop.session_id, loop.reader, limits.max_output)
            return SandboxHand(name, loop, transport, credentials, limits)

        return Hands(make)

    async def always() -> None:
        return None

    return Surroundings(model=model, make_hands=make_hands, admit=always, profiles=registry.load())


async def run(settings: HarnessSettings, *, ready_file: str = READY_FILE) -> None:
    """Work for one tenant until SIGTERM or SIGINT, then drain.

    Args:
        settings: from `cowhand.settings.harness`.
        ready_file: written after the first heartbeat, removed at the end.

    Raises:
        StoreMismatch, Denied: the store is not the one we started with, or refuses us.
    """
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # one line for each request
    async with metrics.serving(settings.metrics_port):
        await _run(settings, Path(ready_file))


async def _run(settings: HarnessSettings, ready: Path) -> None:
    model = AnthropicModel(settings.proxy_url)
    transport, credentials = PinnedTransport(), ProxyCredentials(settings.proxy_url)
    limits = SandboxSettings(wait_s=settings.hand_wait_s, max_output=settings.max_tool_output)
    archive = HttpArchive(f"{settings.proxy_url.rstrip('/')}/cowhand") if settings.archive else None
    store = session.connect(
        store_config(settings.store), namespace=settings.namespace, archive=archive
    )
    previewer, slots = Previewer(store.previews()), ProxySlots(settings.proxy_url)
    try:
        worker = Worker(
            store.worker_log(settings.pod_uid),
            store.session_log(),
            replace(
                surroundings(MeteredModel(model), transport, credentials, limits),
                gate=store.rate_gate(),
                slots=slots,
                preview=previewer,
                preview_end=previewer.end,
            ),
            WorkerSettings(
                namespace=settings.namespace,
                max_sessions=settings.max_sessions,
                drain_s=float(settings.drain_seconds),
                loop=LoopSettings(tool_timeout_ms=settings.tool_timeout_ms),
            ),
            on_ready=lambda: _write(ready),
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, worker.drain)
        await worker.run()
    finally:
        _remove(ready)
        await previewer.close()
        await model.close()
        await slots.close()
        await transport.close()
        await credentials.close()
        await store.aclose()
        if archive is not None:
            await archive.close()


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("ready\n", encoding="utf-8")
    log.info("ready")
