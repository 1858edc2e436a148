"""The proxy of a harness pod: the model's key is added here, and goes nowhere but to the model's endpoint.

The harness names session and lease; the broker decides whether this pod holds that lease, and says
where the session's model is. Nothing in the request has a say in where it goes.
"""

from __future__ import annotations

import json
import logging
import re
import ssl
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

from cowhand.errors import BrokerUnavailable, UserError
from cowhand.proxy import archive as archives
from cowhand.proxy.archive import ArchiveRelay
from cowhand.proxy.brokerclient import BrokerClient, BrokerRefusal
from cowhand.proxy.client import Origin, Pool, UpstreamError, client_tls
from cowhand.proxy.credentials import Credential, CredentialCache
from cowhand.proxy.http1 import Headers, Limits, end_to_end, fold
from cowhand.proxy.relay import relay
from cowhand.proxy.server import Exchange, Refusal
from cowhand.proxy.slots import Slots
from cowhand.wire.ratelimit import refused_s

log = logging.getLogger(__name__)

ANSWER_IDLE_S: Final = 600.0
"""Silence of the model that is tolerated: long thinking before the first token, long pings."""

MAX_ANSWER: Final = 64 * 1024 * 1024
"""Longest answer of the model that is passed on, in bytes: the harness keeps it in memory until it ends."""

MAX_POOLS: Final = 64
MAX_SMALL_BODY: Final = 64 * 1024

SLOT_WAIT_S: Final = 5.0
"""How long a harness that asks for a slot is kept waiting for the answer."""

MESSAGES: Final = ("/v1/messages", "/v1/messages?beta=true")
"""The only targets that are passed on; the SDK's beta client adds the query."""

_SESSION: Final = re.compile(r"sesn_[0-9a-f]{32}")
_LEASE: Final = re.compile(r"[!-~]{1,256}")

_CLIENT_ONLY: Final = frozenset(
    {
        b"authorization",
        b"x-api-key",
        b"cookie",
        b"host",
        b"content-length",
        b"expect",
        b"forwarded",
        b"via",
        b"front-end-https",
        b"x-original-url",
        b"x-rewrite-url",
        b"x-http-method",
        b"x-http-method-override",
        b"x-method-override",
    }
)
"""Headers of the client that never go on: its credentials, framing, and what could reroute a request."""

_CLIENT_PREFIXES: Final = (b"x-cowhand-", b"x-forwarded-", b"proxy-")

_ANSWER_ONLY: Final = frozenset({b"set-cookie", b"alt-svc"})
"""Headers of the answer that stay here: state and routes past this proxy."""


def render(status: int, kind: str, message: str) -> tuple[Headers, bytes]:
    """Refusals of this mode: Anthropic's error envelope, marked as ours."""
    body = json.dumps({"type": "error", "error": {"type": kind, "message": message}}).encode()
    return [(b"content-type", b"application/json"), (b"x-cowhand-proxy", b"refused")], body


def upstream_headers(client: Headers, credential: Credential) -> Headers:
    """The header list for the model: the client's without what it may not say, plus the credential.

    Names are compared with `_` as `-`, as a lenient server would read them.
    """
    ours = {fold(name) for name, _ in credential.headers}
    kept = [
        (name, value)
        for name, value in end_to_end(client)
        if fold(name) not in _CLIENT_ONLY
        and fold(name) not in ours
        and not fold(name).startswith(_CLIENT_PREFIXES)
    ]
    framing = [(n, v) for n, v in client if n in (b"content-length", b"transfer-encoding")]
    host = (b"host", credential.origin.authority.encode())
    return [host, *kept, *credential.headers, *framing]


def client_headers(answer: Headers, credential: Credential) -> Headers:
    """The answer's header list for the harness; a header that repeats the credential is dropped."""
    secrets = [value.removeprefix(b"Bearer ") for _, value in credential.headers]
    return [
        (name, value)
        for name, value in end_to_end(answer)
        if fold(name) not in _ANSWER_ONLY
        and not fold(name).startswith(b"x-cowhand-")
        and not any(secret in value for secret in secrets if len(secret) >= 8)
    ]


class HarnessProxy:
    """The app of a harness pod's proxy.

    Args:
        broker: where credentials and hand tokens come from.
        limits: timeouts and sizes of the upstream side.
        ca_file: CA of the model's endpoint, empty for the system's (tests have their own).
        archive: where large payloads and old events are, None for nowhere; closed with the proxy.
    """

    def __init__(
        self,
        broker: BrokerClient,
        *,
        limits: Limits | None = None,
        ca_file: str = "",
        archive: ArchiveRelay | None = None,
    ) -> None:
        self._broker = broker
        self._archive = archive
        self._limits = limits or Limits(answer_idle_s=ANSWER_IDLE_S)
        self._ca_file = ca_file
        self._tls: ssl.SSLContext | None = None
        self._credentials = CredentialCache(self._fetch)
        self._pools: OrderedDict[tuple[Origin, str], Pool] = OrderedDict()
        self._slots = Slots(lambda body: broker.post("/v1/model-slots", body))

    async def app(self, exchange: Exchange) -> None:
        """Answer one request."""
        if self._archive is not None and exchange.target.startswith(archives.PREFIX):
            await self._archive(exchange)
            return
        routes = {
            "/cowhand/hand-token": ("POST", self._hand_token),
            "/cowhand/keys": ("GET", self._keys),
            "/cowhand/model-slot": ("POST", self._model_slot),
        } | dict.fromkeys(MESSAGES, ("POST", self._messages))
        route = routes.get(exchange.target)
        if route is None:
            text = "This proxy passes on POST /v1/messages and nothing else."
            raise Refusal(403, "permission_error", text)
        method, handler = route
        if exchange.method != method:
            raise Refusal(405, "invalid_request_error", f"Use {method} {exchange.target}.")
        try:
            await handler(exchange)
        except BrokerRefusal as err:
            raise _refusal_of_broker(err) from err
        except BrokerUnavailable as err:
            raise Refusal(503, "api_error", str(err), [(b"retry-after", b"2")]) from err
        except UserError as err:
            raise Refusal(403, "permission_error", str(err)) from err

    def close(self) -> None:
        """Close the kept connections."""
        self._slots.close()
        for pool in self._pools.values():
            pool.close()
        if self._archive is not None:
            self._archive.close()
        self._broker.close()

    async def _fetch(self, session_id: str, lease: str, rejected: str) -> Mapping[str, Any]:
        body = {"session_id": session_id, "lease": lease}
        if rejected:
            body["rejected"] = rejected
        return await self._broker.post("/v1/model-credential", body)

    async def _messages(self, exchange: Exchange) -> None:
        session_id, lease = _named(
            exchange.get("x-cowhand-session"), exchange.get("x-cowhand-lease")
        )
        credential = await self._credentials.get(session_id, lease)
        if not credential.pool:
            await self._relay(exchange, credential)
            return
        async with self._slots.line(credential.pool).slot((session_id, lease)):
            await self._relay(exchange, credential)

    async def _relay(self, exchange: Exchange, credential: Credential) -> None:
        pool = self._pool(credential)

        def answer(status: int, headers: Headers) -> Headers:
            if credential.pool:
                told = {n.decode("latin-1"): v.decode("latin-1") for n, v in headers}
                self._slots.line(credential.pool).paused(refused_s(status, told))
            if status == 401 and self._credentials.reject(credential.credential_id):
                text = (
                    f"{credential.origin.host} refused the credential {credential.credential_id};"
                    " a new one is fetched, send the request again."
                )
                raise Refusal(503, "api_error", text, [(b"retry-after", b"1")])
            return client_headers(headers, credential)

        connection = None
        try:
            connection = await pool.acquire()
            await relay(
                exchange,
                connection,
                method="POST",
                target=pool.origin.path + exchange.target,
                headers=upstream_headers(exchange.headers, credential),
                answer=answer,
                idle_s=self._limits.answer_idle_s,
                max_answer=MAX_ANSWER,
            )
        except UpstreamError as err:
            raise Refusal(502, "api_error", f"The model's endpoint failed: {err}") from err
        finally:
            if connection is not None:
                pool.release(connection)

    async def _model_slot(self, exchange: Exchange) -> None:
        """A harness asks before it writes down that it sends: its wait is no part of the request then."""
        try:
            body = json.loads(await exchange.read_body(MAX_SMALL_BODY))
            session_id, lease = str(body["session_id"]), str(body["lease"])
        except (ValueError, KeyError, TypeError) as err:
            text = 'Send {"session_id", "lease"} as JSON.'
            raise Refusal(400, "invalid_request_error", text) from err
        credential = await self._credentials.get(*_named(session_id, lease))
        granted = True
        if credential.pool:
            line = self._slots.line(credential.pool)
            granted = await line.wait((session_id, lease), SLOT_WAIT_S)
        await _respond(exchange, {"granted": granted, "shared": bool(credential.pool)})

    def _pool(self, credential: Credential) -> Pool:
        """Connections are shared only between requests with the same place and the same credential."""
        key = (credential.origin, credential.credential_id)
        pool = self._pools.get(key)
        if pool is None:
            if credential.origin.scheme == "https" and self._tls is None:
                self._tls = client_tls(self._ca_file)
            tls = self._tls if credential.origin.scheme == "https" else None
            pool = Pool(credential.origin, tls, limits=self._limits)
            self._pools[key] = pool
            if len(self._pools) > MAX_POOLS:
                self._pools.popitem(last=False)[1].close()
        self._pools.move_to_end(key)
        return pool

    async def _hand_token(self, exchange: Exchange) -> None:
        try:
            body = json.loads(await exchange.read_body(MAX_SMALL_BODY))
            asked = {name: body[name] for name in ("session_id", "lease", "sandbox_uid")}
        except (ValueError, KeyError, TypeError) as err:
            text = 'Send {"session_id", "lease", "sandbox_uid"} as JSON.'
            raise Refusal(400, "invalid_request_error", text) from err
        await _respond(exchange, await self._broker.post("/v1/hand-token", asked))

    async def _keys(self, exchange: Exchange) -> None:
        await _respond(exchange, await self._broker.keys())


def _named(session_id: str, lease: str) -> tuple[str, str]:
    if not _SESSION.fullmatch(session_id) or not _LEASE.fullmatch(lease):
        text = "Name the session: x-cowhand-session (sesn_...) and x-cowhand-lease are needed."
        raise Refusal(400, "invalid_request_error", text)
    return session_id, lease


def _refusal_of_broker(err: BrokerRefusal) -> Refusal:
    kinds = {
        400: "invalid_request_error",
        403: "permission_error",
        404: "not_found_error",
    }
    if err.status in kinds:
        return Refusal(err.status, kinds[err.status], str(err))
    text = f"The broker does not accept this pod: {err}"
    return Refusal(503, "api_error", text, [(b"retry-after", b"5")])


async def _respond(exchange: Exchange, document: Mapping[str, Any]) -> None:
    body = json.dumps(document).encode()
    await exchange.respond(200, [(b"content-type", b"application/json")], body)
