"""The CustomResourceDefinitions: names, columns and subresources around the schemas of the models.

Called by `cowhand.api.generate` and by the tests that hold models and CRDs together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from cowhand.api import labels
from cowhand.api.schema import Schema, structural
from cowhand.api.v1alpha1 import Agent, AgentSession, Environment, Sandbox


@dataclass(frozen=True)
class Column:
    """One column of `kubectl get`; priority 1 shows with `-o wide` only."""

    name: str
    path: str
    type: str = "string"
    priority: int = 0


@dataclass(frozen=True)
class Resource:
    """One custom resource: its model and what the schema does not say."""

    model: type[BaseModel]
    plural: str
    short: str
    columns: tuple[Column, ...]

    @property
    def kind(self) -> str:
        """CamelCase kind."""
        return self.model.__name__

    @property
    def has_status(self) -> bool:
        """Whether there is something to observe."""
        return "status" in self.model.model_fields


def _condition(kind: str, field: str) -> str:
    return f'.status.conditions[?(@.type=="{kind}")].{field}'


AGE = Column("Age", ".metadata.creationTimestamp", "date")

RESOURCES: tuple[Resource, ...] = (
    Resource(
        Agent,
        "agents",
        "cagent",
        (
            Column("Model", ".spec.model.id"),
            Column("Tools", ".spec.tools[*].name", priority=1),
            AGE,
        ),
    ),
    Resource(
        AgentSession,
        "agentsessions",
        "ags",
        (
            Column("Agent", ".spec.agentRef.name"),
            Column("Ready", _condition("Ready", "status")),
            Column("State", ".status.state"),
            Column("Turn", _condition("TurnComplete", "reason")),
            Column("Turns", ".status.turns", "integer"),
            Column("Reason", _condition("Ready", "reason"), priority=1),
            Column("Mode", ".spec.operatingMode", priority=1),
            Column("Profile fits", _condition("ContextProfileFits", "status"), priority=1),
            Column("Session", ".status.sessionID", priority=1),
            AGE,
        ),
    ),
    Resource(
        Environment,
        "environments",
        "cenv",
        (
            Column("Image", ".spec.image"),
            Column("Runtime", ".spec.runtimeClassName", priority=1),
            AGE,
        ),
    ),
    Resource(
        Sandbox,
        "sandboxes",
        "csbx",
        (
            Column("Holder", ".spec.holder.sessionID"),
            Column("Ready", _condition("Ready", "status")),
            Column("Reason", _condition("Ready", "reason")),
            Column("Pod", ".status.podName", priority=1),
            Column("Mode", ".spec.operatingMode", priority=1),
            AGE,
        ),
    ),
)


def openapi(resource: Resource) -> Schema:
    """The whole schema of one kind, `apiVersion` and `metadata` included."""
    model = resource.model
    spec = structural(model.model_fields["spec"].annotation)  # type: ignore[arg-type]
    spec["description"] = f"spec is what the user wants. {spec['description']}"
    properties: Schema = {
        "apiVersion": {"type": "string", "description": "apiVersion of this object."},
        "kind": {"type": "string", "description": "kind of this object."},
        "metadata": {"type": "object"},
        "spec": spec,
    }
    if resource.has_status:
        status = structural(model.model_fields["status"].annotation)  # type: ignore[arg-type]
        status["description"] = f"status is what was observed. {status['description']}"
        drop_defaults(status)
        # kstatus takes an object that nobody has seen for finished, unless this differs.
        status["default"] = {"observedGeneration": -1}
        status["properties"]["observedGeneration"]["default"] = -1
        properties["status"] = status
    required = ["spec"] if model.model_fields["spec"].is_required() else []
    return {
        "type": "object",
        "description": " ".join((model.__doc__ or "").split()),
        "properties": properties,
        **({"required": required} if required else {}),
    }


def drop_defaults(schema: Schema) -> None:
    """Remove defaults everywhere in a schema, in place: a status holds only what was written."""
    schema.pop("default", None)
    for child in (
        *schema.get("properties", {}).values(),
        *(schema[key] for key in ("items", "additionalProperties") if key in schema),
    ):
        drop_defaults(child)


def crd(resource: Resource) -> dict[str, Any]:
    """The CustomResourceDefinition of one kind."""
    columns = [
        {
            "name": column.name,
            "type": column.type,
            "jsonPath": column.path,
            **({"priority": column.priority} if column.priority else {}),
        }
        for column in resource.columns
    ]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{resource.plural}.{labels.GROUP}"},
        "spec": {
            "group": labels.GROUP,
            "names": {
                "kind": resource.kind,
                "listKind": f"{resource.kind}List",
                "plural": resource.plural,
                "singular": resource.kind.lower(),
                "shortNames": [resource.short],
                "categories": [labels.CATEGORY],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": labels.VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": openapi(resource)},
                    **({"subresources": {"status": {}}} if resource.has_status else {}),
                    "additionalPrinterColumns": columns,
                }
            ],
        },
    }
