"""Files that a session or a sandbox starts with; shared by AgentSession and Sandbox."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from cowhand.api.markers import cel, list_map, merge, refused_member
from cowhand.api.meta import Model, Name

NO_GIT = (
    "git resources come with the credential proxy, not in this version: put the files into a "
    "ConfigMap and name it under configMap"
)
DOT_DOT = "a path must not contain .. as a component"
_DOT_DOT_CEL = "!self.matches('(^|/)[.][.]?(/|$)')"
_DOT_DOT_RE = re.compile(r"(^|/)\.\.?(/|$)")


class KeyToPath(Model):
    """One key of a ConfigMap and the file it becomes."""

    key: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")]
    """key of the ConfigMap."""
    path: Annotated[
        str,
        Field(
            min_length=1,
            max_length=512,
            pattern=r"^[-A-Za-z0-9._@+]+(/[-A-Za-z0-9._@+]+)*$",
            json_schema_extra=cel(_DOT_DOT_CEL, DOT_DOT),
        ),
    ]
    """path of the file, relative to mountPath."""

    @model_validator(mode="after")
    def _check(self) -> KeyToPath:
        if _DOT_DOT_RE.search(self.path):
            raise ValueError(f"path: {DOT_DOT}")
        return self


class ConfigMapSource(Model):
    """Files from a ConfigMap."""

    name: Name
    """name of the ConfigMap in the same namespace."""
    items: (
        Annotated[
            tuple[KeyToPath, ...],
            Field(min_length=1, max_length=256, json_schema_extra=list_map("path")),
        ]
        | None
    ) = None
    """items chooses keys and their paths. Absent: each key becomes a file of its name."""

    @model_validator(mode="after")
    def _check(self) -> ConfigMapSource:
        if self.items is not None and len({i.path for i in self.items}) != len(self.items):
            raise ValueError("items: each path may occur once")
        return self


def _opaque() -> Any:
    return Field(default=None, json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})


class FileResource(Model):
    """Files that are copied into /workspace before the first tool call."""

    model_config = ConfigDict(
        json_schema_extra=merge(
            refused_member("git", NO_GIT),
            refused_member("githubRepository", NO_GIT),
            cel(
                "has(self.configMap) || has(self.git) || has(self.githubRepository)",
                "configMap must be set",
                field=".configMap",
                reason="FieldValueRequired",
            ),
        )
    )

    config_map: ConfigMapSource | None = None
    """configMap names the ConfigMap whose keys become files."""
    mount_path: Annotated[
        str,
        Field(
            min_length=1,
            max_length=512,
            pattern=r"^/workspace(/[-A-Za-z0-9._@+]+)*$",
            json_schema_extra=cel(_DOT_DOT_CEL, DOT_DOT),
        ),
    ]
    """mountPath is the directory the files are copied to: /workspace or a path under it."""
    git: dict[str, Any] | None = _opaque()
    """git is refused in this version."""
    github_repository: dict[str, Any] | None = _opaque()
    """githubRepository is refused in this version."""

    @model_validator(mode="after")
    def _check(self) -> FileResource:
        if self.git is not None or self.github_repository is not None:
            member = "git" if self.git is not None else "githubRepository"
            raise ValueError(f"{member}: {NO_GIT}")
        if self.config_map is None:
            raise ValueError("configMap: configMap must be set")
        if _DOT_DOT_RE.search(self.mount_path):
            raise ValueError(f"mountPath: {DOT_DOT}")
        return self
