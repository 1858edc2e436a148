"""The operator on an in-memory API and an in-memory log: events in, queues worked off, clock by hand."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from cowhand.api.v1alpha1 import EnvironmentSpec
from cowhand.controller.freeze import FreezeDefaults
from cowhand.controller.logs import Logs
from cowhand.controller.operator import Operator
from cowhand.controller.orphans import Orphans
from cowhand.controller.sandboxes import SandboxConfig, SandboxController
from cowhand.controller.scaling import Scaler
from cowhand.controller.sessions import SessionController
from cowhand.desired.sandbox_pod import PodConfig
from cowhand.kube import kinds
from cowhand.kube.client import Kube
from cowhand.kube.kinds import Kind
from cowhand.reconcile.scaling import ScaleSettings
from cowhand.reconcile.store_profile import StoreProfile
from support.memory_kube import MemoryKube
from support.memory_log import MemoryLog

NS = "team"
RETAIN_S = 1000
WATCHED = (
    kinds.AGENT_SESSION,
    kinds.SANDBOX,
    kinds.AGENT,
    kinds.ENVIRONMENT,
    kinds.POD,
)


class Rig:
    """One operator.

    Args:
        wrap: wraps the API that the operator sees (leader tests).
        store: answers what the store keeps.
        real_store: a `session.store.Store`, instead of the log in memory.
    """

    def __init__(
        self,
        wrap: Any = None,
        store: Callable[[], StoreProfile | None] = lambda: StoreProfile("dev", "dev"),
        *,
        real_store: Any = None,
    ) -> None:
        self.kube = MemoryKube()
        self.log = MemoryLog()
        self.now = datetime.now(UTC)
        kube: Kube = wrap(self.kube) if wrap else self.kube
        if real_store is None:
            logs = Logs(self.log, self.log.of, limit_s=0.05)
        else:
            logs = Logs(real_store.control_log(), real_store.session_log, limit_s=30.0)
        self.logs = logs
        environment = EnvironmentSpec()
        self.orphans = Orphans(logs, RETAIN_S)
        self.session_controller = SessionController(
            kube,
            logs,
            tenants=frozenset({NS}),
            defaults=FreezeDefaults(
                environment, "sandbox:1", "https://api.anthropic.com", "cowhand-model"
            ),
            retain_s=RETAIN_S,
            orphans=self.orphans,
            clock=lambda: self.now,
            store=store,
        )
        self.sandbox_controller = SandboxController(
            kube,
            logs,
            tenants=frozenset({NS}),
            config=SandboxConfig(
                PodConfig("cowhand:1", "IfNotPresent", "https://broker:8443"),
                environment,
                "sandbox:1",
            ),
            clock=lambda: self.now,
        )
        self.operator = Operator(
            kube,
            logs,
            tenants=(NS,),
            sessions=self.session_controller,
            sandboxes=self.sandbox_controller,
            orphans=self.orphans,
        )
        self.scaler = Scaler(
            kube,
            logs,
            tenants=(NS,),
            settings=ScaleSettings(1, 5, 10),
            clock=lambda: self.now,
        )
        self.deaf = False
        self.kube.on_change.append(self._changed)

    def _changed(self, change: str, body: dict[str, Any]) -> None:
        kind = kinds.of(body)
        if not self.deaf and kind in WATCHED:
            self.operator.seen(kind, change, body)

    async def settle(self, *, horizon_s: float = 0.0) -> None:
        """Work until nothing is due; projections included."""
        for _ in range(20):
            if not (self.log.down or self.log.hang):
                await self.operator.project(NS)
            await self.operator.sessions.run_until_idle(horizon_s=horizon_s)
            await self.operator.sandboxes.run_until_idle(horizon_s=horizon_s)
            await self.operator.workers.run_until_idle(horizon_s=horizon_s)
            horizon_s = 0.0

    def later(self, **delta: float) -> None:
        """Move the clock."""
        self.now += timedelta(**delta)

    async def look(self, kind: Kind, name: str) -> None:
        """Ask for one object, whatever its queue thinks is due."""
        queue = self.operator.sessions if kind == kinds.AGENT_SESSION else self.operator.sandboxes
        queue.add((NS, name))
        await self.settle()

    async def get(self, kind: Kind, name: str) -> dict[str, Any]:
        found = await self.kube.get(kind, NS, name)
        assert found is not None, f"{kind} {name} does not exist"
        return found

    async def condition(self, kind: Kind, name: str, which: str) -> tuple[str, str] | None:
        """(status, reason) of a condition."""
        for item in ((await self.get(kind, name)).get("status") or {}).get("conditions") or ():
            if item["type"] == which:
                return item["status"], item["reason"]
        return None


def session(name: str = "one", **spec: Any) -> dict[str, Any]:
    """An AgentSession with an inline agent."""
    body: dict[str, Any] = {"agent": {"model": {"id": "claude-opus-5-5"}}, "message": "hello"}
    body.update(spec)
    return {
        "apiVersion": "cowhand.dev/v1alpha1",
        "kind": "AgentSession",
        "metadata": {"namespace": NS, "name": name},
        "spec": {key: value for key, value in body.items() if value is not None},
    }


def resource(kind: Kind, name: str, **spec: Any) -> dict[str, Any]:
    """Another custom resource."""
    return {
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "metadata": {"namespace": NS, "name": name},
        "spec": spec,
    }


def pod_status(pod: dict[str, Any], **status: Any) -> dict[str, Any]:
    """The pod with another status."""
    return {**pod, "status": status}


READY: dict[str, Any] = {
    "phase": "Running",
    "podIP": "10.0.0.9",
    "conditions": [
        {"type": "PodScheduled", "status": "True"},
        {"type": "Ready", "status": "True", "lastTransitionTime": "2026-11-21T09:00:00Z"},
    ],
    "initContainerStatuses": [
        {"name": "egress-rules", "state": {"terminated": {"exitCode": 0}}},
        {"name": "egress-verify", "state": {"terminated": {"exitCode": 0}}},
    ],
}
KILLED: dict[str, Any] = {
    "phase": "Failed",
    "containerStatuses": [
        {
            "name": "sandbox",
            "state": {
                "terminated": {"exitCode": 137, "reason": "OOMKilled", "message": "no memory"}
            },
        }
    ],
}
