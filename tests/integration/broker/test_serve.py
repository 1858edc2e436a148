"""The broker's server: TLS, health, keys, bodies, until it is cancelled."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from cowhand.broker.run import serve
from cowhand.errors import BrokerUnavailable, UserError
from cowhand.kube import kinds
from cowhand.kube.errors import Forbidden
from cowhand.proxy.brokerclient import BrokerClient, BrokerRefusal
from cowhand.wire.keys import load_keys
from cowhand.wire.tls import ServerCertificate
from support.trust import LEASE, MODEL_KEY, SESSION, Authority, rig

ASKED = {"session_id": SESSION, "lease": LEASE}


async def test_it_serves_and_ends(tmp_path: Path) -> None:
    async with rig(tmp_path) as chain:
        folder = chain.authority.folder
        tls = ServerCertificate(
            str(folder / "localhost.crt"), str(folder / "localhost.key")
        ).context
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        task = asyncio.create_task(serve(chain.broker, port, tls))
        token = tmp_path / "token"
        token.write_text("harness-token")
        client = BrokerClient(f"https://localhost:{port}", str(chain.authority.ca_file), str(token))
        for _ in range(100):
            try:
                document = await client.keys()
                break
            except BrokerUnavailable:
                await asyncio.sleep(0.02)
        assert set(load_keys(document)) == set(chain.keys.public)
        answer = await client.post("/v1/model-credential", ASKED)
        assert answer["headers"] == {"x-api-key": MODEL_KEY}
        with pytest.raises(BrokerRefusal) as caught:
            await client.post("/v1/model-credential", {"session_id": 5})
        assert (caught.value.status, caught.value.type) == (400, "invalid")
        chain.world.kube.fail("get", kinds.SECRET, Forbidden("no right to get secrets"))
        chain.broker._model_keys._cache.clear()
        with pytest.raises(BrokerRefusal, match="extraSecretNames"):
            await client.post("/v1/model-credential", ASKED)
        chain.world.kube.fail("create", kinds.TOKEN_REVIEW, Forbidden("no right to review"))
        chain.broker._reviewer._known.clear()
        with pytest.raises(BrokerUnavailable, match="lacks a right"):
            await client.post("/v1/model-credential", ASKED)
        client.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_broker_with_a_certificate_of_another_ca_is_not_told_the_token(
    tmp_path: Path,
) -> None:
    async with rig(tmp_path) as chain:
        token = tmp_path / "token"
        token.write_text("harness-token")
        stranger = Authority(tmp_path / "stranger")
        client = BrokerClient(chain.broker_url, str(stranger.ca_file), str(token))
        with pytest.raises(BrokerUnavailable, match="not trusted"):
            await client.post("/v1/model-credential", ASKED)
        by_address = chain.broker_url.replace("localhost", "127.0.0.2")
        wrong_name = BrokerClient(by_address, str(chain.authority.ca_file), str(token))
        with pytest.raises(BrokerUnavailable):
            await wrong_name.post("/v1/model-credential", ASKED)
        assert chain.world.reviews == 0


async def test_a_stale_connection_is_tried_again_once(tmp_path: Path) -> None:
    async with rig(tmp_path) as chain:
        client = chain.client("harness-token")
        await client.keys()
        (kept,) = client._pool._idle
        # As when the broker closes just as we write: the pool has not seen it yet.
        kept._writer.transport.abort()
        kept.__class__ = type("Blind", (type(kept),), {"clean": True})
        assert (await client.keys())["keys"]


def test_bad_settings_are_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="https"):
        BrokerClient("http://broker", "", "")
    with pytest.raises(UserError, match="CA file"):
        BrokerClient("https://broker", str(tmp_path / "none"), "")
    with pytest.raises(UserError, match="cannot be read"):
        ServerCertificate(str(tmp_path / "none"), str(tmp_path / "none"))
