"""HTTPS to the proxy of a sandbox, with its certificate pinned; HTTP to the proxy of this pod.

`Transport` and `Credentials` are what `sandbox` needs of the network; tests put fakes in their place.
The pin is checked on the finished TLS handshake, before the first byte of a request is written: a
token never reaches a server that merely has the right address.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import aiohttp
from yarl import URL

from cowhand.errors import BrokerUnavailable, Denied, HandUnavailable
from cowhand.wire.keys import PublicKeys, load_keys

CONNECT_TIMEOUT_S: Final = 5.0
REFRESH_SHARE: Final = 0.5
"""A hand token is renewed after this share of its life."""


class Untrusted(HandUnavailable):
    """The server's certificate is not the pinned one; nothing was sent."""


class NotSent(HandUnavailable):
    """No connection: the request did not leave."""


class Broken(HandUnavailable):
    """The connection broke after the request may have left."""


@dataclass(frozen=True)
class Endpoint:
    """Where a hand answers: `ip:port` and the hex SHA-256 of its DER certificate."""

    address: str
    cert_sha256: str


@dataclass(frozen=True)
class Token:
    """A hand token and when to renew it (monotonic clock, seconds)."""

    value: str
    renew_at: float


class Transport(Protocol):
    """Requests to the proxy of a sandbox."""

    async def request(
        self,
        endpoint: Endpoint,
        method: str,
        path: str,
        *,
        token: str,
        body: Mapping[str, Any] | None = None,
        timeout: float,
    ) -> tuple[int, Any]:
        """Status and decoded JSON (None if the answer is not JSON).

        Raises:
            Untrusted, NotSent, Broken.
        """

    async def close(self) -> None:
        """Close all connections."""


class Credentials(Protocol):
    """Tokens and keys, from the proxy of this pod."""

    async def token(
        self, session_id: str, lease: str, sandbox_uid: str, *, fresh: bool = False
    ) -> str:
        """A hand token for this sandbox, from memory while it is young. Raises BrokerUnavailable, Denied."""

    async def keys(self, *, fresh: bool = False) -> PublicKeys:
        """The broker's public keys. Raises BrokerUnavailable."""


class PinnedTransport:
    """`Transport` on aiohttp; connections stay open, one pool for all hands of this process."""

    def __init__(self, *, limit: int = 1000) -> None:
        self._limit = limit
        self._session: aiohttp.ClientSession | None = None
        self._pins: dict[str, aiohttp.Fingerprint] = {}

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            connector = aiohttp.TCPConnector(limit=self._limit, keepalive_timeout=60)
            self._session = aiohttp.ClientSession(
                connector=connector, trust_env=False, cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session

    def _pin(self, cert_sha256: str) -> aiohttp.Fingerprint:
        # One object per certificate: the pool compares pins by identity.
        pin = self._pins.get(cert_sha256)
        if pin is None:
            try:
                pin = aiohttp.Fingerprint(bytes.fromhex(cert_sha256))
            except ValueError as err:
                raise Untrusted("the hand record holds no valid certificate hash") from err
            if len(self._pins) >= 4 * self._limit:
                self._pins.clear()
            self._pins[cert_sha256] = pin
        return pin

    async def request(
        self,
        endpoint: Endpoint,
        method: str,
        path: str,
        *,
        token: str,
        body: Mapping[str, Any] | None = None,
        timeout: float,
    ) -> tuple[int, Any]:
        """See `Transport`."""
        headers = {"Authorization": f"Bearer {token}"}
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body, separators=(",", ":")).encode()
        try:
            async with self._client().request(
                method,
                URL(f"https://{endpoint.address}{path}", encoded=True),
                data=data,
                headers=headers,
                ssl=self._pin(endpoint.cert_sha256),
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout, connect=CONNECT_TIMEOUT_S),
            ) as answer:
                return answer.status, _json(await answer.read())
        except aiohttp.ServerFingerprintMismatch as err:
            raise Untrusted(f"{endpoint.address} shows another certificate than pinned") from err
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as err:
            raise NotSent(f"no connection to {endpoint.address}: {err}") from err
        except (aiohttp.ClientError, TimeoutError, OSError) as err:
            raise Broken(f"the connection to {endpoint.address} broke: {err!r}") from err

    async def close(self) -> None:
        """See `Transport`."""
        if self._session is not None:
            await self._session.close()


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None


class ProxyCredentials:
    """`Credentials` from `POST /cowhand/hand-token` and `GET /cowhand/keys` of this pod's proxy.

    Args:
        base_url: for example `http://127.0.0.1:8181`.
    """

    def __init__(self, base_url: str) -> None:
        self._base = base_url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None
        self._keys: PublicKeys | None = None
        self._tokens: dict[tuple[str, str], Token] = {}
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(trust_env=False)
        timeout = aiohttp.ClientTimeout(total=15, connect=CONNECT_TIMEOUT_S)
        try:
            async with self._session.request(
                method, self._base + path, json=body, timeout=timeout
            ) as answer:
                status, value = answer.status, _json(await answer.read())
        except (aiohttp.ClientError, TimeoutError, OSError) as err:
            raise BrokerUnavailable(f"this pod's proxy does not answer: {err!r}") from err
        if status == 200 and isinstance(value, dict):
            return value
        error = value.get("error") if isinstance(value, dict) else None
        text = error.get("message", "") if isinstance(error, dict) else ""
        if 400 <= status < 500 and status != 429:
            raise Denied(f"the broker refuses: {text or status}")
        raise BrokerUnavailable(f"the broker does not answer: {text or status}")

    async def token(
        self, session_id: str, lease: str, sandbox_uid: str, *, fresh: bool = False
    ) -> str:
        """See `Credentials`."""
        key = (lease, sandbox_uid)
        lock = self._locks.setdefault(key, asyncio.Lock())
        asked = time.monotonic()
        async with lock:
            known = self._tokens.get(key)
            now = time.monotonic()
            if known is not None and now < known.renew_at and not fresh:
                return known.value
            body = {"session_id": session_id, "lease": lease, "sandbox_uid": sandbox_uid}
            answer = await self._call("POST", "/cowhand/hand-token", body)
            life = float(answer["expires_in_s"])
            token = Token(str(answer["token"]), asked + life * REFRESH_SHARE)
            self._tokens[key] = token
            return token.value

    def forget(self, lease: str) -> None:
        """Drop the tokens of a lease that was given back."""
        for key in [key for key in self._tokens if key[0] == lease]:
            self._tokens.pop(key, None)
            self._locks.pop(key, None)

    async def keys(self, *, fresh: bool = False) -> PublicKeys:
        """See `Credentials`."""
        if self._keys is None or fresh:
            self._keys = load_keys(await self._call("GET", "/cowhand/keys"))
        return self._keys

    async def close(self) -> None:
        """Close the connection."""
        if self._session is not None:
            await self._session.close()
