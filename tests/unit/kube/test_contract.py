"""What `Kube` promises, on the in-memory double and (marker apiserver) on a real API server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cowhand.errors import UserError
from cowhand.kube import kinds
from cowhand.kube.client import AioKube, Kube, connect
from cowhand.kube.errors import AlreadyExists, Conflict, Invalid, NotFound, NotServed
from cowhand.kube.transport import PodTransport, by_kubeconfig
from support.apiserver import kubeconfig
from support.memory_kube import MemoryKube

MANAGER = "cowhand-operator"


@pytest.fixture(
    params=[
        "memory",
        pytest.param("server", marks=pytest.mark.apiserver),
        pytest.param("pod", marks=pytest.mark.apiserver),
    ]
)
async def kube(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Kube]:
    if request.param == "memory":
        double = MemoryKube()
        double.missing.add(kinds.SCALED_OBJECT)
        yield double
        return
    path = kubeconfig()
    if path is None:
        pytest.skip("no cluster: `make cluster` starts one")
    if request.param == "pod":
        async with service_account(path, tmp_path) as way:
            client = AioKube(way)
            yield client
            await client.close()
        return
    client = await connect(path)
    yield client
    await client.close()


@contextlib.asynccontextmanager
async def service_account(path: str, folder: Path) -> AsyncIterator[PodTransport]:
    """As a pod: with a token of a service account that may do everything, and the cluster's CA."""
    name = f"contract-{uuid.uuid4().hex[:8]}"
    admin = await by_kubeconfig(path)
    account = {"kind": "ServiceAccount", "name": name, "namespace": "default"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}
    binding = {"metadata": {"name": name}, "subjects": [account], "roleRef": role}
    bindings = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"
    at = kinds.SERVICE_ACCOUNT.path("default")
    for target, body in (
        (at, {"metadata": {"name": name}}),
        (bindings, binding),
        (f"{at}/{name}/token", {"spec": {"expirationSeconds": 600}}),
    ):
        answer = await admin.send("POST", target, {"Content-Type": "application/json"}, body)
        assert answer.status == 201, answer
    try:
        (folder / "token").write_text(json.loads(answer.raw)["status"]["token"])
        text = await asyncio.to_thread(Path(path).read_text)
        cluster = yaml.safe_load(text)["clusters"][0]["cluster"]
        (folder / "ca.crt").write_bytes(base64.b64decode(cluster["certificate-authority-data"]))
        way = PodTransport(cluster["server"], folder / "ca.crt", folder / "token")
        await bound(way)
        yield way
    finally:
        await admin.send("DELETE", f"{bindings}/{name}", {}, None)
        await admin.send("DELETE", f"{at}/{name}", {}, None)
        await admin.close()


async def bound(way: PodTransport) -> None:
    """Waits until the API server's authoriser, which watches bindings, has seen the new one."""
    reviews = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    question = {"spec": {"resourceAttributes": {"verb": "*", "group": "*", "resource": "*"}}}
    async with asyncio.timeout(60):
        while True:
            answer = await way.send("POST", reviews, {"Content-Type": "application/json"}, question)
            if answer.status == 201 and json.loads(answer.raw)["status"]["allowed"]:
                return
            await asyncio.sleep(0.1)


@pytest.fixture
async def ns(kube: Kube) -> AsyncIterator[str]:
    name = f"contract-{uuid.uuid4().hex[:8]}"
    await kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield name
    await kube.delete(kinds.NAMESPACE, None, name)


def config_map(ns: str, name: str = "a", data: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"namespace": ns, "name": name},
        "data": data if data is not None else {"k": "v"},
    }


def deployment(ns: str) -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"namespace": ns, "name": "web"},
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "web", "image": "registry.invalid/web:1"}]},
            },
        },
    }


async def test_get_answers_none_for_a_missing_object(kube: Kube, ns: str) -> None:
    assert await kube.get(kinds.CONFIG_MAP, ns, "missing") is None


async def test_an_unknown_kind_is_not_an_empty_list(kube: Kube, ns: str) -> None:
    with pytest.raises(NotServed):
        await kube.list(kinds.SCALED_OBJECT, ns)
    with pytest.raises(NotServed):
        await kube.get(kinds.SCALED_OBJECT, ns, "x")


async def test_apply_creates_then_updates_only_what_changed(kube: Kube, ns: str) -> None:
    first = await kube.apply(config_map(ns, data={"a": "1", "b": "2"}), manager=MANAGER)
    again = await kube.apply(config_map(ns, data={"a": "1", "b": "2"}), manager=MANAGER)
    assert again["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    less = await kube.apply(config_map(ns, data={"a": "1"}), manager=MANAGER)
    assert less["data"] == {"a": "1"}
    assert less["metadata"]["uid"] == first["metadata"]["uid"]


async def test_apply_leaves_fields_of_others_and_forces_its_own(kube: Kube, ns: str) -> None:
    await kube.apply(config_map(ns, data={"theirs": "x", "both": "x"}), manager="somebody")
    with pytest.raises(Conflict):
        await kube.apply(config_map(ns, data={"both": "y"}), manager=MANAGER, force=False)
    merged = await kube.apply(config_map(ns, data={"both": "y"}), manager=MANAGER)
    assert merged["data"] == {"theirs": "x", "both": "y"}


async def test_apply_with_a_foreign_uid_is_a_conflict(kube: Kube, ns: str) -> None:
    await kube.apply(config_map(ns), manager=MANAGER)
    wrong = config_map(ns, data={"k": "w"})
    wrong["metadata"]["uid"] = str(uuid.uuid4())
    with pytest.raises(Conflict):
        await kube.apply(wrong, manager=MANAGER)


async def test_create_refuses_a_second(kube: Kube, ns: str) -> None:
    await kube.create(config_map(ns))
    with pytest.raises(AlreadyExists):
        await kube.create(config_map(ns))


async def test_merge_patch_sets_and_removes(kube: Kube, ns: str) -> None:
    made = await kube.create(config_map(ns, data={"a": "1", "b": "2"}))
    patched = await kube.patch(kinds.CONFIG_MAP, ns, "a", {"data": {"a": None, "c": "3"}})
    assert patched["data"] == {"b": "2", "c": "3"}
    stale = {
        "metadata": {"resourceVersion": made["metadata"]["resourceVersion"]},
        "data": {"d": "4"},
    }
    with pytest.raises(Conflict):
        await kube.patch(kinds.CONFIG_MAP, ns, "a", stale)
    with pytest.raises(NotFound):
        await kube.patch(kinds.CONFIG_MAP, ns, "missing", {"data": {"a": "1"}})


async def test_scale_changes_the_generation_and_status_does_not(kube: Kube, ns: str) -> None:
    await kube.create(deployment(ns))
    await kube.patch(kinds.DEPLOYMENT, ns, "web", {"spec": {"replicas": 0}}, subresource="scale")
    before = await kube.get(kinds.DEPLOYMENT, ns, "web")
    assert before is not None
    await kube.patch(kinds.DEPLOYMENT, ns, "web", {"status": {"replicas": 7}})
    after = await kube.get(kinds.DEPLOYMENT, ns, "web")
    assert after is not None
    assert (after.get("status") or {}).get("replicas") != 7
    assert after["metadata"]["generation"] == before["metadata"]["generation"]


async def test_status_apply_needs_the_object(kube: Kube, ns: str) -> None:
    status = {**deployment(ns), "status": {"observedGeneration": 1}}
    del status["spec"]
    with pytest.raises(NotFound):
        await kube.apply(status, manager=MANAGER, subresource="status")


async def test_delete_answers_whether_it_was_there(kube: Kube, ns: str) -> None:
    made = await kube.create(config_map(ns))
    assert not await kube.delete(kinds.CONFIG_MAP, ns, "a", uid=str(uuid.uuid4()))
    assert await kube.delete(kinds.CONFIG_MAP, ns, "a", uid=made["metadata"]["uid"])
    assert not await kube.delete(kinds.CONFIG_MAP, ns, "a")


async def test_finalizers_hold_an_object_until_they_are_removed(kube: Kube, ns: str) -> None:
    held = config_map(ns)
    held["metadata"]["finalizers"] = ["cowhand.dev/session"]
    await kube.create(held)
    assert await kube.delete(kinds.CONFIG_MAP, ns, "a")
    waiting = await kube.get(kinds.CONFIG_MAP, ns, "a")
    assert waiting is not None
    assert waiting["metadata"]["deletionTimestamp"]
    await kube.patch(kinds.CONFIG_MAP, ns, "a", {"metadata": {"finalizers": None}})
    assert await kube.get(kinds.CONFIG_MAP, ns, "a") is None


async def test_list_selects_by_label_and_names_the_kind(kube: Kube, ns: str) -> None:
    for name, color in (("a", "red"), ("b", "blue")):
        item = config_map(ns, name)
        item["metadata"]["labels"] = {"color": color, "ours": "yes"}
        await kube.create(item)
    red = await kube.list(kinds.CONFIG_MAP, ns, label_selector="color=red,ours")
    assert [(item["kind"], item["metadata"]["name"]) for item in red] == [("ConfigMap", "a")]
    both = await kube.list(kinds.CONFIG_MAP, ns, label_selector="ours=yes")
    assert {item["metadata"]["name"] for item in both} == {"a", "b"}


async def test_a_pod_cannot_be_changed(kube: Kube, ns: str) -> None:
    pod: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": ns, "name": "p"},
        "spec": {
            "nodeSelector": {"no": "node"},
            "automountServiceAccountToken": False,
            "serviceAccountName": "default",
            "containers": [{"name": "c", "image": "registry.invalid/c:1"}],
        },
    }
    service_account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"namespace": ns, "name": "default"},
    }
    await kube.apply(service_account, manager=MANAGER)
    await kube.apply(pod, manager=MANAGER)
    pod["spec"]["nodeSelector"] = {"another": "node"}
    with pytest.raises(Invalid) as caught:
        await kube.apply(pod, manager=MANAGER)
    assert caught.value.field is not None
    assert caught.value.field.startswith("spec")


async def test_an_object_without_a_name_is_the_callers_mistake(kube: Kube) -> None:
    with pytest.raises(UserError, match=r"metadata\.name"):
        await kube.apply({"apiVersion": "v1", "kind": "ConfigMap"}, manager=MANAGER)


async def test_garbage_follows_its_owner() -> None:
    kube = MemoryKube()
    owner = await kube.create(config_map("ns", "owner"))
    child = config_map("ns", "child")
    child["metadata"]["ownerReferences"] = [{"uid": owner["metadata"]["uid"], "name": "owner"}]
    await kube.create(child)
    await kube.delete(kinds.CONFIG_MAP, "ns", "owner")
    assert kube.all(kinds.CONFIG_MAP) == []


async def test_failures_come_when_asked_for() -> None:
    kube = MemoryKube()
    kube.fail("apply", kinds.CONFIG_MAP, Conflict("somebody was faster"))
    with pytest.raises(Conflict):
        await kube.apply(config_map("ns"), manager=MANAGER)
    assert (await kube.apply(config_map("ns"), manager=MANAGER))["metadata"]["generation"] == 1
