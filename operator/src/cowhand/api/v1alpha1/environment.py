"""Environment: the template of a sandbox; policy lives here, not on the session."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from cowhand.api.labels import API_VERSION
from cowhand.api.markers import atomic, cel, list_map, merge, refused_member
from cowhand.api.meta import DNS_SUBDOMAIN, Int32, Model, ObjectMeta, Quantity

NO_EGRESS = (
    "sandboxes have no egress in this version: leave networking out or write {type: None} (allowed "
    "hosts come with the credential proxy)"
)
RESERVED_ENV = (
    "names that begin with COWHAND_ or SANDBOXD_ are reserved: choose another name for the variable"
)


class ComputeResources(Model):
    """Limits of the sandbox container; memory and storage are reserved in full, of cpu a tenth."""

    cpu: Quantity | None = None
    """cpu that the sandbox may use, for example 500m; a tenth of it, at least 10m, is reserved (the
    request), because a sandbox mostly waits for the model. Default the chart's default environment."""
    memory: Quantity | None = None
    """memory of the sandbox, for example 1Gi; request and limit at once."""
    ephemeral_storage: Quantity | None = None
    """ephemeralStorage of the sandbox, for example 4Gi; request and limit at
    once, also the size of /workspace."""


class EnvVar(Model):
    """One environment variable of the sandbox."""

    name: Annotated[
        str,
        Field(
            min_length=1,
            max_length=128,
            pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
            json_schema_extra=cel(
                "!self.startsWith('COWHAND_') && !self.startsWith('SANDBOXD_')", RESERVED_ENV
            ),
        ),
    ]
    """name of the variable; names that begin with COWHAND_ or SANDBOXD_ are reserved."""
    value: Annotated[str, Field(max_length=4096)]
    """value of the variable. Not for secrets: everything in the sandbox can read it."""

    @model_validator(mode="after")
    def _check(self) -> EnvVar:
        if self.name.startswith(("COWHAND_", "SANDBOXD_")):
            raise ValueError(f"name: {RESERVED_ENV}")
        return self


class Networking(Model):
    """What a sandbox may reach."""

    model_config = ConfigDict(
        json_schema_extra=merge(
            cel("self.type == 'None'", NO_EGRESS, field=".type"),
            refused_member("allowedHosts", NO_EGRESS),
        )
    )

    type: Annotated[str, Field(min_length=1, max_length=32)] = "None"
    """type must be None in this version: sandboxes reach nothing."""
    allowed_hosts: (
        Annotated[
            tuple[Annotated[str, Field(max_length=253)], ...],
            Field(max_length=256, json_schema_extra=atomic()),
        ]
        | None
    ) = None
    """allowedHosts is refused in this version."""

    @model_validator(mode="after")
    def _check(self) -> Networking:
        if self.type != "None":
            raise ValueError(f"type: {NO_EGRESS}")
        if self.allowed_hosts is not None:
            raise ValueError(f"allowedHosts: {NO_EGRESS}")
        return self


class EnvironmentSpec(Model):
    """What a sandbox looks like."""

    image: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^\S+$")] | None = None
    """image of the sandbox container, which must contain sandboxd; default the chart's
    sandboxImage."""
    resources: ComputeResources | None = None
    """resources of the sandbox container: its limits; of cpu a tenth is reserved, the others in full."""
    runtime_class_name: (
        Annotated[str, Field(min_length=1, max_length=253, pattern=DNS_SUBDOMAIN)] | None
    ) = None
    """runtimeClassName of the pod, for example gvisor."""
    node_selector: (
        Annotated[
            dict[
                str,
                Annotated[
                    str,
                    Field(max_length=63, pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$"),
                ],
            ],
            Field(max_length=32),
        ]
        | None
    ) = None
    """nodeSelector of the pod: labels that its node must have."""
    env: Annotated[
        tuple[EnvVar, ...], Field(max_length=100, json_schema_extra=list_map("name"))
    ] = ()
    """env lists environment variables of the sandbox container."""
    networking: Networking | None = None
    """networking says what the sandbox may reach; in this version nothing."""
    idle_timeout_seconds: Annotated[Int32, Field(ge=10, le=31_536_000)] | None = None
    """idleTimeoutSeconds without a tool call after which the sandbox is suspended. Absent: never."""
    startup_timeout_seconds: Annotated[Int32, Field(ge=5, le=3600)] = 180
    """startupTimeoutSeconds is how long the pod may take to become Ready."""

    @model_validator(mode="after")
    def _check(self) -> EnvironmentSpec:
        if len({var.name for var in self.env}) != len(self.env):
            raise ValueError("env: each name may occur once")
        return self


class Environment(Model):
    """The template of a sandbox: image, resources, runtime class, networking, timeouts."""

    model_config = ConfigDict(extra="ignore")

    api_version: Literal["cowhand.dev/v1alpha1"] = API_VERSION
    kind: Literal["Environment"] = "Environment"
    metadata: ObjectMeta = ObjectMeta()
    spec: EnvironmentSpec = EnvironmentSpec()
    """spec is what the user wants."""
