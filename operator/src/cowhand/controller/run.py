"""`cowhand operator`: wiring, leader election, and the end.

Two replicas run; the one without the lease is ready and waits. The one with it starts kopf; when it loses
the lease it ends, because ending is the only way to be sure that nothing of it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import kopf

from cowhand.api.v1alpha1 import EnvironmentSpec
from cowhand.controller import handlers
from cowhand.controller.archive import CarefulArchive
from cowhand.controller.freeze import FreezeDefaults
from cowhand.controller.identity import IdentityInConfigMap
from cowhand.controller.leader import Elector, LeaderKube
from cowhand.controller.logs import Logs
from cowhand.controller.operator import Operator
from cowhand.controller.orphans import Orphans
from cowhand.controller.quotas import QuotaController
from cowhand.controller.sandboxes import SandboxConfig, SandboxController
from cowhand.controller.scaling import Scaler
from cowhand.controller.sessions import SessionController
from cowhand.controller.store_profile import StoreProfileWatch
from cowhand.desired.sandbox_pod import PodConfig
from cowhand.errors import UserError
from cowhand.kube.client import Kube, connect
from cowhand.reconcile.scaling import ScaleSettings
from cowhand.session import connect as connect_store
from cowhand.session.log import StoreConfig
from cowhand.session.remote import HttpArchive
from cowhand.settings import OperatorSettings
from cowhand.telemetry import metrics

READY_FILE: Final = Path("/run/cowhand/ready")


def now() -> datetime:
    """The clock of the operator."""
    return datetime.now(UTC)


def build(
    settings: OperatorSettings,
    kube: Kube,
    logs: Logs,
    limits: tuple[int, int],
    watch: StoreProfileWatch,
) -> tuple[Operator, Scaler]:
    """All parts of the operator, connected.

    Args:
        settings: from the environment.
        kube: the Kubernetes API.
        logs: the store.
        limits: most bytes of an event, and of one that stands in the store itself.
        watch: what the store keeps; a change is shown by all sessions.

    Raises:
        UserError: the default environment of the chart is not valid.
    """
    try:
        environment = EnvironmentSpec.model_validate(dict(settings.default_environment))
    except ValueError as err:
        raise UserError(
            f"COWHAND_DEFAULT_ENVIRONMENT is not an EnvironmentSpec: {err}",
            field="DEFAULT_ENVIRONMENT",
        ) from err
    tenants = frozenset(settings.tenants)
    orphans = Orphans(logs, settings.retain_s)
    sessions = SessionController(
        kube,
        logs,
        tenants=tenants,
        defaults=FreezeDefaults(
            environment=environment,
            sandbox_image=settings.sandbox_image,
            model_base_url=settings.model_base_url,
            model_secret=settings.model_secret,
            event_limit=limits[0],
            inline_limit=limits[1],
        ),
        retain_s=settings.retain_s,
        orphans=orphans,
        clock=now,
        store=watch.profile,
    )
    sandboxes = SandboxController(
        kube,
        logs,
        tenants=tenants,
        config=SandboxConfig(
            pod=PodConfig(settings.image, settings.image_pull_policy, settings.broker_url),
            environment=environment,
            sandbox_image=settings.sandbox_image,
        ),
        clock=now,
    )
    operator = Operator(
        kube,
        logs,
        tenants=settings.tenants,
        sessions=sessions,
        sandboxes=sandboxes,
        orphans=orphans,
    )
    watch.changed = operator.refresh_sessions
    scaler = Scaler(
        kube,
        logs,
        tenants=settings.tenants,
        settings=ScaleSettings(
            settings.harness_min, settings.harness_max, settings.sessions_per_harness
        ),
        clock=now,
    )
    return operator, scaler


async def run(settings: OperatorSettings, *, ready_file: Path = READY_FILE) -> None:
    """Run one replica until SIGTERM (returns) or until the lease is lost (raises LeadershipLost)."""
    async with metrics.serving(settings.metrics_port):
        await _run(settings, ready_file)


async def _run(settings: OperatorSettings, ready_file: Path) -> None:
    access = settings.archive
    archive = (
        HttpArchive(access.url, ca_file=access.ca_file, token_file=access.token_file)
        if access.url
        else None
    )
    kube = await connect()
    store = connect_store(
        StoreConfig(**asdict(settings.store)),
        archive=CarefulArchive(archive) if archive is not None else None,
        keeper=IdentityInConfigMap(kube, settings.namespace),
    )
    store.keep_scripts()
    loop = asyncio.get_running_loop()
    elector = Elector(
        kube, settings.namespace, settings.identity, settings.lease_seconds, clock=loop.time
    )
    try:
        await store.require_durability()
        # Both replicas are ready: a waiting one is what a rolling update and a drain need.
        _show_ready(ready_file, True)
        await elector.acquire()
        metrics.LEADING.set(1)
        logs = Logs(store.control_log(), lambda namespace: store.session_log(namespace))
        limits = (store.payloads.event_limit, store.payloads.inline_limit)
        writer = LeaderKube(kube, elector.leading)
        watch = StoreProfileWatch(
            lambda: store.durability.verdict,
            *(writer, settings.namespace, settings.identity),
            clock=now,
        )
        await watch.look()
        operator, scaler = build(settings, writer, logs, limits, watch)
        quotas = QuotaController(store.control_log(), settings.tenants, settings.tenant_quota)
        await _until_first(
            elector.hold(),
            operator.run(),
            scaler.run(),
            quotas.run(),
            watch.run(),
            _watch(settings, operator),
        )
    finally:
        _show_ready(ready_file, False)
        await elector.release()
        await store.aclose()
        if archive is not None:
            await archive.close()
        await kube.close()


def _show_ready(file: Path, ready: bool) -> None:
    """Make or remove the file that the readiness probe looks for; outside a pod there is no folder for it."""
    with contextlib.suppress(FileNotFoundError):
        if ready:
            file.touch()
        else:
            file.unlink()


async def _watch(settings: OperatorSettings, operator: Operator) -> None:
    """kopf, until it is told to stop. It takes over SIGTERM and SIGINT, and returns on them."""
    handlers.quiet()
    await asyncio.sleep(0)  # kopf cancels tasks that are younger than itself when it ends
    await kopf.operator(
        registry=handlers.registry(operator.seen),
        settings=handlers.settings(),
        standalone=True,
        namespaces=list(settings.tenants),
    )


async def _until_first(*parts: Coroutine[Any, Any, None]) -> None:
    """Run all parts until the first ends, end the others, and raise what it raised."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
