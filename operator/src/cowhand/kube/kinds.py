"""The Kubernetes kinds that Cowhand reads or writes, as values.

A `Kind` knows its REST path, so that the client needs no discovery and no generated models. Used by
every caller of `cowhand.kube.client`; `of` finds the kind of a manifest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cowhand.errors import UserError

# What a name in a path may be: no dot segment, no separator, no escape. Names come from objects and from the
# store, where a tenant can write them; `../../<other tenant>/...` would be asked for with our own rights.
_SEGMENT: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9._:]{0,251}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Kind:
    """One kind of object.

    Attributes:
        group: API group, empty for the core group.
        version: API version, for example `v1`.
        kind: CamelCase name.
        plural: name in REST paths.
        namespaced: False for cluster-scoped kinds.
    """

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """`group/version`, or `version` alone for the core group."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None = None, name: str = "", subresource: str = "") -> str:
        """REST path of a collection, an object or its subresource.

        Args:
            namespace: None for all namespaces and for cluster-scoped kinds.
            name: empty for the collection.
            subresource: for example `status` or `scale`; needs a name.

        Raises:
            UserError: a part is no name of Kubernetes (and would lead to another object).
        """
        for part in (namespace, name, subresource):
            if part and not _SEGMENT.fullmatch(part):
                raise UserError(f"{part[:80]!r} is not a name of Kubernetes", field="metadata.name")
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root]
        if self.namespaced and namespace is not None:
            parts.append(f"namespaces/{namespace}")
        parts.append(self.plural)
        if name:
            parts.append(name)
        if subresource:
            parts.append(subresource)
        return "/".join(parts)

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


COWHAND_GROUP: Final = "cowhand.dev"
COWHAND_VERSION: Final = "v1alpha1"

AGENT: Final = Kind(COWHAND_GROUP, COWHAND_VERSION, "Agent", "agents")
AGENT_SESSION: Final = Kind(COWHAND_GROUP, COWHAND_VERSION, "AgentSession", "agentsessions")
ENVIRONMENT: Final = Kind(COWHAND_GROUP, COWHAND_VERSION, "Environment", "environments")
SANDBOX: Final = Kind(COWHAND_GROUP, COWHAND_VERSION, "Sandbox", "sandboxes")

CONFIG_MAP: Final = Kind("", "v1", "ConfigMap", "configmaps")
EVENT: Final = Kind("", "v1", "Event", "events")
NAMESPACE: Final = Kind("", "v1", "Namespace", "namespaces", namespaced=False)
NODE: Final = Kind("", "v1", "Node", "nodes", namespaced=False)
PERSISTENT_VOLUME_CLAIM: Final = Kind("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims")
POD: Final = Kind("", "v1", "Pod", "pods")
SECRET: Final = Kind("", "v1", "Secret", "secrets")
SERVICE: Final = Kind("", "v1", "Service", "services")
SERVICE_ACCOUNT: Final = Kind("", "v1", "ServiceAccount", "serviceaccounts")

DEPLOYMENT: Final = Kind("apps", "v1", "Deployment", "deployments")
STATEFUL_SET: Final = Kind("apps", "v1", "StatefulSet", "statefulsets")
JOB: Final = Kind("batch", "v1", "Job", "jobs")
LEASE: Final = Kind("coordination.k8s.io", "v1", "Lease", "leases")
NETWORK_POLICY: Final = Kind("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies")

HORIZONTAL_POD_AUTOSCALER: Final = Kind(
    "autoscaling", "v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers"
)
SCALED_OBJECT: Final = Kind("keda.sh", "v1alpha1", "ScaledObject", "scaledobjects")

CUSTOM_RESOURCE_DEFINITION: Final = Kind(
    "apiextensions.k8s.io",
    "v1",
    "CustomResourceDefinition",
    "customresourcedefinitions",
    namespaced=False,
)
TOKEN_REVIEW: Final = Kind(
    "authentication.k8s.io", "v1", "TokenReview", "tokenreviews", namespaced=False
)
SUBJECT_ACCESS_REVIEW: Final = Kind(
    "authorization.k8s.io", "v1", "SubjectAccessReview", "subjectaccessreviews", namespaced=False
)
SELF_SUBJECT_ACCESS_REVIEW: Final = Kind(
    "authorization.k8s.io",
    "v1",
    "SelfSubjectAccessReview",
    "selfsubjectaccessreviews",
    namespaced=False,
)
LOCAL_SUBJECT_ACCESS_REVIEW: Final = Kind(
    "authorization.k8s.io", "v1", "LocalSubjectAccessReview", "localsubjectaccessreviews"
)

_BY_NAME: Final[Mapping[tuple[str, str], Kind]] = {
    (value.api_version, value.kind): value
    for value in tuple(globals().values())
    if isinstance(value, Kind)
}


def of(manifest: Mapping[str, Any]) -> Kind:
    """The kind of a manifest by its `apiVersion` and `kind`.

    Raises:
        UserError: a kind that is not in this module.
    """
    key = (str(manifest.get("apiVersion", "")), str(manifest.get("kind", "")))
    try:
        return _BY_NAME[key]
    except KeyError:
        raise UserError(
            f"apiVersion {key[0]!r} kind {key[1]!r} is not a kind that Cowhand works with",
            field="kind",
        ) from None
