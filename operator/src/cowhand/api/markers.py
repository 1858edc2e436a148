"""Schema markers: what pydantic cannot say about a field but the Kubernetes API server can check.

The models of `cowhand.api` attach them by `json_schema_extra`; `cowhand.api.schema` copies them into
the CRDs. A CEL rule is checked by the API server only, so a model that has one also has a validator
that says the same in Python; `tests/unit/api` holds both against one table of objects.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Extra: TypeAlias = dict[str, Any]

VALIDATIONS = "x-kubernetes-validations"


def cel(rule: str, message: str, *, field: str | None = None, reason: str | None = None) -> Extra:
    """One CEL rule of the field or object that it is attached to.

    Args:
        rule: expression over `self` (and `oldSelf`, which makes it a transition rule).
        message: what the user reads; names the field and says what to do.
        field: path below the object that the refusal points at, for example `.message`.
        reason: `FieldValueInvalid` (default), `FieldValueForbidden`, `FieldValueRequired`.
    """
    entry: Extra = {"rule": rule, "message": message}
    if field is not None:
        entry["fieldPath"] = field
    if reason is not None:
        entry["reason"] = reason
    return {VALIDATIONS: [entry]}


def immutable_member(name: str, hint: str) -> Extra:
    """Rule of an object: its optional member `name` may be neither changed, added nor removed."""
    rule = (
        f"has(self.{name}) == has(oldSelf.{name}) && "
        f"(!has(self.{name}) || self.{name} == oldSelf.{name})"
    )
    return cel(rule, f"{name} is immutable: {hint}", field=f".{name}")


def refused_member(name: str, message: str) -> Extra:
    """Rule of an object: its member `name` exists only to be refused with `message`."""
    return cel(f"!has(self.{name})", message, field=f".{name}", reason="FieldValueForbidden")


def exactly_one(*names: str) -> Extra:
    """Rule of an object: exactly one of these members is set."""
    rule = f"[{', '.join(f'has(self.{name})' for name in names)}].filter(given, given).size() == 1"
    return cel(rule, f"exactly one of {', '.join(names[:-1])} and {names[-1]} must be set")


def at_most_one(a: str, b: str) -> Extra:
    """Rule of an object: at most one of two members is set."""
    return cel(f"!has(self.{a}) || !has(self.{b})", f"at most one of {a} and {b} may be set")


def list_map(*keys: str) -> Extra:
    """A list whose elements are identified by `keys`: merged by key under server-side apply."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


def list_set() -> Extra:
    """A list of distinct scalars."""
    return {"x-kubernetes-list-type": "set"}


def atomic() -> Extra:
    """A list that has one owner and is replaced as a whole."""
    return {"x-kubernetes-list-type": "atomic"}


def merge(*extras: Extra) -> Extra:
    """Several markers as one: CEL rules are joined, other keys must not collide."""
    out: Extra = {}
    for extra in extras:
        for key, value in extra.items():
            if key == VALIDATIONS:
                out.setdefault(VALIDATIONS, []).extend(value)
            elif key in out:
                raise ValueError(f"marker {key} given twice")
            else:
                out[key] = value
    return out
