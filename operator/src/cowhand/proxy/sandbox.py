"""The proxy of a sandbox pod: the only door in. Checks token and fence, then passes calls on to sandboxd.

sandboxd runs with the untrusted code: its answers are data, and it never sees a token.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import time
from collections.abc import Callable
from typing import Any, Final

from cowhand.errors import BrokerUnavailable, CowhandError, Unauthenticated, UserError
from cowhand.proxy.brokerclient import BrokerClient
from cowhand.proxy.client import Origin, Pool, UpstreamError
from cowhand.proxy.fence import Fence, FenceRefusal
from cowhand.proxy.http1 import Headers, Limits
from cowhand.proxy.keyring import KeyRing
from cowhand.proxy.relay import relay
from cowhand.proxy.server import Exchange, Refusal

log = logging.getLogger(__name__)

MAX_ANSWER: Final = 16 * 1024 * 1024
"""Longest answer of sandboxd that is passed on, in bytes (its results are capped at 1 MiB)."""

CALL_IDLE_S: Final = 3600.0
"""A tool call may be silent for this long."""

KEYS_EVERY_S: Final = 300.0
"""The keys are fetched this often, so that a key that the broker drops is dropped here too."""

POLL_S: Final = 0.05
EAGER_S: Final = 60.0
"""sandboxd is asked every `POLL_S` for the first `EAGER_S` seconds of a pod, then once a second."""

_CALLS: Final = re.compile(r"/v1/calls/[A-Za-z0-9._~%-]{1,600}(\?wait_ms=[0-9]{1,8})?")
_PASSED_ON: Final = (b"content-type", b"content-length", b"transfer-encoding", b"accept")


def render(status: int, kind: str, message: str) -> tuple[Headers, bytes]:
    """Refusals of this mode: `{"error": {"type", "message"}}`."""
    body = json.dumps({"error": {"type": kind, "message": message}}).encode()
    return [(b"content-type", b"application/json")], body


class SandboxProxy:
    """The app of a sandbox pod's proxy, and its way to readiness.

    Args:
        broker: where to register and to fetch keys.
        sandboxd_port: port of sandboxd on 127.0.0.1.
        clock: seconds since the epoch, for the times in tokens.
    """

    def __init__(
        self, broker: BrokerClient, sandboxd_port: int, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._broker = broker
        self._clock = clock
        self._ring = KeyRing(broker.keys)
        self._fence: Fence | None = None
        limits = Limits(handshake_s=5.0, answer_idle_s=CALL_IDLE_S)
        origin = Origin("http", "127.0.0.1", sandboxd_port)
        self._sandboxd = Pool(origin, None, limits=limits, idle_s=20.0)

    async def app(self, exchange: Exchange) -> None:
        """Answer one request."""
        if exchange.target == "/v1/health":
            if exchange.method != "GET":
                raise Refusal(405, "invalid", "Health is asked for with GET.")
            await self._health(exchange)
            return
        calls = _CALLS.fullmatch(exchange.target) is not None
        known = calls or exchange.target == "/v1/execute"
        allowed = ("GET", "DELETE") if calls else ("POST",)
        if not known:
            raise Refusal(404, "not_found", "There is only /v1/execute, /v1/calls/ID, /v1/health.")
        if exchange.method not in allowed:
            raise Refusal(405, "invalid", f"Use {' or '.join(allowed)} here.")
        await self._authorize(exchange)
        await self._pass_on(exchange)

    async def _authorize(self, exchange: Exchange) -> None:
        fence = self._fence
        if fence is None:
            raise Refusal(
                503, "unavailable", "The sandbox is not registered yet.", [(b"retry-after", b"1")]
            )
        scheme, _, token = exchange.get("authorization").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refusal(401, "unauthenticated", "Send the hand token: Authorization: Bearer ...")
        try:
            claims = await self._ring.verify(token.strip(), self._clock())
        except Unauthenticated as err:
            raise Refusal(401, "unauthenticated", str(err)) from None
        except (BrokerUnavailable, UserError) as err:
            raise Refusal(503, "unavailable", str(err), [(b"retry-after", b"2")]) from err
        # Read again: another call may have moved the fence while the keys were fetched.
        verdict = (self._fence or fence).check(claims)
        if isinstance(verdict, FenceRefusal):
            raise Refusal(verdict.status, verdict.type, verdict.message)
        self._fence = verdict

    async def _pass_on(self, exchange: Exchange) -> None:
        headers: Headers = [(b"host", self._sandboxd.origin.authority.encode())]
        headers += [(n, v) for n, v in exchange.headers if n in _PASSED_ON]
        connection = None
        try:
            connection = await self._sandboxd.acquire()
            await relay(
                exchange,
                connection,
                method=exchange.method,
                target=exchange.target,
                headers=headers,
                answer=_answer,
                idle_s=CALL_IDLE_S,
                max_answer=MAX_ANSWER,
            )
        except UpstreamError as err:
            text = f"sandboxd does not answer; ask again with the same call id. {err}"
            raise Refusal(502, "hand_unavailable", text) from err
        finally:
            if connection is not None:
                self._sandboxd.release(connection)

    async def _health(self, exchange: Exchange) -> None:
        if not await self.sandboxd_answers():
            raise Refusal(503, "unavailable", "sandboxd does not answer.")
        await exchange.respond(
            200, [(b"content-type", b"application/json")], b'{"status":"ok","version":1}'
        )

    async def sandboxd_answers(self) -> bool:
        """Whether sandboxd answers its health request within two seconds."""
        connection = None
        try:
            async with asyncio.timeout(2):
                connection = await self._sandboxd.acquire()
                host = self._sandboxd.origin.authority.encode()
                await connection.start("GET", "/v1/health", [(b"host", host)])
                await connection.finish()
                response = await connection.response(2)
                size = 0
                async for piece in connection.body(2):
                    size += len(piece)
                    if size > 65536:
                        return False
                return response.status_code == 200
        except (UpstreamError, TimeoutError):
            return False
        finally:
            if connection is not None:
                self._sandboxd.release(connection)

    async def become_ready(self, port: int, cert_sha256: str) -> None:
        """Fetch the keys, wait for sandboxd, register; returns when calls can come.

        Never gives up: while the broker refuses or is away the pod is not Ready, and the log says why.
        """
        keyed = await self._fetch_keys()
        await self._wait_for_sandboxd()
        pause = 0.2
        while True:
            try:
                if keyed or await self._fetch_keys():
                    keyed = True
                    self._admit(await self._broker.register(port, cert_sha256))
                    return
            except CowhandError as err:
                log.warning("not registered yet", extra={"reason": str(err)})
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311
            pause = min(pause * 2, 10.0)

    async def _wait_for_sandboxd(self) -> None:
        """A closed port on loopback answers in microseconds: ask often while the pod starts."""
        asked = 0
        while not await self.sandboxd_answers():
            asked += 1
            await asyncio.sleep(POLL_S if asked * POLL_S < EAGER_S else 1.0)

    async def _fetch_keys(self) -> bool:
        try:
            await self._ring.refresh()
        except CowhandError as err:
            log.warning("keys not fetched", extra={"reason": str(err)})
            return False
        return True

    def _admit(self, answer: dict[str, Any]) -> None:
        try:
            uid, session = str(answer["sandbox_uid"]), str(answer["session_id"])
            epoch = int(answer["owner_epoch"])
        except (KeyError, TypeError, ValueError) as err:
            raise UserError(f"The broker's answer to register lacks {err}.") from err
        if not uid:
            raise UserError("The broker's answer to register names no sandbox.")
        self._fence = Fence(uid, epoch, session)
        log.info("registered", extra={"sandbox": uid, "session": session})

    async def keep_keys(self) -> None:
        """Fetch the keys now and then, for ever."""
        while True:
            await asyncio.sleep(KEYS_EVERY_S)
            await self._fetch_keys()

    def close(self) -> None:
        """Close the kept connections."""
        self._sandboxd.close()
        self._broker.close()


def _answer(status: int, headers: Headers) -> Headers:
    passed = (b"content-type", b"content-length")
    return [(name, value) for name, value in headers if name in passed]
