"""What a context profile is: a pure decision, and the models it was made for.

`harness.context` asks `next` before each new model request. Everything a profile may look at is in
the `View`; everything it may want is a `Change`. A profile never drops events: what leaves the
window stays in the log, where the model can read it with `read_log` and `search_log`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from cowhand.harness.profiles.models import traits
from cowhand.harness.window import Overflow

MOST_TRIGGER: Final = 400_000
"""Default trigger of the largest windows, tokens: beyond, each request is dear and answers get worse."""


@dataclass(frozen=True)
class Thresholds:
    """When a profile acts; frozen in `context.selected`.

    Attributes:
        window_tokens: size of the context window.
        trigger_tokens: a request estimated to be larger makes the profile act.
        keep_tool_results: newest tool results that are never cleared.
        clear_at_least_tokens: clearing less is not worth the cache that it costs.
        instructions: text that replaces the built-in summarization or notes prompt; empty for that.
    """

    window_tokens: int
    trigger_tokens: int
    keep_tool_results: int = 3
    clear_at_least_tokens: int = 0
    instructions: str = ""

    @classmethod
    def resolve(cls, model: str, max_tokens: int, given: Mapping[str, Any]) -> Thresholds:
        """Thresholds for a model: what the Agent gives, else the default.

        Args:
            model: model id.
            max_tokens: output limit of one request; that room stays free.
            given: `context` of `session.created`: `window_tokens`, `trigger_tokens` and so on.
        """
        window = int(given.get("window_tokens") or traits(model).window)
        room = max(window // 4, window - 2 * max_tokens)
        default = min(window * 3 // 4, room, MOST_TRIGGER)
        trigger = min(int(given.get("trigger_tokens") or default), window)
        keep = given.get("keep_tool_results")
        least = given.get("clear_at_least_tokens")
        return cls(
            window_tokens=window,
            trigger_tokens=trigger,
            keep_tool_results=3 if keep is None else int(keep),
            clear_at_least_tokens=trigger // 5 if least is None else int(least),
            instructions=str(given.get("instructions") or ""),
        )

    def to_json(self) -> dict[str, Any]:
        """As it stands in `context.selected`."""
        return {
            "window_tokens": self.window_tokens,
            "trigger_tokens": self.trigger_tokens,
            "keep_tool_results": self.keep_tool_results,
            "clear_at_least_tokens": self.clear_at_least_tokens,
            "instructions": self.instructions,
        }


@dataclass(frozen=True)
class OldResult:
    """A tool result that stands whole in the prompt.

    Attributes:
        tool_use_id: its call.
        name: name of the tool, empty if unknown.
        seq: position of its event in the log.
        tokens: estimated size.
    """

    tool_use_id: str
    name: str
    seq: int
    tokens: int


@dataclass(frozen=True)
class View:
    """What a profile may look at, before a new request is made.

    Attributes:
        model: model id.
        thresholds: see there.
        tokens: estimated size of the next request: what the newest response reported, plus what is new.
        results: tool results in the prompt that were not cleared, oldest first.
        can_renew: the prompt may be replaced now: there is one, and no paused response is open.
        newest: tool_use_ids of the results that the newest request added and that were not cleared.
    """

    model: str
    thresholds: Thresholds
    tokens: int
    results: tuple[OldResult, ...]
    can_renew: bool
    newest: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compact:
    """Ask the API for a signed summary that replaces the prompt."""


@dataclass(frozen=True)
class Reset:
    """Ask the model for notes; begin a new window with the first message and the notes."""


@dataclass(frozen=True)
class Clear:
    """Replace these tool results by a short text that says where they are."""

    tool_use_ids: tuple[str, ...]


Change = Compact | Reset | Clear


@dataclass(frozen=True)
class Extras:
    """What a profile adds to each request of a session; frozen in `context.selected`.

    Attributes:
        fields: members of the request body, for example `context_management`.
        betas: values of the header `anthropic-beta`.
    """

    fields: Mapping[str, Any]
    betas: tuple[str, ...] = ()


class Profile(ABC):
    """A context profile; instances have no state.

    Attributes:
        name: what an Agent calls it.
    """

    name: ClassVar[str]

    @abstractmethod
    def fitness(self, model: str) -> int:
        """How well it suits a model: 0 it was not made for it, the highest number is the default."""

    def warning(self, model: str) -> str:
        """What to tell whoever uses it for a model it was not made for; empty if it was."""
        if self.fitness(model):
            return ""
        return (
            f"context profile {self.name!r} was not made for the model {model!r}: it may cost more "
            "or lose more than another one, see docs/context-profiles.md"
        )

    def extras(self, model: str, thresholds: Thresholds) -> Extras:
        """What it adds to each request."""
        return Extras({})

    @abstractmethod
    def next(self, view: View) -> Change | None:
        """What to do before the next request, None for nothing."""

    def rescue(self, view: View, overflow: Overflow) -> Change | None:
        """What to do when the window was full all the same: the API refused a request, or cut a response.

        Asked again when that did not help, with what is left; a renewal is offered (`view.can_renew`) only once
        until the model has answered. A summary or notes are asked for without the text that was too much, which
        follows them.

        Args:
            view: as for `next`; `tokens` was an estimate, and too low.
            overflow: `prompt`, or `answer` of a response that was cut.

        Returns:
            None: nothing, the turn ends with an error.
        """
        return None

    @staticmethod
    def too_much(view: View) -> bool:
        """More than half of a refused prompt are the results that it brought: the rest may stay."""
        new = sum(result.tokens for result in view.results if result.tool_use_id in view.newest)
        return 2 * new > view.tokens

    @classmethod
    def renewed(cls, change: Change, view: View, overflow: Overflow) -> Change | None:
        """For `rescue` of profiles that renew: `change`, unless the results that are new are the trouble."""
        if overflow == "prompt" and cls.too_much(view):
            return Clear(view.newest)
        return change if view.can_renew else None
