"""pydantic models -> structural schemas of Kubernetes; what has no faithful translation is an error.

Called by `cowhand.api.crds`. pydantic's JSON schema is not what a CustomResourceDefinition accepts:
`$ref`, null branches, titles and closed objects have to go, and unions, tuples and floats have no
counterpart at all. Guessing would make an API server that checks something else than we do, so an
unknown construct raises `SchemaError`. So does a schema that breaks the house rules: every field is
described, every string, list and integer bounded or typed, every list says how it is merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from pydantic import BaseModel

from cowhand.api.markers import VALIDATIONS

Schema: TypeAlias = dict[str, Any]

_COPIED = frozenset(
    {
        "type",
        "format",
        "enum",
        "pattern",
        "minLength",
        "maxLength",
        "minimum",
        "maximum",
        "minItems",
        "maxItems",
        "maxProperties",
        "x-kubernetes-list-type",
        "x-kubernetes-list-map-keys",
        "x-kubernetes-int-or-string",
        "x-kubernetes-preserve-unknown-fields",
        VALIDATIONS,
    }
)
"""Keywords that mean the same on both sides."""

_HANDLED = frozenset({"title", "description", "default", "properties", "required", "items"})
_HANDLED_UNIONS = frozenset({"$ref", "anyOf", "additionalProperties", "const", "$defs"})


class SchemaError(Exception):
    """A model says something that has no faithful structural schema, or breaks a house rule."""


def structural(model: type[BaseModel]) -> Schema:
    """The structural schema of a model.

    Raises:
        SchemaError: with the path of the offending field.
    """
    source = model.model_json_schema(by_alias=True, mode="validation")
    return _Walk(source.get("$defs", {})).node(source, model.__name__, ())


class _Walk:
    """One walk over one JSON schema; `defs` are its shared definitions."""

    def __init__(self, defs: Mapping[str, Schema]) -> None:
        self._defs = defs

    def node(self, source: Schema, path: str, seen: tuple[str, ...]) -> Schema:
        """Translate one node; `seen` are the references that lead to it."""
        source, seen = self._resolve(source, path, seen)
        if unknown := set(source) - _COPIED - _HANDLED - _HANDLED_UNIONS:
            raise SchemaError(f"{path}: {', '.join(sorted(unknown))} has no structural counterpart")
        out: Schema = {}
        if text := source.get("description"):
            out["description"] = " ".join(text.split())
        out.update({key: value for key, value in source.items() if key in _COPIED})
        if "const" in source:
            out["enum"] = [source["const"]]
        if out.get("x-kubernetes-int-or-string"):
            out.pop("type", None)
        # A default list or object would show up in every stored object; code supplies those.
        if isinstance(source.get("default"), str | int):
            out["default"] = source["default"]
        self._children(source, out, path, seen)
        _check(out, path)
        return out

    def _resolve(
        self, source: Schema, path: str, seen: tuple[str, ...]
    ) -> tuple[Schema, tuple[str, ...]]:
        """Inline references and drop null branches; what stands beside a reference wins."""
        while "$ref" in source or "anyOf" in source:
            rest = {k: v for k, v in source.items() if k not in ("$ref", "anyOf")}
            if "$ref" in source:
                name = source["$ref"].rpartition("/")[2]
                if name in seen:
                    raise SchemaError(f"{path}: {name} contains itself")
                seen = (*seen, name)
                inner = self._defs[name]
            else:
                branches = [b for b in source["anyOf"] if b.get("type") != "null"]
                if len(branches) != 1:
                    raise SchemaError(f"{path}: a union has no structural counterpart")
                inner = branches[0]
            rules = [*inner.get(VALIDATIONS, []), *rest.get(VALIDATIONS, [])]
            source = {**inner, **rest, **({VALIDATIONS: rules} if rules else {})}
        return source, seen

    def _children(self, source: Schema, out: Schema, path: str, seen: tuple[str, ...]) -> None:
        if properties := source.get("properties"):
            out["properties"] = {
                name: self._property(child, f"{path}.{name}", seen)
                for name, child in properties.items()
            }
            if required := source.get("required"):
                out["required"] = sorted(required)
        extra = source.get("additionalProperties", False)
        if isinstance(extra, dict):
            out["additionalProperties"] = self.node(extra, f"{path}[*]", seen)
        elif extra and not out.get("x-kubernetes-preserve-unknown-fields"):
            raise SchemaError(f"{path}: open objects need the marker preserve-unknown-fields")
        if "items" in source:
            out["items"] = self.node(source["items"], f"{path}[]", seen)

    def _property(self, child: Schema, path: str, seen: tuple[str, ...]) -> Schema:
        if "description" not in child:
            raise SchemaError(f"{path}: every field needs a description")
        return self.node(child, path, seen)


def _check(out: Schema, path: str) -> None:
    """The house rules, one node at a time.

    Raises:
        SchemaError: a rule is broken.
    """
    kind = out.get("type")
    if kind in ("number", "boolean", "null") or (
        kind is None and not out.get("x-kubernetes-int-or-string")
    ):
        raise SchemaError(f"{path}: type {kind} is not allowed (enums over booleans, no floats)")
    if kind == "string" and not ({"maxLength", "enum"} & set(out) or out.get("format")):
        raise SchemaError(f"{path}: a string needs maxLength or enum")
    if kind == "integer" and out.get("format") not in ("int32", "int64"):
        raise SchemaError(f"{path}: an integer needs the format int32 or int64")
    if kind == "array":
        _check_list(out, path)
    if kind == "object" and not (
        {"properties", "additionalProperties", "x-kubernetes-preserve-unknown-fields"} & set(out)
    ):
        raise SchemaError(f"{path}: an object without properties")


def _check_list(out: Schema, path: str) -> None:
    if "maxItems" not in out or "x-kubernetes-list-type" not in out:
        raise SchemaError(f"{path}: a list needs maxItems and a list type")
    for key in out.get("x-kubernetes-list-map-keys", []):
        if key not in out["items"].get("required", []):
            raise SchemaError(f"{path}: list map key {key} must be required in the items")
