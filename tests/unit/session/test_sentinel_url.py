"""URLs that name Sentinels."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from cowhand import settings
from cowhand.errors import UserError
from cowhand.session.log import StoreConfig
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


def test_the_login_at_sentinels_is_read_from_files(tmp_path):
    env = {
        "COWHAND_STORE_URL": "rediss+sentinel://a:1/p",
        "COWHAND_STORE_SENTINEL_USERNAME_FILE": str(tmp_path / "username"),
        "COWHAND_STORE_SENTINEL_PASSWORD_FILE": str(tmp_path / "password"),
    }
    (tmp_path / "password").write_text("secret\n")
    found = settings.store(env)
    assert (found.sentinel_username, found.sentinel_password) == ("", "secret")
    assert "secret" not in repr(found)
    assert "secret" not in repr(StoreConfig(**asdict(found)))
