"""How a request gets to the API server: as a pod, on aiohttp alone, or as a kubeconfig says, by the official client.

The official client costs a process some 10 to 25 MiB as soon as it is imported. A pod needs little of it (an
address, a CA, a token that the kubelet renews), so only who has a kubeconfig, with its exec plugins, client
certificates and proxies, loads it. Called by `cowhand.kube.client`.
"""

from __future__ import annotations

import json
import os
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import aiohttp
from yarl import URL

from cowhand.errors import UserError

if TYPE_CHECKING:
    from kubernetes.aio.client import ApiClient

REQUEST_TIMEOUT_S: Final = 15.0
"""Total time of one request to the API server."""

TOKEN_S: Final = 60.0
"""How long a token file is believed before it is read again: the kubelet renews it long before it expires."""

CONNECTIONS: Final = 100
"""Connections to the API server at the same time; more requests wait."""

ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True)
class Answer:
    """What the API server said: HTTP status, `Retry-After` as sent, body."""

    status: int
    retry_after: str | None
    raw: bytes


class Transport(Protocol):
    """One request at a time to the API server, without retries."""

    async def send(
        self, method: str, target: str, headers: Mapping[str, str], body: Mapping[str, Any] | None
    ) -> Answer:
        """Send `target` (path and query, encoded) and the body as JSON; answers whatever the status is.

        Raises:
            TimeoutError, aiohttp.ClientError, OSError: no answer within REQUEST_TIMEOUT_S.
        """

    async def close(self) -> None:
        """Close the connections."""


class PodTransport:
    """A pod's way: the service account that the kubelet mounts.

    The token is read again every TOKEN_S, and at once after it was refused.
    """

    def __init__(
        self,
        server: str,
        ca: Path,
        token: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`server` is an URL without a path.

        Raises:
            UserError: the CA or the token is not there or not usable.
        """
        self._server = server
        self._token_file = token
        self._clock = clock
        self._bearer, self._read_at = "", 0.0
        try:
            context = ssl.create_default_context(cafile=str(ca))
            self._authorization()
        except (OSError, ssl.SSLError) as err:
            raise UserError(f"the service account in {ca.parent} is not usable: {err}") from err
        self._context = context
        self._http: aiohttp.ClientSession | None = None

    def _authorization(self) -> str:
        """The header; OSError if there is no token."""
        if not self._bearer or self._clock() - self._read_at >= TOKEN_S:
            token = self._token_file.read_text().strip()
            if not token:
                raise OSError(f"{self._token_file} is empty")
            self._bearer, self._read_at = f"Bearer {token}", self._clock()
        return self._bearer

    async def send(
        self, method: str, target: str, headers: Mapping[str, str], body: Mapping[str, Any] | None
    ) -> Answer:
        """See `Transport.send`."""
        if self._http is None:
            # A proxy from the environment must never stand between us and the API server (kopf does the same).
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS, ssl=self._context),
                timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
                trust_env=False,
            )
        sent = {**headers, "Authorization": self._authorization(), "User-Agent": "cowhand"}
        async with self._http.request(
            method,
            URL(self._server + target, encoded=True),
            headers=sent,
            data=None if body is None else json.dumps(body).encode(),
            allow_redirects=False,
        ) as answer:
            raw = await answer.read()
        if answer.status == 401:
            self._bearer = ""
        return Answer(answer.status, answer.headers.get("Retry-After"), raw)

    async def close(self) -> None:
        """See `Transport.close`."""
        if self._http is not None:
            await self._http.close()


class KubeconfigTransport:
    """A kubeconfig's way, by the official client: exec plugins, client certificates, proxies."""

    def __init__(self, api: ApiClient) -> None:
        self._api = api

    async def send(
        self, method: str, target: str, headers: Mapping[str, str], body: Mapping[str, Any] | None
    ) -> Answer:
        """See `Transport.send`."""
        path, _, query = target.partition("?")
        _, url, sent, _, _ = await self._api.param_serialize(
            method, path, header_params=dict(headers), auth_settings=["BearerToken"]
        )
        if query:
            url = f"{url}?{query}"
        answer = await self._api.call_api(
            method, url, sent, body, _request_timeout=REQUEST_TIMEOUT_S
        )
        raw: bytes = await answer.read()  # type: ignore[no-untyped-call]
        return Answer(answer.status, answer.headers.get("Retry-After"), raw)

    async def close(self) -> None:
        """See `Transport.close`."""
        await self._api.close()  # type: ignore[no-untyped-call]


def in_pod(
    *, environ: Mapping[str, str] | None = None, account: Path = ACCOUNT
) -> PodTransport | None:
    """A pod's way to its own API server; None outside a pod, or in one without a service account's token.

    Raises:
        UserError: the service account is there but not usable.
    """
    # These two are Kubernetes' own and no settings of ours.
    environ = os.environ if environ is None else environ  # noqa: TID251
    host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT")
    token = account / "token"
    if not host or not port or not token.is_file():
        return None
    name = f"[{host}]" if ":" in host else host
    return PodTransport(f"https://{name}:{port}", account / "ca.crt", token)


async def by_kubeconfig(path: str | None) -> KubeconfigTransport:
    """The way of a kubeconfig file; None is the default one (`KUBECONFIG`, `~/.kube/config`).

    Raises:
        UserError: there is none, or it is not usable.
    """
    # Here, not above: see the module.
    from kubernetes.aio.client import ApiClient, Configuration
    from kubernetes.aio.config import ConfigException, load_kube_config

    config = Configuration()
    try:
        await load_kube_config(  # type: ignore[no-untyped-call]
            config_file=path, client_configuration=config
        )
    except (ConfigException, OSError) as err:
        raise UserError(
            f"no way to the Kubernetes API: {err}; run in a pod with a service account, "
            "or point KUBECONFIG at a kubeconfig file"
        ) from err
    config.client_session_kwargs = {"trust_env": False}  # as in `PodTransport`
    return KubeconfigTransport(ApiClient(config))
