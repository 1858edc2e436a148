"""How long an answer's headers say that nothing should be sent."""

from __future__ import annotations

import pytest

from cowhand.wire.ratelimit import LONGEST_S, exhausted_s, refused_s

DATE = {"date": "Thu, 21 Aug 2025 12:41:00 GMT"}


def told(**buckets: str) -> dict[str, str]:
    """`requests="0 2025-08-21T12:41:20Z"`: remaining and reset of each limit, as documented."""
    headers = dict(DATE)
    for name, value in buckets.items():
        left, _, reset = value.partition(" ")
        name = name.replace("_", "-")
        headers[f"anthropic-ratelimit-{name}-limit"] = "1000"
        headers[f"anthropic-ratelimit-{name}-remaining"] = left
        headers[f"anthropic-ratelimit-{name}-reset"] = reset
    return headers


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({}, 0),
        (told(requests="999 2025-08-21T12:41:20Z"), 0),
        (told(requests="0 2025-08-21T12:41:20Z"), 20),
        (told(requests="5 2025-08-21T12:41:50Z", input_tokens="0 2025-08-21T12:41:07Z"), 7),
        (
            told(output_tokens="0 2025-08-21T12:41:30+00:00", tokens="0 2025-08-21T12:41:10Z"),
            30,
        ),
        (told(requests="0 2025-08-21T12:40:59Z"), 0),
        (told(requests="0 2026-08-21T12:41:00Z"), LONGEST_S),
        (told(requests="0 soon"), 0),
        (told(requests="0 2025-08-21T12:41:20"), 0),
        (told(requests="none 2025-08-21T12:41:20Z"), 0),
        (told(priority_input_tokens="0 2025-08-21T12:41:20Z"), 0),
        ({**told(requests="0 2001-01-01T00:00:00Z"), "date": "yesterday"}, 0),
        ({**told(requests="0 9000-01-01T00:00:00Z"), "date": ""}, LONGEST_S),
    ],
)
def test_what_is_left_of_the_limits(headers: dict[str, str], pause: float) -> None:
    assert exhausted_s(headers) == pause
    assert refused_s(200, headers) == pause


@pytest.mark.parametrize(
    ("status", "after", "pause"),
    [
        (429, "12", 12),
        (529, "2.5", 2.5),
        (200, "12", 0),
        (503, "12", 0),
        (429, "", 0),
        (429, "soon", 0),
        (429, "nan", 0),
        (429, "inf", 0),
        (429, "-5", 0),
        (429, "86400", LONGEST_S),
    ],
)
def test_a_refusal_that_names_a_time(status: int, after: str, pause: float) -> None:
    assert refused_s(status, {**DATE, "retry-after": after}) == pause
