"""Names become paths of the Kubernetes API: one that leads elsewhere is refused before it is sent."""

from __future__ import annotations

import pytest
from yarl import URL

from cowhand.broker.secrets import ModelKeys
from cowhand.errors import UserError
from cowhand.kube import kinds
from cowhand.kube.client import AioKube
from cowhand.kube.transport import Answer

BAD = [
    "../../team-b/secrets/cowhand-model",
    "..",
    ".",
    "a/b",
    "a?b=c",
    "a#b",
    "%2e%2e",
    "a\nb",
    "a b",
    "\u2025",
]


def test_why_it_matters() -> None:
    """The HTTP client resolves dot segments: control of the tests below."""
    url = URL("https://h/api/v1/namespaces/team-a/secrets/../../team-b/secrets/cowhand-model")
    assert url.path == "/api/v1/namespaces/team-b/secrets/cowhand-model"


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="not a name"):
        kinds.SECRET.path("team-a", name)
    with pytest.raises(UserError, match="not a name"):
        kinds.SECRET.path(name, "cowhand-model")


@pytest.mark.parametrize("name", ["a", "cowhand-model", "system:node.x", "v1.2", "A_b", "0" * 253])
def test_names_that_kubernetes_has(name: str) -> None:
    assert kinds.SECRET.path("team-a", name) == f"/api/v1/namespaces/team-a/secrets/{name}"


class Unreachable:
    """Nothing may get as far as being sent."""

    async def send(self, method: str, target: str, *_: object) -> Answer:
        raise AssertionError(f"{method} {target} was sent")

    async def close(self) -> None:
        pass


@pytest.fixture
async def nowhere() -> AioKube:
    return AioKube(Unreachable())


@pytest.mark.parametrize("name", ["", "../../team-b/secrets/cowhand-model"])
async def test_one_object_needs_a_name(nowhere: AioKube, name: str) -> None:
    try:
        for call in (
            lambda: nowhere.get(kinds.SECRET, "team-a", name),
            lambda: nowhere.patch(kinds.SECRET, "team-a", name, {}),
            lambda: nowhere.delete(kinds.SECRET, "team-a", name),
        ):
            with pytest.raises(UserError):
                await call()
    finally:
        await nowhere.close()


async def test_a_forged_session_cannot_name_another_tenants_secret(nowhere: AioKube) -> None:
    """`model` stands in the store, where the tenant's own login can write it."""
    model = {
        "base_url": "https://api.anthropic.com",
        "secret": {"name": "../../team-b/secrets/cowhand-model", "key": "api-key"},
    }
    try:
        with pytest.raises(UserError, match="not a name"):
            await ModelKeys(nowhere).credential("team-a", model, "")
    finally:
        await nowhere.close()
