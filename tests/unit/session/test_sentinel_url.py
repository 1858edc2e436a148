"""URLs that name Sentinels."""

from __future__ import annotations

import pytest

from cowhand.errors import UserError
from cowhand.session.sentinel import SentinelAddress, parse


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("redis://a:1/0", None),
        ("rediss://a", None),
        ("redis+sentinel://a:1,b/p", SentinelAddress((("a", 1), ("b", 26379)), "p")),
        ("rediss+sentinel://a:1/p", SentinelAddress((("a", 1),), "p", tls=True)),
        ("redis+sentinel://[::1]:5/p", SentinelAddress((("::1", 5),), "p")),
        (
            "redis+sentinel://u:p%40ss@a/p",
            SentinelAddress((("a", 26379),), "p", username="u", password="p@ss"),
        ),
    ],
)
def test_what_a_url_says(url, found):
    assert parse(url) == found


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://",
        "redis+sentinel://a:1",
        "redis+sentinel://a:1/",
        "redis+sentinel:///p",
        "redis+sentinel://a:x/p",
        "redis+sentinel://a:1/p/q",
        "redis+sentinel://:1/p",
    ],
)
def test_what_is_wrong_with_one_is_said_without_its_password(url):
    with pytest.raises(UserError, match="store URL") as caught:
        parse(url.replace("://", "://:secret@"))
    assert "secret" not in str(caught.value)
