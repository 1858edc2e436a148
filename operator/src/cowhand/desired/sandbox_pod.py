"""The pod of a Sandbox: rules, proxy, check, files, and only then the untrusted container.

The order of the init containers is the defence (docs/interfaces.md section 6): `egress-rules` loads the
packet filter, `proxy` (a native sidecar) is the only door, `egress-verify` proves under the sandbox's own
user id that nothing else is reachable, `resources` copies files. The token and the CA are mounted into the
proxy alone. A pod never restarts its sandbox: a dead sandbox container is a lost sandbox, because what ran
in it is gone and somebody must be told.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from cowhand.api import labels
from cowhand.api.v1alpha1 import ComputeResources, EnvironmentSpec, FileResource, Sandbox
from cowhand.desired import names
from cowhand.desired.sandbox import hand_labels

Manifest = dict[str, Any]

RULES: Final = "egress-rules"
PROXY: Final = "proxy"
VERIFY: Final = "egress-verify"
RESOURCES: Final = "resources"
SANDBOX: Final = "sandbox"

PROXY_PORT: Final = 8443
SANDBOXD_PORT: Final = 7070
TOKEN_SECONDS: Final = 600
TERMINATION_GRACE_S: Final = 2

CPU_SHARE: Final = 10
CPU_FLOOR_MILLIS: Final = 10

_SCALE: Final = {
    **{unit: Decimal(10) ** (3 * power) for power, unit in enumerate("num", start=-3)},
    **{unit: Decimal(10) ** (3 * power) for power, unit in enumerate(("", *"kMGTPE"))},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", start=1)},
}

_SCRATCH: Final = (
    ("workspace", "/workspace"),
    ("tmp", "/tmp"),  # noqa: S108 - a mount of its own
    ("home", "/home/sandbox"),
    ("sandboxd", "/run/sandboxd"),
)


@dataclass(frozen=True)
class PodConfig:
    """What the operator adds to each sandbox pod.

    Attributes:
        image: image of our own processes.
        pull_policy: of all containers.
        broker_url: where the proxy registers.
    """

    image: str
    pull_policy: str
    broker_url: str


def sandbox_pod(sandbox: Sandbox, environment: EnvironmentSpec, config: PodConfig) -> Manifest:
    """The pod of a sandbox.

    Args:
        sandbox: its owner; name and namespace are the pod's as well.
        environment: resolved (`desired.environment.resolve`): the image is set.
        config: the operator's part.
    """
    spec: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "shareProcessNamespace": False,
        "serviceAccountName": labels.ACCOUNT_SANDBOX,
        "terminationGracePeriodSeconds": TERMINATION_GRACE_S,
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "initContainers": _init_containers(sandbox, environment, config),
        "containers": [_sandbox_container(environment, config)],
        "volumes": _volumes(sandbox, environment),
    }
    if environment.runtime_class_name:
        spec["runtimeClassName"] = environment.runtime_class_name
    if environment.node_selector:
        spec["nodeSelector"] = dict(environment.node_selector)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": _metadata(sandbox),
        "spec": spec,
    }


def _metadata(sandbox: Sandbox) -> Manifest:
    meta, holder = sandbox.metadata, sandbox.spec.holder
    found = {
        labels.APP_NAME: labels.APP_NAME_VALUE,
        labels.APP_COMPONENT: labels.COMPONENT_SANDBOX,
        labels.SANDBOX: names.label_value(meta.name),
    }
    if holder is not None:
        found |= hand_labels(holder.session_id, holder.hand, holder.instance)
    return {
        "namespace": meta.namespace,
        "name": meta.name,
        "labels": found,
        "annotations": {
            # kubectl logs means the sandbox; an autoscaler must not move it: what runs in it would be lost.
            "kubectl.kubernetes.io/default-container": SANDBOX,
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        },
        "ownerReferences": [
            {
                "apiVersion": labels.API_VERSION,
                "kind": "Sandbox",
                "name": meta.name,
                "uid": meta.uid,
                "controller": True,
                "blockOwnerDeletion": False,
            }
        ],
    }


def _restricted(uid: int) -> Manifest:
    """Security context of everything that runs without rights."""
    return {
        "runAsUser": uid,
        "runAsGroup": uid,
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _ours(name: str, command: str, config: PodConfig) -> Manifest:
    """The common part of the containers that run our image."""
    return {
        "name": name,
        "image": config.image,
        "imagePullPolicy": config.pull_policy,
        "command": ["python3", "-m", "cowhand", command],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "resources": {
            "requests": {"cpu": "10m", "memory": "48Mi"},
            "limits": {"memory": "160Mi"},
        },
    }


def _init_containers(
    sandbox: Sandbox, environment: EnvironmentSpec, config: PodConfig
) -> list[Manifest]:
    rules = {
        **_ours(RULES, "egress-rules", config),
        "securityContext": {
            "runAsUser": 0,
            "runAsNonRoot": False,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    verify = {
        **_ours(VERIFY, "egress-verify", config),
        "securityContext": _restricted(labels.UID_SANDBOX),
        "env": [{"name": "COWHAND_BROKER_URL", "value": config.broker_url}],
    }
    found = [rules, _proxy(config), verify]
    if sandbox.spec.resources:
        found.append(_copy_resources(sandbox.spec.resources, environment, config))
    return found


def _proxy(config: PodConfig) -> Manifest:
    """The sidecar. No startupProbe: it is ready only after sandboxd answers, which starts after it."""
    return {
        **_ours(PROXY, "proxy", config),
        "restartPolicy": "Always",
        "securityContext": _restricted(labels.UID_COWHAND),
        "env": [
            {"name": "COWHAND_PROXY_MODE", "value": "sandbox"},
            {"name": "COWHAND_BROKER_URL", "value": config.broker_url},
            {"name": "COWHAND_CA_FILE", "value": "/etc/cowhand/ca/ca.crt"},
            {"name": "COWHAND_TOKEN_FILE", "value": "/var/run/secrets/cowhand/token"},
            {"name": "COWHAND_READY_FILE", "value": "/run/cowhand/ready"},
            {"name": "COWHAND_LISTEN_PORT", "value": str(PROXY_PORT)},
            {"name": "COWHAND_SANDBOXD_PORT", "value": str(SANDBOXD_PORT)},
        ],
        "ports": [{"name": "hand", "containerPort": PROXY_PORT, "protocol": "TCP"}],
        "readinessProbe": {
            "exec": {"command": ["test", "-f", "/run/cowhand/ready"]},
            "periodSeconds": 1,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
        },
        "volumeMounts": [
            {"name": "broker-token", "mountPath": "/var/run/secrets/cowhand", "readOnly": True},
            {"name": "ca", "mountPath": "/etc/cowhand/ca", "readOnly": True},
            {"name": "proxy-run", "mountPath": "/run/cowhand"},
        ],
    }


def copy_script(resources: Sequence[FileResource]) -> str:
    """The shell script that copies mounted ConfigMaps to where the sandbox wants them.

    A ConfigMap volume consists of links into `..data`; the two patterns leave that folder out and
    take names that begin with one dot.
    """
    lines = ["set -eu", "umask 022"]
    for index, resource in enumerate(resources):
        target = shlex.quote(resource.mount_path)
        source = f"/mnt/resources/{index}"
        lines += [
            f"mkdir -p {target}",
            f'for f in {source}/* {source}/.[!.]*; do [ ! -e "$f" ] || cp -RL "$f" {target}/; done',
            f"chmod -R u+w {target}",
        ]
    return "\n".join(lines)


def _copy_resources(
    resources: Sequence[FileResource], environment: EnvironmentSpec, config: PodConfig
) -> Manifest:
    mounts: list[Manifest] = [
        {"name": f"resource-{index}", "mountPath": f"/mnt/resources/{index}", "readOnly": True}
        for index in range(len(resources))
    ]
    return {
        "name": RESOURCES,
        "image": environment.image,
        "imagePullPolicy": config.pull_policy,
        "command": ["sh", "-c", copy_script(resources)],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": _restricted(labels.UID_SANDBOX),
        "resources": {
            "requests": {"cpu": "10m", "memory": "16Mi"},
            "limits": {"memory": "64Mi"},
        },
        "volumeMounts": [{"name": "workspace", "mountPath": "/workspace"}, *mounts],
    }


def _sandbox_container(environment: EnvironmentSpec, config: PodConfig) -> Manifest:
    """The untrusted container: the image's own entry point, which is sandboxd. No probe on the network."""
    env = [{"name": var.name, "value": var.value} for var in environment.env]
    ours = {
        "HOME": "/home/sandbox",
        "SANDBOXD_PORT": str(SANDBOXD_PORT),
        "SANDBOXD_WORKDIR": "/workspace",
        "SANDBOXD_STATE": "/run/sandboxd",
    }
    named = {var["name"] for var in env}
    env += [{"name": key, "value": value} for key, value in ours.items() if key not in named]
    container: Manifest = {
        "name": SANDBOX,
        "image": environment.image,
        "imagePullPolicy": config.pull_policy,
        "env": env,
        "workingDir": "/workspace",
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": _restricted(labels.UID_SANDBOX),
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in _SCRATCH],
    }
    if environment.resources is not None:
        limits = _amounts(environment.resources)
        requests = dict(limits)
        if "cpu" in limits:
            requests["cpu"] = cpu_request(limits["cpu"])
        container["resources"] = {"requests": requests, "limits": limits}
    return container


def cpu_request(limit: str) -> str:
    """What is reserved of a CPU limit: a tenth, at least 10m, never more than the limit.

    A sandbox waits for the model most of the time; what it reserved would stand idle. Memory is another
    matter: it cannot be taken back, so there request and limit are equal.
    """
    millis = parse_cpu(limit)
    return f"{math.ceil(min(millis, max(Decimal(CPU_FLOOR_MILLIS), millis / CPU_SHARE)))}m"


def parse_cpu(quantity: str) -> Decimal:
    """A Kubernetes quantity (`QUANTITY` of api.meta) in thousandths: `1.5` is 1500, `250m` is 250."""
    number = quantity.rstrip("numkKMGTPEi")
    return Decimal(number) * _SCALE[quantity[len(number) :]] * 1000


def _amounts(resources: ComputeResources) -> dict[str, str]:
    """Resource name -> quantity, of those that are set."""
    found = {
        "cpu": resources.cpu,
        "memory": resources.memory,
        "ephemeral-storage": resources.ephemeral_storage,
    }
    return {key: value for key, value in found.items() if value}


def _volumes(sandbox: Sandbox, environment: EnvironmentSpec) -> list[Manifest]:
    size = environment.resources.ephemeral_storage if environment.resources else None
    scratch: list[Manifest] = [
        {"name": name, "emptyDir": {"sizeLimit": size} if size and name == "workspace" else {}}
        for name, _ in _SCRATCH
    ]
    token = {
        "serviceAccountToken": {
            "audience": labels.AUDIENCE_BROKER,
            "expirationSeconds": TOKEN_SECONDS,
            "path": "token",
        }
    }
    proxy: list[Manifest] = [
        {"name": "broker-token", "projected": {"sources": [token]}},
        {"name": "ca", "configMap": {"name": labels.CA_CONFIG_MAP}},
        {"name": "proxy-run", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
    ]
    return [*scratch, *proxy, *_resource_volumes(sandbox.spec.resources)]


def _resource_volumes(resources: Sequence[FileResource]) -> list[Manifest]:
    found: list[Manifest] = []
    for index, resource in enumerate(resources):
        source = resource.config_map
        assert source is not None, "FileResource validates that configMap is set"
        volume: Manifest = {"name": source.name}
        if source.items is not None:
            volume["items"] = [{"key": item.key, "path": item.path} for item in source.items]
        found.append({"name": f"resource-{index}", "configMap": volume})
    return found
