"""Tenants that share one key: real proxies, the real broker and a real store between two tenants and an endpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cowhand import session
from cowhand.broker.app import Sharing
from cowhand.harness.slots import ProxySlots
from cowhand.proxy import slots as proxy_slots
from cowhand.proxy.server import Server
from cowhand.session import scripts as lua
from cowhand.session.log import StoreConfig
from cowhand.session.store import Store
from cowhand.telemetry.metrics import REGISTRY
from support.trust import (
    HARNESS_POD,
    NAMESPACE,
    OTHER_NAMESPACE,
    RawClient,
    Rig,
    Upstream,
    reply,
    request,
    rig,
    session_state,
)

LIMIT = 4
CROWD = 200
LEASES = {NAMESPACE: f"7:{HARNESS_POD}.00c0ffee:nonce", OTHER_NAMESPACE: "7:rival-pod.00c0ffee:n"}


def session_of(namespace: str, number: int) -> str:
    return f"sesn_{'a' if namespace == NAMESPACE else 'b'}{number:031x}"


class Endpoint:
    """Answers in the order of arrival, one each time that it is told to; `order` says whose request came."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.order: list[str] = []
        self.waiting: asyncio.Queue[asyncio.Event] = asyncio.Queue()
        self.now = self.most = 0
        self.headers: tuple[str, ...] = ()
        upstream.answer = self.answer

    async def answer(self, upstream: Upstream, writer: asyncio.StreamWriter) -> None:
        self.order.append(json.loads(upstream.requests[-1][1])["model"])
        self.now += 1
        self.most = max(self.most, self.now)
        go = asyncio.Event()
        self.waiting.put_nowait(go)
        await go.wait()
        self.now -= 1
        writer.write(reply(200, b"{}", *self.headers))

    async def finish(self, count: int = 1) -> None:
        for _ in range(count):
            async with asyncio.timeout(60):
                (await self.waiting.get()).set()

    async def came(self, count: int) -> None:
        async with asyncio.timeout(60):
            while True:
                if len(self.order) >= count:
                    return
                await asyncio.sleep(0.002)


@asynccontextmanager
async def chain(
    folder: Path, sharing: Sharing | None
) -> AsyncIterator[tuple[Rig, dict[str, Server]]]:
    """Two tenants with the same key for the same endpoint, a proxy for each."""
    async with rig(folder, sharing=sharing) as made:
        url = f"http://localhost:{made.upstream.port}"
        made.world.secret(f"localhost:{made.upstream.port}", namespace=OTHER_NAMESPACE)
        made.world.token(
            "rival-token", "cowhand-harness", namespace=OTHER_NAMESPACE, uid="rival-pod"
        )
        for namespace, lease in LEASES.items():
            for number in range(CROWD if namespace == NAMESPACE else 2):
                name = session_of(namespace, number)
                made.world.logs.sessions[namespace, name] = session_state(
                    url, session_id=name, lease=lease, namespace=namespace
                )
        yield (
            made,
            {
                NAMESPACE: await made.harness(),
                OTHER_NAMESPACE: await made.harness(token="rival-token"),
            },
        )


@pytest.fixture
async def sharing(store_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Sharing]:
    monkeypatch.setattr(proxy_slots, "POLL_S", 0.02)
    async with session.connect(StoreConfig(store_url)) as store:
        yield Sharing(store.model_slots(), LIMIT, {})


async def send(made: Rig, server: Server, namespace: str, number: int) -> Any:
    client = await RawClient.open(server.port)
    made.stack.callback(client.close)
    body = json.dumps({"model": namespace}).encode()
    lines = (
        f"x-cowhand-session: {session_of(namespace, number)}",
        f"x-cowhand-lease: {LEASES[namespace]}",
    )
    return await client.ask(request("POST", "/v1/messages", *lines, body=body))


def waits(what: str) -> float:
    found = REGISTRY.get_sample_value(f"cowhand_slot_wait_seconds_{what}")
    assert found is not None
    return found


async def others_before(
    made: Rig, servers: dict[str, Server], endpoint: Endpoint, crowd: int = CROWD
) -> int:
    """How many of a crowd's requests reach the endpoint after another tenant's one came and before it does."""
    sent = [asyncio.create_task(send(made, servers[NAMESPACE], NAMESPACE, n)) for n in range(crowd)]
    await endpoint.came(LIMIT)
    one = asyncio.create_task(send(made, servers[OTHER_NAMESPACE], OTHER_NAMESPACE, 0))
    reached = len(endpoint.order)
    await asyncio.wait({one}, timeout=0.5)  # so that the broker knows of it
    while OTHER_NAMESPACE not in endpoint.order:
        await endpoint.finish()
        await endpoint.came(min(reached + 1, crowd + 1))
        reached = len(endpoint.order)
    found = endpoint.order.index(OTHER_NAMESPACE) - LIMIT
    drain = asyncio.create_task(endpoint.finish(crowd + 1))
    answers = await asyncio.gather(one, *sent)
    drain.cancel()
    assert {answer.status for answer in answers} == {200}
    return found


async def test_one_request_is_served_next_while_two_hundred_of_another_tenant_wait(
    tmp_path: Path, sharing: Sharing
) -> None:
    async with chain(tmp_path, sharing) as (made, servers):
        endpoint = Endpoint(made.upstream)
        assert await others_before(made, servers, endpoint) <= 1
        assert endpoint.most <= LIMIT


async def test_control_without_turns_it_is_served_after_all_of_them(
    tmp_path: Path, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_slots, "POLL_S", 0.02)
    scripts = lua.load()
    source = scripts["slots"].source.replace("total + before(mine) >= limit", "total >= limit")
    assert source != scripts["slots"].source
    scripts["slots"] = lua.Script("slots", source)
    async with (
        Store(StoreConfig(store_url), "", scripts=scripts) as store,
        chain(tmp_path, Sharing(store.model_slots(), LIMIT, {})) as (made, servers),
    ):
        endpoint = Endpoint(made.upstream)
        assert await others_before(made, servers, endpoint, 60) > 30
        assert endpoint.most <= LIMIT


async def test_control_without_a_limit_the_endpoint_gets_all_at_once(tmp_path: Path) -> None:
    async with chain(tmp_path, None) as (made, servers):
        endpoint = Endpoint(made.upstream)
        sent = [
            asyncio.create_task(send(made, servers[NAMESPACE], NAMESPACE, n)) for n in range(40)
        ]
        await endpoint.came(40)
        sent.append(asyncio.create_task(send(made, servers[OTHER_NAMESPACE], OTHER_NAMESPACE, 0)))
        await endpoint.came(41)
        assert endpoint.most == 41, "the endpoint has to take, or refuse, all at once"
        assert endpoint.order[-1] == OTHER_NAMESPACE
        await endpoint.finish(41)
        await asyncio.gather(*sent)


async def test_limits_that_one_tenant_used_up_hold_for_the_other_before_it_is_refused(
    tmp_path: Path, sharing: Sharing, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with chain(tmp_path, sharing) as (made, servers):
        endpoint = Endpoint(made.upstream)
        endpoint.headers = (
            "date: Thu, 21 Aug 2025 12:41:00 GMT",
            "anthropic-ratelimit-requests-remaining: 0",
            "anthropic-ratelimit-requests-reset: 2025-08-21T12:41:02Z",
        )
        first = asyncio.create_task(send(made, servers[NAMESPACE], NAMESPACE, 0))
        await endpoint.finish()
        answer = await first
        assert answer.headers["anthropic-ratelimit-requests-remaining"] == "0", "passed on"
        asking = ProxySlots(f"http://127.0.0.1:{servers[OTHER_NAMESPACE].port}")
        monkeypatch.setattr("cowhand.proxy.harness.SLOT_WAIT_S", 0.2)
        rival = session_of(OTHER_NAMESPACE, 1), LEASES[OTHER_NAMESPACE]
        count, seconds = waits("count"), waits("sum")
        assert not await asking.reserve(*rival)
        async with asyncio.timeout(60):
            while not await asking.reserve(*rival):
                pass
        assert waits("count") == count + 1
        assert waits("sum") - seconds > 0.2, "both questions, one wait"
        second = asyncio.create_task(send(made, servers[OTHER_NAMESPACE], OTHER_NAMESPACE, 1))
        await endpoint.finish()
        assert (await second).status == 200
        await asking.close()


async def test_a_harness_is_told_where_nobody_shares_and_asks_no_more(tmp_path: Path) -> None:
    async with chain(tmp_path, None) as (made, servers):
        asking = ProxySlots(f"http://127.0.0.1:{servers[NAMESPACE].port}")
        mine = session_of(NAMESPACE, 1), LEASES[NAMESPACE]
        assert await asking.reserve(*mine)
        made.world.logs.sessions.clear()
        await servers[NAMESPACE].close()
        assert await asking.reserve(*mine)
        assert asking._session is not None
        await asking.close()


async def test_requests_go_on_when_the_broker_is_gone(tmp_path: Path, sharing: Sharing) -> None:
    class Away:
        async def ask(self, *_: Any, **__: Any) -> Any:
            raise ConnectionError("the store is gone")

    async with chain(tmp_path, Sharing(Away(), 1, {})) as (made, servers):  # type: ignore[arg-type]
        endpoint = Endpoint(made.upstream)
        sent = [asyncio.create_task(send(made, servers[NAMESPACE], NAMESPACE, n)) for n in range(3)]
        await endpoint.finish(3)
        assert [answer.status for answer in await asyncio.gather(*sent)] == [200] * 3


@pytest.mark.parametrize("body", [b"{}", b"[]", b"rubbish", b'{"session_id": "x", "lease": "y"}'])
async def test_a_malformed_question_is_refused(tmp_path: Path, body: bytes) -> None:
    async with chain(tmp_path, None) as (made, servers):
        client = await made.open(servers[NAMESPACE].port)
        answer = await client.ask(request("POST", "/cowhand/model-slot", body=body))
        assert answer.status == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("token", ["sandbox-token", "gateway-token"])
async def test_only_harness_pods_may_ask_for_slots(
    tmp_path: Path, sharing: Sharing, token: str
) -> None:
    async with chain(tmp_path, sharing) as (made, _):
        made.world.token("sandbox-token", "cowhand-sandbox", uid="s")
        body = {
            "pool": "ab" * 32,
            "client": "c",
            "waiting": 0,
            "wanted": [],
            "held": [],
            "done": [],
        }
        with pytest.raises(Exception, match="account"):
            await made.client(token).post("/v1/model-slots", body)
