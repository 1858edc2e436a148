"""The generator refuses what it cannot translate faithfully."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from cowhand.api.markers import atomic, cel, list_map, merge
from cowhand.api.meta import Int32, Quantity
from cowhand.api.schema import SchemaError, structural


class Base(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


Short = Annotated[str, Field(max_length=9)]


class Leaf(Base):
    """A leaf."""

    name: Short
    """name of it."""


class Tree(Base):
    """A tree."""

    inner: Tree | None = None
    """inner tree."""


def model(annotation: Any, default: Any = ..., description: str = "field of it.") -> type[Base]:
    namespace = {
        "__annotations__": {"field": annotation},
        "field": Field(default, description=description or None),
        "__module__": __name__,
    }
    return type("Probe", (Base,), namespace)


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (Annotated[float, Field(ge=0)], "no floats"),
        (bool, "enums over booleans"),
        (str, "needs maxLength or enum"),
        (int, "int32 or int64"),
        (Leaf | Short, "union"),
        (Annotated[tuple[Short, Short], Field(json_schema_extra=atomic())], "prefixItems"),
        (Annotated[set[Short], Field(max_length=3, json_schema_extra=atomic())], "uniqueItems"),
        (tuple[Short, ...], "maxItems and a list type"),
        (Annotated[tuple[Short, ...], Field(max_length=2)], "maxItems and a list type"),
        (dict[str, Any], "preserve-unknown-fields"),
        (Annotated[Int32, Field(gt=0)], "exclusiveMinimum"),
        (Tree, "contains itself"),
        (
            Annotated[tuple[Leaf, ...], Field(max_length=2, json_schema_extra=list_map("other"))],
            "list map key other must be required",
        ),
        (Any, "type None"),
    ],
)
def test_what_has_no_counterpart_is_an_error_with_its_path(annotation: Any, text: str) -> None:
    with pytest.raises(SchemaError, match=r"Probe\.field|Tree|contains itself") as refused:
        structural(model(annotation))
    assert text in str(refused.value)


def test_a_field_without_description_is_an_error() -> None:
    with pytest.raises(SchemaError, match=r"Probe\.field: every field needs a description"):
        structural(model(Short, description=""))


def field(annotation: Any, default: Any = ...) -> dict[str, Any]:
    found: dict[str, Any] = structural(model(annotation, default))["properties"]["field"]
    return found


def test_optional_is_absent_from_required_and_has_no_null() -> None:
    schema = structural(model(Short | None, None))
    assert "required" not in schema
    assert schema["properties"]["field"] == {
        "description": "field of it.",
        "type": "string",
        "maxLength": 9,
    }


def test_references_are_inlined_and_the_description_beside_them_wins() -> None:
    assert field(Leaf) == {
        "description": "field of it.",
        "type": "object",
        "properties": {"name": {"description": "name of it.", "type": "string", "maxLength": 9}},
        "required": ["name"],
    }


def test_rules_of_a_class_and_of_a_field_are_joined() -> None:
    class Ruled(Leaf):
        """Ruled."""

        model_config = ConfigDict(json_schema_extra=cel("inner", "m"))

    annotation = Annotated[Ruled, Field(json_schema_extra=cel("outer", "m"))]
    rules = field(annotation)["x-kubernetes-validations"]
    assert [rule["rule"] for rule in rules] == ["inner", "outer"]


def test_scalars_keep_their_default_lists_and_objects_lose_it() -> None:
    assert field(Short, "x")["default"] == "x"
    assert "default" not in field(Leaf, Leaf(name="x"))
    listed = Annotated[tuple[Short, ...], Field(max_length=2, json_schema_extra=atomic())]
    assert "default" not in field(listed, ("x",))


def test_scalar_translations() -> None:
    assert field(Literal["only"]) == {
        "description": "field of it.",
        "type": "string",
        "enum": ["only"],
    }
    assert field(datetime)["format"] == "date-time"
    quantity = field(Quantity)
    assert quantity["x-kubernetes-int-or-string"] is True
    assert "type" not in quantity
    assert "pattern" in quantity


def test_markers_join_rules_and_refuse_a_clash() -> None:
    both = merge(cel("a", "m"), cel("b", "m", field=".x"))
    assert [rule["rule"] for rule in both["x-kubernetes-validations"]] == ["a", "b"]
    with pytest.raises(ValueError, match="twice"):
        merge(atomic(), list_map("name"))
