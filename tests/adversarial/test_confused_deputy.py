"""Making the harness proxy send the model's key elsewhere (threat list B), over real sockets.

`breaches` is one check of what the upstream and a second server saw; the control tests in
`test_controls.py` run it with a defence taken away.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.trust import (
    LEASE,
    MODEL_KEY,
    SESSION,
    Answer,
    Authority,
    Rig,
    Upstream,
    messages,
    reply,
    request,
    rig,
)

OURS = (f"x-cowhand-session: {SESSION}", f"x-cowhand-lease: {LEASE}")


@pytest.fixture
async def chain(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig(tmp_path) as made:
        yield made


@pytest.fixture
async def evil() -> AsyncIterator[Upstream]:
    async with Upstream().serving() as made:
        yield made


async def ask(chain: Rig, raw: bytes) -> Answer:
    client = await chain.open((await chain.harness()).port)
    async with asyncio.timeout(60):
        return await client.ask(raw)


TRICKS: dict[str, bytes] = {
    "B5 absolute form": request("POST", "http://localhost:{evil}/v1/messages", *OURS, body=b"{}"),
    "B5 absolute form, own host": request(
        "POST", "http://localhost:{evil}/", *OURS, body=b"{}", host="localhost:{evil}"
    ),
    "B6 connect": request("CONNECT", "localhost:{evil}", *OURS),
    "B6 connect path": request("CONNECT", "/v1/messages", *OURS),
    "B16 TRACE": request("TRACE", "/v1/messages", *OURS),
    "B16 GET": request("GET", "/v1/messages", *OURS),
    "B16 OPTIONS": request("OPTIONS", "/v1/messages", *OURS),
    "B19 dot segment": messages(target="/v1/messages/../models"),
    "B19 encoded": messages(target="/v1/%6dessages"),
    "B19 double slash": messages(target="//v1/messages"),
    "B19 network path": messages(target="//localhost:{evil}/v1/messages"),
    "B19 parameter": messages(target="/v1/messages;x"),
    "B19 query": messages(target="/v1/messages?host=localhost:{evil}"),
    "B19 sibling": messages(target="/v1/messages/batches"),
    "B25 key management": messages(target="/v1/organizations/api_keys"),
    "no session": request("POST", "/v1/messages", body=b"{}"),
    "no lease": request("POST", "/v1/messages", OURS[0], body=b"{}"),
    "session twice": messages(f"x-cowhand-session: {SESSION}"),
    "bad session": request("POST", "/v1/messages", "x-cowhand-session: ../x", OURS[1], body=b"{}"),
    "a foreign session": request(
        "POST", "/v1/messages", "x-cowhand-session: sesn_" + "c" * 32, OURS[1], body=b"{}"
    ),
    "an invented lease": request(
        "POST", "/v1/messages", OURS[0], "x-cowhand-lease: 9:me.00:x", body=b"{}"
    ),
    "B28 h2c without body": request("GET", "/v1/messages", *OURS, "Upgrade: h2c"),
    "the broker's own paths": messages(target="/v1/model-credential"),
}


@pytest.mark.parametrize("name", TRICKS)
async def test_the_request_is_refused_and_nothing_is_sent(
    chain: Rig, evil: Upstream, name: str
) -> None:
    raw = TRICKS[name].replace(b"{evil}", str(evil.port).encode())
    answer = await ask(chain, raw)
    assert 400 <= answer.status <= 505
    assert answer.headers["x-cowhand-proxy"] == "refused"
    assert answer.json()["type"] == "error"
    assert chain.upstream.requests == []
    assert evil.connections == 0


REROUTES: dict[str, bytes] = {
    "B1 host": request("POST", "/v1/messages", *OURS, body=b"{}", host="localhost:{evil}"),
    "B18 forwarded host": messages("X-Forwarded-Host: localhost:{evil}"),
    "B18 forwarded": messages("Forwarded: host=localhost:{evil}"),
    "B18 original url": messages("X-Original-URL: http://localhost:{evil}/"),
    "B18 rewrite url": messages("X_Rewrite_URL: http://localhost:{evil}/"),
    "B17 override": messages("X-HTTP-Method-Override: DELETE"),
    "B20 own keys": messages("X-Api-Key: mine", "Authorization: Bearer mine", "X_Api_Key: mine"),
    "B21 connection": messages("Connection: x-api-key, authorization, keep-alive"),
    "B21 proxy connection": messages("Proxy-Connection: x-api-key"),
    "B28 upgrade": messages("Upgrade: websocket", "Connection: upgrade"),
    "base url header": messages("x-cowhand-base-url: http://localhost:{evil}"),
}


def breaches(chain: Rig, evil: Upstream) -> list[str]:
    """What went wrong, in words."""
    found = []
    if evil.connections:
        found.append("something was sent elsewhere")
    for head, _ in chain.upstream.requests:
        lines = head.decode("latin-1").lower().split("\r\n")
        if lines[1] != f"host: localhost:{chain.upstream.port}":
            found.append("another host")
        if lines.count(f"x-api-key: {MODEL_KEY.lower()}") != 1:
            found.append("the key is not there once")
        words = (str(evil.port), "mine", "upgrade", "x-cowhand", "override", "proxy-")
        rest = "\n".join(lines[2:])
        found += [f"{word} was passed on" for word in words if word in rest]
    return found


@pytest.mark.parametrize("name", REROUTES)
async def test_the_request_goes_to_the_right_place_all_the_same(
    chain: Rig, evil: Upstream, name: str
) -> None:
    raw = REROUTES[name].replace(b"{evil}", str(evil.port).encode())
    assert (await ask(chain, raw)).status == 200
    assert len(chain.upstream.requests) == 1
    assert breaches(chain, evil) == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_b9_redirects_are_passed_on_and_not_followed(
    chain: Rig, evil: Upstream, status: int
) -> None:
    async def redirect(_: Upstream, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(status, b"", f"location: http://localhost:{evil.port}/"))

    chain.upstream.answer = redirect
    answer = await ask(chain, messages())
    assert answer.status == status
    assert evil.connections == 0


async def test_b15_an_answer_that_echoes_the_key_in_a_header_is_cleaned(chain: Rig) -> None:
    async def echo(_: Upstream, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(200, b"{}", f"x-echo: {MODEL_KEY}", "set-cookie: s=1", "alt-svc: h3"))

    chain.upstream.answer = echo
    answer = await ask(chain, messages())
    assert MODEL_KEY not in str(answer.headers)
    assert not {"set-cookie", "alt-svc", "x-echo"} & set(answer.headers)


async def test_b22_trailers_are_dropped(chain: Rig) -> None:
    raw = messages("transfer-encoding: chunked", body=b"")
    trailers = b"2\r\n{}\r\n0\r\nAuthorization: Bearer mine\r\nHost: evil\r\n\r\n"
    assert (await ask(chain, raw + trailers)).status == 200
    head, body = chain.upstream.requests[0]
    assert body == b"{}"
    assert b"mine" not in head


async def test_b29_a_second_request_in_the_same_packet_is_judged_by_itself(chain: Rig) -> None:
    client = await chain.open((await chain.harness()).port)
    await client.send(messages() + request("POST", "/v1/organizations/api_keys", *OURS, body=b"{}"))
    assert (await client.read()).status == 200
    assert (await client.read()).status == 403
    assert len(chain.upstream.requests) == 1


async def test_b34_a_certificate_of_another_ca_gets_nothing(tmp_path: Path) -> None:
    async with rig(tmp_path, upstream_tls=True) as chain:
        proxy = await chain.harness()
        other = tmp_path / "other"
        async with Upstream(Authority(other).server("localhost")).serving() as evil:
            state = chain.world.logs.sessions["team", SESSION]
            state.meta.model["base_url"] = f"https://localhost:{evil.port}"
            chain.world.secret("localhost")
            answer = await (await chain.open(proxy.port)).ask(messages())
            assert answer.status == 502
            assert evil.requests == []


async def test_a10_b11_a_base_url_at_the_metadata_address_is_not_dialled(chain: Rig) -> None:
    state = chain.world.logs.sessions["team", SESSION]
    state.meta.model["base_url"] = "http://169.254.169.254"
    chain.world.secret("169.254.169.254:80")
    answer = await ask(chain, messages())
    assert answer.status == 502
    assert "never dialled" in answer.json()["error"]["message"]


async def test_c7_bytes_that_nobody_asked_for_do_not_become_the_next_answer(chain: Rig) -> None:
    async def chatty(up: Upstream, writer: asyncio.StreamWriter) -> None:
        first = len(up.requests) == 1
        writer.write(reply(200, b"first") + reply(200, b"poison") if first else reply(200, b"good"))

    chain.upstream.answer = chatty
    client = await chain.open((await chain.harness()).port)
    assert (await client.ask(messages())).body == b"first"
    assert (await client.ask(messages())).body == b"good"
    assert chain.upstream.connections == 2


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20,
        b"not http at all\r\n\r\n",
    ],
    ids=str,
)
async def test_c7_answers_with_two_readings_are_not_passed_on(chain: Rig, raw: bytes) -> None:
    async def hostile(_: Upstream, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)

    chain.upstream.answer = hostile
    answer = await ask(chain, messages())
    assert (answer.status, answer.headers["x-cowhand-proxy"]) == (502, "refused")
