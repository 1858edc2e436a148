"""`clearing`: old tool results leave the prompt, everything else stays.

Models with bound thinking refuse a prompt whose older messages were edited; for those the API does
the clearing (context editing), and the prompt that we send stays whole.
"""

from __future__ import annotations

from cowhand.harness.profiles.base import Change, Clear, Extras, Profile, Thresholds, View
from cowhand.harness.profiles.models import traits
from cowhand.harness.window import Overflow


class Clearing(Profile):
    """For agents whose tool results are large and soon stale: reading files, listing, searching."""

    name = "clearing"

    def fitness(self, model: str) -> int:
        """Known models; the default for those that the API does not compact."""
        known = traits(model)
        if not known.known:
            return 0
        return 1 if known.compacts else 2

    def extras(self, model: str, thresholds: Thresholds) -> Extras:
        """Context editing by the API, for models with bound thinking."""
        if not traits(model).bound_thinking:
            return Extras({})
        edit = {
            "type": "clear_tool_uses_20250919",
            "trigger": {"type": "input_tokens", "value": thresholds.trigger_tokens},
            "keep": {"type": "tool_uses", "value": thresholds.keep_tool_results},
            "clear_at_least": {
                "type": "input_tokens",
                "value": thresholds.clear_at_least_tokens,
            },
        }
        fields = {"context_management": {"edits": [edit]}}
        return Extras(fields, ("context-management-2025-06-27",))

    def next(self, view: View) -> Change | None:
        """Clear all but the newest results once the trigger is passed, if that frees enough."""
        limits = view.thresholds
        if traits(view.model).bound_thinking or view.tokens <= limits.trigger_tokens:
            return None
        old = view.results[: max(0, len(view.results) - limits.keep_tool_results)]
        if not old or sum(result.tokens for result in old) < max(1, limits.clear_at_least_tokens):
            return None
        return Clear(tuple(result.tool_use_id for result in old))

    def rescue(self, view: View, overflow: Overflow) -> Change | None:
        """Clear all results but those that the refused request brought, then those; bound prompts keep the old ones."""
        old = tuple(r.tool_use_id for r in view.results if r.tool_use_id not in view.newest)
        if old and not traits(view.model).bound_thinking:
            return Clear(old)
        if overflow == "prompt" and (self.too_much(view) or not traits(view.model).bound_thinking):
            return Clear(view.newest)
        return None
