"""Model and CRD say the same about a table of good and bad objects.

The CEL rules of a CRD cannot run here; the models repeat them, and tests/e2e/test_bad_manifests.py holds
the same table against a real API server.
"""

from __future__ import annotations

import copy
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel, ValidationError

from cowhand.api.crds import RESOURCES, openapi
from cowhand.api.v1alpha1 import AgentSession, AgentSpec
from e2e.bad_manifests import BAD, GOOD, Bad, manifest

MODELS: dict[str, type[BaseModel]] = {resource.kind: resource.model for resource in RESOURCES}
Json = dict[str, Any]


def as_jsonschema(node: Json) -> Json:
    """A structural schema with Kubernetes' own keywords spelled out; closed, as in strict validation."""
    out = {key: value for key, value in node.items() if not key.startswith("x-")}
    if node.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    if "properties" in node:
        out["properties"] = {k: as_jsonschema(v) for k, v in node["properties"].items()}
        out["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if key in node:
            out[key] = as_jsonschema(node[key])
    return out


SCHEMAS = {
    resource.kind: jsonschema.Draft4Validator(
        as_jsonschema(openapi(resource)["properties"]["spec"])
    )
    for resource in RESOURCES
}


def duplicates(node: Any, schema: Json) -> bool:
    """Whether a list-map in the object has the same key twice."""
    if isinstance(node, list):
        keys = schema.get("x-kubernetes-list-map-keys")
        if keys:
            seen = [tuple(item.get(key) for key in keys) for item in node]
            if len(set(seen)) != len(seen):
                return True
        return any(duplicates(item, schema["items"]) for item in node)
    if isinstance(node, dict):
        return any(
            duplicates(value, schema["properties"][name])
            for name, value in node.items()
            if name in schema.get("properties", {})
        )
    return False


def schema_accepts(kind: str, spec: Json) -> bool:
    resource = next(r for r in RESOURCES if r.kind == kind)
    raw = openapi(resource)["properties"]["spec"]
    return bool(SCHEMAS[kind].is_valid(spec)) and not duplicates(spec, raw)


@pytest.mark.parametrize("kind", GOOD)
def test_both_accept_the_good_ones(kind: str) -> None:
    assert schema_accepts(kind, GOOD[kind])
    MODELS[kind].model_validate(manifest(kind, GOOD[kind]))


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_the_model_refuses_every_bad_one(bad: Bad) -> None:
    with pytest.raises(ValidationError):
        MODELS[bad.manifest["kind"]].model_validate(bad.manifest)


@pytest.mark.parametrize("bad", [b for b in BAD if not b.rule], ids=lambda bad: bad.name)
def test_the_schema_refuses_what_needs_no_rule(bad: Bad) -> None:
    assert not schema_accepts(bad.manifest["kind"], bad.manifest["spec"])


@pytest.mark.parametrize("bad", [b for b in BAD if b.rule], ids=lambda bad: bad.name)
def test_what_needs_a_rule_has_one_with_this_message(bad: Bad) -> None:
    kind = bad.manifest["kind"]
    assert schema_accepts(kind, bad.manifest["spec"]), "refused by the schema: no rule is needed"
    resource = next(r for r in RESOURCES if r.kind == kind)
    messages = str(openapi(resource))
    assert bad.text
    assert bad.text in messages


def test_the_table_is_large_and_its_names_are_distinct() -> None:
    assert len(BAD) >= 30
    assert len({bad.name for bad in BAD}) == len(BAD)
    assert {bad.manifest["kind"] for bad in BAD} == set(MODELS)


def test_every_rule_that_is_no_transition_has_a_bad_manifest() -> None:
    """A rule that nobody tries could be wrong for years."""
    tried = [bad.text for bad in BAD if bad.rule]

    def rules(node: Json) -> list[Json]:
        own = list(node.get("x-kubernetes-validations", []))
        for child in node.get("properties", {}).values():
            own += rules(child)
        return own + (rules(node["items"]) if "items" in node else [])

    for resource in RESOURCES:
        for rule in rules(openapi(resource)["properties"]["spec"]):
            if "oldSelf" in rule["rule"]:
                continue
            assert any(text in rule["message"] for text in tried), rule


@pytest.mark.parametrize("kind", GOOD)
def test_what_a_model_writes_its_schema_accepts(kind: str) -> None:
    written = MODELS[kind].model_validate(manifest(kind, GOOD[kind])).to_json()  # type: ignore[attr-defined]
    assert schema_accepts(kind, written["spec"])
    again = MODELS[kind].model_validate(written)
    assert again == MODELS[kind].model_validate(manifest(kind, GOOD[kind]))


def test_a_status_round_trips_and_ignores_what_a_newer_version_wrote() -> None:
    status = {
        "conditions": [
            {
                "type": "Ready",
                "status": "True",
                "reason": "Accepted",
                "message": "",
                "lastTransitionTime": "2026-01-02T03:04:05Z",
                "observedGeneration": 1,
            }
        ],
        "observedGeneration": 1,
        "sessionID": "sesn_x",
        "state": "idle",
        "usage": {"inputTokens": 3, "outputTokens": 4, "future": 5},
        "hands": [{"name": "sandbox", "instance": 1, "sandboxName": "s", "state": "Ready"}],
        "futureField": {"a": 1},
    }
    whole = {**manifest("AgentSession", copy.deepcopy(GOOD["AgentSession"])), "status": status}
    parsed = AgentSession.model_validate(whole)
    written = parsed.status.to_json()
    assert written["conditions"][0]["lastTransitionTime"] == "2026-01-02T03:04:05Z"
    assert "futureField" not in written
    assert written["usage"]["inputTokens"] == 3
    resource = next(r for r in RESOURCES if r.kind == "AgentSession")
    validator = jsonschema.Draft4Validator(as_jsonschema(openapi(resource)["properties"]["status"]))
    assert list(validator.iter_errors(written)) == []


def test_defaults_of_an_agent() -> None:
    spec = AgentSpec.model_validate({"model": {"id": "m"}})
    assert [tool.name for tool in spec.tools] == ["bash", "read", "write", "edit", "glob", "grep"]
    assert {tool.permission for tool in spec.tools} == {"Allow"}
    assert [(hand.name, hand.sandbox.provisioning) for hand in spec.hands] == [("sandbox", "Lazy")]
    assert spec.model.max_tokens == 8192
