"""HTTPS to the proxy of a sandbox, with its certificate pinned; HTTP to the proxy of this pod.

`Transport` and `Credentials` are what `sandbox` needs of the network; tests put fakes in their place.
The pin is checked on the finished TLS handshake, before the first byte of a request is written: a
token never reaches a server that merely has the right address.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import aiohttp
from yarl import URL

from cowhand.errors import BrokerUnavailable, Denied, HandUnavailable
from cowhand.wire.keys import PublicKeys, load_keys

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 5.0
RENEW_SHARE: Final = 0.5
"""A hand token is renewed in the background after this share of its life."""

USE_SHARE: Final = 0.85
"""A hand token is not used any more after this share of its life."""

MAX_TOKENS: Final = 1024
"""Tokens in memory before the old ones are thrown out."""


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
    """A hand token, when to renew it and until when to use it (monotonic clock, seconds)."""

    value: str
    renew_at: float
    use_until: float


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
    except (ValueError, RecursionError):
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
        self._tokens: dict[tuple[str, str, str], Token] = {}
        self._locks: dict[tuple[str, str, str], asyncio.Lock] = {}
        self._renewals: dict[tuple[str, str, str], asyncio.Task[None]] = {}

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
        """See `Credentials`; a renewal in the background costs the call nothing."""
        key = (session_id, lease, sandbox_uid)
        known = self._tokens.get(key)
        now = time.monotonic()
        if fresh or known is None or now >= known.use_until:
            # Whoever asked for the same token while it was fetched shares it.
            async with self._locks.setdefault(key, asyncio.Lock()):
                newest = self._tokens.get(key)
                if newest is None or newest is known:
                    newest = await self._fetch(key)
                return newest.value
        if now >= known.renew_at and key not in self._renewals:
            self._renewals[key] = asyncio.create_task(self._renew(key))
        return known.value

    async def _renew(self, key: tuple[str, str, str]) -> None:
        try:
            await self._fetch(key)
        except (BrokerUnavailable, Denied) as err:
            log.info("hand token not renewed yet: %s", err)
        finally:
            self._renewals.pop(key, None)

    async def _fetch(self, key: tuple[str, str, str]) -> Token:
        asked = time.monotonic()
        session_id, lease, sandbox_uid = key
        body = {"session_id": session_id, "lease": lease, "sandbox_uid": sandbox_uid}
        answer = await self._call("POST", "/cowhand/hand-token", body)
        life = float(answer["expires_in_s"])
        token = Token(str(answer["token"]), asked + life * RENEW_SHARE, asked + life * USE_SHARE)
        if len(self._tokens) >= MAX_TOKENS:
            self._tokens = {k: t for k, t in self._tokens.items() if asked < t.use_until}
            self._locks = {k: lock for k, lock in self._locks.items() if k in self._tokens}
        self._tokens[key] = token
        return token

    async def keys(self, *, fresh: bool = False) -> PublicKeys:
        """See `Credentials`."""
        if self._keys is None or fresh:
            self._keys = load_keys(await self._call("GET", "/cowhand/keys"))
        return self._keys

    async def close(self) -> None:
        """Close the connection."""
        for task in list(self._renewals.values()):
            task.cancel()
        if self._session is not None:
            await self._session.close()
