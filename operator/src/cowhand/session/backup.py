"""All sessions of a namespace as one file: NDJSON, exports (`export.py`) one behind the other.

Each export has a checksum of its own, so that one torn session is noticed and the others are not lost with it.
Written by the gateway (`GET /v1/namespaces/{ns}/backup`), checked and read by `cowhand backup` and `restore`. Pure.

    {"cowhand_backup":1,"namespace","made_ms"}
    an export
    {"cowhand_backup_skipped":"sesn_...","reason"}    instead of the rest of an export that could not be read
    {"cowhand_backup_end":1,"sessions":N}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cowhand.session.export import ExportDamaged, Header, Reader, dump

FORMAT: Final = 1
"""Version of the file; a reader refuses any other."""


@dataclass(frozen=True)
class Part:
    """One session in a backup: `header`, and where its lines stand (bytes of the file)."""

    header: Header
    start: int
    length: int


@dataclass
class Index:
    """What a backup holds.

    Attributes:
        namespace: of its sessions.
        parts: whole sessions, in order.
        skipped: session id -> why it is not in the backup.
    """

    namespace: str = ""
    parts: list[Part] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def begin(namespace: str, made_ms: int) -> bytes:
    """The first line of a backup; `made_ms` since the epoch."""
    return dump({"cowhand_backup": FORMAT, "namespace": namespace, "made_ms": made_ms})


def skipped(session_id: str, reason: str) -> bytes:
    """The line that gives up on a session, whose export may have begun."""
    return dump({"cowhand_backup_skipped": session_id, "reason": reason})


def end(sessions: int) -> bytes:
    """The last line of a backup: how many whole exports it has."""
    return dump({"cowhand_backup_end": FORMAT, "sessions": sessions})


class Indexer:
    """Reads a backup, or a single export, line by line: `feed` each with its newline, then `finish`."""

    def __init__(self) -> None:
        self._index = Index()
        self._reader: Reader | None = None
        self._start = 0
        self._offset = 0
        self._line = 0
        self._backup = False
        self._whole = False

    def feed(self, raw: bytes) -> None:
        """Take one line. Raises ExportDamaged."""
        self._line += 1
        self._offset += len(raw)
        if self._whole:
            raise ExportDamaged(f"line {self._line} stands behind the end of the backup")
        head = _head(raw)
        if self._line == 1 and "cowhand_backup" in head:
            self._begin(head)
        elif "cowhand_backup_skipped" in head:
            self._reader = None
            self._index.skipped[str(head["cowhand_backup_skipped"])] = str(head.get("reason"))
        elif "cowhand_backup_end" in head:
            self._end(head)
        elif self._reader is None and "error" in head:
            error = head["error"]
            said = error.get("message") if isinstance(error, dict) else error
            raise ExportDamaged(f"the backup broke off: {said}; make it again")
        else:
            self._export(raw)

    def _begin(self, head: Mapping[str, Any]) -> None:
        if head["cowhand_backup"] != FORMAT:
            raise ExportDamaged(
                f"the backup has format {head['cowhand_backup']!r}, this release reads {FORMAT}: use the "
                "release that wrote it, or a newer one"
            )
        self._backup = True
        self._index.namespace = str(head.get("namespace"))

    def _end(self, head: Mapping[str, Any]) -> None:
        if self._reader is not None or head.get("sessions") != len(self._index.parts):
            raise ExportDamaged(
                f"the end of the backup speaks of {head.get('sessions')!r} sessions, the file has "
                f"{len(self._index.parts)}: it was changed or is not whole"
            )
        self._whole = True

    def _export(self, raw: bytes) -> None:
        if self._reader is None:
            if not self._backup and self._index.parts:
                raise ExportDamaged(f"line {self._line} stands behind the end of the export")
            self._reader = Reader()
            self._start = self._offset - len(raw)
        reader = self._reader
        reader.feed(raw)
        header = reader.header
        assert header is not None, "the first line of an export sets it"
        if self._backup and header.meta.namespace != self._index.namespace:
            raise ExportDamaged(
                f"{header.session_id} is of namespace {header.meta.namespace}, the backup is of "
                f"{self._index.namespace}"
            )
        if reader.whole:
            self._index.parts.append(Part(header, self._start, self._offset - self._start))
            self._reader = None

    def finish(self) -> Index:
        """All lines were fed. Raises ExportDamaged if the end is missing."""
        if self._reader is not None:
            self._reader.finish()
        if self._backup and not self._whole:
            raise ExportDamaged(
                f"the backup ends after line {self._line} without its last line, so part of it is "
                "missing: make it again"
            )
        if not self._line:
            raise ExportDamaged("the file is empty")
        if not self._backup:
            self._index.namespace = self._index.parts[0].header.meta.namespace
        return self._index


def _head(raw: bytes) -> dict[str, Any]:
    """A line that is not an event as an object; empty for events (they may be large) and for anything else."""
    if not raw.startswith((b'{"cowhand_backup', b'{"error"')):
        return {}
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
