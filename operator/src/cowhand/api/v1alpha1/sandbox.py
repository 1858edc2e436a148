"""Sandbox: one hand that is a pod."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from cowhand.api.labels import API_VERSION
from cowhand.api.markers import at_most_one, atomic, immutable_member, list_map, merge
from cowhand.api.meta import (
    DNS_LABEL,
    Condition,
    Int32,
    Int64,
    LocalRef,
    Model,
    ObjectMeta,
    StatusModel,
    Time,
)
from cowhand.api.v1alpha1.environment import EnvironmentSpec
from cowhand.api.v1alpha1.files import FileResource
from cowhand.api.v1alpha1.session import OperatingMode


class Holder(Model):
    """The session that may execute in a sandbox."""

    session_id: Annotated[str, Field(min_length=37, max_length=37, pattern=r"^sesn_[0-9a-f]{32}$")]
    """sessionID of the session."""
    hand: Annotated[str, Field(min_length=1, max_length=20, pattern=DNS_LABEL)]
    """hand of the session that this sandbox is."""
    instance: Annotated[Int32, Field(ge=1)]
    """instance of the hand, from 1."""


class SandboxSpec(Model):
    """What the sandbox should be."""

    model_config = ConfigDict(
        json_schema_extra=merge(
            at_most_one("environmentRef", "environment"),
            immutable_member(
                "holder", "a sandbox keeps its holder; make a new Sandbox for another session"
            ),
        )
    )

    environment_ref: LocalRef | None = None
    """environmentRef names the Environment. At most one of environmentRef, environment; absent: the
    chart's default environment."""
    environment: EnvironmentSpec | None = None
    """environment is an Environment written inline."""
    holder: Holder | None = None
    """holder is the session that may execute in it. Absent: only people, with `cowhand exec`."""
    resources: Annotated[
        tuple[FileResource, ...], Field(max_length=16, json_schema_extra=atomic())
    ] = ()
    """resources are files that are copied into /workspace when the pod starts."""
    operating_mode: OperatingMode = "Running"
    """operatingMode is Running, or Suspended: then it has no pod."""
    ttl_seconds_after_creation: Annotated[Int32, Field(ge=0, le=31_536_000)] | None = None
    """ttlSecondsAfterCreation deletes the sandbox so long after it was made. Absent: never."""

    @model_validator(mode="after")
    def _check(self) -> SandboxSpec:
        if self.environment_ref is not None and self.environment is not None:
            raise ValueError("at most one of environmentRef and environment may be set")
        return self


class SandboxStatus(StatusModel):
    """What was observed of the sandbox."""

    conditions: Annotated[
        tuple[Condition, ...], Field(max_length=16, json_schema_extra=list_map("type"))
    ] = ()
    """conditions are Ready and EgressEnforced, and Reconciling and Stalled where they apply."""
    observed_generation: Annotated[Int64, Field(ge=-1)] = -1
    """observedGeneration is the generation that the operator has acted upon, -1 before the first."""
    pod_name: Annotated[str, Field(max_length=253)] = ""
    """podName is the pod that is this sandbox now."""
    pod_uid: Annotated[str, Field(max_length=64)] = ""
    """podUID is its uid."""
    pod_ip: Annotated[str, Field(max_length=45)] = ""
    """podIP is its address."""
    started_time: Time | None = None
    """startedTime is when the pod became Ready."""


class Sandbox(Model):
    """One sandbox pod in which a session's tools run."""

    model_config = ConfigDict(extra="ignore")

    api_version: Literal["cowhand.dev/v1alpha1"] = API_VERSION
    kind: Literal["Sandbox"] = "Sandbox"
    metadata: ObjectMeta = ObjectMeta()
    spec: SandboxSpec = SandboxSpec()
    """spec is what the user wants."""
    status: SandboxStatus = SandboxStatus()
    """status is what was observed."""
