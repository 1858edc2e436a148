"""The admission policies at a real API server: what the operator's account can make, and who is a sandbox.

The policies of a release in two namespaces of its own are applied under names of their own, so that they
do not meddle with an installed Cowhand. Every refusal has a control: the same pod is accepted from somebody whom
the policy does not concern.
"""

from __future__ import annotations

import copy
import json
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from chart.conftest import ROOT, Json, Render
from cowhand.api.v1alpha1 import EnvironmentSpec, Sandbox
from cowhand.desired.sandbox_pod import PodConfig, sandbox_pod

pytestmark = pytest.mark.apiserver

Edit = Callable[[Json], Any]


class Api:
    """kubectl with two namespaces: `system` of the release and `tenant`."""

    def __init__(self) -> None:
        def output(*command: str) -> str:
            return subprocess.run(
                command, check=True, capture_output=True, text=True
            ).stdout.strip()

        self._kubectl = output(str(ROOT / "hack/tools.sh"), "path", "kubectl")
        self._config = output(str(ROOT / "hack/cluster.sh"), "kubeconfig")
        mark = uuid.uuid4().hex[:8]
        self.mark = mark
        self.system, self.tenant = f"adm-system-{mark}", f"adm-tenant-{mark}"
        self.operator = f"system:serviceaccount:{self.system}:cowhand-operator"
        self.user = f"system:serviceaccount:{self.tenant}:editor"

    def run(self, *args: str, stdin: object = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._kubectl, "--kubeconfig", self._config, *args],
            input=json.dumps(stdin) if stdin is not None else None,
            capture_output=True,
            text=True,
            check=False,
        )

    def must(self, *args: str, stdin: object = None) -> None:
        done = self.run(*args, stdin=stdin)
        assert done.returncode == 0, done.stderr

    def create(self, pod: Json, user: str) -> str:
        """Refusal of a create, empty if it would be accepted."""
        done = self.run(
            "create", "--dry-run=server", "-n", self.tenant, f"--as={user}", "-f", "-", stdin=pod
        )
        return "" if done.returncode == 0 else done.stderr


def good_pod(namespace: str) -> Json:
    """The pod that the operator really makes."""
    sandbox = Sandbox.model_validate(
        {
            "metadata": {"name": "s", "namespace": namespace, "uid": str(uuid.uuid4())},
            "spec": {
                "holder": {"sessionID": f"sesn_{'0' * 32}", "hand": "sandbox", "instance": 1},
                "resources": [{"configMap": {"name": "c"}, "mountPath": "/workspace/c"}],
            },
        }
    )
    environment = EnvironmentSpec.model_validate(
        {"image": "cowhand/sandbox:x", "resources": {"cpu": "100m", "memory": "64Mi"}}
    )
    return sandbox_pod(sandbox, environment, PodConfig("cowhand/cowhand:x", "Never", "https://b"))


@pytest.fixture(scope="module")
def api(render: Render) -> Iterator[Api]:
    made = Api()
    objects = [
        copy.deepcopy(o)
        for o in render({"tenants": [made.tenant]}, made.system)
        if o["kind"].startswith("ValidatingAdmissionPolicy")
    ]
    assert len(objects) == 4
    for item in objects:
        item["metadata"]["name"] += f"-{made.mark}"
        if "policyName" in item["spec"]:
            item["spec"]["policyName"] += f"-{made.mark}"
    try:
        for namespace in (made.system, made.tenant):
            made.must("create", "namespace", namespace)
        for account in ("cowhand-sandbox", "cowhand-harness", "default-2"):
            made.must("create", "serviceaccount", account, "-n", made.tenant)
        for name, user in (("operator", made.operator), ("editor", made.user)):
            made.must(
                *("create", "rolebinding", name, "-n", made.tenant),
                *("--clusterrole=admin", f"--user={user}"),
            )
        made.must("apply", "-f", "-", stdin={"apiVersion": "v1", "kind": "List", "items": objects})
        probe = good_pod(made.tenant)
        probe["spec"]["hostNetwork"] = True
        deadline = time.monotonic() + 60
        while not made.create(probe, made.operator) or not made.create(probe, made.user):
            assert time.monotonic() < deadline, "the policies do not come into force"
        yield made
    finally:
        for item in objects:
            made.run("delete", item["kind"].lower(), item["metadata"]["name"], "--ignore-not-found")
        made.run("delete", "namespace", made.system, made.tenant, "--wait=false")


def _sandbox(spec: Json) -> Json:
    found: Json = spec["containers"][0]
    return found


def _volume(**source: Any) -> Edit:
    return lambda spec: spec["volumes"].append({"name": "x", **source})


def _token(audience: str | None) -> Edit:
    token = {"path": "t", **({"audience": audience} if audience else {})}
    return _volume(projected={"sources": [{"serviceAccountToken": token}]})


BREAKS: dict[str, tuple[Edit, str]] = {
    "secret volume": (_volume(secret={"secretName": "a"}), "spec.volumes"),
    "projected secret": (
        _volume(projected={"sources": [{"secret": {"name": "a"}}]}),
        "spec.volumes",
    ),
    "host path": (_volume(hostPath={"path": "/"}), "spec.volumes"),
    "claim": (_volume(persistentVolumeClaim={"claimName": "a"}), "spec.volumes"),
    "api token": (_token(None), "spec.volumes"),
    "foreign audience": (_token("vault"), "spec.volumes"),
    "secret env": (
        lambda s: _sandbox(s)["env"].append(
            {"name": "X", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}
        ),
        "read Secrets",
    ),
    "secret envFrom": (
        lambda s: _sandbox(s).update(envFrom=[{"secretRef": {"name": "a"}}]),
        "read Secrets",
    ),
    "secret env of an init container": (
        lambda s: s["initContainers"][0].update(envFrom=[{"secretRef": {"name": "a"}}]),
        "read Secrets",
    ),
    "host network": (lambda s: s.update(hostNetwork=True), "spec.hostNetwork"),
    "host pid": (lambda s: s.update(hostPID=True), "spec.hostNetwork"),
    "host ipc": (lambda s: s.update(hostIPC=True), "spec.hostNetwork"),
    "foreign account": (lambda s: s.update(serviceAccountName="default-2"), "cowhand-sandbox"),
    "harness account": (
        lambda s: s.update(serviceAccountName="cowhand-harness"),
        "cowhand-sandbox",
    ),
    "mounted token": (lambda s: s.update(automountServiceAccountToken=True), "cowhand-sandbox"),
    "privileged": (
        lambda s: _sandbox(s)["securityContext"].update(
            privileged=True, allowPrivilegeEscalation=True
        ),
        "privileged",
    ),
    "escalation": (
        lambda s: _sandbox(s)["securityContext"].update(allowPrivilegeEscalation=True),
        "privileged",
    ),
    "capability of the sandbox": (
        lambda s: _sandbox(s)["securityContext"]["capabilities"].update(add=["NET_ADMIN"]),
        "add a capability",
    ),
    "capability of another init container": (
        lambda s: s["initContainers"][1]["securityContext"]["capabilities"].update(
            add=["NET_ADMIN"]
        ),
        "add a capability",
    ),
    "more capability of the rules": (
        lambda s: s["initContainers"][0]["securityContext"]["capabilities"].update(
            add=["NET_ADMIN", "SYS_ADMIN"]
        ),
        "add a capability",
    ),
    "kept capabilities": (
        lambda s: _sandbox(s)["securityContext"].pop("capabilities"),
        "drop ALL",
    ),
    "root": (
        lambda s: _sandbox(s)["securityContext"].update(runAsNonRoot=False, runAsUser=0),
        "run as root",
    ),
    "host port": (
        lambda s: _sandbox(s).update(ports=[{"containerPort": 80, "hostPort": 80}]),
        "ports of the node",
    ),
}


def test_the_operators_own_pod_is_accepted(api: Api) -> None:
    assert api.create(good_pod(api.tenant), api.operator) == ""


@pytest.mark.parametrize("name", BREAKS)
def test_the_operator_can_make_nothing_worse(api: Api, name: str) -> None:
    edit, text = BREAKS[name]
    pod = good_pod(api.tenant)
    edit(pod["spec"])
    refused = api.create(pod, api.operator)
    assert f"cowhand-operator-pods-{api.mark}" in refused
    assert text in refused


@pytest.mark.parametrize("name", BREAKS)
def test_the_same_pod_of_somebody_else_is_no_matter_of_this_policy(api: Api, name: str) -> None:
    """The control: nothing but the policy refused it."""
    edit, _ = BREAKS[name]
    pod = good_pod(api.tenant)
    pod["metadata"]["labels"] = {}
    pod["spec"]["serviceAccountName"] = "default-2"
    edit(pod["spec"])
    assert api.create(pod, api.user) == ""


def plain(labels: Json, account: str = "default-2") -> Json:
    container = {"name": "c", "image": "cowhand/sandbox:x", "imagePullPolicy": "Never"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"p-{uuid.uuid4().hex[:8]}", "labels": labels},
        "spec": {
            "serviceAccountName": account,
            "schedulingGates": [{"name": "cowhand.dev/never"}],
            "containers": [container],
        },
    }


OURS = {"app.kubernetes.io/name": "cowhand", "app.kubernetes.io/component": "sandbox"}


@pytest.mark.parametrize(
    "labels",
    [
        {"cowhand.dev/session-id": "sesn_x"},
        {"cowhand.dev/hand": "x"},
        {"cowhand.dev/instance": "1"},
        {"cowhand.dev/sandbox": "x"},
        OURS,
    ],
    ids=lambda labels: next(iter(labels)),
)
def test_nobody_else_can_make_a_pod_that_looks_like_a_sandbox(api: Api, labels: Json) -> None:
    refused = api.create(plain(labels), api.user)
    assert f"cowhand-sandbox-identity-{api.mark}" in refused
    assert "only the Cowhand operator" in refused


def test_nobody_else_can_use_the_account_of_sandboxes(api: Api) -> None:
    assert "cowhand-sandbox" in api.create(plain({}, "cowhand-sandbox"), api.user)


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {"app": "web"},
        {"app.kubernetes.io/component": "sandbox"},
        {"app.kubernetes.io/name": "cowhand", "app.kubernetes.io/component": "harness"},
    ],
)
def test_other_pods_are_left_alone(api: Api, labels: Json) -> None:
    assert api.create(plain(labels), api.user) == ""


def test_labels_can_be_neither_added_nor_taken_away_later(api: Api) -> None:
    ordinary = plain({"app": "web"})
    name = ordinary["metadata"]["name"]
    api.must("create", "-n", api.tenant, f"--as={api.user}", "-f", "-", stdin=ordinary)

    def label(pod: str, *change: str) -> str:
        done = api.run(
            "label", "pod", pod, "-n", api.tenant, f"--as={api.user}", "--overwrite", *change
        )
        return "" if done.returncode == 0 else done.stderr

    assert label(name, "tier=front") == ""
    assert "only the Cowhand operator" in label(name, "cowhand.dev/sandbox=x")
    sandbox = good_pod(api.tenant)
    sandbox["spec"]["schedulingGates"] = [{"name": "cowhand.dev/never"}]
    del sandbox["metadata"]["ownerReferences"]  # its Sandbox does not exist: it would be collected
    api.must("create", "-n", api.tenant, f"--as={api.operator}", "-f", "-", stdin=sandbox)
    assert label("s", "tier=front") == ""
    assert "only the Cowhand operator" in label("s", "cowhand.dev/hand-")
    assert "only the Cowhand operator" in label("s", "cowhand.dev/session-id=sesn_other")
