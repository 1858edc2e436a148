"""The algebra of conditions: observe, merge with what stands in the status, read.

A condition is an observation. Nothing here, and nothing that uses it, decides on a condition that was
written before; only `lastTransitionTime` is carried over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from cowhand.api.v1alpha1 import Condition

Truth = Literal["True", "False", "Unknown"]

MESSAGE_LIMIT = 2000
"""Characters of a message; the schema allows 4096."""


@dataclass(frozen=True)
class Observed:
    """One observation: the condition without its bookkeeping."""

    type: str
    status: Truth
    reason: str
    message: str = ""


def merge(
    previous: Sequence[Condition], observed: Iterable[Observed], *, generation: int, now: datetime
) -> tuple[Condition, ...]:
    """The new list of conditions, in the order of `observed`; what is not observed is dropped.

    `lastTransitionTime` changes only with `status`.
    """
    before = {condition.type: condition for condition in previous}
    merged = []
    for item in observed:
        old = before.get(item.type)
        same = old is not None and old.status == item.status
        merged.append(
            Condition(
                type=item.type,
                status=item.status,
                observed_generation=generation,
                last_transition_time=old.last_transition_time if old and same else now,
                reason=str(item.reason),
                message=item.message[:MESSAGE_LIMIT],
            )
        )
    return tuple(merged)


def find(conditions: Iterable[Condition], kind: str) -> Condition | None:
    """The condition of a type, or None."""
    return next((item for item in conditions if item.type == kind), None)


def keep(conditions: Iterable[Condition], kind: str, otherwise: Observed) -> Observed:
    """A condition as it stands, as an observation: for what cannot be looked at now."""
    old = find(conditions, kind)
    if old is None:
        return otherwise
    return Observed(old.type, old.status, old.reason, old.message)
