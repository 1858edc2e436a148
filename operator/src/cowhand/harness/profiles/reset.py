"""`reset`: the model writes notes, and goes on in a new window with the first message and the notes."""

from __future__ import annotations

from cowhand.harness.profiles.base import Change, Profile, Reset, View
from cowhand.harness.profiles.models import traits
from cowhand.harness.window import Overflow


class ContextReset(Profile):
    """For models that hurry as their window fills: those work on as if they had just begun."""

    name = "reset"

    def fitness(self, model: str) -> int:
        """Models that tire; possible, but not the default, for other known ones."""
        known = traits(model)
        return 4 if known.tires else int(known.known)

    def next(self, view: View) -> Change | None:
        """Ask for notes before the next request would pass the trigger."""
        full = view.tokens > view.thresholds.trigger_tokens
        return Reset() if full and view.can_renew else None

    def rescue(self, view: View, overflow: Overflow) -> Change | None:
        """The same, unless the results that a refused request brought are too much by themselves: they are cleared."""
        return self.renewed(Reset(), view, overflow)
