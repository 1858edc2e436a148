"""What all custom resources share: base model, scalar types, metadata, conditions, references.

Imported by the models of each version, and by whoever writes conditions or reads object metadata.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
DNS_SUBDOMAIN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
QUANTITY = r"^[0-9]+(\.[0-9]+)?([numkMGTPE]|[KMGTPE]i)?$"

Int32 = Annotated[int, Field(strict=True, json_schema_extra={"format": "int32"})]
"""32-bit integer."""
Int64 = Annotated[int, Field(strict=True, json_schema_extra={"format": "int64"})]
"""64-bit integer."""
Name = Annotated[str, Field(min_length=1, max_length=253, pattern=DNS_SUBDOMAIN)]
"""Name of a Kubernetes object."""
Word = Annotated[str, Field(max_length=128)]
"""Short machine-readable text of a status."""
Text = Annotated[str, Field(max_length=4096)]
"""Text for people in a status."""


def _as_text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Quantity = Annotated[
    str,
    Field(max_length=32, pattern=QUANTITY, json_schema_extra={"x-kubernetes-int-or-string": True}),
    BeforeValidator(_as_text),
]
"""Kubernetes quantity such as `500m` or `2Gi`; a plain integer is read as text."""


def _rfc3339(value: datetime) -> str:
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


Time = Annotated[datetime, PlainSerializer(_rfc3339, return_type=str, when_used="json")]
"""Instant; written in UTC with whole seconds, as Kubernetes does."""


def _alias(name: str) -> str:
    """CamelCase as Kubernetes writes it: `session_id` is sessionID, `base_url` baseURL."""
    first, *rest = name.split("_")
    acronyms = {"id", "ip", "uid", "url"}
    return first + "".join(w.upper() if w in acronyms else w.capitalize() for w in rest)


class Model(BaseModel):
    """Base of everything the user writes: frozen, camelCase on the wire, unknown members refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=_alias,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )

    def to_json(self) -> dict[str, Any]:
        """The object as the API server sees it: camelCase, absent members left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class StatusModel(Model):
    """Base of what the operator writes: members of a newer version are ignored when read."""

    model_config = ConfigDict(extra="ignore")


class OwnerReference(StatusModel):
    """The part of an owner reference that Cowhand reads."""

    api_version: str
    kind: str
    name: str
    uid: str
    controller: bool = False


class ObjectMeta(StatusModel):
    """The part of an object's metadata that Cowhand reads; never part of a generated schema."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    finalizers: tuple[str, ...] = ()
    owner_references: tuple[OwnerReference, ...] = ()


class Condition(StatusModel):
    """One observation about an object, as in Kubernetes' API conventions."""

    type: Annotated[str, Field(min_length=1, max_length=64)]
    """type names what is observed, for example Ready."""
    status: Literal["True", "False", "Unknown"]
    """status is True, False or Unknown."""
    observed_generation: Annotated[Int64, Field(ge=0)] | None = None
    """observedGeneration is the generation of the object that was observed."""
    last_transition_time: Time
    """lastTransitionTime is when status last changed."""
    reason: Annotated[
        str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z]([A-Za-z0-9_]*[A-Za-z0-9_])?$")
    ]
    """reason is one CamelCase word from the closed list of this condition."""
    message: Text = ""
    """message says in words what was observed and what to do about it."""


class LocalRef(Model):
    """Names an object in the same namespace."""

    name: Name
    """name of the object."""


class SecretKeyRef(Model):
    """Names one key of a Secret in the same namespace."""

    name: Name
    """name of the Secret."""
    key: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")] = (
        "api-key"
    )
    """key is the entry of the Secret that holds the value."""
