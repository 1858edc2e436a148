"""The lint of our CRDs: Kubernetes' API conventions as far as they can be read off a schema."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from cowhand.api import generate, labels
from cowhand.api.crds import RESOURCES, crd
from cowhand.api.v1alpha1.reasons import REASONS, SandboxCondition, SessionCondition

ROOT = pathlib.Path(__file__).resolve().parents[3]
CRDS = {
    path.name: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "crds").glob("*.yaml"))
}
Json = dict[str, Any]


def version(loaded: Json) -> Json:
    (only,) = loaded["spec"]["versions"]
    found: Json = only
    return found


def schema(loaded: Json) -> Json:
    found: Json = version(loaded)["schema"]["openAPIV3Schema"]
    return found


def nodes(path: str, node: Json) -> Iterator[tuple[str, Json]]:
    """Every schema node below spec and status, with its path."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(f"{path}.{name}", child)
    for key in ("items", "additionalProperties"):
        if key in node:
            yield from nodes(f"{path}[]", node[key])


ALL_NODES = [
    (f"{loaded['spec']['names']['kind']}.{path}", node)
    for loaded in CRDS.values()
    for part in ("spec", "status")
    if part in schema(loaded)["properties"]
    for path, node in nodes(part, schema(loaded)["properties"][part])
]


def complaints(path: str, node: Json) -> list[str]:
    """What the conventions say about one node; empty if nothing."""
    found = []
    kind = node.get("type")
    name = path.rpartition(".")[2].removesuffix("[]")
    described = path.endswith("[]") or str(node.get("description", "")).startswith(f"{name} ")
    if not described:
        found.append("the description must begin with the field's name")
    if kind in ("boolean", "number") or node.get("nullable"):
        found.append(f"{kind} or nullable is not used")
    if kind == "string" and not {"maxLength", "enum", "format"} & set(node):
        found.append("an unbounded string")
    if kind == "array" and not {"maxItems", "x-kubernetes-list-type"} <= set(node):
        found.append("a list without maxItems or list type")
    if kind == "integer" and node.get("format") not in ("int32", "int64"):
        found.append("an integer without width")
    if name.endswith(("Seconds", "Milliseconds")) and kind != "integer":
        found.append("a duration that is no integer")
    if name.endswith("Time") and node.get("format") != "date-time":
        found.append("an instant that is no date-time")
    found += [
        f"rule without a message: {rule['rule']}"
        for rule in node.get("x-kubernetes-validations", [])
        if not rule.get("message")
    ]
    return found


@pytest.mark.parametrize(("path", "node"), ALL_NODES, ids=[path for path, _ in ALL_NODES])
def test_every_field_follows_the_conventions(path: str, node: Json) -> None:
    assert complaints(path, node) == []


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("a", {"type": "boolean", "description": "a is."}),
        ("a", {"type": "string", "description": "a is."}),
        ("a", {"type": "string", "maxLength": 3}),
        ("a", {"type": "string", "maxLength": 3, "description": "the field a."}),
        ("a", {"type": "array", "maxItems": 3, "description": "a is."}),
        ("a", {"type": "integer", "description": "a is."}),
        ("waitSeconds", {"type": "string", "maxLength": 3, "description": "waitSeconds is."}),
        ("startTime", {"type": "string", "maxLength": 30, "description": "startTime is."}),
    ],
)
def test_the_lint_finds_each_fault(name: str, node: Json) -> None:
    assert complaints(f"X.spec.{name}", node)


@pytest.mark.parametrize("loaded", CRDS.values(), ids=CRDS)
def test_the_frame_of_each_crd(loaded: Json) -> None:
    names = loaded["spec"]["names"]
    assert loaded["metadata"]["name"] == f"{names['plural']}.{labels.GROUP}"
    assert names["categories"] == ["cowhand"]
    assert all(len(short) >= 3 for short in names["shortNames"])
    assert loaded["spec"]["scope"] == "Namespaced"
    assert version(loaded)["storage"]
    assert version(loaded)["served"]
    assert "status" not in schema(loaded).get("required", [])
    has_status = "status" in schema(loaded)["properties"]
    assert version(loaded).get("subresources", {}) == ({"status": {}} if has_status else {})


def test_short_names_are_distinct_and_not_those_of_the_sandbox_sig() -> None:
    short = [name for loaded in CRDS.values() for name in loaded["spec"]["names"]["shortNames"]]
    assert sorted(short) == ["ags", "cagent", "cenv", "csbx"]


@pytest.mark.parametrize("loaded", CRDS.values(), ids=CRDS)
def test_status_begins_with_conditions_and_is_not_current_by_itself(loaded: Json) -> None:
    status = schema(loaded)["properties"].get("status")
    if status is None:
        assert loaded["spec"]["names"]["kind"] in ("Agent", "Environment")
        return
    assert next(iter(status["properties"])) == "conditions"
    conditions = status["properties"]["conditions"]
    assert conditions["x-kubernetes-list-map-keys"] == ["type"]
    needed = ["lastTransitionTime", "reason", "status", "type"]
    assert conditions["items"]["required"] == needed
    assert status["default"] == {"observedGeneration": -1}
    assert status["properties"]["observedGeneration"]["default"] == -1
    assert "phase" not in status["properties"]
    others = [
        path
        for path, node in nodes("status", status)
        if "default" in node and path not in ("status", "status.observedGeneration")
    ]
    assert others == []


@pytest.mark.parametrize("loaded", CRDS.values(), ids=CRDS)
def test_printer_columns_owner_ready_reason_mode_age(loaded: Json) -> None:
    columns = version(loaded)["additionalPrinterColumns"]
    assert columns[-1]["name"] == "Age"
    order = [c["name"] for c in columns if c["name"] in ("Ready", "Reason", "Mode", "Age")]
    assert order == [name for name in ("Ready", "Reason", "Mode", "Age") if name in order]
    assert all(c["priority"] == 1 for c in columns if c["name"] == "Mode")


def test_crds_fit_into_a_client_side_apply() -> None:
    for name in CRDS:
        assert (ROOT / "crds" / name).stat().st_size < 262_144 // 2


def test_the_committed_files_are_what_the_generator_makes() -> None:
    assert generate.drift(ROOT) == []
    for name in CRDS:
        copy = ROOT / "charts/cowhand/files/crds" / name
        assert copy.read_bytes() == (ROOT / "crds" / name).read_bytes()
        assert copy.read_text().startswith(generate.HEADER)


def test_check_finds_drift_and_leftovers_and_write_repairs_them(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main([str(tmp_path)]) == 0
    assert generate.main(["--check", str(tmp_path)]) == 0
    (tmp_path / "crds/cowhand.dev_agents.yaml").write_text("changed")
    (tmp_path / "crds/old.yaml").write_text("left over")
    assert generate.main(["--check", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "crds/cowhand.dev_agents.yaml is not up to date" in told
    assert "crds/old.yaml" in told
    assert generate.main([str(tmp_path)]) == 0
    assert generate.drift(tmp_path) == []


def test_reasons_are_closed_lists_that_say_when() -> None:
    assert set(REASONS["AgentSession"]) == set(SessionCondition)
    assert set(REASONS["Sandbox"]) == set(SandboxCondition)
    for conditions in REASONS.values():
        for reasons in conditions.values():
            for reason in reasons:
                assert reason.value[0].isupper()
                assert reason.value.isalnum()
                assert reason.meaning.startswith(("True: ", "False: ", "Unknown: "))
                assert reason.meaning.endswith(".")


def test_the_reference_page_names_every_field_and_reason() -> None:
    text = (ROOT / "docs/api.md").read_text()
    for resource in RESOURCES:
        parts = schema(crd(resource))["properties"]
        for part in ("spec", "status"):
            for path, node in nodes(part, parts[part]) if part in parts else ():
                if path != part and not path.endswith("[]") and node.get("description"):
                    assert f"| `{path}` |" in text
    for conditions in REASONS.values():
        for reasons in conditions.values():
            for reason in reasons:
                assert f"| `{reason.value}` | {reason.meaning} |" in text
