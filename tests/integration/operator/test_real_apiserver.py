"""`cowhand operator` as a process, on a real API server and a real store; no node has to run anything.

Two replicas serve a namespace of their own. The harness is played by its own `WorkerLog`.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import pytest
import yaml

from cowhand.desired import names
from cowhand.kube import kinds
from cowhand.kube.client import Kube, connect
from cowhand.session import connect as connect_store
from cowhand.session.events import NewEvent
from cowhand.session.log import Lease, StoreConfig
from support.apiserver import ROOT, kubeconfig

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(180)]

T = TypeVar("T")


async def eventually(look: Callable[[], Awaitable[T | None]], patience: float = 60.0) -> T:
    """What `look` answers as soon as it is true."""
    async with asyncio.timeout(patience):
        while True:
            found = await look()
            if found:
                return found
            await asyncio.sleep(0.1)


class Replicas:
    """Operator processes of one namespace."""

    def __init__(self, namespace: str, store_url: str, config: str) -> None:
        self.namespace = namespace
        self._env = {
            **os.environ,
            "KUBECONFIG": config,
            "COWHAND_STORE_URL": store_url,
            "COWHAND_NAMESPACE": namespace,
            "COWHAND_TENANTS": namespace,
            "COWHAND_IMAGE": "registry.invalid/cowhand:1",
            "COWHAND_SANDBOX_IMAGE": "registry.invalid/sandbox:1",
            "COWHAND_BROKER_URL": "https://cowhand-broker:8443",
            "COWHAND_LEASE_SECONDS": "6",
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", "cowhand", "operator"],
            env={**self._env, "COWHAND_POD_NAME": name},
            stderr=subprocess.DEVNULL,
        )

    def stop(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


@pytest.fixture
async def kube() -> AsyncIterator[Kube]:
    path = kubeconfig()
    if path is None:
        pytest.skip("no cluster: `make cluster` starts one")
    client = await connect(path)
    for file in sorted((ROOT / "crds").glob("*.yaml")):
        await client.apply(yaml.safe_load(file.read_text()), manager="helm")
    yield client
    await client.close()


@pytest.fixture
async def replicas(kube: Kube, store_url: str) -> AsyncIterator[Replicas]:
    namespace = f"optest-{uuid.uuid4().hex[:8]}"
    await kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    for account in ("default", "cowhand-sandbox"):
        await kube.apply(
            {
                "apiVersion": "v1",
                "kind": "ServiceAccount",
                "metadata": {"namespace": namespace, "name": account},
            },
            manager="test",
        )
    config = kubeconfig()
    assert config is not None
    found = Replicas(namespace, store_url, config)
    found.start("a")
    yield found
    found.stop()
    for item in await kube.list(kinds.AGENT_SESSION, namespace):
        name = item["metadata"]["name"]
        await kube.patch(kinds.AGENT_SESSION, namespace, name, {"metadata": {"finalizers": None}})
    await kube.delete(kinds.NAMESPACE, None, namespace)


def session(namespace: str, name: str) -> dict[str, Any]:
    return {
        "apiVersion": "cowhand.dev/v1alpha1",
        "kind": "AgentSession",
        "metadata": {"namespace": namespace, "name": name},
        "spec": {"agent": {"model": {"id": "m"}}, "message": f"work on {name}"},
    }


async def ready(kube: Kube, namespace: str, name: str) -> dict[str, Any]:
    async def look() -> dict[str, Any] | None:
        found = await kube.get(kinds.AGENT_SESSION, namespace, name)
        conditions = ((found or {}).get("status") or {}).get("conditions") or ()
        is_ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
        return found if is_ready else None

    return await eventually(look)


async def test_a_session_its_sandbox_a_takeover_and_the_end(
    kube: Kube, replicas: Replicas, store_url: str
) -> None:
    ns = replicas.namespace
    made = await kube.create(session(ns, "one"))
    sid = names.session_id(made["metadata"]["uid"])
    found = await ready(kube, ns, "one")
    assert found["status"]["sessionID"] == sid
    assert not [key for key in found["metadata"].get("annotations") or {} if "kopf" in key]
    async with connect_store(StoreConfig(store_url), namespace=ns) as store:
        worker, control, log = store.worker_log("pod"), store.control_log(), store.session_log()
        await worker.beat()
        lease = await worker.claim(sid)
        assert isinstance(lease, Lease)
        hand = {"name": "sandbox", "instance": 1, "state": "Pending", "sandbox": ""}
        asked = NewEvent("hand.requested", {"hand": "sandbox", "instance": 1, "reason": "eager"})
        await worker.append(lease, [asked], status={"hands": [hand], "stop_reason": None})

        name = names.sandbox_name(sid, "sandbox", 1)
        pod = await eventually(lambda: kube.get(kinds.POD, ns, name))
        sandbox = await kube.get(kinds.SANDBOX, ns, name)
        assert sandbox is not None
        assert pod["metadata"]["ownerReferences"][0]["uid"] == sandbox["metadata"]["uid"]
        record = await eventually(lambda: control.get_hand(ns, sid, "sandbox", 1))
        assert (record.state, record.sandbox_uid) == ("Pending", sandbox["metadata"]["uid"])

        replicas.start("b")
        replicas.processes["a"].kill()
        await kube.create(session(ns, "two"))
        await ready(kube, ns, "two")
        leader = await kube.get(kinds.LEASE, ns, "cowhand-operator")
        assert leader is not None
        assert leader["spec"]["holderIdentity"] == "b"

        await kube.delete(kinds.POD, ns, name, grace_s=0)

        async def lost() -> bool:
            now = await control.get_hand(ns, sid, "sandbox", 1)
            return now is not None and now.state == "Lost"

        await eventually(lost)
        await kube.delete(kinds.AGENT_SESSION, ns, "one")

        async def gone() -> bool:
            return await kube.get(kinds.AGENT_SESSION, ns, "one") is None

        await eventually(gone)
        assert (await log.get_events(sid))[-1].type == "session.deleted"
        assert await kube.get(kinds.POD, ns, name) is None
    replicas.processes["b"].terminate()
    assert await asyncio.to_thread(replicas.processes["b"].wait, 30) == 0
