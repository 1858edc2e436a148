"""How tenants share a workspace: settings, names of pools, and what a proxy may say."""

from __future__ import annotations

from typing import Any

import pytest

from cowhand import settings
from cowhand.broker.policy import MAX_PAUSE_MS, slots_asked
from cowhand.broker.secrets import SecretText, pool_of
from cowhand.errors import UserError
from cowhand.kube.review import Refusal
from cowhand.session.slots import Asked

BODY: dict[str, Any] = {
    "pool": "ab" * 32,
    "client": "c1",
    "waiting": 3,
    "wanted": ["1", "2"],
    "held": ["0"],
    "done": [],
    "pause_ms": 5,
}


def test_a_whole_question() -> None:
    asked = Asked("c1", 3, ("1", "2"), ("0",), (), 5)
    assert slots_asked(BODY) == ("ab" * 32, asked)


def test_a_pause_is_bounded() -> None:
    found = slots_asked({**BODY, "pause_ms": 900_000})
    assert not isinstance(found, Refusal)
    assert found[1].pause_ms == MAX_PAUSE_MS


@pytest.mark.parametrize(
    "wrong",
    [
        {"pool": "ab"},
        {"pool": None},
        {"pool": "ab" * 31 + "x:"},
        {"client": ""},
        {"client": "a:b"},
        {"client": 1},
        {"waiting": -1},
        {"waiting": True},
        {"waiting": 1.5},
        {"waiting": None},
        {"pause_ms": "1"},
        {"wanted": "12"},
        {"wanted": ["a|b"]},
        {"held": [1]},
        {"done": None},
        {"held": ["1"] * 5000},
    ],
)
def test_what_is_malformed_is_refused(wrong: dict[str, Any]) -> None:
    found = slots_asked({**BODY, **wrong})
    assert isinstance(found, Refusal)
    assert found.type == "invalid"


def test_a_pool_is_an_endpoint_with_a_key() -> None:
    one = pool_of("https://api.example", SecretText("key"))
    assert pool_of("https://api.example/", SecretText("key")) == one
    others = {
        pool_of("https://api.example", SecretText("other")),
        pool_of("https://other.example", SecretText("key")),
        pool_of("https://api.example", None),
    }
    assert len({one, *others}) == 4
    assert "key" not in one


def test_settings() -> None:
    env = {f"COWHAND_{name}": "x" for name in ("STORE_URL", "NAMESPACE", "TENANTS")}
    plain = settings.broker(env)
    assert (plain.max_concurrent_requests, plain.tenant_weights) == (0, {})
    told = settings.broker(
        {
            **env,
            "COWHAND_MAX_CONCURRENT_REQUESTS": "64",
            "COWHAND_TENANT_WEIGHTS": "team-a=2, team-b=0.5",
        }
    )
    assert told.max_concurrent_requests == 64
    assert told.tenant_weights == {"team-a": 2.0, "team-b": 0.5}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("MAX_CONCURRENT_REQUESTS", "many"),
        ("MAX_CONCURRENT_REQUESTS", "-1"),
        ("TENANT_WEIGHTS", "team-a"),
        ("TENANT_WEIGHTS", "=1"),
        ("TENANT_WEIGHTS", "team-a=0"),
        ("TENANT_WEIGHTS", "team-a=nan"),
        ("TENANT_WEIGHTS", "team-a=1000"),
    ],
)
def test_a_setting_that_is_none_is_refused_by_name(name: str, text: str) -> None:
    env = {f"COWHAND_{key}": "x" for key in ("STORE_URL", "NAMESPACE", "TENANTS")}
    with pytest.raises(UserError, match=name):
        settings.broker({**env, f"COWHAND_{name}": text})
