"""What the store of the log keeps, as a condition of AgentSessions and as Events: pure.

`controller.store_profile` feeds in what the operator's own connection sees of the server; `reconcile.session_status`
makes the condition of it. Every session carries it, so a change is believed only once it has stood for a while: a
replica that restarts must not be a write to each object.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, Literal

from cowhand.api.v1alpha1.reasons import SessionCondition, StoreDurable
from cowhand.reconcile.conditions import Observed

STEADY: Final = timedelta(seconds=60)
"""How long a change has to stand before it is shown."""

_KEPT: Final = {
    "dev": StoreDurable.DEV,
    "standard": StoreDurable.STANDARD,
    "strict": StoreDurable.STRICT,
    "managed": StoreDurable.MANAGED,
}


@dataclass(frozen=True)
class StoreProfile:
    """What the store was seen to keep.

    Attributes:
        demanded: profile that was set (`store.profile`).
        effective: what it comes to: a profile, or `none`.
        weaker: whether that is less than demanded.
        faults: why, each with what to do; empty if it is not weaker.
    """

    demanded: str
    effective: str
    weaker: bool = False
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Note:
    """An Event to write: type, reason and text."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Belief:
    """What is shown, and what may come to be shown.

    Attributes:
        shown: the profile that conditions say; None: nothing was seen yet.
        next: another one that was seen since, None while the store keeps what is shown.
        since: when `next` was first seen.
    """

    shown: StoreProfile | None = None
    next: StoreProfile | None = None
    since: datetime | None = None


def step(
    belief: Belief, found: StoreProfile | None, now: datetime
) -> tuple[Belief, tuple[Note, ...]]:
    """The belief after a look at the store, and the Events of a change.

    Args:
        belief: what was believed before.
        found: what was seen; None: the store has not been seen yet (one that is away keeps what it kept).
        now: the time.
    """
    if found is None or found == belief.shown:
        return replace(belief, next=None, since=None), ()
    if belief.shown is None:
        return Belief(found), _notes(None, found)
    if found != belief.next or belief.since is None:
        return replace(belief, next=found, since=now), ()
    if now - belief.since < STEADY:
        return belief, ()
    return Belief(found), _notes(belief.shown, found)


def _notes(old: StoreProfile | None, new: StoreProfile) -> tuple[Note, ...]:
    """One Event where it became weaker, or weaker in another degree, and one where it is not any more."""
    if new.weaker:
        if old is not None and old.weaker and old.effective == new.effective:
            return ()
        return (Note("Warning", StoreDurable.WEAKER_THAN_DEMANDED, _weaker(new)),)
    if old is not None and old.weaker:
        return (Note("Normal", "StoreDurable", _kept(new)),)
    return ()


def _weaker(profile: StoreProfile) -> str:
    kept = "nothing that survives its process" if profile.effective == "none" else profile.effective
    why = "; ".join(profile.faults) or "see `cowhand doctor`"
    return f"store.profile {profile.demanded} is demanded, the store keeps {kept}: {why}."


def _kept(profile: StoreProfile) -> str:
    return f"The store keeps profile {profile.effective} (docs/guarantees.md)."


def store_durable(profile: StoreProfile | None, unreachable: str = "") -> Observed:
    """Condition StoreDurable: whether the log is kept as `store.profile` demands.

    Args:
        profile: what is shown of the store; None: it was never seen.
        unreachable: why it does not answer now; empty if it does.
    """
    kind = SessionCondition.STORE_DURABLE
    if unreachable:
        return Observed(kind, "Unknown", StoreDurable.STORE_UNAVAILABLE, unreachable)
    if profile is None:
        text = "The operator could not look at the store yet."
        return Observed(kind, "Unknown", StoreDurable.NOT_OBSERVED, text)
    if profile.weaker:
        return Observed(kind, "False", StoreDurable.WEAKER_THAN_DEMANDED, _weaker(profile))
    return Observed(kind, "True", _KEPT[profile.effective], _kept(profile))
