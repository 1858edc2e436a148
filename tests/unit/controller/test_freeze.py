"""The frozen session: its events, its model endpoint, and what makes two runs the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cowhand.api.v1alpha1 import AgentSession, AgentSpec, EnvironmentSpec
from cowhand.controller.freeze import (
    AgentSource,
    FreezeDefaults,
    Frozen,
    TooLarge,
    freeze,
    tombstone,
)
from cowhand.errors import UserError
from cowhand.session.events import EVENT_LIMIT, INLINE_LIMIT, INLINE_WITH_BLOBS

DEFAULTS = FreezeDefaults(
    EnvironmentSpec.model_validate({"resources": {"cpu": "1"}}),
    "sandbox:1",
    "https://api.anthropic.com",
    "cowhand-model",
)


def session(**spec: Any) -> AgentSession:
    body: dict[str, Any] = {"agentRef": {"name": "coder"}, "message": "hi"}
    if "messages" in spec:
        del body["message"]
    if "agent" in spec:
        del body["agentRef"]
    meta = {"name": "one", "namespace": "ns", "uid": "u", "generation": 1}
    return AgentSession.model_validate({"metadata": meta, "spec": {**body, **spec}})


def frozen(
    agent: dict[str, Any] | None = None, *, limits: dict[str, int] | None = None, **spec: Any
) -> Frozen:
    of = AgentSpec.model_validate({"model": {"id": "m"}, **(agent or {})})
    big = EnvironmentSpec.model_validate({"image": "big:2", "resources": {"memory": "8Gi"}})
    source = AgentSource(of, "coder", "agent-uid", 4)
    defaults = replace(DEFAULTS, **(limits or {}))
    return freeze(session(**spec), "sesn_" + "0" * 32, source, {"big": big}, defaults)


def test_the_created_event_holds_everything_a_harness_needs() -> None:
    made = frozen(
        {"system": "Be kind.", "tools": [{"name": "bash", "permission": "Ask"}, {"name": "read"}]},
        title="A title",
        environmentRef={"name": "big"},
        resources=[{"configMap": {"name": "code"}, "mountPath": "/workspace"}],
        budget={"maxTokens": 9},
    )
    data = made.events[0].data
    assert data["agent"]["generation"] == 4
    assert len(data["agent"]["hash"]) == 64
    assert data["request"]["system"] == [{"type": "text", "text": "Be kind."}]
    assert [tool["name"] for tool in data["request"]["tools"]] == ["bash", "read"]
    assert data["permissions"] == {"bash": "Ask", "read": "Allow"}
    assert data["budget"] == {"max_tokens": 9}
    assert data["title"] == "A title"
    (hand,) = data["hands"]
    assert (hand["name"], hand["kind"], hand["provisioning"]) == ("sandbox", "sandbox", "Lazy")
    assert hand["environment_ref"] == "big"
    assert hand["environment"]["image"] == "big:2"
    assert hand["environment"]["resources"] == {"cpu": "1", "memory": "8Gi"}
    assert data["resources"][0]["configMap"]["name"] == "code"


def test_a_hand_may_name_its_own_environment() -> None:
    hand = {"name": "h", "sandbox": {"environmentRef": {"name": "big"}, "provisioning": "Eager"}}
    data = frozen({"hands": [hand]}).events[0].data
    assert data["hands"][0]["environment"]["image"] == "big:2"
    assert data["hands"][0]["provisioning"] == "Eager"


def test_model_endpoint_and_secret() -> None:
    assert frozen().meta.model == {
        "base_url": "https://api.anthropic.com",
        "secret": {"name": "cowhand-model", "key": "api-key"},
    }
    model = {"id": "m", "baseURL": "http://model:8080", "secretRef": {"name": "k", "key": "x"}}
    own = frozen({"model": model}).meta.model
    assert own == {"base_url": "http://model:8080", "secret": {"name": "k", "key": "x"}}


def test_messages_become_events_with_their_ids() -> None:
    assert [event.id for event in frozen().events] == ["created", "msg:0"]
    several = frozen(messages=[{"id": "a", "content": "x"}, {"id": "b", "content": "y"}])
    assert [event.id for event in several.events] == ["created", "msg:a", "msg:b"]
    suspended = frozen(operatingMode="Suspended")
    assert [event.type for event in suspended.events][-1] == "session.suspended"


def test_too_large_says_what_to_do() -> None:
    wide = [{"name": f"V{i}", "value": "😀" * 4096} for i in range(100)]
    with pytest.raises(TooLarge, match=r"session\.created .*ConfigMap"):
        frozen(environment={"env": wide})
    many = [{"id": f"m{i}", "content": "x" * 100_000} for i in range(22)]
    with pytest.raises(TooLarge, match=r"together, .*add the others to spec\.messages later"):
        frozen(messages=many)
    frozen(messages=many[:-2])


def test_with_an_archive_larger_ones_fit_and_do_not_count_against_the_store() -> None:
    limits = {"event_limit": EVENT_LIMIT, "inline_limit": INLINE_WITH_BLOBS}
    wide = [{"name": f"V{i}", "value": "😀" * 4096} for i in range(100)]
    assert len(frozen(environment={"env": wide}, limits=limits).events[0].payload()) > INLINE_LIMIT
    many = [{"id": f"m{i}", "content": "x" * 100_000} for i in range(22)]
    frozen(messages=many, limits=limits)
    small = [{"id": f"m{i}", "content": "x" * 60_000} for i in range(37)]
    with pytest.raises(TooLarge, match="together"):
        frozen(messages=small, limits=limits)


@pytest.mark.parametrize("letter", ["x", "😀", "\x01"])
def test_the_longest_message_and_system_prompt_that_the_api_takes_fit(letter: str) -> None:
    longest = letter * 100_000
    made = frozen({"system": longest}, message=longest)
    assert max(len(event.payload()) for event in made.events) <= INLINE_LIMIT


SAME: list[dict[str, Any]] = [
    {"operatingMode": "Suspended"},
    {"budget": {"maxTokens": 1}},
    {"ttlSecondsAfterFinished": 5},
    {"deletionPolicy": "Delete"},
    {"title": "x"},
]
OTHER: list[dict[str, Any]] = [
    {"message": "another"},
    {"runID": "2"},
    {"agentRef": {"name": "writer"}},
    {"environmentRef": {"name": "big"}},
    {"resources": [{"configMap": {"name": "c"}, "mountPath": "/workspace"}]},
]


@pytest.mark.parametrize("spec", SAME)
def test_the_same_run(spec: dict[str, Any]) -> None:
    assert tombstone("ns", "one", session(**spec).spec) == tombstone("ns", "one", session().spec)


@pytest.mark.parametrize("spec", OTHER)
def test_another_run(spec: dict[str, Any]) -> None:
    assert tombstone("ns", "one", session(**spec).spec) != tombstone("ns", "one", session().spec)


def test_name_and_namespace_count_and_later_messages_do_not() -> None:
    spec = session().spec
    assert len({tombstone("ns", "one", spec), tombstone("ns", "two", spec)}) == 2
    assert tombstone("ns", "one", spec) != tombstone("other", "one", spec)
    a, b = {"id": "a", "content": "x"}, {"id": "b", "content": "y"}
    short, long = session(messages=[a]).spec, session(messages=[a, b]).spec
    assert tombstone("ns", "one", short) == tombstone("ns", "one", long)
    assert tombstone("ns", "one", short) != tombstone("ns", "one", session(messages=[b]).spec)


def test_prices_are_frozen_where_they_are_known() -> None:
    assert "prices" not in frozen().events[0].data
    listed = frozen({"model": {"id": "claude-sonnet-5-5"}}).events[0].data["prices"]
    assert (listed["input"], listed["output"], listed["cache_write_5m"]) == (2000, 10_000, 2500)
    own = {"model": {"id": "m", "prices": {"input": "0.5", "output": "1"}}}
    assert frozen(own, budget={"maxCost": "2.50"}).events[0].data["prices"]["cache_read"] == 50


@pytest.mark.parametrize(
    ("model", "price"),
    [
        ("claude-opus-4-20250514", 15_000),
        ("claude-opus-4-5-20251101", 5000),
        ("claude-opus-5-5", 4000),
    ],
)
def test_the_longest_prefix_of_the_price_list_counts(model: str, price: int) -> None:
    assert frozen({"model": {"id": model}}).events[0].data["prices"]["input"] == price


def test_a_cost_limit_for_an_unknown_model_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"set model\.prices of the agent") as caught:
        frozen(budget={"maxCost": "1"})
    assert caught.value.field == "budget.maxCost"


def test_a_budget_in_money_and_time_is_in_the_log_in_whole_units() -> None:
    of = {"model": {"id": "claude-opus-5-5"}}
    data = frozen(of, budget={"maxCost": "2.50", "maxDurationSeconds": 60}).events[0].data
    assert data["budget"] == {"max_cost_microusd": 2_500_000, "max_duration_s": 60}
