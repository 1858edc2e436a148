"""What the gateway asks of the broker: a token to execute in a sandbox, and the keys that sign hand records."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from cowhand.errors import BrokerUnavailable, CowhandError, Denied, Terminal, UserError
from cowhand.gateway.errors import NotFound
from cowhand.wire.keys import PublicKeys, load_keys

TIMEOUT = aiohttp.ClientTimeout(total=15)


class Broker(Protocol):
    """The broker's side of `exec`; errors are those of the common tree."""

    async def exec_token(self, namespace: str, sandbox_uid: str, actor: str) -> str:
        """A token of type `exec` for one sandbox."""

    async def keys(self) -> PublicKeys:
        """The broker's public keys."""

    async def healthy(self) -> bool:
        """Whether the broker answers."""


class HttpBroker:
    """`Broker` over HTTPS; our identity is the projected token in `token_file`, read for each call."""

    def __init__(self, url: str, ca_file: str, token_file: str) -> None:
        self._url = url.rstrip("/")
        self._token_file = Path(token_file)
        self._tls = ssl.create_default_context(cafile=ca_file)
        self._session: aiohttp.ClientSession | None = None

    async def exec_token(self, namespace: str, sandbox_uid: str, actor: str) -> str:
        """See `Broker.exec_token`."""
        body = {"namespace": namespace, "sandbox_uid": sandbox_uid, "actor": actor}
        answer = await self._call("POST", "/v1/exec-token", body)
        return str(answer["token"])

    async def keys(self) -> PublicKeys:
        """See `Broker.keys`."""
        return load_keys(await self._call("GET", "/v1/keys"))

    async def healthy(self) -> bool:
        """See `Broker.healthy`."""
        try:
            async with self._client().get(f"{self._url}/healthz", ssl=self._tls) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=TIMEOUT)
        return self._session

    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        token = (await asyncio.to_thread(self._token_file.read_text, "utf-8")).strip()
        try:
            async with self._client().request(
                method,
                self._url + path,
                json=body,
                headers={"authorization": f"Bearer {token}"},
                ssl=self._tls,
                allow_redirects=False,
            ) as response:
                document = await response.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as err:
            text = str(err) or type(err).__name__
            raise BrokerUnavailable(f"the broker does not answer: {text}") from err
        if response.status != 200 or not isinstance(document, dict):
            raise _refused(response.status, document)
        return document


def _refused(status: int, document: Any) -> CowhandError:
    error = document.get("error") if isinstance(document, dict) else None
    text = error.get("message") if isinstance(error, dict) else None
    message = f"the broker refuses: {text or f'HTTP {status}'}"
    if status in (401, 403):
        return Denied(message)
    if status == 404:
        return NotFound(message)
    if status == 400:
        return UserError(message)
    if status >= 500:
        return BrokerUnavailable(message)
    return Terminal(message)
