"""The gateway's HTTP API over the standard library, with its certificate checked against our CA.

The TCP connection goes to loopback (the port-forward), the name that the certificate must show is the
gateway's own: `cowhand-gateway.<namespace>.svc`.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import urlencode

from cowhand import __version__
from cowhand.errors import (
    CowhandError,
    Denied,
    Retryable,
    SessionNotFound,
    Unauthenticated,
    UserError,
)

CONNECT_S: Final = 10.0
READ_S: Final = 45.0
"""Longest silence of a stream: several of the gateway's keep-alives."""


class GatewayUnavailable(Retryable):
    """No connection, or it broke, or the gateway asks to come back later."""


class Refused(CowhandError):
    """The gateway understood and says no: the state does not allow it."""


class _Connection(http.client.HTTPSConnection):
    """TLS to one address under the name of another."""

    def __init__(
        self, address: tuple[str, int], name: str, context: ssl.SSLContext, timeout: float
    ) -> None:
        super().__init__(name, address[1], timeout=timeout)
        self._address = address
        self._name = name
        self._tls = context

    def connect(self) -> None:
        raw = socket.create_connection(self._address, CONNECT_S)
        raw.settimeout(self.timeout)
        self.sock = self._tls.wrap_socket(raw, server_hostname=self._name)


class Client:
    """One user, one namespace, one gateway.

    Args:
        address: host and port to connect to.
        name: name that the certificate must show.
        ca: PEM text of the CA.
        token: makes a token; called again once when the gateway no longer accepts the last.
        namespace: the tenant.
    """

    def __init__(
        self, address: tuple[str, int], name: str, ca: str, token: Callable[[], str], namespace: str
    ) -> None:
        self.address = address
        self._name = name
        self._tls = tls_context(ca)
        self._make_token = token
        self._token = ""
        self.namespace = namespace

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        timeout: float = READ_S,
    ) -> dict[str, Any]:
        """One request; the decoded answer.

        Raises:
            Unauthenticated, Denied, SessionNotFound, UserError, Refused, GatewayUnavailable.
        """
        return _decoded(*self._open(method, path, query, body, timeout, {}))

    def upload(
        self,
        path: str,
        content: Callable[[], Iterable[bytes]],
        length: int,
        *,
        query: Mapping[str, str],
        timeout: float,
    ) -> dict[str, Any]:
        """POST a body of `length` bytes in pieces (`content` is called again for a second try).

        Raises:
            As `call`.
        """
        return _decoded(
            *self._open("POST", path, query, None, timeout, {}, upload=(content, length))
        )

    def lines(
        self, path: str, query: Mapping[str, str], headers: Mapping[str, str] | None = None
    ) -> Iterator[bytes]:
        """Lines of a streaming answer, without their newline; empty ones (keep-alives) too.

        Raises:
            As `call`; GatewayUnavailable when the connection breaks in the middle.
        """
        connection, response = self._open("GET", path, query, None, READ_S, headers or {})
        try:
            while raw := response.readline():
                yield raw.rstrip(b"\n")
        except (OSError, http.client.HTTPException) as err:
            raise GatewayUnavailable(f"the connection to the gateway broke: {err!r}") from err
        finally:
            connection.close()

    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Mapping[str, Any] | None,
        timeout: float,
        extra: Mapping[str, str],
        upload: tuple[Callable[[], Iterable[bytes]], int] | None = None,
    ) -> tuple[_Connection, http.client.HTTPResponse]:
        for attempt in (1, 2):
            if not self._token:
                self._token = self._make_token()
            connection = _Connection(self.address, self._name, self._tls, timeout)
            headers = {
                "authorization": f"Bearer {self._token}",
                "anthropic-workspace-id": self.namespace,
                "user-agent": f"cowhand/{__version__}",
                **extra,
            }
            data: bytes | Iterable[bytes] | None = None
            if upload is not None:
                data = upload[0]()
                headers |= {
                    "content-type": "application/x-ndjson",
                    "content-length": f"{upload[1]}",
                }
            if body is not None:
                data = json.dumps(body).encode()
                headers["content-type"] = "application/json"
            target = f"{path}?{urlencode(query)}" if query else path
            keep = False
            try:
                connection.request(method, target, data, headers)
                response = connection.getresponse()
                if response.status == 200:
                    keep = True
                    return connection, response
                status, raw = response.status, response.read()
            except ssl.SSLCertVerificationError as err:
                raise CowhandError(
                    f"the gateway's certificate is not valid for {self._name}: {err.verify_message}. "
                    "Nothing was sent. Does ConfigMap cowhand-ca belong to this installation?"
                ) from err
            except (OSError, http.client.HTTPException) as err:
                raise GatewayUnavailable(
                    f"the gateway does not answer: {err or repr(err)}"
                ) from err
            finally:
                if not keep:
                    connection.close()
            if status == 401 and attempt == 1:
                self._token = ""
                continue
            raise refusal(status, raw)
        raise AssertionError("unreachable")


def _decoded(connection: _Connection, response: http.client.HTTPResponse) -> dict[str, Any]:
    """The JSON of an answer, and the end of its connection. Raises GatewayUnavailable where it broke off."""
    try:
        loaded: dict[str, Any] = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError) as err:
        raise GatewayUnavailable(f"the gateway's answer broke off: {err!r}") from err
    finally:
        connection.close()
    return loaded


def tls_context(ca: str) -> ssl.SSLContext:
    """A client context that trusts this CA alone. Raises UserError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=ca)
    except (ssl.SSLError, ValueError) as err:
        raise UserError(f"the CA certificate cannot be read: {err}") from err
    return context


def refusal(status: int, raw: bytes) -> CowhandError:
    """The error for an answer that is not 200."""
    try:
        message = str(json.loads(raw)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"the gateway answers HTTP {status}: {raw[:200].decode(errors='replace')}"
    if status == 401:
        return Unauthenticated(message)
    if status == 403:
        return Denied(message)
    if status == 404:
        return SessionNotFound(message)
    if status in (400, 413):
        return UserError(message)
    if status in (429, 502, 503, 504):
        return GatewayUnavailable(message)
    return Refused(message)
