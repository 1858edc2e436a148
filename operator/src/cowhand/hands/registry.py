"""`execute(name, input) -> string` for one session: finds the hand that answers a tool.

The harness makes one registry for each session it works on. What else a delivery needs (call id,
instance, time limit) travels beside name and input, not in them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cowhand.hands.base import Call, Hand, Outcome
from cowhand.telemetry.metrics import TOOL_CALLS, TOOL_SECONDS


@dataclass(frozen=True)
class Delivery:
    """What travels beside name and input of a call.

    Attributes:
        hand: name of the hand that `tool.started` names.
        instance: its instance.
        call_id: `<session id>/<tool_use_id>`.
        timeout_ms: time limit.
        again: an earlier worker may have sent this call: ask for its result first.
    """

    hand: str
    instance: int
    call_id: str
    timeout_ms: int
    again: bool = False


class Hands:
    """The hands of one session, made when they are first used.

    Args:
        make: hand name -> hand; raises KeyError for a name that the agent does not have.
    """

    def __init__(self, make: Callable[[str], Hand]) -> None:
        self._make = make
        self._hands: dict[str, Hand] = {}

    def _hand(self, name: str) -> Hand:
        if name not in self._hands:
            self._hands[name] = self._make(name)
        return self._hands[name]

    async def execute(
        self,
        name: str,
        input: Mapping[str, Any],  # noqa: A002  the public shape is execute(name, input)
        *,
        delivery: Delivery,
    ) -> Outcome:
        """Run a tool; the text for Claude is `content` of the outcome. Raises Fenced."""
        began = time.monotonic()
        outcome = await self._execute(name, input, delivery)
        TOOL_SECONDS.observe(time.monotonic() - began)
        synthesized = "synthesized" if outcome.synthesized else ""
        TOOL_CALLS.labels(synthesized or ("error" if outcome.is_error else "ok")).inc()
        return outcome

    async def _execute(self, name: str, input: Mapping[str, Any], delivery: Delivery) -> Outcome:  # noqa: A002
        try:
            hand = self._hand(delivery.hand)
        except KeyError:
            return Outcome(f"this agent has no hand {delivery.hand!r}", True, synthesized=True)
        call = Call(delivery.call_id, name, input, delivery.instance, delivery.timeout_ms)
        return await (hand.attach(call) if delivery.again else hand.execute(call))

    async def provision(self, name: str) -> Outcome | None:
        """Make a hand and wait for it; an outcome says why there is none. Raises Fenced."""
        return await self._hand(name).provision()

    async def interrupt(self, deliveries: list[Delivery]) -> None:
        """Stop running calls, best effort."""
        await asyncio.gather(
            *(self._hand(item.hand).interrupt(item.call_id) for item in deliveries),
            return_exceptions=True,
        )
