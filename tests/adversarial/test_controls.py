"""Every defence taken away once: the check that is green with it must report the breach without it.

A check is one function that attacks a running chain and answers what it got, in words. `DEFENCES` says
which check guards which defence and how that defence is switched off.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cowhand.kube.review import Caller
from cowhand.wire.keys import SigningKey
from cowhand.wire.tokens import HandClaims, sign
from support.trust import (
    HARNESS_POD,
    LEASE,
    NAMESPACE,
    OTHER_NAMESPACE,
    SANDBOX_UID,
    SESSION,
    Rig,
    Upstream,
    messages,
    reply,
    request,
    rig,
    session_state,
)

Check = Callable[[Rig], Awaitable[list[str]]]


def token(key: SigningKey, **changes: Any) -> str:
    now = int(time.time())
    plain = HandClaims(SANDBOX_UID, SESSION, 1, 7, now, now + 300)
    return sign(dataclasses.replace(plain, **changes), key)


async def execute(chain: Rig, *bearers: str) -> list[int]:
    """Statuses of one call for each token, against a registered sandbox."""
    async with Upstream().serving() as sandboxd:
        server, _, tls = await chain.sandbox(sandboxd.port)
        statuses = []
        for bearer in bearers:
            client = await chain.open(server.port, tls)
            header = (f"authorization: Bearer {bearer}",) if bearer else ()
            raw = request("POST", "/v1/execute", *header, body=b"{}")
            statuses.append((await client.ask(raw)).status)
        await server.close()
        return statuses


async def strangers_execute(chain: Rig) -> list[str]:
    """Calls without a token, with a foreign signature, and for another sandbox."""
    good = token(chain.keys.signing)
    foreign = token(SigningKey.generate())
    other = token(chain.keys.signing, sandbox_uid="another")
    statuses = await execute(chain, good, "", foreign, other)
    assert statuses[0] == 200, "the check itself does not work"
    return [f"call {i} was executed" for i, status in enumerate(statuses) if i and status == 200]


async def old_worker_executes(chain: Rig) -> list[str]:
    """D: a worker that lost its lease calls after its successor."""
    new, old = token(chain.keys.signing, epoch=8), token(chain.keys.signing, epoch=7)
    statuses = await execute(chain, new, old)
    assert statuses[0] == 200, "the check itself does not work"
    return ["the old worker's call was executed"] if statuses[1] == 200 else []


async def strangers_get_the_key(chain: Rig) -> list[str]:
    """G2: a token that the API server does not know, one for another audience, another account."""
    chain.world.token("other-audience", "cowhand-harness", uid=HARNESS_POD)
    chain.world.tokens["other-audience"]["audiences"] = ["https://kubernetes.default.svc"]
    chain.world.token("sandbox-account", "cowhand-sandbox", uid=HARNESS_POD)
    body = {"session_id": SESSION, "lease": LEASE}
    assert await chain.client("harness-token").post("/v1/model-credential", body)
    return [
        f"the key was given to {name}"
        for name in ("invented", "other-audience", "sandbox-account")
        if await succeeds(chain, name, "/v1/model-credential", body)
    ]


async def succeeds(chain: Rig, name: str, path: str, body: dict[str, Any]) -> bool:
    try:
        await chain.client(name).post(path, body)
    except Exception:
        return False
    return True


async def other_workers_get_the_key(chain: Rig) -> list[str]:
    """G3: a pod that does not hold the lease, an old lease, another tenant."""
    chain.world.token("second-pod", "cowhand-harness", uid="another-harness-pod")
    chain.world.token("rival", "cowhand-harness", namespace=OTHER_NAMESPACE, uid=HARNESS_POD)
    chain.world.logs.sessions[OTHER_NAMESPACE, SESSION] = session_state("http://localhost:1")
    old = LEASE.replace("7:", "6:")
    wishes = (("second-pod", LEASE), ("rival", LEASE), ("harness-token", old))
    found = []
    for name, lease in wishes:
        body = {"session_id": SESSION, "lease": lease}
        if await succeeds(chain, name, "/v1/model-credential", body):
            found.append(f"the key was given to {name} with {lease}")
    return found


async def forged_record_opens(chain: Rig) -> list[str]:
    """A harness writes a record of its own into its tenant's keys and asks for a token."""
    async with Upstream().serving() as sandboxd:
        await chain.sandbox(sandboxd.port)
    mine = "sesn_" + "d" * 32
    state = session_state("http://localhost:1", session_id=mine)
    chain.world.logs.sessions[NAMESPACE, mine] = state
    record = chain.world.logs.records[NAMESPACE, SANDBOX_UID]
    forged = dataclasses.replace(record, owner=mine, owner_epoch=9)
    chain.world.logs.records[NAMESPACE, SANDBOX_UID] = forged
    body = {"session_id": mine, "lease": LEASE, "sandbox_uid": SANDBOX_UID}
    given = await succeeds(chain, "harness-token", "/v1/hand-token", body)
    return ["a token for a forged owner"] if given else []


async def foreign_pod_registers(chain: Rig) -> list[str]:
    """A pod with another address than the request, and one beside the Sandbox's own."""
    body = {"port": 8443, "cert_sha256": "ab" * 32}
    chain.world.sandbox_pod(ip="10.0.0.9")
    found = []
    if await succeeds(chain, "sandbox-token", "/v1/register", body):
        found.append("registered from another address")
    chain.world.sandbox_pod(name="impostor")
    if await succeeds(chain, "sandbox-token", "/v1/register", body):
        found.append("a second pod took the Sandbox's place")
    return found


async def key_goes_elsewhere(chain: Rig) -> list[str]:
    """B: the session's base URL is a host that the Secret does not list."""
    client = await chain.open((await chain.harness()).port)
    async with Upstream().serving() as evil:
        state = chain.world.logs.sessions[NAMESPACE, SESSION]
        state.meta.model["base_url"] = f"http://localhost:{evil.port}"
        await client.ask(messages())
        return ["the key was sent to a host that is not listed"] if evil.requests else []


async def client_header_arrives(chain: Rig) -> list[str]:
    """B20: the client's own credentials reach the endpoint."""
    client = await chain.open((await chain.harness()).port)
    answer = await client.ask(messages("Authorization: Bearer mine", "Cookie: mine"))
    assert answer.status == 200, "the check itself does not work"
    heads = [head for head, _ in chain.upstream.requests if b"mine" in head]
    return ["the client's header was passed on"] if heads else []


async def smuggling(chain: Rig) -> list[str]:
    """C1: a head with two readings is accepted."""
    client = await chain.open((await chain.harness()).port)
    raw = messages("Content-Length: 5", "Transfer-Encoding: chunked", body=b"") + b"0\r\n\r\n"
    answer = await client.ask(raw)
    return ["a head with two lengths was accepted"] if answer.status == 200 else []


async def poisoned_answer(chain: Rig) -> list[str]:
    """C7: bytes that nobody asked for become the next request's answer."""

    async def chatty(up: Upstream, writer: Any) -> None:
        first = len(up.requests) == 1
        writer.write(reply(200, b"first") + reply(200, b"poison") if first else reply(200, b"good"))

    chain.upstream.answer = chatty
    client = await chain.open((await chain.harness()).port)
    await client.ask(messages())
    second = await client.ask(messages())
    return ["a poisoned answer"] if second.body == b"poison" else []


def no_token_check(patch: pytest.MonkeyPatch) -> None:
    async def authorize(self: Any, exchange: Any) -> None:
        return None

    patch.setattr("cowhand.proxy.sandbox.SandboxProxy._authorize", authorize)


def no_fence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("cowhand.proxy.fence.Fence.check", lambda self, claims: self)


def no_token_review(patch: pytest.MonkeyPatch) -> None:
    async def caller(self: Any, authorization: str) -> Caller:
        return Caller("u", NAMESPACE, "cowhand-harness", HARNESS_POD, "harness")

    patch.setattr("cowhand.kube.review.Reviewer.caller", caller)


def no_lease_check(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("cowhand.broker.policy.lease_epoch", lambda caller, state, lease: 1)


def no_record_signature(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("cowhand.broker.app.verify_record", lambda record, keys, *, namespace: None)


def no_address_check(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("cowhand.broker.policy.same_address", lambda peer, addresses: peer)


def no_allowed_hosts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("cowhand.broker.secrets.check_allowed_host", lambda url, secret, note: None)


def no_header_filter(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("cowhand.proxy.harness._CLIENT_ONLY", frozenset({b"host", b"content-length"}))


def no_head_scan(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("cowhand.proxy.server.scan_request", lambda head, limits: None)


def no_clean_check(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("cowhand.proxy.client.Connection.clean", True)


DEFENCES: dict[str, tuple[Check, Callable[[pytest.MonkeyPatch], None]]] = {
    "token check": (strangers_execute, no_token_check),
    "fence": (old_worker_executes, no_fence),
    "TokenReview": (strangers_get_the_key, no_token_review),
    "lease check": (other_workers_get_the_key, no_lease_check),
    "signature of records": (forged_record_opens, no_record_signature),
    "address of a registration": (foreign_pod_registers, no_address_check),
    "allowed hosts of a Secret": (key_goes_elsewhere, no_allowed_hosts),
    "header filter": (client_header_arrives, no_header_filter),
    "head scan": (smuggling, no_head_scan),
    "clean connections": (poisoned_answer, no_clean_check),
}


@pytest.mark.parametrize("defence", DEFENCES)
async def test_the_attack_fails(tmp_path: Path, defence: str) -> None:
    async with rig(tmp_path) as chain:
        chain.world.sandbox_pod()
        assert await DEFENCES[defence][0](chain) == []


@pytest.mark.parametrize("defence", DEFENCES)
async def test_without_the_defence_the_check_reports_it(
    tmp_path: Path, defence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, switch_off = DEFENCES[defence]
    async with rig(tmp_path) as chain:
        chain.world.sandbox_pod()
        switch_off(monkeypatch)
        assert await check(chain) != []
