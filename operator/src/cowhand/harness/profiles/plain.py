"""`plain`: the whole conversation in every request, until the window is full."""

from __future__ import annotations

from cowhand.harness.profiles.base import Change, Profile, View


class Plain(Profile):
    """Does nothing; the default for models that nobody knows, and for short sessions good enough."""

    name = "plain"

    def fitness(self, model: str) -> int:
        """It suits any model, and any other that suits is better."""
        return 1

    def next(self, view: View) -> Change | None:
        """Nothing."""
        return None
