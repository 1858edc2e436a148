"""`compaction`: the API summarizes the conversation on demand, and its signed summary takes its place."""

from __future__ import annotations

from cowhand.harness.profiles.base import Change, Compact, Profile, View
from cowhand.harness.profiles.models import traits
from cowhand.harness.window import Overflow


class Compaction(Profile):
    """For models that the API compacts; the default for them.

    The whole prompt is summarized, tool results of the open turn too; queued messages of the user
    are not, they follow the summary word for word.
    """

    name = "compaction"

    def fitness(self, model: str) -> int:
        """Models that support on-demand compaction."""
        return 3 if traits(model).compacts else 0

    def next(self, view: View) -> Change | None:
        """Compact before the next request would pass the trigger."""
        full = view.tokens > view.thresholds.trigger_tokens
        return Compact() if full and view.can_renew else None

    def rescue(self, view: View, overflow: Overflow) -> Change | None:
        """The same, unless the results that a refused request brought are too much by themselves: they are cleared."""
        return self.renewed(Compact(), view, overflow)
