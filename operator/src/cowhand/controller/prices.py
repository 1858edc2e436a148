"""List prices of Claude models, for budgets in money. Pure; `freeze` writes them into a new session.

Frozen with the session, so that a new table never changes what a running one has cost. An Agent can name
its own prices (`spec.model.prices`), which it must for a model that is not in the table.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Final

from cowhand.api.v1alpha1 import ModelPrices

SOURCE: Final = "platform.claude.com, About Claude, Pricing and Models; read November 2026"
"""Where the table is from. US dollars for a million tokens: (input, output)."""

TABLE: Final[dict[str, tuple[str, str]]] = {
    "claude-fable-5": ("10", "50"),
    "claude-mythos-5": ("10", "50"),
    "claude-opus-5-5": ("4", "20"),
    "claude-opus-5": ("5", "25"),
    "claude-opus-4-8": ("5", "25"),
    "claude-opus-4-7": ("5", "25"),
    "claude-opus-4-6": ("5", "25"),
    "claude-opus-4-5": ("5", "25"),
    "claude-opus-4": ("15", "75"),
    "claude-sonnet-5": ("2", "10"),
    "claude-sonnet-4": ("3", "15"),
    # Two bands by length of the prompt: the dearer one, so that no budget is passed.
    "claude-haiku-5-5": ("0.50", "2.50"),
    "claude-haiku-4-5": ("1", "5"),
}
"""Prefix of the model's id -> prices; the longest prefix counts. Cache reads cost a tenth of input (some models
less: then the budget is a little stricter than the bill), writes 1.25 times (5 minutes) or twice (1 hour)."""


def prices(model: str, own: ModelPrices | None = None) -> dict[str, int] | None:
    """Prices as `session.created` has them, in billionths of a dollar a token; None for an unknown model.

    Args:
        model: id of the model.
        own: prices of the Agent, which come first.
    """
    if own is not None:
        given, answered = Decimal(own.input), Decimal(own.output)
    else:
        found = max((prefix for prefix in TABLE if model.startswith(prefix)), key=len, default=None)
        if found is None:
            return None
        given, answered = (Decimal(price) for price in TABLE[found])
    per_token = {
        "input": given,
        "output": answered,
        "cache_read": given / 10,
        "cache_write_5m": given * Decimal("1.25"),
        "cache_write_1h": given * 2,
    }
    # A dollar for a million tokens is a thousand billionths a token.
    return {name: int(price * 1000) for name, price in per_token.items()}
