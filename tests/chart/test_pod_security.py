"""Every pod that the chart makes is restricted, and holds only the credentials it needs."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from chart.conftest import Json, Render, containers, pick, pods

TWO = {"tenants": ["team-a", "team-b"], "purge": True}
UIDS = {"StatefulSet/cowhand-store": 999}
TOKENS = {
    "Deployment/cowhand-operator",
    "Deployment/cowhand-broker",
    "Deployment/cowhand-gateway",
    "StatefulSet/cowhand-archive",
    "Job/cowhand-bootstrap",
    "Job/cowhand-teardown",
}
"""Pods that speak to the API server."""


def faults(name: str, spec: Json) -> list[str]:
    """What the restricted profile, and our own rules, say about a pod; empty if nothing."""
    found = []
    context = spec.get("securityContext", {})
    if not context.get("runAsNonRoot") or context.get("runAsUser") != UIDS.get(name, 62017):
        found.append("user")
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        found.append("seccomp of the pod")
    found += [flag for flag in ("hostNetwork", "hostPID", "hostIPC") if spec.get(flag)]
    if spec.get("automountServiceAccountToken") is not (name in TOKENS):
        found.append("automountServiceAccountToken")
    if spec.get("enableServiceLinks") is not False:
        found.append("service links")
    found += [f"volume {v['name']}" for v in spec.get("volumes", []) if "hostPath" in v]
    for one in containers(spec):
        found += [f"{one['name']}: {fault}" for fault in container_faults(one)]
    return found


def container_faults(one: Json) -> list[str]:
    found = []
    wanted: Json = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    if one.get("securityContext") != wanted:
        found.append("securityContext")
    resources = one.get("resources", {})
    if not {"cpu", "memory"} <= set(resources.get("requests", {})):
        found.append("requests")
    if "memory" not in resources.get("limits", {}):
        found.append("memory limit")
    if any("secretKeyRef" in e.get("valueFrom", {}) for e in one.get("env", [])) or one.get(
        "envFrom"
    ):
        found.append("a secret in the environment")
    found += [f"port {p['hostPort']} of the node" for p in one.get("ports", []) if "hostPort" in p]
    return found


def test_every_pod_is_restricted(render: Render) -> None:
    seen = {name: faults(name, spec) for name, _, spec in pods(render(TWO))}
    assert {name: found for name, found in seen.items() if found} == {}
    assert len(seen) >= 7


BREAKS: dict[str, Any] = {
    "user": lambda s: s["securityContext"].update(runAsUser=0),
    "seccomp of the pod": lambda s: s["securityContext"].pop("seccompProfile"),
    "hostNetwork": lambda s: s.update(hostNetwork=True),
    "automountServiceAccountToken": lambda s: s.pop("automountServiceAccountToken"),
    "volume x": lambda s: s["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    "harness: securityContext": lambda s: s["containers"][0]["securityContext"].update(
        capabilities={"drop": ["ALL"], "add": ["NET_ADMIN"]}
    ),
    "harness: memory limit": lambda s: s["containers"][0]["resources"].pop("limits"),
    "harness: a secret in the environment": lambda s: s["containers"][0]["env"].append(
        {"name": "X", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}
    ),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_the_check_finds_each_fault(render: Render, fault: str) -> None:
    spec = copy.deepcopy(
        pick(render(), "Deployment", "cowhand-harness")["spec"]["template"]["spec"]
    )
    BREAKS[fault](spec)
    assert faults("Deployment/cowhand-harness", spec) == [fault]


def sources(spec: Json, container: Json) -> dict[str, Json]:
    """Mount path -> volume of a container."""
    volumes = {v["name"]: v for v in spec["volumes"]}
    return {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"]}


def test_the_harness_container_holds_a_store_login_and_no_token(render: Render) -> None:
    spec = pick(render(), "Deployment", "cowhand-harness")["spec"]["template"]["spec"]
    (harness,) = spec["containers"]
    mounted = sources(spec, harness)
    secrets = [v["secret"] for v in mounted.values() if "secret" in v]
    assert [s["secretName"] for s in secrets] == ["cowhand-store"]
    assert secrets[0]["items"] == [{"key": "password", "path": "password"}]
    assert not [v for v in mounted.values() if "projected" in v]


def test_the_proxy_container_holds_the_token_and_no_store_login(render: Render) -> None:
    spec = pick(render(), "Deployment", "cowhand-harness")["spec"]["template"]["spec"]
    (proxy,) = spec["initContainers"]
    assert proxy["restartPolicy"] == "Always"
    mounted = sources(spec, proxy)
    assert not [v for v in mounted.values() if "secret" in v]
    tokens = [v["projected"]["sources"] for v in mounted.values() if "projected" in v]
    assert [[s["serviceAccountToken"]["audience"] for s in t] for t in tokens] == [
        ["cowhand-broker"],
        ["cowhand-archive"],
    ]
    assert not [e for e in proxy["env"] if "STORE" in e["name"]]
    shared = {m["name"] for m in proxy["volumeMounts"]} & {
        m["name"] for m in spec["containers"][0]["volumeMounts"]
    }
    assert shared == set(), "harness and proxy share no volume"


def test_no_pod_mounts_the_ca_key_or_a_secret_of_another_component(render: Render) -> None:
    allowed = {
        "Deployment/cowhand-operator": {"cowhand-store-operator"},
        "Deployment/cowhand-broker": {"cowhand-store-broker", "cowhand-tls-broker"},
        "Deployment/cowhand-gateway": {"cowhand-store-gateway", "cowhand-tls-gateway"},
        "Deployment/cowhand-harness": {"cowhand-store"},
        "StatefulSet/cowhand-archive": {"cowhand-store-archive", "cowhand-tls-archive"},
        "StatefulSet/cowhand-store": {"cowhand-store-acl", "cowhand-tls-store"},
    }
    for name, _, spec in pods(render(TWO)):
        mounted = {v["secret"]["secretName"] for v in spec.get("volumes", []) if "secret" in v}
        assert mounted == allowed.get(name, set()), name
