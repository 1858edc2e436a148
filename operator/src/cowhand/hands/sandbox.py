"""A hand that is a sandbox pod: made by its first call, reached through its proxy, lost with its pod.

The harness calls it through `registry`. Whatever happens to the sandbox becomes an `Outcome` that
Claude reads; a call id makes every step repeatable, because sandboxd keeps a journal: a call that
may have been sent is asked for before it is sent (again).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from cowhand.errors import BrokerUnavailable, Denied, Fenced, HandUnavailable
from cowhand.hands.base import (
    LOST_BEFORE,
    LOST_RUNNING,
    Call,
    Host,
    Outcome,
    cut_output,
    next_instance,
    printable,
)
from cowhand.hands.transport import Broken, Credentials, Endpoint, Transport
from cowhand.session import events as ev
from cowhand.session.events import NewEvent
from cowhand.session.log import HandRecord
from cowhand.wire.records import UnknownRecordKey, verify_record

log = logging.getLogger(__name__)

MARGIN_S: Final = 15.0
"""How much longer than the tool's own limit we wait for its result, seconds."""

POLL_WAIT_MS: Final = 20_000
"""Longest wait of one question for a running call."""

INTERRUPT_TIMEOUT_S: Final = 3.0

MAX_SAID: Final = 1000
"""Characters of a refusal's message that are kept."""


@dataclass(frozen=True)
class SandboxSettings:
    """Limits of a sandbox hand.

    Attributes:
        wait_s: how long a call waits for its sandbox, seconds.
        max_output: characters of output that Claude sees.
        grace_s: how long a sandbox may be unreachable before it counts as lost, seconds.
        broker_wait_s: how long a call waits for a hand token, seconds.
    """

    wait_s: float = 180.0
    max_output: int = 30_000
    grace_s: float = 15.0
    broker_wait_s: float = 60.0


class _Delivery:
    """How far the delivery of one call has come."""

    def __init__(self, call: Call, *, attach: bool, now: float) -> None:
        self.call = call
        self.may_have_run = attach
        self.ask = attach
        self.deadline = now + call.timeout_ms / 1000 + MARGIN_S
        self.failing_since: float | None = None
        self.broker_since: float | None = None
        self.fresh_token = False
        self.renewed = False
        self.pause = 0.05
        self.why = ""

    def reached(self) -> None:
        """The hand answered: forget earlier trouble."""
        self.failing_since = self.broker_since = None
        self.renewed = False
        self.pause = 0.05


class SandboxHand:
    """One sandbox of one session, see `hands.base.Hand`.

    Args:
        name: name of the hand in the agent.
        host: the session.
        transport: the way to the sandbox's proxy.
        credentials: tokens and keys.
        settings: limits.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        host: Host,
        transport: Transport,
        credentials: Credentials,
        settings: SandboxSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._host = host
        self._transport = transport
        self._credentials = credentials
        self._settings = settings
        self._clock = clock
        self._record: HandRecord | None = None
        self._making = asyncio.Lock()
        self._losing = asyncio.Lock()

    async def execute(self, call: Call) -> Outcome:
        """See `Hand`."""
        return await self._run(call, attach=False)

    async def attach(self, call: Call) -> Outcome:
        """See `Hand`."""
        return await self._run(call, attach=True)

    async def provision(self) -> Outcome | None:
        """See `Hand`."""
        instance = next_instance(self._host.hand_state(self._name))
        found = await self._ready(instance, "eager", may_have_run=False)
        return found if isinstance(found, Outcome) else None

    async def interrupt(self, call_id: str) -> None:
        """See `Hand`."""
        record = self._record
        if record is None:
            return
        try:
            token = await self._token(record, fresh=False)
            await self._transport.request(
                _endpoint(record),
                "DELETE",
                f"/v1/calls/{quote(call_id, safe='')}",
                token=token,
                timeout=INTERRUPT_TIMEOUT_S,
            )
        except (HandUnavailable, BrokerUnavailable, Denied) as err:
            log.info("call %s could not be stopped: %s", call_id, err)

    async def _run(self, call: Call, *, attach: bool) -> Outcome:
        reason = "lost" if call.instance > 1 else "first_call"
        record = await self._ready(call.instance, reason, may_have_run=attach)
        if isinstance(record, Outcome):
            return record
        return await self._deliver(_Delivery(call, attach=attach, now=self._clock()), record)

    # Making and finding the sandbox.

    async def _ready(
        self, instance: int, reason: str, *, may_have_run: bool
    ) -> HandRecord | Outcome:
        """The verified record of an instance, asked for if nobody has; an outcome says why not."""
        async with self._making:
            if self._record is not None and self._record.instance == instance:
                return self._record
            state = self._host.hand_state(self._name)
            if state == (instance, "Lost"):
                return _failure(LOST_RUNNING if may_have_run else LOST_BEFORE)
            if state is None or state[0] < instance:
                request = {"hand": self._name, "instance": instance, "reason": reason}
                await self._host.append([NewEvent(ev.HAND_REQUESTED, request)])
            found = await self._await_record(instance, may_have_run)
            if isinstance(found, HandRecord):
                self._record = found
            return found

    async def _await_record(self, instance: int, may_have_run: bool) -> HandRecord | Outcome:
        began = self._clock()
        poll, why = 0.25, "nothing is known of it yet"
        while True:
            record = await self._host.get_hand(self._name, instance)
            if record is not None and record.state == "Ready":
                try:
                    await self._verify(record, instance)
                except Denied as err:
                    why = str(err)
                except BrokerUnavailable as err:
                    why = f"its record cannot be checked: {err}"
                else:
                    await self._provisioned(record, began)
                    return record
            elif record is not None and record.state in ("Failed", "Lost"):
                return await self._gone(record, instance, may_have_run)
            elif record is not None:
                why = record.message or record.reason or why
            left = self._settings.wait_s - (self._clock() - began)
            if left <= 0:
                return _failure(
                    f"no sandbox became ready within {self._settings.wait_s:g} s: {why}. The call "
                    "did not run; a later call waits again."
                    if not may_have_run
                    else f"the sandbox cannot be used: {why}. The call may have partly executed."
                )
            await self._host.changed(min(poll, left))
            poll = min(2.0, poll * 1.5)

    async def _provisioned(self, record: HandRecord, began: float) -> None:
        if self._host.hand_state(self._name) == (record.instance, "Ready"):
            return
        data = {
            "hand": self._name,
            "instance": record.instance,
            "sandbox": record.sandbox,
            "sandbox_uid": record.sandbox_uid,
            "pod_uid": record.pod_uid,
            "waited_ms": round((self._clock() - began) * 1000),
        }
        await self._host.append([NewEvent(ev.HAND_PROVISIONED, data)])

    async def _verify(self, record: HandRecord, instance: int) -> None:
        """The broker vouches for this record, and it is the one that was asked for.

        Raises:
            Denied, BrokerUnavailable.
        """
        asked = (self._host.session_id, self._name, instance)
        if (record.session_id, record.hand, record.instance) != asked:
            raise Denied("the hand record belongs to another hand")
        if record.owner != self._host.session_id:
            raise Denied("the sandbox belongs to another session now")
        keys = await self._credentials.keys()
        try:
            verify_record(record, keys, namespace=self._host.namespace)
        except UnknownRecordKey:
            keys = await self._credentials.keys(fresh=True)
            verify_record(record, keys, namespace=self._host.namespace)

    async def _gone(self, record: HandRecord, instance: int, may_have_run: bool) -> Outcome:
        """The operator gave this instance up; the next call asks for a new one."""
        await self._lost(instance, record.sandbox, record.reason or record.state, record.message)
        if record.state == "Lost" or may_have_run:
            return _failure(LOST_RUNNING if may_have_run else LOST_BEFORE)
        why = (
            ": ".join(part for part in (record.reason, record.message) if part) or "unknown reason"
        )
        return _failure(
            f"the sandbox could not be started: {why}. The call did not run; the next call tries a "
            "new sandbox."
        )

    async def _lost(self, instance: int, sandbox: str, reason: str, message: str) -> None:
        self._record = None
        data = {
            "hand": self._name,
            "instance": instance,
            "sandbox": sandbox,
            "reason": reason,
            "message": message,
        }
        # Parallel calls lose it at the same time; the log says so once.
        async with self._losing:
            if self._host.hand_state(self._name) != (instance, "Lost"):
                await self._host.append([NewEvent(ev.HAND_LOST, data)])

    # Delivering a call.

    async def _token(self, record: HandRecord, *, fresh: bool) -> str:
        return await self._credentials.token(
            self._host.session_id, self._host.lease, record.sandbox_uid, fresh=fresh
        )

    async def _deliver(self, delivery: _Delivery, record: HandRecord) -> Outcome:
        while True:
            if self._clock() >= delivery.deadline:
                await self.interrupt(delivery.call.call_id)
                return _failure(_overdue(delivery))
            try:
                answer = await self._exchange(delivery, record)
            except BrokerUnavailable as err:
                answer = self._no_token(delivery, str(err))
            except Denied as err:
                answer = self._no_token(delivery, str(err))
            except HandUnavailable as err:
                if isinstance(err, Broken):
                    # The request may have arrived: from here on ask first.
                    delivery.may_have_run = delivery.ask = True
                delivery.why = str(err)
                found = await self._trouble(delivery, record)
                if isinstance(found, Outcome):
                    return found
                record = found
                continue
            if answer is not None:
                return answer
            if delivery.broker_since is not None:
                await self._pause(delivery)

    def _no_token(self, delivery: _Delivery, why: str) -> Outcome | None:
        """No token now. That is no sign of the sandbox: wait a while, then leave it as it is."""
        now = self._clock()
        if delivery.broker_since is None:
            delivery.broker_since = now
        if now - delivery.broker_since < self._settings.broker_wait_s:
            return None
        if delivery.may_have_run:
            return _failure(f"the result cannot be fetched: {why}. The call may have executed.")
        return _failure(f"the call could not be sent and did not run: {why}.")

    async def _exchange(self, delivery: _Delivery, record: HandRecord) -> Outcome | None:
        """One request; None means go on (running, unknown, or a new token is needed)."""
        call = delivery.call
        left = delivery.deadline - self._clock()
        token = await self._token(record, fresh=delivery.fresh_token)
        delivery.fresh_token = False
        delivery.broker_since = None
        if delivery.ask:
            wait_ms = max(0, min(POLL_WAIT_MS, int(left * 1000)))
            path = f"/v1/calls/{quote(call.call_id, safe='')}?wait_ms={wait_ms}"
            status, value = await self._transport.request(
                _endpoint(record), "GET", path, token=token, timeout=wait_ms / 1000 + MARGIN_S
            )
        else:
            body = {
                "call_id": call.call_id,
                "name": call.name,
                "input": call.input,
                "timeout_ms": call.timeout_ms,
            }
            status, value = await self._transport.request(
                _endpoint(record), "POST", "/v1/execute", token=token, body=body, timeout=left
            )
        return self._interpret(delivery, status, value)

    def _interpret(self, delivery: _Delivery, status: int, value: Any) -> Outcome | None:
        error = value.get("error") if isinstance(value, dict) else None
        kind = error.get("type") if isinstance(error, dict) else None
        # Whatever runs in the sandbox can answer in sandboxd's place: this goes into the log.
        said = str(error.get("message", "")) if isinstance(error, dict) else ""
        text = cut_output(printable(said), MAX_SAID)
        if status == 200 and isinstance(value, dict):
            delivery.reached()
            delivery.may_have_run = True
            if value.get("status") == "done":
                return self._outcome(value.get("result"))
            delivery.ask = True
            return None
        if status == 404 and delivery.ask:
            # The journal does not know the call: it never started.
            delivery.ask = delivery.may_have_run = False
            return None
        if status == 401 and not delivery.renewed:
            delivery.fresh_token = delivery.renewed = True
            return None
        if status == 409 and kind == "fenced":
            raise Fenced(f"the hand {self._name} has seen a newer lease: {text}")
        if status >= 500 or status in (408, 429):
            # The proxy may have passed the call on before sandboxd failed: ask first.
            delivery.may_have_run = delivery.ask = True
            raise HandUnavailable(f"the sandbox answers {status}: {text}")
        return _failure(f"the sandbox refuses the call ({status}): {text or 'no reason given'}")

    def _outcome(self, result: Any) -> Outcome:
        """The result as Claude sees it; what a sandbox says is untrusted, also in its shape."""
        content = result.get("content") if isinstance(result, dict) else None
        if not isinstance(content, str):
            return _failure("the sandbox gave a result without text")
        code, took = result.get("exit_code"), result.get("duration_ms")
        return Outcome(
            content=cut_output(printable(content), self._settings.max_output),
            is_error=result.get("is_error") is not False,
            exit_code=code if type(code) is int else None,
            duration_ms=took if type(took) is int else None,
        )

    async def _trouble(self, delivery: _Delivery, record: HandRecord) -> HandRecord | Outcome:
        """The sandbox did not answer: look at its record, wait, and at last call it lost."""
        now = self._clock()
        if delivery.failing_since is None:
            delivery.failing_since = now
        newest = await self._host.get_hand(self._name, record.instance)
        if newest is not None and newest.state in ("Lost", "Failed"):
            await self._lost(newest.instance, newest.sandbox, newest.reason, newest.message)
            return _failure(LOST_RUNNING if delivery.may_have_run else LOST_BEFORE)
        if newest is not None and newest.state == "Ready" and newest != record:
            # Its proxy started anew, with another certificate.
            try:
                await self._verify(newest, record.instance)
            except (Denied, BrokerUnavailable) as err:
                delivery.why = str(err)
            else:
                self._record = newest
                return newest
        if now - delivery.failing_since >= self._settings.grace_s:
            await self._lost(record.instance, record.sandbox, "Unreachable", delivery.why)
            return _failure(LOST_RUNNING if delivery.may_have_run else LOST_BEFORE)
        await self._pause(delivery)
        return record

    async def _pause(self, delivery: _Delivery) -> None:
        await self._host.changed(delivery.pause)
        delivery.pause = min(1.0, delivery.pause * 2)


def _endpoint(record: HandRecord) -> Endpoint:
    return Endpoint(record.address, record.cert_sha256)


def _failure(text: str) -> Outcome:
    return Outcome(content=text, is_error=True, synthesized=True)


def _overdue(delivery: _Delivery) -> str:
    seconds = delivery.call.timeout_ms / 1000
    why = f" ({delivery.why})" if delivery.why else ""
    return (
        f"the call gave no result within {seconds:g} s and was stopped{why}; it may have executed"
    )
