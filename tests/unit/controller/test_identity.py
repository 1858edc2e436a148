"""Where the operator remembers which store it belongs to."""

from __future__ import annotations

import pytest

from cowhand.controller.identity import IdentityInConfigMap
from cowhand.errors import StoreUnavailable
from cowhand.kube import kinds
from cowhand.kube.errors import KubeUnavailable
from support.memory_kube import MemoryKube

NS = "cowhand-system"


async def test_it_remembers_across_processes() -> None:
    kube = MemoryKube()
    assert await IdentityInConfigMap(kube, NS).recall() is None
    await IdentityInConfigMap(kube, NS).keep("abc")
    assert await IdentityInConfigMap(kube, NS).recall() == "abc"


async def test_what_is_kept_is_never_overwritten() -> None:
    kube = MemoryKube()
    await IdentityInConfigMap(kube, NS).keep("abc")
    with pytest.raises(StoreUnavailable):
        await IdentityInConfigMap(kube, NS).keep("other")
    assert await IdentityInConfigMap(kube, NS).recall() == "abc"


async def test_without_kubernetes_no_store_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    kube = MemoryKube()

    async def down(*_: object) -> None:
        raise KubeUnavailable("no answer")

    monkeypatch.setattr(kube, "get", down)
    with pytest.raises(StoreUnavailable, match="cowhand-system/cowhand-store-identity"):
        await IdentityInConfigMap(kube, NS).recall()


async def test_deleting_the_configmap_accepts_the_store_that_is_there() -> None:
    kube = MemoryKube()
    keeper = IdentityInConfigMap(kube, NS)
    await keeper.keep("abc")
    namespace, name = keeper.where.removeprefix("ConfigMap ").split("/")
    await kube.delete(kinds.CONFIG_MAP, namespace, name)
    assert await keeper.recall() is None
