"""What a session's budget still allows. Pure; `decide` asks before each request and each tool call.

A limit stops the session before it is passed, not after: a request goes out only if what it may take at
most (its input at the price of a cache write, its whole output limit) still fits. Where only a shorter
answer fits, the output limit of the request is lowered, down to `MIN_OUTPUT`. What a failed or interrupted
request cost is not known and not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cowhand.harness import status as st
from cowhand.harness.fold import Conversation
from cowhand.harness.window import BYTES_PER_TOKEN

MIN_OUTPUT: Final = 1024
"""Output tokens below which a lowered limit is not worth a request."""

MAX_TOKENS: Final = "max_tokens"
MAX_TOOL_CALLS: Final = "max_tool_calls"
MAX_COST: Final = "max_cost_microusd"
MAX_DURATION: Final = "max_duration_s"


@dataclass(frozen=True)
class Allowance:
    """What the next request may take.

    Attributes:
        max_tokens: its output limit; 0: it must not be sent.
        reached: the limit that forbids or lowers it, empty for none.
    """

    max_tokens: int
    reached: str = ""


def cost_nanousd(usage: Mapping[str, Any], prices: Mapping[str, int]) -> int:
    """List price of one response.

    Args:
        usage: as in the message; with `iterations` each of them counts.
        prices: billionths of a dollar a token: `input`, `output`, `cache_read`, `cache_write_5m`,
            `cache_write_1h`.
    """
    total = 0
    for part in usage.get("iterations") or [usage]:
        written = int(part.get("cache_creation_input_tokens") or 0)
        split = part.get("cache_creation") or {}
        hour = min(written, int(split.get("ephemeral_1h_input_tokens") or 0))
        total += int(part.get("input_tokens") or 0) * prices["input"]
        total += int(part.get("output_tokens") or 0) * prices["output"]
        total += int(part.get("cache_read_input_tokens") or 0) * prices["cache_read"]
        total += hour * prices["cache_write_1h"] + (written - hour) * prices["cache_write_5m"]
    return total


def calls_left(conversation: Conversation) -> int | None:
    """Tool calls that may still begin, None without a limit."""
    limit = conversation.budget.get(MAX_TOOL_CALLS)
    used = st.counted(conversation.status, "tool_calls")
    return None if limit is None else max(0, int(limit) - used)


def seconds_left(conversation: Conversation, now_ms: int) -> float | None:
    """Seconds that the session may still run, at this time of the store; None without a limit."""
    limit = conversation.budget.get(MAX_DURATION)
    return None if limit is None else int(limit) - conversation.running_ms(now_ms) / 1000


def known_input(conversation: Conversation) -> int:
    """Input tokens of the next request: what the newest response counted, and an estimate of the rest."""
    prompt = conversation.prompt(conversation.last_seq)
    new = prompt[conversation.counted_messages :] if conversation.context_tokens else prompt
    size = sum(len(block.raw) for message in new for block in message.blocks)
    if not conversation.context_tokens:
        size += len(str(conversation.base.get("tools") or ""))
        size += len(str(conversation.base.get("system") or ""))
    return conversation.context_tokens + -(-size // BYTES_PER_TOKEN)


def allowance(conversation: Conversation, wanted: int) -> Allowance:
    """What the next request may take, if it would like `wanted` output tokens."""
    budget = conversation.budget
    if calls_left(conversation) == 0:
        return Allowance(0, MAX_TOOL_CALLS)
    tokens, cost = budget.get(MAX_TOKENS), budget.get(MAX_COST)
    if tokens is None and cost is None:
        return Allowance(wanted)
    taken = known_input(conversation)
    room: dict[str, int] = {}
    if tokens is not None:
        room[MAX_TOKENS] = int(tokens) - st.total_tokens(conversation.status) - taken
    if cost is not None:
        prices = (conversation.created or {}).get("prices")
        if not prices:
            return Allowance(0, MAX_COST)  # the model's price is not known: nothing can be promised
        left = int(cost) * 1000 - st.counted(conversation.status, "cost_nanousd")
        room[MAX_COST] = (left - taken * int(prices["cache_write_5m"])) // max(
            1, int(prices["output"])
        )
    reached = min(room, key=lambda name: room[name])
    if room[reached] >= wanted:
        return Allowance(wanted)
    thinking = conversation.base.get("thinking") or {}
    least = min(wanted, MIN_OUTPUT + int(thinking.get("budget_tokens") or 0))
    return Allowance(room[reached] if room[reached] >= least else 0, reached)
