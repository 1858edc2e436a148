"""A simulated prompt cache, so that `usage` reads like the real one. Called by `app` once per request.

Prefix match over tools, system, messages in this order; an entry is written at each breakpoint; a breakpoint finds
entries at most 20 blocks before it; life 5 minutes or 1 hour, renewed by use. Tokens are estimated: four bytes each.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from model_server.signatures import canonical, without_cache_control
from model_server.validate import merged

Json = dict[str, Any]
LOOKBACK = 20
_ENTRIES = 100_000


@dataclass(frozen=True)
class InputUsage:
    """Input tokens of one request; the three add up to the whole prompt."""

    fresh: int
    read: int
    written: int
    written_1h: int = 0

    def as_json(self) -> Json:
        """The fields of `usage` that concern the input."""
        return {
            "input_tokens": self.fresh,
            "cache_creation_input_tokens": self.written,
            "cache_read_input_tokens": self.read,
            "cache_creation": {
                "ephemeral_5m_input_tokens": self.written - self.written_1h,
                "ephemeral_1h_input_tokens": self.written_1h,
            },
        }


def tokens(data: bytes) -> int:
    """Estimated tokens of a text."""
    return (len(data) + 3) // 4


class PromptCache:
    """The cache of one organisation.

    Args:
        minimum: shortest prefix that is kept, tokens.
    """

    def __init__(self, minimum: int) -> None:
        self._minimum = minimum
        self._entries: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def use(self, body: Json, now: float) -> InputUsage:
        """Read and write the cache for one request at time `now` (seconds, any clock)."""
        hashes, sums, marks = _prefixes(body)
        total = sums[-1] if sums else 0
        read_at = -1
        for mark, _ in marks:
            for i in range(mark, max(-1, mark - LOOKBACK), -1):
                entry = self._entries.get(hashes[i])
                if entry is not None and entry[0] > now:
                    read_at = max(read_at, i)
                    self._put(hashes[i], now, entry[1])
                    break
        written_to, ttl_last = -1, 300.0
        for mark, ttl in marks:
            if sums[mark] >= self._minimum:
                self._put(hashes[mark], now, ttl)
                if mark > written_to:
                    written_to, ttl_last = mark, ttl
        read = sums[read_at] if read_at >= 0 else 0
        written = max(0, sums[written_to] - read) if written_to >= 0 else 0
        return InputUsage(total - read - written, read, written, written if ttl_last > 300 else 0)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def _put(self, key: bytes, now: float, ttl: float) -> None:
        self._entries[key] = (now + ttl, ttl)
        self._entries.move_to_end(key)
        while len(self._entries) > _ENTRIES:
            self._entries.popitem(last=False)


def _prefixes(body: Json) -> tuple[list[bytes], list[int], list[tuple[int, float]]]:
    """Hash and token sum up to each block, and the breakpoints as (block, life in seconds)."""
    system = body.get("system") or []
    if isinstance(system, str):
        system = [{"type": "text", "text": system}]
    blocks: list[tuple[str, Json]] = [("tools", t) for t in body.get("tools") or []]
    blocks += [("system", b) for b in system]
    for turn in merged(body["messages"]):
        blocks += [(turn["role"], b) for b in turn["content"]]
    hashes, sums, marks = [], [], []
    digest, total = hashlib.sha256(body["model"].encode()).digest(), 0
    for i, (where, block) in enumerate(blocks):
        data = canonical([where, without_cache_control(block)])
        digest = hashlib.sha256(digest + data).digest()
        total += tokens(data)
        hashes.append(digest)
        sums.append(total)
        control = block.get("cache_control") or (
            body.get("cache_control") if i == len(blocks) - 1 else None
        )
        if control:
            marks.append((i, 3600.0 if control.get("ttl") == "1h" else 300.0))
    return hashes, sums, marks
