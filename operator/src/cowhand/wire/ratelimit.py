"""What the headers of a model endpoint's answer say of its limits: how long nobody should send anything more.

The proxy reads them for all tenants of a workspace, the harness for its own; both before the endpoint has to
refuse a request. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from math import isfinite
from typing import Final

PREFIX: Final = "anthropic-ratelimit-"

BUCKETS: Final = ("requests", "tokens", "input-tokens", "output-tokens")
"""Limits of the workspace; what is bought beyond them (`priority-*`) falls back to these when it is used up."""

LONGEST_S: Final = 60.0
"""No pause is longer: the limits are per minute, and a wrong clock must not stop a workspace for hours."""


def exhausted_s(headers: Mapping[str, str]) -> float:
    """Seconds until the limits that are used up are there again, 0 if none is; at most `LONGEST_S`.

    Args:
        headers: of an answer, whatever its status; names in lower case. What is not of the documented form says
            nothing.
    """
    pauses = [_reset_s(headers, name) for name in BUCKETS if _used_up(headers, name)]
    return min(LONGEST_S, max(pauses, default=0.0))


def refused_s(status: int, headers: Mapping[str, str]) -> float:
    """As `exhausted_s`, and for a 429 or 529 that names a time also until then."""
    pause = exhausted_s(headers)
    if status in (429, 529):
        try:
            after = float(headers.get("retry-after", ""))
        except ValueError:
            after = 0.0
        pause = max(pause, after if isfinite(after) else 0.0)
    return min(LONGEST_S, pause)


def _used_up(headers: Mapping[str, str], bucket: str) -> bool:
    return headers.get(f"{PREFIX}{bucket}-remaining", "").strip() == "0"


def _reset_s(headers: Mapping[str, str], bucket: str) -> float:
    """By the endpoint's own clock where it tells its time, for ours may be another."""
    try:
        reset = datetime.fromisoformat(headers.get(f"{PREFIX}{bucket}-reset", "").strip())
    except ValueError:
        return 0.0
    try:
        now = parsedate_to_datetime(headers.get("date", ""))
    except ValueError:
        now = datetime.now(UTC)
    if reset.tzinfo is None or now.tzinfo is None:
        return 0.0
    return max(0.0, (reset - now).total_seconds())
