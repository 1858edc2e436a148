"""Small parts of the proxy: origins, addresses, headers, credentials, keys, what it imports."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cowhand.errors import BrokerUnavailable, Unauthenticated, UserError
from cowhand.proxy.client import Origin, UpstreamError, check_address
from cowhand.proxy.credentials import Credential, CredentialCache, parse_credential
from cowhand.proxy.harness import client_headers, upstream_headers
from cowhand.proxy.keyring import KeyRing
from cowhand.proxy.measure import FORBIDDEN, measure_rss
from cowhand.proxy.tls import self_signed
from cowhand.wire.keys import SigningKey, dump_keys
from cowhand.wire.tokens import HandClaims, sign

ANSWER = {
    "base_url": "https://api.example/v",
    "headers": {"x-api-key": "the-secret-key"},
    "expires_in_s": 300,
    "credential_id": "s/k@1",
}


@pytest.mark.parametrize(
    ("url", "origin", "authority"),
    [
        ("https://api.example", Origin("https", "api.example", 443), "api.example"),
        ("http://a.b:8080/x/", Origin("http", "a.b", 8080, "/x"), "a.b:8080"),
        ("https://[fd00::1]:9", Origin("https", "fd00::1", 9), "[fd00::1]:9"),
        ("http://10.0.0.1", Origin("http", "10.0.0.1", 80), "10.0.0.1"),
    ],
)
def test_origins(url: str, origin: Origin, authority: str) -> None:
    assert Origin.parse(url) == origin
    assert origin.authority == authority


@pytest.mark.parametrize(
    "url",
    [
        "api.example",
        "ftp://a",
        "https://",
        "https://u:p@a",
        "https://a@b",
        "https://a?b",
        "https://a#b",
        "https://a:99999",
        "https://a_b",
        "https://a..b",
        "https://ä.example",
        "https://a b",
        "https://2130706433",
        "https://0x7f.1",
        "https://127.1",
    ],
)
def test_urls_that_are_no_origin(url: str) -> None:
    if url == "https://0x7f.1":
        # Not a number to us, so a name: it is resolved, and the address is judged.
        assert Origin.parse(url).host == "0x7f.1"
        return
    with pytest.raises(UserError):
        Origin.parse(url)


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "169.254.170.2",
        "168.63.129.16",
        "100.100.100.200",
        "fd00:ec2::254",
        "fd20:ce::254",
        "fe80::1",
        "fe80::1%eth0",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::1",
        "224.0.0.1",
        "0.0.0.0",
        "::",
    ],
)
def test_a10_addresses_that_are_never_dialled(address: str) -> None:
    with pytest.raises(UpstreamError):
        check_address(address)


def test_other_addresses_are() -> None:
    for address in ("10.0.0.1", "127.0.0.1", "2001:db8::1", "fd00::1", "1.1.1.1"):
        check_address(address)


def credential(**headers: str) -> Credential:
    return parse_credential(ANSWER | {"headers": headers or ANSWER["headers"]}, 0.0)


def test_b20_to_b24_what_a_client_may_not_say() -> None:
    sent = [
        (b"host", b"evil"),
        (b"authorization", b"Bearer evil"),
        (b"Authorization", b"again"),
        (b"x-api-key", b"evil"),
        (b"x_api_key", b"evil"),
        (b"X_Forwarded_Host", b"evil"),
        (b"forwarded", b"host=evil"),
        (b"x-forwarded-host", b"evil"),
        (b"x-original-url", b"/evil"),
        (b"x-rewrite-url", b"/evil"),
        (b"x-http-method-override", b"DELETE"),
        (b"cookie", b"evil"),
        (b"proxy-authorization", b"evil"),
        (b"x-cowhand-lease", b"evil"),
        (b"expect", b"100-continue"),
        (b"upgrade", b"h2c"),
        (b"connection", b"x-api-key, keep-alive"),
        (b"content-length", b"2"),
        (b"anthropic-version", b"2023-06-01"),
    ]
    assert upstream_headers(sent, credential()) == [
        (b"host", b"api.example"),
        (b"anthropic-version", b"2023-06-01"),
        (b"x-api-key", b"the-secret-key"),
        (b"content-length", b"2"),
    ]
    bearer = upstream_headers(sent, credential(Authorization="Bearer good"))
    assert [v for n, v in bearer if n == b"authorization"] == [b"Bearer good"]


def test_b15_b23_b35_what_an_answer_may_not_say() -> None:
    got = [
        (b"content-type", b"a"),
        (b"set-cookie", b"a=b"),
        (b"alt-svc", b"h3"),
        (b"x-cowhand-proxy", b"refused"),
        (b"x-echo", b"you sent the-secret-key"),
        (b"transfer-encoding", b"chunked"),
    ]
    assert client_headers(got, credential()) == [(b"content-type", b"a")]


@pytest.mark.parametrize(
    "change",
    [
        {"base_url": None},
        {"headers": None},
        {"headers": {"x-api-key": "ключ"}},
        {"expires_in_s": "x"},
        {"credential_id": ...},
    ],
    ids=str,
)
def test_d20_a_bad_credential_is_refused_without_its_value(change: dict[str, Any]) -> None:
    answer = {k: v for k, v in (ANSWER | change).items() if v is not ...}
    with pytest.raises((BrokerUnavailable, UserError)) as caught:
        parse_credential(answer, 0.0)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None or "secret" not in str(caught.value.__cause__)


def test_d20_a_credential_does_not_show_itself() -> None:
    assert "the-secret-key" not in repr(credential())


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Source:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def __call__(self, session: str, lease: str, rejected: str) -> dict[str, Any]:
        self.calls.append((session, lease, rejected))
        await self.gate.wait()
        if self.error:
            raise self.error
        return ANSWER


async def test_one_fetch_for_many_and_none_until_the_refresh() -> None:
    clock, source = Clock(), Source()
    cache = CredentialCache(source, clock=clock)
    await asyncio.gather(*(cache.get("s", "l") for _ in range(10)))
    assert len(source.calls) == 1
    clock.now = 190
    await cache.get("s", "l")
    assert len(source.calls) == 1
    clock.now = 193  # 0.8 of 240 s
    source.gate.clear()
    await asyncio.wait_for(cache.get("s", "l"), 60)  # does not wait for the refresh
    await asyncio.sleep(0)
    assert len(source.calls) == 2
    source.gate.set()
    await cache.get("s", "other lease")
    assert len(source.calls) == 3


async def test_g7_an_old_credential_is_not_used_when_the_broker_is_away() -> None:
    clock, source = Clock(), Source()
    cache = CredentialCache(source, clock=clock)
    await cache.get("s", "l")
    source.error = BrokerUnavailable("away")
    clock.now = 239
    await cache.get("s", "l")
    clock.now = 241
    with pytest.raises(BrokerUnavailable):
        await cache.get("s", "l")
    source.error = None
    await cache.get("s", "l")


async def test_a_401_forgets_the_credential_once() -> None:
    source = Source()
    cache = CredentialCache(source, clock=Clock())
    await cache.get("s", "l")
    assert cache.reject("s/k@1") is True
    await cache.get("s", "l")
    assert source.calls[-1] == ("s", "l", "s/k@1")
    assert cache.reject("s/k@1") is False


async def test_a_waiter_that_is_cancelled_does_not_cancel_the_others() -> None:
    source = Source()
    source.gate.clear()
    cache = CredentialCache(source, clock=Clock())
    first = asyncio.create_task(cache.get("s", "l"))
    second = asyncio.create_task(cache.get("s", "l"))
    await asyncio.sleep(0)
    first.cancel()
    source.gate.set()
    assert (await second).credential_id == "s/k@1"
    assert len(source.calls) == 1


async def test_invented_key_ids_ask_the_broker_every_five_seconds_at_most() -> None:
    clock, key = Clock(), SigningKey.generate()
    asked = 0

    async def fetch() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return dump_keys([key.public])

    ring = KeyRing(fetch, clock=clock)
    good = HandClaims("b", "s", 1, 1, 100, 200)
    assert await ring.verify(sign(good, key), 150) == good
    for _ in range(10):
        with pytest.raises(Unauthenticated):
            await ring.verify(sign(good, SigningKey.generate()), 150)
    assert asked == 1
    clock.now = 5.1
    with pytest.raises(Unauthenticated):
        await ring.verify(sign(good, SigningKey.generate()), 150)
    assert asked == 2


def test_two_starts_make_two_certificates() -> None:
    hashes = {self_signed()[1] for _ in range(2)}
    assert len(hashes) == 2
    assert all(len(digest) == 64 for digest in hashes)


@pytest.mark.parametrize("mode", ["sandbox", "harness"])
def test_the_proxy_loads_only_what_it_needs(mode: Any) -> None:
    rss, packages = measure_rss(mode)
    assert not packages & set(FORBIDDEN)
    assert 5 < rss < 60
    if mode == "harness":
        assert "cryptography" not in packages
