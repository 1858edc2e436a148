"""The SDK's HTTP client on aiohttp's connections: a third of the CPU for each piece of a streamed answer.

A stream brings some fifty small chunks a second, and parsing each in Python was most of what a harness
did. `model` puts this transport under the Anthropic SDK, which keeps its headers, timeouts and errors;
`hands` uses aiohttp anyway. Redirects, cookies, decoding and proxies stay with the SDK's client.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import aiohttp
import httpx2
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

KEEPALIVE_S: Final = 30.0
"""How long an unused connection stays open."""

_AUTO_HEADERS: Final = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")
"""What aiohttp would add by itself: the SDK decides about headers."""


@contextlib.contextmanager
def _translated(request: httpx2.Request) -> Iterator[None]:
    """Raise errors of aiohttp as those of the SDK client: its caller sees no difference."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError as err:
        raise httpx2.ConnectTimeout(str(err), request=request) from err
    except TimeoutError as err:  # aiohttp.ServerTimeoutError is one
        raise httpx2.ReadTimeout(str(err), request=request) from err
    except aiohttp.ClientConnectorError as err:
        raise httpx2.ConnectError(str(err), request=request) from err
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError) as err:
        raise httpx2.RemoteProtocolError(str(err), request=request) from err
    except (aiohttp.ClientResponseError, HttpProcessingError) as err:
        raise httpx2.RemoteProtocolError(str(err), request=request) from err
    except (aiohttp.ClientError, OSError) as err:
        raise httpx2.ReadError(str(err), request=request) from err


class _Answer(httpx2.AsyncByteStream):
    """The body of an answer, in the pieces in which it came."""

    def __init__(self, request: httpx2.Request, response: aiohttp.ClientResponse) -> None:
        self._request = request
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _translated(self._request):
            async for piece in self._response.content.iter_any():
                yield piece

    async def aclose(self) -> None:
        """Keep the connection if the answer was read to its end, close it otherwise."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class AiohttpTransport(httpx2.AsyncBaseTransport):
    """See the module. As many connections as there are requests: the worker limits its sessions."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request; returns when the head of the answer is there.

        Raises:
            httpx2.TransportError: one of its subclasses, as the SDK's own transport raises.
        """
        timeouts: dict[str, Any] = request.extensions.get("timeout", {})
        with _translated(request):
            response = await self._client().request(
                request.method,
                URL(str(request.url), encoded=True),
                headers=[(name.decode(), value.decode()) for name, value in request.headers.raw],
                data=request.stream,
                allow_redirects=False,
                skip_auto_headers=_AUTO_HEADERS,
                timeout=aiohttp.ClientTimeout(
                    total=None,
                    sock_connect=timeouts.get("connect"),
                    sock_read=timeouts.get("read"),
                ),
            )
        return httpx2.Response(
            response.status,
            headers=response.raw_headers,
            stream=_Answer(request, response),
            request=request,
        )

    def _client(self) -> aiohttp.ClientSession:
        # Not in __init__: a session belongs to the event loop that it is made in.
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
            )
        return self._session

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
