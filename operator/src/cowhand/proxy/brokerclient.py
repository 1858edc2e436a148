"""The broker as its clients see it: verified TLS, this pod's token, kept connections, clear errors.

Used by both modes of the proxy. Answers are small JSON documents; a broker that does not answer is
`BrokerUnavailable`, one that says no is `BrokerRefusal`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Final

from cowhand.errors import BrokerUnavailable, CowhandError
from cowhand.proxy.client import Connection, UpstreamError, trusted_pool
from cowhand.proxy.http1 import Headers

MAX_ANSWER: Final = 256 * 1024
"""Longest answer of the broker that is read, in bytes."""


class BrokerRefusal(CowhandError):
    """The broker answered with an error of its own.

    Attributes:
        status: HTTP status, 400 to 499.
        type: `unauthenticated`, `forbidden`, `not_found` or `invalid`.
    """

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.type = kind


class BrokerClient:
    """Calls of one pod to the broker.

    Args:
        url: `https://host[:port]`.
        ca_file: PEM file with the CA that signed the broker's certificate.
        token_file: this pod's projected token; read for each call, since the kubelet rotates it.
        timeout_s: for a whole call, retry included.
    """

    def __init__(self, url: str, ca_file: str, token_file: str, *, timeout_s: float = 10.0) -> None:
        self._token_file = token_file
        self._timeout_s = timeout_s
        self._pool = trusted_pool(url, ca_file, "BROKER_URL")

    async def register(self, port: int, cert_sha256: str) -> dict[str, Any]:
        """Announce this sandbox; see docs/interfaces.md section 8."""
        return await self.post("/v1/register", {"port": port, "cert_sha256": cert_sha256})

    async def keys(self) -> dict[str, Any]:
        """The document with the broker's public keys."""
        return await self._call("GET", "/v1/keys", None)

    async def post(self, target: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST a JSON object; the decoded answer.

        Raises:
            BrokerUnavailable: no answer, a server error, or not our protocol.
            BrokerRefusal: the broker said no.
        """
        return await self._call("POST", target, json.dumps(body).encode())

    def close(self) -> None:
        """Close the kept connections."""
        self._pool.close()

    async def _call(self, method: str, target: str, body: bytes | None) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self._timeout_s):
                try:
                    status, answer = await self._once(method, target, body, fresh=False)
                except UpstreamError as err:
                    # Every call of the broker may be repeated: none has an effect that adds up.
                    if not err.stale:
                        raise
                    status, answer = await self._once(method, target, body, fresh=True)
        except (UpstreamError, TimeoutError) as err:
            text = str(err) or f"no answer in {self._timeout_s:g} s"
            raise BrokerUnavailable(f"The broker cannot be reached: {text}", after=2) from err
        return _judge(status, answer)

    async def _once(
        self, method: str, target: str, body: bytes | None, *, fresh: bool
    ) -> tuple[int, bytes]:
        headers: Headers = [
            (b"host", self._pool.origin.authority.encode()),
            (b"accept", b"application/json"),
        ]
        if body is not None:
            headers += [
                (b"authorization", b"Bearer " + self._token()),
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
            ]
        connection = await self._pool.acquire(fresh=fresh)
        try:
            await connection.start(method, self._pool.origin.path + target, headers)
            if body:
                await connection.send(body)
            await connection.finish()
            return await _read(connection, self._timeout_s)
        finally:
            self._pool.release(connection)

    def _token(self) -> bytes:
        try:
            with open(self._token_file, "rb") as handle:
                return handle.read().strip()
        except OSError as err:
            text = f"This pod's token {self._token_file} cannot be read: {err.strerror}."
            raise BrokerUnavailable(text, after=2) from err


async def _read(connection: Connection, timeout_s: float) -> tuple[int, bytes]:
    response = await connection.response(timeout_s)
    answer = bytearray()
    async for piece in connection.body(timeout_s):
        answer += piece
        if len(answer) > MAX_ANSWER:
            raise UpstreamError("The answer is too long.")
    return response.status_code, bytes(answer)


def _judge(status: int, answer: bytes) -> dict[str, Any]:
    try:
        document = json.loads(answer)
    except ValueError:
        document = None
    if status == 200 and isinstance(document, dict):
        return document
    error = document.get("error") if isinstance(document, dict) else None
    kind = str(error.get("type", "")) if isinstance(error, dict) else ""
    message = str(error.get("message", "")) if isinstance(error, dict) else ""
    if 400 <= status <= 499 and kind:
        raise BrokerRefusal(status, kind, message)
    raise BrokerUnavailable(f"The broker answered {status}: {message or 'no reason'}", after=2)
