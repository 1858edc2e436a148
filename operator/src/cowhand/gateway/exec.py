"""`POST /v1/namespaces/{ns}/sandboxes/{name}/exec`: a person runs a command in a sandbox, and it is on record.

The command takes the way of every other call: a token of the broker, the sandbox's own proxy with its
pinned certificate, sandboxd. It is written into the log of the session that owns the sandbox before it
runs (if the log cannot take it, nothing runs), and once more with its exit code.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from cowhand.errors import Denied, HandUnavailable, SessionClosed, SessionNotFound, UserError
from cowhand.gateway.auth import Caller
from cowhand.gateway.broker import Broker
from cowhand.gateway.errors import Conflict, NotFound, TooLarge
from cowhand.gateway.messages import uuid7
from cowhand.hands.transport import Endpoint, PinnedTransport, Transport, Untrusted
from cowhand.kube import kinds
from cowhand.kube.client import Kube
from cowhand.session.events import SESSION_EXEC, NewEvent
from cowhand.session.log import ControlLog, HandRecord, SessionLog
from cowhand.wire.records import verify_record

DEFAULT_TIMEOUT_MS: Final = 120_000
MAX_TIMEOUT_MS: Final = 600_000
MAX_COMMAND: Final = 32 * 1024
"""Bytes of a command: it is one argument of bash (Linux takes 128 KiB), and it stands in the log."""

SLACK_S: Final = 15.0
"""Time beyond the command's own limit that its sandbox has to answer."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """A valid request body.

    Attributes:
        command: text for bash.
        timeout_ms: time limit.
    """

    command: str
    timeout_ms: int = DEFAULT_TIMEOUT_MS


def parse(body: bytes) -> Command:
    """The command of a request body `{"command", "timeout_ms"?}`. Raises UserError."""
    try:
        document = json.loads(body)
    except ValueError as err:
        raise UserError(f"the body is not JSON: {err}") from None
    if not isinstance(document, dict):
        raise UserError("body: must be an object", field="body")
    command = document.get("command")
    if not isinstance(command, str) or not command.strip():
        raise UserError("command: must be a string that is not empty", field="command")
    if len(command.encode()) > MAX_COMMAND:
        raise TooLarge(f"command: more than {MAX_COMMAND} bytes", field="command")
    timeout = document.get("timeout_ms", DEFAULT_TIMEOUT_MS)
    if isinstance(timeout, bool) or not isinstance(timeout, int):
        raise UserError("timeout_ms: must be an integer", field="timeout_ms")
    if not 1 <= timeout <= MAX_TIMEOUT_MS:
        raise UserError(f"timeout_ms: must be from 1 to {MAX_TIMEOUT_MS}", field="timeout_ms")
    return Command(command, timeout)


class Hands(Protocol):
    """Runs a command in a sandbox whose record has been checked."""

    async def execute(self, record: HandRecord, token: str, command: Command) -> dict[str, Any]:
        """`{"content","is_error","exit_code",...}`. Raises HandUnavailable, Conflict."""


class PinnedHands:
    """`Hands` over the transport of `cowhand.hands`: the certificate is compared before a byte is sent."""

    def __init__(self, transport: Transport | None = None) -> None:
        self._transport = transport or PinnedTransport(limit=100)

    async def execute(self, record: HandRecord, token: str, command: Command) -> dict[str, Any]:
        """See `Hands.execute`."""
        body = {
            "call_id": f"exec/{uuid7()}",
            "name": "bash",
            # A bash of its own: the sandbox's shell belongs to the agent, and `cd`, `export` or `exit`
            # of a person must not change it.
            "input": {
                "command": f"bash -c {shlex.quote(command.command)}",
                "timeout_ms": command.timeout_ms,
            },
            "timeout_ms": command.timeout_ms,
        }
        try:
            status, answer = await self._transport.request(
                Endpoint(record.address, record.cert_sha256),
                "POST",
                "/v1/execute",
                token=token,
                body=body,
                timeout=command.timeout_ms / 1000 + SLACK_S,
            )
        except Untrusted as err:
            raise Conflict(
                f"sandbox {record.sandbox}: what answers at {record.address} shows another "
                "certificate than the sandbox registered; nothing was sent to it"
            ) from err
        except HandUnavailable as err:
            raise HandUnavailable(f"sandbox {record.sandbox} does not answer: {err}") from err
        return _result(record, status, answer)

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()


def _result(record: HandRecord, status: int, document: Any) -> dict[str, Any]:
    """The result in an answer of the sandbox's proxy, which is untrusted data."""
    if not isinstance(document, dict):
        raise HandUnavailable(f"sandbox {record.sandbox} answers HTTP {status} without JSON")
    if status != 200:
        error = document.get("error")
        text = error.get("message") if isinstance(error, dict) else None
        message = f"sandbox {record.sandbox} refuses: {text or f'HTTP {status}'}"
        raise HandUnavailable(message) if status >= 500 else Conflict(message)
    result = document.get("result")
    if not isinstance(result, dict) or not isinstance(result.get("content"), str):
        raise HandUnavailable(f"sandbox {record.sandbox} answers without a result")
    code = result.get("exit_code")
    return {
        "content": result["content"],
        "exit_code": code if isinstance(code, int) else None,
        "is_error": bool(result.get("is_error")),
        "truncated": bool(result.get("truncated")),
    }


@dataclass(frozen=True)
class Executor:
    """Everything that `run` needs.

    Attributes:
        kube: to read the Sandbox.
        control: to read its record.
        logs: session logs by namespace, for the audit events.
        broker: tokens and keys.
        hands: the way into the sandbox.
    """

    kube: Kube
    control: ControlLog
    logs: Mapping[str, SessionLog]
    broker: Broker
    hands: Hands

    async def run(
        self, caller: Caller, namespace: str, name: str, command: Command
    ) -> dict[str, Any]:
        """Run a command in a Sandbox; answers `{"content","exit_code","is_error","truncated"}`.

        Raises:
            NotFound: there is no such Sandbox.
            Conflict: it is not ready, its record lacks the broker's signature, or it refuses.
            HandUnavailable, BrokerUnavailable, StoreUnavailable.
        """
        record = await self._record(namespace, name)
        token = await self.broker.exec_token(namespace, record.sandbox_uid, caller.user)
        exec_id = f"exec:{uuid7()}"
        entry = {"actor": caller.actor(), "sandbox": name, "command": command.command}
        logged = await self._audit(namespace, record, NewEvent(SESSION_EXEC, entry, id=exec_id))
        result = await self.hands.execute(record, token, command)
        if logged:
            done = {**entry, "exit_code": result["exit_code"]}
            await self._audit(
                namespace, record, NewEvent(SESSION_EXEC, done, id=f"{exec_id}:end", cause=exec_id)
            )
        return result

    async def _record(self, namespace: str, name: str) -> HandRecord:
        manifest = await self.kube.get(kinds.SANDBOX, namespace, name)
        if manifest is None:
            raise NotFound(f"there is no Sandbox {name} in namespace {namespace}")
        record = await self.control.get_sandbox(namespace, manifest["metadata"]["uid"])
        if record is None:
            raise Conflict(f"Sandbox {name} has not registered yet: its pod is not ready")
        if record.state != "Ready":
            why = f": {record.message}" if record.message else ""
            raise Conflict(
                f"Sandbox {name} is {record.state} ({record.reason or 'no reason'}){why}"
            )
        try:
            verify_record(record, await self.broker.keys(), namespace=namespace)
        except Denied as err:
            raise Conflict(f"Sandbox {name} is not trusted: {err}") from err
        if record.sandbox_uid != manifest["metadata"]["uid"]:
            raise Conflict(f"the record of Sandbox {name} belongs to another Sandbox")
        return record

    async def _audit(self, namespace: str, record: HandRecord, event: NewEvent) -> bool:
        """Write an event into the owner's log; a sandbox without a live session has only our log."""
        actor = event.data["actor"]["user"]
        logger.info(
            "exec", extra={"namespace": namespace, "sandbox": record.sandbox, "actor": actor}
        )
        if not record.owner:
            return False
        try:
            await self.logs[namespace].emit_event(record.owner, event)
        except (SessionClosed, SessionNotFound):
            return False
        return True
