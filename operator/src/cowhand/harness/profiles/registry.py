"""Finds context profiles, once, when the harness starts: the built-in ones, and installed ones by entry point.

The built-in ones are named here and not by entry points of our own: the image holds Cowhand's modules without the
metadata of a distribution.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Final

from cowhand.harness.profiles.base import Profile
from cowhand.harness.profiles.clearing import Clearing
from cowhand.harness.profiles.compaction import Compaction
from cowhand.harness.profiles.plain import Plain
from cowhand.harness.profiles.reset import ContextReset

log = logging.getLogger(__name__)

GROUP: Final = "cowhand.context_profiles"
AUTO: Final = "auto"
"""What an Agent says that leaves the choice to the profiles; also what it says if it says nothing."""


BUILT_IN: Final[tuple[type[Profile], ...]] = (Clearing, Compaction, Plain, ContextReset)


def load() -> dict[str, Profile]:
    """All profiles by name. An installed one that cannot be loaded is left out and logged, whatever it raises."""
    found: dict[str, Profile] = {kind.name: kind() for kind in BUILT_IN}
    for entry in sorted(entry_points(group=GROUP), key=lambda item: item.name):
        try:
            profile = entry.load()()
        except Exception:
            log.exception("context profile %s (%s) cannot be loaded", entry.name, entry.value)
            continue
        if not isinstance(profile, Profile) or profile.name != entry.name:
            log.error("context profile %s (%s) is no profile of that name", entry.name, entry.value)
        elif entry.name in found:
            log.error("context profile %s (%s): the name is taken", entry.name, entry.value)
        else:
            found[entry.name] = profile
    return found


def choose(profiles: Mapping[str, Profile], name: str, model: str) -> Profile | None:
    """The profile of that name, None if nobody has it; for `auto` the one that suits the model best."""
    if name != AUTO:
        return profiles.get(name)
    return max(
        profiles.values(), key=lambda profile: (profile.fitness(model), profile.name), default=None
    )
