"""JSON text kept as it came: members and items of a JSON value as slices of the original text.

What the model API sent must go back unchanged, and a decoder loses more than it seems: `1.0`, `1e5`
and `0.10` come out of Python as other text, and so do escapes. So the harness keeps each block of a
response as its own text, `session.events` writes that text into the log, and `harness.fold` cuts it
out again. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final, NoReturn

_SPACE: Final = re.compile(r"[ \t\n\r]*")
_KEY: Final = re.compile(r'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*')
"""A member's name without escapes up to where its value begins; others take the long way."""
_NEXT: Final = re.compile(r"[ \t\n\r]*([,}\]])")


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER: Final = json.JSONDecoder(parse_constant=_refuse)


class RawObject(dict[str, Any]):
    """A decoded JSON object that remembers its text: equal to any dict of the same members.

    Args:
        raw: UTF-8 JSON text of one object.

    Raises:
        ValueError: it is no JSON object, or it has NaN or Infinity, which JSON does not know.
    """

    def __init__(self, raw: bytes) -> None:
        value = decode(raw.decode())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        super().__init__(value)
        self.raw = raw


def decode(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON; NaN and Infinity are not.
    """
    return _DECODER.decode(text)


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None, "matches the empty string"
    return match.end()


def _expect(text: str, at: int, mark: str) -> int:
    at = _skip(text, at)
    if not text.startswith(mark, at):
        raise ValueError(f"expected {mark!r} at {at}")
    return at + 1


def _more(text: str, at: int, close: str) -> int | None:
    """Position behind the comma that follows; None if `close` does."""
    match = _NEXT.match(text, at)
    if match is None or match[1] not in (",", close):
        raise ValueError(f"expected ',' or {close!r} at {at}")
    return match.end() if match[1] == "," else None


def _key(text: str, at: int) -> tuple[str, int]:
    """A member's name, and where its value begins."""
    match = _KEY.match(text, at)
    if match is not None:
        return match[1], match.end()
    key, at = _DECODER.raw_decode(text, _expect(text, at, '"') - 1)
    return key, _skip(text, _expect(text, at, ":"))


def members(text: str) -> dict[str, str]:
    """Text of each member of a JSON object, in order; of two with one name the later counts.

    Raises:
        ValueError: not a JSON object.
    """
    found: dict[str, str] = {}
    at: int | None = _expect(text, 0, "{")
    assert at is not None
    if text.startswith("}", _skip(text, at)):
        return found
    while at is not None:
        key, start = _key(text, at)
        _, end = _DECODER.raw_decode(text, start)
        found[key] = text[start:end]
        at = _more(text, end, "}")
    return found


def items(text: str) -> Iterator[str]:
    """Text of each item of a JSON array.

    Raises:
        ValueError: not a JSON array.
    """
    at: int | None = _expect(text, 0, "[")
    assert at is not None
    if text.startswith("]", _skip(text, at)):
        return
    while at is not None:
        start = _skip(text, at)
        _, end = _DECODER.raw_decode(text, start)
        yield text[start:end]
        at = _more(text, end, "]")


def dumps(value: Any) -> str:
    """Compact JSON text, not escaped beyond need."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def join(parts: dict[str, str]) -> str:
    """A JSON object from the text of its members."""
    return "{" + ",".join(f"{dumps(key)}:{text}" for key, text in parts.items()) + "}"
