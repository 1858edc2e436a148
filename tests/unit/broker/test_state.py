"""What the broker keeps: reviews, signing keys, model keys."""

from __future__ import annotations

import asyncio
import base64
import pickle
import traceback
from typing import Any

import pytest

from cowhand.broker.keys import KeyStore
from cowhand.broker.secrets import ModelKeys, SecretText
from cowhand.errors import UserError
from cowhand.kube import kinds
from cowhand.kube.errors import KubeUnavailable
from cowhand.kube.review import Caller, Refusal, Reviewer
from support.memory_kube import MemoryKube
from support.trust import MODEL_KEY, NAMESPACE, World

MODEL = {"base_url": "https://api.example", "secret": {"name": "cowhand-model", "key": "api-key"}}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_a_token_is_reviewed_once_a_minute_and_once_for_many() -> None:
    world, clock = World(), Clock()
    world.token("t", "cowhand-harness", uid="p")
    reviewer = Reviewer(world.kube, "cowhand-broker", clock=clock)
    found = await asyncio.gather(*(reviewer.caller("Bearer t") for _ in range(5)))
    assert all(isinstance(caller, Caller) for caller in found)
    assert world.reviews == 1
    clock.now += 59
    await reviewer.caller("bearer t")
    assert world.reviews == 1
    world.tokens.clear()
    clock.now += 2
    assert isinstance(await reviewer.caller("Bearer t"), Refusal)
    clock.now += 4
    assert isinstance(await reviewer.caller("Bearer t"), Refusal)
    assert world.reviews == 2


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic t", "t", "Bearer " + "x" * 20000]
)
async def test_headers_without_a_token_ask_nobody(header: str) -> None:
    world = World()
    assert isinstance(await Reviewer(world.kube, "cowhand-broker").caller(header), Refusal)
    assert world.reviews == 0


async def test_a_failed_review_is_not_remembered() -> None:
    world = World()
    world.token("t", "cowhand-harness", uid="p")
    world.kube.fail("create", kinds.TOKEN_REVIEW, KubeUnavailable("away"))
    reviewer = Reviewer(world.kube, "cowhand-broker")
    with pytest.raises(KubeUnavailable):
        await reviewer.caller("Bearer t")
    assert isinstance(await reviewer.caller("Bearer t"), Caller)


class Racing(MemoryKube):
    """Two replicas ask at once: both are told that there is no Secret."""

    blind = 2

    async def get(self, kind: Any, namespace: str | None, name: str) -> Any:
        if self.blind:
            self.blind -= 1
            return None
        return await super().get(kind, namespace, name)


async def test_two_replicas_agree_on_one_key() -> None:
    kube = Racing()
    stores = [KeyStore(kube, "system", "keys") for _ in range(2)]
    await asyncio.gather(*(store.load() for store in stores))
    assert stores[0].signing.kid == stores[1].signing.kid
    assert len(kube.all(kinds.SECRET)) == 1


async def test_a_rotated_key_signs_and_the_old_one_stays_published() -> None:
    kube, clock = MemoryKube(), Clock()
    store = KeyStore(kube, "system", "keys", clock=clock)
    await store.load()
    old = store.signing.kid
    clock.now += 1
    new = (await store.rotate()).kid
    assert new != old
    assert set(store.public) == {old, new}
    other = KeyStore(kube, "system", "keys")
    await other.load()
    assert other.signing.kid == new


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"1.x": base64.b64encode(b"k" * 32).decode()},
        {"1.x": base64.b64encode(b"SECRET-GARBAGE").decode()},
        {"1.x": "!"},
    ],
    ids=str,
)
async def test_a_secret_that_holds_no_keys_is_named_not_shown(data: dict[str, str]) -> None:
    kube = MemoryKube()
    kube.put(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"namespace": "system", "name": "keys"},
            "data": data,
        }
    )
    with pytest.raises(UserError, match="keys") as caught:
        await KeyStore(kube, "system", "keys").load()
    text = "".join(traceback.format_exception(caught.value))
    assert "SECRET-GARBAGE" not in text
    assert not [value for value in data.values() if len(value) > 4 and value in text]


async def test_the_model_key_and_its_id() -> None:
    world = World()
    world.secret("api.example")
    answer = await ModelKeys(world.kube).credential(NAMESPACE, MODEL, "")
    assert isinstance(answer, dict)
    assert answer["headers"] == {"x-api-key": MODEL_KEY}
    assert answer["base_url"] == "https://api.example"
    assert answer["credential_id"].startswith("cowhand-model/api-key@")
    world.secret("api.example", "sk-ant-oat01-abc")
    answer = await ModelKeys(world.kube).credential(NAMESPACE, MODEL, "")
    assert isinstance(answer, dict)
    assert answer["headers"] == {"authorization": "Bearer sk-ant-oat01-abc"}


async def test_an_endpoint_without_a_secret_gets_no_header() -> None:
    model = {"base_url": "http://model:8080", "secret": None}
    answer = await ModelKeys(MemoryKube()).credential(NAMESPACE, model, "")
    assert isinstance(answer, dict)
    assert (answer["headers"], answer["credential_id"]) == ({}, "none")


async def test_a_changed_secret_is_seen_after_a_minute_or_after_a_401() -> None:
    world, clock = World(), Clock()
    world.secret("api.example")
    keys = ModelKeys(world.kube, clock=clock)

    async def key(rejected: str = "") -> tuple[str, str]:
        answer = await keys.credential(NAMESPACE, MODEL, rejected)
        assert isinstance(answer, dict)
        return answer["headers"]["x-api-key"], answer["credential_id"]

    _, first = await key()
    world.secret("api.example", "second-key")
    clock.now += 4
    assert (await key(first))[0] == MODEL_KEY
    assert (await key("another id"))[0] == MODEL_KEY
    clock.now += 2
    value, second = await key(first)
    assert value == "second-key"
    world.secret("api.example", "third-key")
    clock.now += 30
    assert await key() == ("second-key", second)
    clock.now += 31
    assert (await key())[0] == "third-key"


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"metadata": {"annotations": {"cowhand.dev/allowed-hosts": ""}}}, "forbidden", "nowhere"),
        ({"metadata": {"annotations": {"cowhand.dev/allowed-hosts": "b"}}}, "forbidden", "lists b"),
        ({"data": {"api-key": ""}}, "not_found", "no entry"),
        ({"data": {"api-key": "%%%"}}, "invalid", "ASCII"),
        ({"data": {"api-key": base64.b64encode(b"a\r\nb: c").decode()}}, "invalid", "ASCII"),
        ({"data": {"api-key": base64.b64encode("ключ".encode()).decode()}}, "invalid", "ASCII"),
    ],
    ids=str,
)
async def test_secrets_that_give_nothing(change: dict[str, Any], kind: str, words: str) -> None:
    world = World()
    world.secret("api.example")
    identity = {"namespace": NAMESPACE, "name": "cowhand-model"}
    metadata = {"metadata": identity | change.get("metadata", {})}
    world.kube.put({"apiVersion": "v1", "kind": "Secret", **change, **metadata})
    found = await ModelKeys(world.kube).credential(NAMESPACE, MODEL, "")
    assert isinstance(found, Refusal)
    assert found.type == kind
    assert words in found.message
    assert MODEL_KEY not in found.message


async def test_a_secret_of_another_namespace_is_not_read() -> None:
    world = World()
    world.secret("api.example")
    found = await ModelKeys(world.kube).credential("rivals", MODEL, "")
    assert isinstance(found, Refusal)
    assert found.type == "not_found"


def test_a_secret_value_does_not_show_itself() -> None:
    secret = SecretText(MODEL_KEY)
    for text in (repr(secret), str(secret), f"{secret}", f"{[secret]!r}", f"{vars(World)}"):
        assert MODEL_KEY not in text
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    assert secret.reveal() == MODEL_KEY
