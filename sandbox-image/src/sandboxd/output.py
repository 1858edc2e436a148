"""Bounded collection of a command's output: head and tail are kept, the middle is counted.

Used by the shell and by grep, so that 50 MB of output cost 1 MiB of memory.
"""

from __future__ import annotations

import codecs

CAP = 1024 * 1024
"""Bytes of output that a result holds, mark included (UTF-8)."""
_MARK_ROOM = 128


class Collector:
    """Keeps the first and the last half of what is added.

    Args:
        cap: size of the rendered text in bytes of UTF-8, at most.
    """

    def __init__(self, cap: int = CAP) -> None:
        self._half = (cap - _MARK_ROOM) // 2
        self._head = bytearray()
        self._tail = bytearray()
        self.total = 0
        """Bytes added so far."""

    def add(self, data: bytes) -> None:
        """Take the next bytes of the output."""
        self.total += len(data)
        room = self._half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        if data:
            self._tail += data
            # Trimmed only now and then: moving the tail at each add would cost quadratic time.
            if len(self._tail) > 2 * self._half:
                del self._tail[: -self._half]

    def render(self) -> tuple[str, bool]:
        """The text (invalid UTF-8 replaced) and whether something was left out."""
        tail = self._tail[-self._half :] if self._half else self._tail
        if self.total == len(self._head) + len(tail):
            text = (self._head + tail).decode("utf-8", "replace")
            encoded = text.encode("utf-8")
            if len(encoded) <= 2 * self._half:
                return text, False
            head_bytes, tail_bytes = encoded, encoded  # replaced bytes grew beyond the cap
        else:
            head_bytes = _decode_head(bytes(self._head)).encode("utf-8")
            tail_bytes = _decode_tail(bytes(tail)).encode("utf-8")
        head = _decode_head(head_bytes[: self._half])
        last = _decode_tail(tail_bytes[-self._half :])
        left_out = max(1, self.total - len(self._head) - len(tail))
        mark = f"\n[... output truncated: about {left_out} bytes left out here ...]\n"
        if self.total == len(self._head) + len(tail):
            mark = "\n[... output truncated: not text, the middle is left out here ...]\n"
        return head + mark + last, True


def _decode_head(data: bytes) -> str:
    """Decode without the character that the cut went through."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data, final=False)


def _decode_tail(data: bytes) -> str:
    """Decode from the first byte that begins a character."""
    start = 0
    while start < min(3, len(data)) and 0x80 <= data[start] < 0xC0:
        start += 1
    return data[start:].decode("utf-8", "replace")


def cap_text(text: str, cap: int = CAP) -> tuple[str, bool]:
    """The text within the cap, and whether something was left out."""
    if len(text) * 4 <= cap:
        return text, False
    collector = Collector(cap)
    collector.add(text.encode("utf-8", "replace"))
    return collector.render()
