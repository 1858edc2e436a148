"""What has to happen before `helm uninstall` takes the processes away; a pre-delete hook runs it.

Sessions are suspended while the operator can still write that into their logs; then the operator is
stopped, so that nothing it does can interfere; then sandbox pods go (nobody else would delete them) and
our finalizers (nobody else would remove them). Custom resources and the store's volume stay, unless
`purge` asks for their end too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from cowhand.api import labels
from cowhand.bootstrap.objects import OWN_SECRETS
from cowhand.kube import kinds
from cowhand.kube.client import Kube
from cowhand.kube.errors import NotFound, NotServed
from cowhand.kube.kinds import Kind
from cowhand.settings import BootstrapSettings

log = logging.getLogger(__name__)

OPERATOR: Final = "cowhand-operator"
BROKER_KEYS: Final = "cowhand-broker-keys"
CLAIMS: Final = ("data-cowhand-archive-0", "data-cowhand-store-0")
"""Volumes of archive and store, which Helm leaves behind."""
SUSPEND_PATIENCE_S: Final = 30
"""How long the operator may take to write the suspension into the logs; after that they go unsuspended."""

Sleep = Callable[[float], Awaitable[None]]


async def teardown(
    kube: Kube, settings: BootstrapSettings, *, sleep: Sleep = asyncio.sleep
) -> None:
    """Leave nothing behind that only our processes could remove.

    Raises:
        CowhandError: the API server refuses or does not answer; the Job tries again.
    """
    for tenant in settings.tenants:
        await _suspend(kube, tenant)
    await _wait_suspended(kube, settings, sleep)
    if settings.purge:
        await _delete_sessions(kube, settings, sleep)
    await _stop_operator(kube, settings.namespace, sleep)
    for tenant in settings.tenants:
        await _delete_sandbox_pods(kube, tenant)
        for session in await _items(kube, kinds.AGENT_SESSION, tenant):
            await _drop_finalizer(kube, session)
    if settings.purge:
        await _purge(kube, settings)


async def _items(
    kube: Kube, kind: Kind, namespace: str, selector: str = ""
) -> list[dict[str, Any]]:
    """All objects of a kind; none if its CRD is gone."""
    try:
        return await kube.list(kind, namespace, label_selector=selector)
    except NotServed:
        return []


def _is_live(session: dict[str, Any]) -> bool:
    """Whether a suspension has something to stop, and somebody to write it down."""
    status = session.get("status") or {}
    return bool(status.get("sessionID")) and status.get("state") not in ("terminated", "closed")


def _is_suspended(session: dict[str, Any]) -> bool:
    return (session.get("status") or {}).get("mode") == "Suspended" or not _is_live(session)


async def _suspend(kube: Kube, tenant: str) -> None:
    for session in await _items(kube, kinds.AGENT_SESSION, tenant):
        if not _is_suspended(session):
            await _ignoring_gone(
                kube.patch(
                    kinds.AGENT_SESSION,
                    tenant,
                    session["metadata"]["name"],
                    {"spec": {"operatingMode": "Suspended"}},
                )
            )


async def _wait_suspended(kube: Kube, settings: BootstrapSettings, sleep: Sleep) -> None:
    for _ in range(SUSPEND_PATIENCE_S):
        sessions = [
            session
            for tenant in settings.tenants
            for session in await _items(kube, kinds.AGENT_SESSION, tenant)
        ]
        if all(map(_is_suspended, sessions)):
            return
        await sleep(1)
    log.warning("some sessions were not suspended in time; their logs end without that event")


async def _delete_sessions(kube: Kube, settings: BootstrapSettings, sleep: Sleep) -> None:
    """While the operator lives: it ends the logs as each deletionPolicy says."""
    for tenant in settings.tenants:
        for session in await _items(kube, kinds.AGENT_SESSION, tenant):
            await kube.delete(kinds.AGENT_SESSION, tenant, session["metadata"]["name"])
    for _ in range(SUSPEND_PATIENCE_S):
        if not [s for t in settings.tenants for s in await _items(kube, kinds.AGENT_SESSION, t)]:
            return
        await sleep(1)


async def _stop_operator(kube: Kube, namespace: str, sleep: Sleep) -> None:
    """Scale the operator down and wait: a live one would put back the finalizers that we remove."""
    body = {"spec": {"replicas": 0}}
    await _ignoring_gone(
        kube.patch(kinds.DEPLOYMENT, namespace, OPERATOR, body, subresource="scale")
    )
    selector = (
        f"{labels.APP_NAME}={labels.APP_NAME_VALUE},"
        f"{labels.APP_COMPONENT}={labels.COMPONENT_OPERATOR}"
    )
    for _ in range(SUSPEND_PATIENCE_S):
        if not await _items(kube, kinds.POD, namespace, selector):
            return
        await sleep(1)


async def _delete_sandbox_pods(kube: Kube, tenant: str) -> None:
    selector = (
        f"{labels.APP_NAME}={labels.APP_NAME_VALUE},"
        f"{labels.APP_COMPONENT}={labels.COMPONENT_SANDBOX}"
    )
    for pod in await _items(kube, kinds.POD, tenant, selector):
        meta = pod["metadata"]
        await kube.delete(kinds.POD, tenant, meta["name"], uid=meta["uid"])


async def _drop_finalizer(kube: Kube, session: dict[str, Any]) -> None:
    meta = session["metadata"]
    finalizers = meta.get("finalizers") or []
    if labels.FINALIZER not in finalizers:
        return
    body = {
        "metadata": {
            "resourceVersion": meta["resourceVersion"],
            "finalizers": [name for name in finalizers if name != labels.FINALIZER],
        }
    }
    await _ignoring_gone(kube.patch(kinds.AGENT_SESSION, meta["namespace"], meta["name"], body))


async def _purge(kube: Kube, settings: BootstrapSettings) -> None:
    """Custom resources, the store's volume, and what bootstrap made."""
    for tenant in settings.tenants:
        for kind in (kinds.AGENT_SESSION, kinds.SANDBOX, kinds.AGENT, kinds.ENVIRONMENT):
            for item in await _items(kube, kind, tenant):
                await kube.delete(kind, tenant, item["metadata"]["name"])
        await kube.delete(kinds.SECRET, tenant, labels.STORE_SECRET)
        await kube.delete(kinds.CONFIG_MAP, tenant, labels.CA_CONFIG_MAP)
    # By name, not by list: whoever may list Secrets may read them all.
    for secret in (*OWN_SECRETS, BROKER_KEYS):
        await kube.delete(kinds.SECRET, settings.namespace, secret)
    await kube.delete(kinds.CONFIG_MAP, settings.namespace, labels.CA_CONFIG_MAP)
    for claim in CLAIMS:
        await kube.delete(kinds.PERSISTENT_VOLUME_CLAIM, settings.namespace, claim)
    await kube.delete(kinds.CONFIG_MAP, settings.namespace, labels.STORE_IDENTITY)


async def _ignoring_gone(write: Awaitable[object]) -> None:
    try:
        await write
    except NotFound:
        log.info("already gone")
