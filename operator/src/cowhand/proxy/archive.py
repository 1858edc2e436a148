"""A harness's way to the archive: large payloads and old events of its own tenant, with this pod's token.

The harness has no Kubernetes token, so its proxy passes these few requests on. The namespace is this pod's, never the
client's, and a target is taken apart and put together anew: nothing in it leads elsewhere. The archive checks both
again.
"""

from __future__ import annotations

import re
from typing import Final

from cowhand.errors import UserError
from cowhand.proxy.client import UpstreamError, trusted_pool
from cowhand.proxy.http1 import Headers
from cowhand.proxy.relay import relay
from cowhand.proxy.server import Exchange, Refusal

PREFIX: Final = ("/cowhand/blobs/", "/cowhand/segments/")
"""How the targets begin that come here."""

MAX_BODY: Final = 16 * 1024 * 1024
"""Largest blob, in bytes."""

MAX_ANSWER: Final = 64 * 1024 * 1024
"""Longest answer that is passed on, in bytes."""

IDLE_S: Final = 30.0
"""Silence of the archive that is tolerated."""

_SESSION: Final = r"sesn_[0-9a-f]{32}"
_BLOB: Final = re.compile(rf"/cowhand/(blobs/)({_SESSION}/[0-9a-f]{{64}})")
_SEGMENT: Final = re.compile(
    rf"/cowhand/(segments/)({_SESSION}(?:/[1-9][0-9]{{0,11}}-[1-9][0-9]{{0,11}})?)"
)
_NAMESPACE: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_KEPT: Final = frozenset({b"content-type", b"content-length", b"retry-after"})
"""Headers of the archive's answers that are passed on."""


class ArchiveRelay:
    """Passes requests on to the archive.

    Args:
        url: `https://host[:port]`.
        ca_file: PEM file with the CA of the archive's certificate.
        token_file: this pod's projected token; read for each call, since the kubelet rotates it.
        namespace: of this pod.

    Raises:
        UserError: a setting is wrong.
    """

    def __init__(self, url: str, ca_file: str, token_file: str, namespace: str) -> None:
        self._pool = trusted_pool(url, ca_file, "ARCHIVE_URL")
        if not _NAMESPACE.fullmatch(namespace):
            text = "COWHAND_NAMESPACE must be the pod's namespace where there is an archive."
            raise UserError(text, field="NAMESPACE")
        self._token_file = token_file
        self._namespace = namespace

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request; raises Refusal."""
        target, methods = self._target(exchange.target)
        if exchange.method not in methods:
            text = f"Use {' or '.join(methods)} {exchange.target}."
            raise Refusal(405, "invalid_request_error", text)
        headers: Headers = [
            (b"host", self._pool.origin.authority.encode()),
            (b"authorization", b"Bearer " + self._token()),
        ]
        if exchange.method == "PUT":
            headers += [
                (b"content-type", b"application/octet-stream"),
                (b"content-length", _length(exchange)),
            ]
        await self._pass(exchange, target, headers)

    def close(self) -> None:
        """Close the kept connections."""
        self._pool.close()

    async def _pass(self, exchange: Exchange, target: str, headers: Headers) -> None:
        # A body can be read only once: it is not risked on a connection that may have died meanwhile.
        fresh = exchange.method == "PUT"
        while True:
            connection = None
            try:
                connection = await self._pool.acquire(fresh=fresh)
                await relay(
                    exchange,
                    connection,
                    method=exchange.method,
                    target=target,
                    headers=headers,
                    answer=lambda _, found: [pair for pair in found if pair[0] in _KEPT],
                    idle_s=IDLE_S,
                    max_answer=MAX_ANSWER,
                )
                return
            except UpstreamError as err:
                if err.stale and not fresh and not exchange.started:
                    fresh = True
                    continue
                text = f"The archive cannot be reached: {err}"
                raise Refusal(503, "api_error", text, [(b"retry-after", b"2")]) from err
            finally:
                if connection is not None:
                    self._pool.release(connection)

    def _target(self, target: str) -> tuple[str, tuple[str, ...]]:
        """The archive's own target, and the methods that it takes."""
        if (match := _BLOB.fullmatch(target)) is not None:
            methods: tuple[str, ...] = ("GET", "PUT")
        elif (match := _SEGMENT.fullmatch(target)) is not None:
            methods = ("GET",)
        else:
            text = (
                "Ask for /cowhand/blobs/<session id>/<sha256>, /cowhand/segments/<session id> or"
                " /cowhand/segments/<session id>/<first>-<last>."
            )
            raise Refusal(400, "invalid_request_error", text)
        return f"{self._pool.origin.path}/v1/{match[1]}{self._namespace}/{match[2]}", methods

    def _token(self) -> bytes:
        try:
            with open(self._token_file, "rb") as handle:
                return handle.read().strip()
        except OSError as err:
            text = f"This pod's token {self._token_file} cannot be read: {err.strerror}."
            raise Refusal(503, "api_error", text, [(b"retry-after", b"2")]) from err


def _length(exchange: Exchange) -> bytes:
    found = exchange.get("content-length")
    if not found.isdecimal() or exchange.get("transfer-encoding"):
        text = "Say the length of the body (content-length)."
        raise Refusal(411, "invalid_request_error", text)
    if int(found) > MAX_BODY:
        text = f"The body has {found} bytes, the limit is {MAX_BODY}."
        raise Refusal(413, "request_too_large", text)
    return found.encode()
