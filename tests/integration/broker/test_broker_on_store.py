"""The broker with the real session log: leases and hand records as the other processes write them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cowhand import session
from cowhand.broker.app import Broker, Names, Refused
from cowhand.broker.keys import KeyStore
from cowhand.kube.review import Caller
from cowhand.session.events import NewEvent
from cowhand.session.log import Lease, StoreConfig
from cowhand.session.store import Store
from cowhand.wire.tokens import verify
from support.trust import (
    GATEWAY,
    NAMESPACE,
    SANDBOX_UID,
    SESSION,
    World,
    session_state,
)

HARNESS = Caller("u", NAMESPACE, "cowhand-harness", "pod-a", "harness-a")
OTHER = Caller("u", NAMESPACE, "cowhand-harness", "pod-b", "harness-b")
RIVAL = Caller("u", "rivals", "cowhand-harness", "pod-a", "harness-a")
SANDBOX = Caller("u", NAMESPACE, "cowhand-sandbox", "sandbox-pod-uid", "aaaaaaaaaaaa-main-1")
REGISTER = {"port": 8443, "cert_sha256": "ab" * 32}


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    async with session.connect(StoreConfig(store_url)) as made:
        meta = session_state("https://api.example").meta
        start = NewEvent("session.created", {"namespace": NAMESPACE}, id="created")
        message = NewEvent("user.message", {"content": []}, id="msg:0")
        await made.session_log(NAMESPACE).create_session(meta, [start, message])
        yield made


@pytest.fixture
async def broker(store: Store) -> tuple[Broker, World, KeyStore]:
    world = World()
    world.secret("api.example")
    world.sandbox_pod(ip="10.0.0.9")
    keys = KeyStore(world.kube, "cowhand-system", "keys")
    await keys.load()
    names = Names((NAMESPACE, "rivals"), GATEWAY, "cowhand-harness", "cowhand-sandbox")
    made = Broker(
        kube=world.kube,
        sessions=store.session_log,
        control=store.control_log(),
        keys=keys,
        names=names,
    )
    return made, world, keys


async def claimed(store: Store, pod: str) -> Lease:
    worker = store.worker_log(pod, NAMESPACE)
    await worker.beat()
    lease = await worker.claim(SESSION)
    assert isinstance(lease, Lease)
    return lease


async def test_from_registration_to_token(
    store: Store, broker: tuple[Broker, World, KeyStore]
) -> None:
    made, _, keys = broker
    answer = await made.register(SANDBOX, REGISTER, "10.0.0.9")
    assert answer == {
        "sandbox_uid": SANDBOX_UID,
        "session_id": SESSION,
        "hand": "main",
        "instance": 1,
        "owner_epoch": 1,
    }
    record = await store.control_log().get_hand(NAMESPACE, SESSION, "main", 1)
    assert record is not None
    assert record.signature
    lease = await claimed(store, "pod-a")
    body = {"session_id": SESSION, "lease": lease.value, "sandbox_uid": SANDBOX_UID}
    token = (await made.hand_token(HARNESS, body, ""))["token"]
    claims = verify(token, keys.public, time.time())
    assert (claims.session_id, claims.epoch, claims.owner_epoch) == (SESSION, lease.epoch, 1)
    model = await made.model_credential(HARNESS, body, "")
    assert model["base_url"] == "https://api.example"
    for caller in (OTHER, RIVAL, SANDBOX):
        for call in (made.hand_token, made.model_credential):
            with pytest.raises(Exception, match=r"worker|no such|service account|session"):
                await call(caller, body, "")


async def test_a_lease_that_was_taken_over_gives_nothing(
    store: Store, broker: tuple[Broker, World, KeyStore]
) -> None:
    made, _, _ = broker
    await made.register(SANDBOX, REGISTER, "10.0.0.9")
    old = await claimed(store, "pod-a")
    await store.control_log().drop_worker(NAMESPACE, "pod-a")
    await claimed(store, "pod-b")
    body = {"session_id": SESSION, "lease": old.value, "sandbox_uid": SANDBOX_UID}
    with pytest.raises(Refused, match="not live"):
        await made.hand_token(HARNESS, body, "")


async def test_a_lost_sandbox_does_not_come_back(
    store: Store, broker: tuple[Broker, World, KeyStore]
) -> None:
    made, _, _ = broker
    await made.register(SANDBOX, REGISTER, "10.0.0.9")
    control = store.control_log()
    record = await control.get_sandbox(NAMESPACE, SANDBOX_UID)
    assert record is not None
    await control.put_hand(NAMESPACE, dataclasses.replace(record, state="Lost", signature=""))
    with pytest.raises(Refused, match="lost"):
        await made.register(SANDBOX, REGISTER, "10.0.0.9")
    lease = await claimed(store, "pod-a")
    body = {"session_id": SESSION, "lease": lease.value, "sandbox_uid": SANDBOX_UID}
    with pytest.raises(Refused, match="no such sandbox"):
        await made.hand_token(HARNESS, body, "")


async def test_a_record_that_a_harness_wrote_itself_opens_nothing(
    store: Store, broker: tuple[Broker, World, KeyStore], tmp_path: Path
) -> None:
    made, _, _ = broker
    await made.register(SANDBOX, REGISTER, "10.0.0.9")
    control = store.control_log()
    record = await control.get_sandbox(NAMESPACE, SANDBOX_UID)
    assert record is not None
    forged = dataclasses.replace(record, owner="sesn_" + "e" * 32)
    await control.put_hand(NAMESPACE, forged)
    lease = await claimed(store, "pod-a")
    body = {"session_id": SESSION, "lease": lease.value, "sandbox_uid": SANDBOX_UID}
    with pytest.raises(Refused, match="no such sandbox"):
        await made.hand_token(HARNESS, body, "")
