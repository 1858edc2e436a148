"""kopf's part: watch the kinds that matter and hand each event on. No decision is made here.

Only `on.event` is used: kopf's stateful handlers would add annotations, finalizers and waiting to every
object. Handlers never fail, because kopf does not retry them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

import kopf

from cowhand.api import labels
from cowhand.kube import kinds
from cowhand.kube.client import Manifest
from cowhand.kube.kinds import Kind

Seen = Callable[[Kind, str | None, Manifest], None]

WATCHED: Final = (
    kinds.AGENT_SESSION,
    kinds.SANDBOX,
    kinds.AGENT,
    kinds.ENVIRONMENT,
    kinds.POD,
)


def registry(seen: Seen) -> kopf.OperatorRegistry:
    """Handlers for all watched kinds."""
    found = kopf.OperatorRegistry()

    def watch(kind: Kind) -> None:
        @kopf.on.event(
            kind.group, kind.version, kind.plural, registry=found, id=f"seen-{kind.plural}"
        )
        async def handler(event: Any, **_: Any) -> None:
            # Initial lists carry items without apiVersion and kind: nobody here looks at them.
            seen(kind, event["type"], dict(event["object"]))

    for kind in WATCHED:
        watch(kind)

    @kopf.on.login(registry=found)
    async def login(**kwargs: Any) -> Any:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    return found


def quiet() -> None:
    """Keep kopf from writing a line, with all of its settings, for each event of each object."""
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
    logging.getLogger("kopf.activities").setLevel(logging.WARNING)


def settings() -> kopf.OperatorSettings:
    """Kopf's settings; each differs from the default for a reason."""
    chosen = kopf.OperatorSettings()
    chosen.peering.standalone = True  # leader election is ours (controller.leader)
    chosen.scanning.disabled = (
        True  # the CRDs come before the operator; needs no cluster-wide rights
    )
    chosen.watching.label_selectors["pods"] = f"{labels.APP_NAME}={labels.APP_NAME_VALUE}"
    chosen.watching.chunk_size = 500
    chosen.watching.connect_timeout = 10.0
    chosen.networking.connect_timeout = 10.0
    chosen.networking.request_timeout = 30.0
    chosen.networking.error_backoffs = (0.5, 1, 2, 4, 8)
    chosen.queueing.exit_timeout = 0.5  # handlers only fill a queue: nothing is worth waiting for
    chosen.posting.enabled = False
    chosen.persistence.finalizer = f"{labels.GROUP}/kopf"
    chosen.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=labels.GROUP)
    chosen.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=labels.GROUP)
    return chosen
