"""The model client: one streamed Messages request through the proxy of this pod.

The proxy adds the credential; the key that the SDK is given here is a dummy. The SDK brings headers,
connections and error classes; body and answer are bytes of our own, see `request` and `stream`.
Retries are the loop's, each of them logged.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

import anthropic
import httpx2

from cowhand.harness.http import AiohttpTransport
from cowhand.harness.stream import Accumulator, ModelError
from cowhand.session.preview import Kind
from cowhand.wire.ratelimit import exhausted_s

PIECE: Final = 256 * 1024
"""Bytes of a request that are sent at a time."""

_BY_STATUS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


_MALFORMED: Final = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading an answer of another shape than the API's raises: the endpoint may send anything."""


class OnText(Protocol):
    """Called with each piece of visible text, and of thinking, as it comes."""

    def __call__(self, block: int, text: str, kind: Kind = "text", /) -> None:
        """`block`: index of the content block."""


class OnStart(Protocol):
    """Called once, when the endpoint begins to answer."""

    def __call__(self, exhausted_s: float = 0.0) -> None:
        """`exhausted_s`: seconds until a limit that is used up now is there again, 0 if none is."""


def nothing(exhausted_s: float = 0.0) -> None:
    """What `on_start` does by default."""


@dataclass(frozen=True)
class Response:
    """A complete response.

    Attributes:
        message: the message as received, content blocks in order; a `RawObject` keeps its text.
        request_id: the API's id of the request, or empty.
        ttft_ms: milliseconds from sending to the first content block.
        duration_ms: milliseconds from sending to the end.
    """

    message: dict[str, Any]
    request_id: str
    ttft_ms: int
    duration_ms: int


class Model(Protocol):
    """Sends one Messages request."""

    async def stream(
        self,
        body: bytes,
        *,
        session_id: str,
        lease: str,
        on_text: OnText,
        on_start: OnStart = nothing,
        betas: Sequence[str] = (),
    ) -> Response:
        """Send `body` as it is; `on_text` gets each piece of text and thinking as it comes.

        Args:
            body: the request.
            session_id: for the proxy.
            lease: for the proxy.
            on_text: see `OnText`.
            on_start: see `OnStart`.
            betas: values of the header `anthropic-beta`.

        Raises:
            ModelError: no complete response.
        """


def classify(error: Exception) -> ModelError:
    """An exception of the SDK or its HTTP client as a `ModelError`, by type, never by status alone."""
    if isinstance(error, ModelError):
        return error
    if isinstance(error, anthropic.APIStatusError):
        return _classify_status(error)
    if isinstance(error, anthropic.APITimeoutError | httpx2.TimeoutException):
        return ModelError("timeout_error", "the model endpoint did not answer in time")
    if isinstance(error, httpx2.RemoteProtocolError | httpx2.ReadError):
        return ModelError("stream_cut", f"the connection broke: {error}")
    cause = error.__cause__ or error
    return ModelError("connection_error", f"the model endpoint cannot be reached: {cause}")


def _classify_status(error: anthropic.APIStatusError) -> ModelError:
    status, headers = error.status_code, error.response.headers
    kind = error.type or _BY_STATUS.get(
        status, "api_error" if status >= 500 else "invalid_request_error"
    )
    if headers.get("x-cowhand-proxy") == "refused":
        kind = "proxy_unavailable" if status >= 500 else "proxy_refused"
    try:
        after = float(headers["retry-after"])
    except (KeyError, ValueError):
        after = None
    if after is not None and not math.isfinite(after):
        after = None  # JSON has no such number
    message = error.api_message or str(error)
    return ModelError(kind, message, status=status, retry_after_s=after)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    """The body, once; what was sent is not kept."""
    for at in range(0, len(body), PIECE):
        yield body[at : at + PIECE]


class AnthropicModel:
    """`Model` on the Anthropic SDK.

    Args:
        base_url: the proxy of this pod, for example `http://127.0.0.1:8181`.
        read_timeout_s: longest silence of the endpoint, seconds.
    """

    def __init__(self, base_url: str, *, read_timeout_s: float = 300.0) -> None:
        # trust_env off: a HTTP_PROXY variable of the pod must not lead requests past our proxy.
        http = anthropic.DefaultAsyncHttpxClient(trust_env=False, transport=AiohttpTransport())
        self._client = anthropic.AsyncAnthropic(
            base_url=base_url,
            api_key="added-by-the-proxy",
            max_retries=0,
            timeout=httpx2.Timeout(read_timeout_s, connect=10.0),
            http_client=http,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def stream(
        self,
        body: bytes,
        *,
        session_id: str,
        lease: str,
        on_text: OnText,
        on_start: OnStart = nothing,
        betas: Sequence[str] = (),
    ) -> Response:
        """See `Model`."""
        headers = {
            "content-type": "application/json",
            "x-cowhand-session": session_id,
            "x-cowhand-lease": lease,
        }
        if betas:
            headers["anthropic-beta"] = ",".join(betas)
        headers["content-length"] = str(len(body))
        content = _pieces(body)
        del body  # thousands of sessions wait for their answer: none keeps its request meanwhile
        try:
            return await self._stream(content, headers, on_text, on_start)
        except (anthropic.AnthropicError, httpx2.HTTPError, httpx2.StreamError) as err:
            raise classify(err) from err
        except _MALFORMED as err:
            raise ModelError("stream_cut", f"the stream is not valid: {err!r}") from err

    async def _stream(
        self,
        content: AsyncIterator[bytes],
        headers: dict[str, str],
        on_text: OnText,
        on_start: OnStart,
    ) -> Response:
        began = time.monotonic()
        # cast_to is only the type of parsed events, which we never ask for.
        stream = cast(
            "anthropic.AsyncStream[object]",
            await self._client.post(
                "/v1/messages?beta=true" if "anthropic-beta" in headers else "/v1/messages",
                cast_to=object,
                content=content,
                options={"headers": headers},
                stream=True,
                stream_cls=anthropic.AsyncStream[object],
            ),
        )
        gathered, ttft = Accumulator(), None
        try:
            async for item in stream.raw_events(stream.response):
                if not item.data or item.event == "ping":
                    continue
                text = gathered.feed(item.data)
                if ttft is None and gathered.started:
                    ttft = time.monotonic() - began
                    on_start(exhausted_s(stream.response.headers))
                if text:
                    on_text(gathered.block, text)
                elif gathered.thought:
                    on_text(gathered.block, gathered.thought, "thinking")
        finally:
            await asyncio.shield(stream.close())
        message = gathered.message()
        took = time.monotonic() - began
        return Response(
            message=message,
            request_id=stream.response.headers.get("request-id", ""),
            ttft_ms=round((took if ttft is None else ttft) * 1000),
            duration_ms=round(took * 1000),
        )
