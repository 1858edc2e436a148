"""What profiles need to know of models: size of the window, and what the API does for them.

The only place with assumptions about models: when a model changes, this table does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Traits:
    """What is known of a model.

    Attributes:
        window: size of its context window, tokens.
        compacts: the API compacts its conversations on demand.
        bound_thinking: its thinking blocks are bound to what stands before them ("preserved
            thinking"): an edit of an older message is refused, but for those of the API itself.
        tires: it wraps up its work early when the window fills: a new window helps, a summary does not.
        known: it stands in this table.
    """

    window: int = 200_000
    compacts: bool = False
    bound_thinking: bool = False
    tires: bool = False
    known: bool = True


_MILLION: Final = 1_000_000
_BOUND: Final = Traits(_MILLION, compacts=True, bound_thinking=True)
_LARGE: Final = Traits(_MILLION, compacts=True)
_SMALL: Final = Traits()
_UNKNOWN: Final = Traits(known=False)

_TABLE: Final = {
    "claude-fable-5": _LARGE,
    "claude-fable-5-1": _BOUND,
    "claude-fable-5-2": _BOUND,
    "claude-mythos-5": _LARGE,
    "claude-mythos-5-1": _BOUND,
    "claude-mythos-5-2": _BOUND,
    "claude-mythos-preview": _LARGE,
    "claude-opus-5": _LARGE,
    "claude-opus-5-5": _BOUND,
    "claude-opus-4": _SMALL,
    "claude-opus-4-6": _LARGE,
    "claude-opus-4-7": _LARGE,
    "claude-opus-4-8": _LARGE,
    "claude-sonnet-5": _LARGE,
    "claude-sonnet-5-5": _BOUND,
    "claude-sonnet-4": _SMALL,
    "claude-sonnet-4-5": Traits(tires=True),
    "claude-sonnet-4-6": _LARGE,
    "claude-haiku-5-5": _BOUND,
    "claude-haiku-4-5": _SMALL,
}


def traits(model: str) -> Traits:
    """What is known of a model id; a dated id (`-20250929`) counts as the model it begins with."""
    best = ""
    for name in _TABLE:
        if len(name) > len(best) and (model == name or model.startswith((name + "-", name + "@"))):
            best = name
    return _TABLE[best] if best else _UNKNOWN
