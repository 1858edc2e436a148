"""Archived segments of a log: their format, and which part of a log goes into one. Pure; `now` is a parameter.

A segment is a gzip file of NDJSON: one line for each entry as it stands in the store (large payloads as references),
and a footer with the positions and the hash of the lines, so that a torn or foreign file is noticed. Segments of a
session follow each other without a gap, from position 1. Used by the archive process, by whoever reads an archived
log (`cold.py`), and by whoever exports one.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from cowhand.errors import LogIncompatible
from cowhand.session.blobs import Span
from cowhand.session.events import Event

SEGMENT_EVENTS: Final = 5_000
"""Most events of a segment."""

SEGMENT_BYTES: Final = 8 * 1024 * 1024
"""Most bytes of lines in a segment, before compression; one event may be larger."""

MAX_UNPACKED: Final = 64 * 1024 * 1024
"""Longest segment that is unpacked: a file that says more is not one of ours."""

IDLE_MS: Final = 30 * 60 * 1000
"""A log in which nothing was written for so long is archived whole."""

HOT_EVENTS: Final = 2_000
HOT_BYTES: Final = 5 * 1024 * 1024
"""A log with more than that in the store is archived up to KEEP_EVENTS before what the next prompt is made of."""

KEEP_EVENTS: Final = 50
KEEP_UNMARKED: Final = 500
"""What stays in the store of a long log that runs and has no compaction in its hot part."""

WINDOW_STARTS: Final = frozenset({"context.compacted", "context.reset"})
"""Events after which a prompt is made of nothing older but notes and a summary."""

_NAME: Final = re.compile(r"([0-9]{12})-([0-9]{12})\.ndjson\.gz")


@dataclass(frozen=True)
class HotLog:
    """What the store holds of a log, as the decision needs it.

    Attributes:
        session_id: whose log.
        closed: nothing is appended any more.
        held: a worker holds the session, or it waits for one.
        first: first position in the store (of an empty one `next_seq`).
        next_seq: position of the next event.
        size: bytes of the stream in the store's memory.
        newest_ms: time of the newest event, 0 if the store holds none.
    """

    session_id: str
    closed: bool
    held: bool
    first: int
    next_seq: int
    size: int
    newest_ms: int


def wanted(log: HotLog, now_ms: int) -> bool:
    """Whether something of this log belongs into the archive now."""
    events = log.next_seq - log.first
    if events <= 0:
        return False
    if log.closed or rests(log, now_ms):
        return True
    return events > HOT_EVENTS or log.size > HOT_BYTES


def rests(log: HotLog, now_ms: int) -> bool:
    """Whether nobody holds or waits for the session, and nothing was written for long."""
    return not log.held and log.newest_ms > 0 and now_ms - log.newest_ms > IDLE_MS


def archive_until(log: HotLog, hot: Sequence[Event], now_ms: int) -> int:
    """Last position that may go into the archive now, 0 for none.

    A log that ended or rests goes whole. One that is only long keeps everything since its window began (the newest
    compaction or reset) and KEEP_EVENTS before.

    Args:
        log: what the store holds.
        hot: the entries in the store, in order, all or as many as were read from the first on.
        now_ms: the store's time in milliseconds.
    """
    if not wanted(log, now_ms) or not hot:
        return 0
    if log.closed or rests(log, now_ms):
        return hot[-1].seq
    starts = [event.seq for event in hot if event.type in WINDOW_STARTS]
    keep_from = starts[-1] - KEEP_EVENTS if starts else log.next_seq - KEEP_UNMARKED
    last = min(keep_from - 1, hot[-1].seq)
    return last if last >= log.first else 0


def cut(events: Sequence[Event], until: int) -> list[Event]:
    """The longest beginning of `events` that ends at `until` at the latest and fits one segment."""
    chosen: list[Event] = []
    size = 0
    for event in events[:SEGMENT_EVENTS]:
        size += len(event.payload) + 200
        if event.seq > until or (chosen and size > SEGMENT_BYTES):
            break
        chosen.append(event)
    return chosen


def name(span: Span) -> str:
    """File name of a segment, such that names sort by position."""
    return f"{span.first:012d}-{span.last:012d}.ndjson.gz"


def span_of(file_name: str, size: int = 0) -> Span | None:
    """The positions that a file name says, None if it is not the name of a segment."""
    match = _NAME.fullmatch(file_name)
    if match is None:
        return None
    first, last = int(match[1]), int(match[2])
    return Span(first, last, size) if 1 <= first <= last else None


def chain(spans: Sequence[Span]) -> list[Span]:
    """Segments that cover the most from position 1 on without a gap, in order.

    Two archivers that did not know of each other may have left overlapping segments: entries never change, so that
    of those with the same beginning the longest counts.
    """
    chosen: list[Span] = []
    ahead = sorted(spans, key=lambda span: (span.first, -span.last))
    position = 1
    while True:
        reach = [span for span in ahead if span.first <= position <= span.last]
        if not reach:
            return chosen
        best = max(reach, key=lambda span: (span.last, -span.first))
        chosen.append(best)
        position = best.last + 1


def line(event: Event) -> bytes:
    """One entry as a line of a segment, with its newline; payload bytes survive exactly."""
    body: dict[str, Any] = {
        "seq": event.seq,
        "t": event.type,
        "e": event.id,
        "ts": event.ts,
        "w": event.lease,
    }
    try:
        body["p"] = event.payload.decode()
    except UnicodeDecodeError:
        body["hex"] = event.payload.hex()
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def encode(events: Sequence[Event]) -> bytes:
    """A segment of these entries.

    Raises:
        ValueError: there are none, or their positions are not dense.
    """
    if not events or [e.seq for e in events] != list(
        range(events[0].seq, events[0].seq + len(events))
    ):
        raise ValueError("a segment holds dense positions")
    lines = b"".join(line(event) for event in events)
    footer = {
        "first": events[0].seq,
        "last": events[-1].seq,
        "count": len(events),
        "sha256": hashlib.sha256(lines).hexdigest(),
    }
    tail = json.dumps({"footer": footer}, separators=(",", ":")).encode() + b"\n"
    return gzip.compress(lines + tail, compresslevel=6, mtime=0)


def decode(data: bytes, span: Span | None = None) -> list[Event]:
    """The entries of a segment.

    Args:
        data: the file.
        span: the positions that it must hold.

    Raises:
        LogIncompatible: torn, damaged, of other positions, or not a segment.
    """
    where = f"{span.first}-{span.last}" if span else "?"
    try:
        lines, _, footer = _unpack(data).removesuffix(b"\n").rpartition(b"\n")
        lines += b"\n"
        said = json.loads(footer)["footer"]
        if said["sha256"] != hashlib.sha256(lines).hexdigest():
            raise ValueError("its hash is not that of its footer")
        events = [_event(json.loads(text)) for text in lines.splitlines()]
        positions = [event.seq for event in events]
        if positions != list(range(said["first"], said["last"] + 1)):
            raise ValueError("its positions are not those of its footer")
        if span is not None and (span.first, span.last) != (said["first"], said["last"]):
            raise ValueError(f"it holds the positions {said['first']}-{said['last']}")
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, RecursionError) as err:
        raise LogIncompatible(f"the archived segment {where} is damaged: {err}") from err
    return events


def _unpack(data: bytes) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    found = unpacker.decompress(data, MAX_UNPACKED)
    if unpacker.unconsumed_tail:
        raise ValueError(f"it unpacks to more than {MAX_UNPACKED} bytes")
    if not unpacker.eof:
        raise ValueError("it is torn")
    return found


def _event(body: dict[str, Any]) -> Event:
    payload = bytes.fromhex(body["hex"]) if "hex" in body else body["p"].encode()
    return Event(int(body["seq"]), body["t"], body["e"], int(body["ts"]), body["w"], payload)
