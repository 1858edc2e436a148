"""The journal of calls: what was started, and what came out of it.

It makes `execute` idempotent: a call id that was seen is never run again, also after sandboxd was killed. Written by
`calls` alone. Lines of JSON in numbered segments; the intent of a call with an effect is fsynced before the call
starts. A new segment begins when one is full, the oldest is dropped, and the ids of its calls stay known as forgotten.

Commands run under our UID and can write these files: what is read back is data, and a line that makes no sense is
skipped.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEGMENT_BYTES = 8 * 1024 * 1024
SEGMENTS = 4
FORGOTTEN = 20_000
"""Ids of dropped calls that stay known; beyond them the oldest are gone."""

RESTARTED = "sandboxd restarted while the call ran; it may have partly executed"
DROPPED = "the call ran, but its result is no longer kept: too many calls have ended since"


@dataclass
class Entry:
    """What the journal knows of one call: `result` lies in segment `segment` at `offset`, or there is none."""

    digest: str
    segment: int = -1
    offset: int = -1
    length: int = 0


class Journal:
    """The journal in one directory.

    Args:
        directory: made if it is missing.
        segment_bytes: size at which a new segment begins.
        segments: segments kept.
    """

    def __init__(
        self, directory: Path, segment_bytes: int = SEGMENT_BYTES, segments: int = SEGMENTS
    ) -> None:
        self._dir = directory
        self._limit = segment_bytes
        self._keep = segments
        self._entries: dict[str, Entry] = {}
        self._forgotten: OrderedDict[str, str] = OrderedDict()
        self._files: dict[int, int] = {}
        self._size = 0
        self._dir.mkdir(parents=True, exist_ok=True)
        for number in self._numbers():
            self._load(number)
        self._roll()
        for call_id, entry in list(self._entries.items()):
            if entry.segment < 0:
                self.finish(call_id, {**_ERROR, "content": RESTARTED})

    def digest(self, call_id: str) -> str | None:
        """Digest of the request that this call id was first used for; None if it was never seen."""
        if entry := self._entries.get(call_id):
            return entry.digest
        return self._forgotten.get(call_id)

    def result(self, call_id: str) -> dict[str, Any] | None:
        """The stored result; None while the call runs or if it is unknown."""
        if entry := self._entries.get(call_id):
            return self._read(entry) if entry.segment >= 0 else None
        return {**_ERROR, "content": DROPPED} if call_id in self._forgotten else None

    def begin(self, call_id: str, digest: str, *, durable: bool) -> None:
        """Write the intent of a call.

        Args:
            call_id: the id, not seen before.
            digest: of the tool's name and input.
            durable: wait until it is on the disk.

        Raises:
            OSError: it could not be written; the call must not start.
        """
        if self._size > self._limit:
            self._roll()
        self._append({"t": "call", "id": call_id, "digest": digest})
        if durable:
            os.fdatasync(self._files[self._current])
        self._entries[call_id] = Entry(digest)

    def finish(self, call_id: str, result: dict[str, Any]) -> None:
        """Write the result of a call that was begun.

        Raises:
            OSError: it could not be written.
        """
        entry = self._entries[call_id]
        offset = self._size
        # No fsync: a result that a dead node loses reads as "may have partly executed", which is true.
        length = self._append(
            {"t": "done", "id": call_id, "digest": entry.digest, "result": result}
        )
        entry.segment, entry.offset, entry.length = self._current, offset, length

    def close(self) -> None:
        """Close all files."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    @property
    def _current(self) -> int:
        return max(self._files)

    def _numbers(self) -> list[int]:
        names = [p.stem.removeprefix("journal-") for p in self._dir.glob("journal-*.ndjson")]
        return sorted(int(n) for n in names if n.isdecimal())

    def _path(self, number: int) -> Path:
        return self._dir / f"journal-{number:08d}.ndjson"

    def _append(self, line: dict[str, Any]) -> int:
        data = (
            json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
            + b"\n"
        )
        fd, start = self._files[self._current], self._size
        view = memoryview(data)
        try:
            while view:
                view = view[os.pwrite(fd, view, self._size + len(data) - len(view)) :]
        except OSError:
            os.ftruncate(fd, start)  # a full disk must not leave half a line
            raise
        self._size += len(data)
        return len(data)

    def _read(self, entry: Entry) -> dict[str, Any]:
        try:
            data = os.pread(self._files[entry.segment], entry.length, entry.offset)
            result = json.loads(data)["result"]
            if isinstance(result, dict) and isinstance(result.get("content"), str):
                return {**_ERROR, **result}
        except (OSError, KeyError, TypeError, ValueError):
            pass
        return {**_ERROR, "content": "the call ran, but its result in the journal was damaged"}

    def _load(self, number: int) -> None:
        fd = os.open(self._path(number), os.O_RDWR | os.O_CLOEXEC)
        self._files[number] = fd
        offset = 0
        with open(fd, "rb", closefd=False) as lines:
            for raw in lines:
                self._take(raw, number, offset)
                offset += len(raw)

    def _take(self, raw: bytes, number: int, offset: int) -> None:
        try:
            line = json.loads(raw)
            kind = line["t"]
            if kind == "forgotten":
                self._forgotten.update((str(k), str(v)) for k, v in line["calls"].items())
            elif kind == "call":
                self._entries.setdefault(str(line["id"]), Entry(str(line["digest"])))
            elif kind == "done":
                self._entries[str(line["id"])] = Entry(
                    str(line["digest"]), number, offset, len(raw)
                )
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # torn by a crash, or written by somebody else

    def _roll(self) -> None:
        """Begin a new segment and drop the oldest; calls that run, and ids of dropped calls, are written into it."""
        number = max(self._files, default=0) + 1
        fd = os.open(self._path(number), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._files[number], self._size = fd, 0
        for old in sorted(self._files)[: -self._keep]:
            self._drop(old)
        while len(self._forgotten) > FORGOTTEN:
            self._forgotten.popitem(last=False)
        if self._forgotten:
            self._append({"t": "forgotten", "calls": dict(self._forgotten)})
        for call_id, entry in self._entries.items():
            if entry.segment < 0:
                self._append({"t": "call", "id": call_id, "digest": entry.digest})
        os.fdatasync(fd)
        directory = os.open(self._dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _drop(self, number: int) -> None:
        for call_id in [c for c, e in self._entries.items() if e.segment == number]:
            self._forgotten[call_id] = self._entries.pop(call_id).digest
        os.close(self._files.pop(number))
        self._path(number).unlink(missing_ok=True)


_ERROR: dict[str, Any] = {
    "content": "",
    "is_error": True,
    "exit_code": None,
    "truncated": False,
    "duration_ms": 0,
}
