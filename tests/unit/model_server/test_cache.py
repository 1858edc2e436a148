"""The simulated prompt cache: prefix, breakpoints, lookback, life, minimum."""

from __future__ import annotations

from typing import Any

import pytest

from model_server.cache import PromptCache
from model_server.validate import validate

Json = dict[str, Any]


def request(blocks: int, *marks: int, ttl: str = "5m", words: str = "x" * 400, **more: Any) -> Json:
    """One user message of `blocks` blocks of about 100 tokens, with breakpoints at the given ones."""
    content: list[Json] = [{"type": "text", "text": f"{i} {words}"} for i in range(blocks)]
    for mark in marks:
        content[mark]["cache_control"] = {"type": "ephemeral", "ttl": ttl}
    return validate(
        {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": content}], **more}
    )


def test_second_request_reads_what_the_first_wrote() -> None:
    cache = PromptCache(minimum=100)
    first = cache.use(request(5, 4), now=0)
    second = cache.use(request(8, 7), now=1)
    assert (first.read, first.fresh) == (0, 0)
    assert first.written > 500
    assert second.read == first.written
    assert second.written > 0


def test_three_numbers_add_up_to_the_prompt() -> None:
    plain = PromptCache(0).use(request(9), now=0)
    cache = PromptCache(0)
    cache.use(request(3, 2), now=0)
    mixed = cache.use(request(9, 5), now=0)
    assert mixed.fresh > 0
    assert mixed.fresh + mixed.read + mixed.written == plain.fresh


@pytest.mark.parametrize(("grown", "hit"), [(19, True), (20, False)])
def test_lookback_is_20_blocks(grown: int, hit: bool) -> None:
    cache = PromptCache(minimum=0)
    cache.use(request(5, 4), now=0)
    assert (cache.use(request(5 + grown, 4 + grown), now=0).read > 0) is hit


@pytest.mark.parametrize(("ttl", "life"), [("5m", 300), ("1h", 3600)])
def test_life_is_renewed_by_use(ttl: str, life: int) -> None:
    cache = PromptCache(minimum=0)
    cache.use(request(5, 4, ttl=ttl), now=0)
    assert cache.use(request(5, 4, ttl=ttl), now=life - 1).read > 0
    assert cache.use(request(5, 4, ttl=ttl), now=2 * life - 2).read > 0
    assert cache.use(request(5, 4, ttl=ttl), now=3 * life).read == 0


def test_changed_prefix_model_or_short_prefix_miss() -> None:
    cache = PromptCache(minimum=100)
    cache.use(request(5, 4), now=0)
    assert cache.use(request(5, 4, words="y" * 400), now=0).read == 0
    assert cache.use({**request(5, 4), "model": "other"}, now=0).read == 0
    assert cache.use({**request(5, 4), "system": "new"}, now=0).read == 0
    assert cache.use(request(1, 0, words="short"), now=0).written == 0


def test_top_level_mark_counts_for_the_last_block() -> None:
    cache = PromptCache(minimum=0)
    marked = request(5, cache_control={"type": "ephemeral"})
    assert cache.use(marked, now=0).written > 0
    assert cache.use(marked, now=0).read > 0
