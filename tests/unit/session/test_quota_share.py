"""How much a tenant may have, and how its quota is written in the settings."""

from __future__ import annotations

import pytest

from cowhand import settings
from cowhand.errors import UserError
from cowhand.session.log import StoreUsage
from cowhand.session.quota import share


@pytest.mark.parametrize(
    ("quota", "memory", "tenants", "limit"),
    [
        (None, 1000, 1, 800),
        (None, 1000, 4, 200),
        (None, 0, 4, None),  # a store without a limit has no shares
        (0, 1000, 4, None),
        (123, 1000, 4, 123),
        (123, 0, 1, 123),
    ],
)
def test_share(quota, memory, tenants, limit):
    assert share(quota, StoreUsage(memory, 0, {}), tenants) == limit


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1024", 1024),
        ("100k", 100_000),
        ("64kb", 65536),
        ("2GB", 2 << 30),
        ("5m", 5_000_000),
    ],
)
def test_sizes(text, size):
    assert settings.size(text) == size


@pytest.mark.parametrize("text", ["x", "5 MiB", "-1", "1.5gb", "gb", "5t"])
def test_a_size_that_is_none_is_refused_by_name(text):
    env = {
        **{f"COWHAND_{name}": "x" for name in ("STORE_URL", "NAMESPACE", "POD_NAME", "TENANTS")},
        **{f"COWHAND_{name}": "x" for name in ("IMAGE", "SANDBOX_IMAGE", "BROKER_URL")},
    }
    assert settings.operator(env).tenant_quota is None
    with pytest.raises(UserError, match="COWHAND_TENANT_QUOTA"):
        settings.operator({**env, "COWHAND_TENANT_QUOTA": text})
