"""Taking the release apart: nothing stays that only our processes could remove, and nothing else goes."""

from __future__ import annotations

from typing import Any

import pytest

from cowhand.bootstrap.teardown import teardown
from cowhand.kube import kinds
from cowhand.settings import BootstrapSettings
from support.memory_kube import MemoryKube

NS = "cowhand-system"
SANDBOX = {"app.kubernetes.io/name": "cowhand", "app.kubernetes.io/component": "sandbox"}
OPERATOR = {"app.kubernetes.io/name": "cowhand", "app.kubernetes.io/component": "operator"}


class Cluster(MemoryKube):
    """The operator of this cluster obeys: it suspends, ends logs and goes away when scaled down."""

    def __init__(self, *, operator: bool = True) -> None:
        super().__init__()
        self.operator = operator

    async def nap(self, seconds: float) -> None:
        if not self.operator:
            return
        for session in self.all(kinds.AGENT_SESSION):
            if session["metadata"].get("deletionTimestamp"):
                session["metadata"]["finalizers"] = []
                self.put({**session, "metadata": {**session["metadata"], "finalizers": None}})
                self.vanish(kinds.AGENT_SESSION, "default", session["metadata"]["name"])
            elif session["spec"].get("operatingMode") == "Suspended":
                self.put({**session, "status": {**session["status"], "mode": "Suspended"}})
        deployments = self.all(kinds.DEPLOYMENT)
        if deployments and deployments[0]["spec"].get("replicas") == 0:
            self.vanish(kinds.POD, NS, "operator-1")


def session(name: str, **status: Any) -> dict[str, Any]:
    return {
        "apiVersion": "cowhand.dev/v1alpha1",
        "kind": "AgentSession",
        "metadata": {
            "name": name,
            "namespace": "default",
            "finalizers": ["cowhand.dev/session", "example.com/other"],
        },
        "spec": {"agentRef": {"name": "a"}, "message": "m", "operatingMode": "Running"},
        "status": status,
    }


def pod(namespace: str, name: str, labels: dict[str, str]) -> dict[str, Any]:
    meta = {"name": name, "namespace": namespace, "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {}}


def fill(kube: Cluster) -> None:
    kube.put(session("live", sessionID="sesn_1", state="running", mode="Running"))
    kube.put(session("ended", sessionID="sesn_2", state="terminated"))
    kube.put(pod("default", "sandbox-1", SANDBOX))
    kube.put(pod("default", "web", {"app": "web"}))
    kube.put(pod(NS, "operator-1", OPERATOR))
    meta = {"name": "cowhand-operator", "namespace": NS}
    kube.put(
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": {"replicas": 2}}
    )
    for claim in ("data-cowhand-archive-0", "data-cowhand-store-0"):
        meta = {"name": claim, "namespace": NS}
        kube.put({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta})
    for name in ("cowhand-ca", "cowhand-store-identity"):
        meta = {"name": name, "namespace": NS}
        kube.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta})


def settings(*, purge: bool = False) -> BootstrapSettings:
    return BootstrapSettings(namespace=NS, tenants=("default",), mode="teardown", purge=purge)


async def test_sessions_stay_suspended_without_our_finalizer() -> None:
    kube = Cluster()
    fill(kube)
    await teardown(kube, settings(), sleep=kube.nap)
    by_name = {s["metadata"]["name"]: s for s in kube.all(kinds.AGENT_SESSION)}
    assert by_name["live"]["spec"]["operatingMode"] == "Suspended"
    assert by_name["ended"]["spec"]["operatingMode"] == "Running"
    assert {tuple(s["metadata"]["finalizers"]) for s in by_name.values()} == {
        ("example.com/other",)
    }
    assert [p["metadata"]["name"] for p in kube.all(kinds.POD)] == ["web"]
    assert kube.all(kinds.DEPLOYMENT)[0]["spec"]["replicas"] == 0
    assert len(kube.all(kinds.PERSISTENT_VOLUME_CLAIM)) == 2


async def test_a_dead_operator_does_not_hold_up_the_removal() -> None:
    kube = Cluster(operator=False)
    fill(kube)
    await teardown(kube, settings(), sleep=kube.nap)
    finalizers = [s["metadata"]["finalizers"] for s in kube.all(kinds.AGENT_SESSION)]
    assert finalizers == [["example.com/other"]] * 2


async def test_purge_takes_resources_and_volume() -> None:
    kube = Cluster()
    fill(kube)
    await teardown(kube, settings(purge=True), sleep=kube.nap)
    assert kube.all(kinds.AGENT_SESSION) == []
    assert kube.all(kinds.PERSISTENT_VOLUME_CLAIM) == []
    assert kube.all(kinds.CONFIG_MAP) == []
    assert [p["metadata"]["name"] for p in kube.all(kinds.POD)] == ["web"]


@pytest.mark.parametrize("purge", [False, True])
async def test_without_crds_and_deployment_it_ends_well(purge: bool) -> None:
    kube = Cluster()
    kube.missing = {kinds.AGENT_SESSION, kinds.SANDBOX, kinds.AGENT, kinds.ENVIRONMENT}
    await teardown(kube, settings(purge=purge), sleep=kube.nap)
