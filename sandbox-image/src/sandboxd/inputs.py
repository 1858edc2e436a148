"""Checks of tool inputs against their schemas (Claude's agent toolset), with errors that name the field.

Called by `tools` before a tool runs. The error is the tool's result, so it is written for Claude.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class ToolError(Exception):
    """A tool cannot do what it was asked; the message says why and is the result of the call."""


@dataclass(frozen=True)
class Field:
    """One field of an input: kind is `str`, `bool`, `int` or `range` (two integers)."""

    kind: str
    required: bool = False


SCHEMAS: Mapping[str, Mapping[str, Field]] = {
    "bash": {"command": Field("str"), "restart": Field("bool"), "timeout_ms": Field("int")},
    "read": {"file_path": Field("str", required=True), "view_range": Field("range")},
    "write": {"file_path": Field("str", required=True), "content": Field("str", required=True)},
    "edit": {
        "file_path": Field("str", required=True),
        "old_string": Field("str", required=True),
        "new_string": Field("str", required=True),
        "replace_all": Field("bool"),
    },
    "glob": {"pattern": Field("str", required=True), "path": Field("str")},
    "grep": {"pattern": Field("str", required=True), "path": Field("str")},
}

_KINDS = {
    "str": "a string",
    "bool": "true or false",
    "int": "a positive integer",
    "range": "two integers [start line, end line]",
}


def check(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The input with null fields left out.

    Raises:
        ToolError: the tool is unknown, or a field is missing, unknown or of the wrong kind.
    """
    schema = SCHEMAS.get(name)
    if schema is None:
        raise ToolError(f"unknown tool {name!r}; this sandbox has {', '.join(SCHEMAS)}")
    known = ", ".join(schema)
    checked: dict[str, Any] = {}
    for key, value in given.items():
        if key not in schema:
            raise ToolError(f"{name}: unknown field {key!r}; the fields are {known}")
        if value is None:
            continue
        kind = schema[key].kind
        if not _fits(kind, value):
            raise ToolError(f"{name}: field {key!r} must be {_KINDS[kind]}, not {_short(value)}")
        if kind == "str":
            _check_text(name, key, value)
        checked[key] = value
    for key, field in schema.items():
        if field.required and key not in checked:
            raise ToolError(f"{name}: field {key!r} is required")
    return checked


def _fits(kind: str, value: object) -> bool:
    if kind == "str":
        return isinstance(value, str)
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    )


def _check_text(name: str, key: str, value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ToolError(
            f"{name}: field {key!r} holds half a surrogate pair, which is not text"
        ) from None
    if "\0" in value and key != "content" and not key.endswith("_string"):
        raise ToolError(f"{name}: field {key!r} holds a NUL character")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
