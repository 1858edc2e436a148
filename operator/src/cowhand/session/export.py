"""A session as a file: NDJSON that a log can be read back from, byte for byte.

First line a header (what the meta hash says), then one line for each event, last a footer with the number of
events and the SHA-256 of every byte before it: a file that is torn or edited is noticed. Written by the gateway
(`GET /v1/sessions/{id}/export`), read by `cowhand verify`, `replay` and `restore`. Pure.

    {"cowhand_export":1,"session","namespace","name","uid","model","tombstone","state","mode","last_seq",
     "created_ms","exported_ms","epoch","status","budget"}
    {"seq","type","id","ts","lease","payload"}           payload: the stored bytes as a string
    {"seq","type","id","ts","lease","payload_base64"}    the same where they are not UTF-8
    {"cowhand_export_end":1,"events":N,"sha256":"..."}
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

from cowhand.errors import UserError
from cowhand.session.events import Event
from cowhand.session.log import Mode, SessionMeta, SessionState, State

FORMAT: Final = 1
"""Version of the file; a reader refuses any other."""

STATES: Final = frozenset({"idle", "running", "rescheduling", "terminated", "closed"})
MODES: Final = frozenset({"running", "suspended"})

_AGAIN: Final = "export the session again"


class ExportDamaged(UserError):
    """The file is not a whole export: nothing of it is used."""


@dataclass(frozen=True)
class Header:
    """First line of an export.

    Attributes:
        meta: the fixed part of the session.
        state: state of the session when it was exported.
        mode: `running` or `suspended`.
        last_seq: position of the last event.
        created_ms: milliseconds since the epoch, store clock.
        exported_ms: milliseconds since the epoch, clock of the gateway.
        epoch: of the newest lease.
        status: status document as it stood at `last_seq`.
        budget: limits in force.
    """

    meta: SessionMeta
    state: State
    mode: Mode
    last_seq: int
    created_ms: int
    exported_ms: int
    epoch: int = 0
    status: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, int] = field(default_factory=dict)

    @property
    def session_id(self) -> str:
        """The session."""
        return self.meta.session_id


@dataclass(frozen=True)
class Export:
    """A whole export."""

    header: Header
    events: tuple[Event, ...]


def header_of(state: SessionState, exported_ms: int) -> Header:
    """The header for a session as it stands now."""
    return Header(
        meta=state.meta,
        state=state.state,
        mode=state.mode,
        last_seq=state.next_seq - 1,
        created_ms=state.created_ms,
        exported_ms=exported_ms,
        epoch=state.epoch,
        status=state.status,
        budget=state.budget,
    )


def dump(value: Mapping[str, Any]) -> bytes:
    """One line of NDJSON, ASCII, with its newline."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def event_line(event: Event) -> bytes:
    """The line of one event; the payload survives byte for byte."""
    head: dict[str, Any] = {
        "seq": event.seq,
        "type": event.type,
        "id": event.id,
        "ts": event.ts,
        "lease": event.lease,
    }
    try:
        head["payload"] = event.payload.decode("utf-8", "strict")
    except UnicodeDecodeError:
        head["payload_base64"] = base64.b64encode(event.payload).decode()
    return dump(head)


class Writer:
    """Makes the lines of one export, in order: `begin`, `event` for each, `end`."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._count = 0

    def _seen(self, line: bytes) -> bytes:
        self._sha.update(line)
        return line

    def begin(self, header: Header) -> bytes:
        """The first line."""
        meta = header.meta
        body = {
            "cowhand_export": FORMAT,
            "session": meta.session_id,
            "namespace": meta.namespace,
            "name": meta.name,
            "uid": meta.uid,
            "model": meta.model,
            "tombstone": meta.tombstone,
            "state": header.state,
            "mode": header.mode,
            "last_seq": header.last_seq,
            "created_ms": header.created_ms,
            "exported_ms": header.exported_ms,
            "epoch": header.epoch,
            "status": header.status,
            "budget": header.budget,
        }
        return self._seen(dump(body))

    def event(self, event: Event) -> bytes:
        """The line of the next event."""
        self._count += 1
        return self._seen(event_line(event))

    def end(self) -> bytes:
        """The last line."""
        return dump(
            {"cowhand_export_end": FORMAT, "events": self._count, "sha256": self._sha.hexdigest()}
        )


def encode(export: Export) -> bytes:
    """A whole export as bytes."""
    writer = Writer()
    lines = [writer.begin(export.header), *map(writer.event, export.events), writer.end()]
    return b"".join(lines)


class Reader:
    """Reads an export line by line: `feed` each line with its newline, then `finish`.

    Attributes:
        header: set by the first line.
    """

    def __init__(self) -> None:
        self.header: Header | None = None
        self._sha = hashlib.sha256()
        self._count = 0
        self._line = 0
        self._whole = False

    def feed(self, raw: bytes) -> Event | None:
        """Take one line; answers the event in it, None for header and footer.

        Raises:
            ExportDamaged: the line is not what comes here; the message names it.
        """
        self._line += 1
        if self._whole:
            raise self._damaged("stands behind the end of the export")
        body = self._object(raw)
        if self.header is None:
            self.header = self._header(body)
        elif "cowhand_export_end" in body:
            self._end(body)
            return None
        elif "error" in body:
            raise ExportDamaged(f"the export broke off: {_message(body)}; {_AGAIN}")
        else:
            event = self._event(body)
            self._count += 1
            self._sha.update(raw)
            return event
        self._sha.update(raw)
        return None

    @property
    def whole(self) -> bool:
        """The footer was read, and it fits."""
        return self._whole

    def finish(self) -> Header:
        """All lines were fed. Raises ExportDamaged if the footer is missing."""
        if self.header is None or not self._whole:
            raise ExportDamaged(
                f"the export ends after line {self._line} without its footer, so part of it is "
                f"missing: {_AGAIN}"
            )
        return self.header

    def _damaged(self, why: str) -> ExportDamaged:
        return ExportDamaged(f"line {self._line} of the export {why}: {_AGAIN}")

    def _object(self, raw: bytes) -> dict[str, Any]:
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict) or not raw.endswith(b"\n"):
            raise self._damaged("is not a whole JSON object")
        return body

    def _header(self, body: Mapping[str, Any]) -> Header:
        if "cowhand_export" not in body:
            raise ExportDamaged(
                "this is not an export of a session: its first line has no cowhand_export "
                "(`cowhand export SESSION -o FILE` makes one)"
            )
        if body["cowhand_export"] != FORMAT:
            raise ExportDamaged(
                f"the export has format {body['cowhand_export']!r}, this release reads {FORMAT}: "
                "use the release that wrote it, or a newer one"
            )
        try:
            if body["state"] not in STATES or body["mode"] not in MODES:
                raise ValueError("state or mode is unknown")
            return Header(
                meta=SessionMeta(
                    session_id=_text(body["session"]),
                    namespace=_text(body["namespace"]),
                    name=_text(body["name"]),
                    uid=_text(body["uid"]),
                    model=dict(body["model"]),
                    tombstone=_text(body["tombstone"]),
                ),
                state=cast(State, body["state"]),
                mode=cast(Mode, body["mode"]),
                last_seq=int(body["last_seq"]),
                created_ms=int(body["created_ms"]),
                exported_ms=int(body["exported_ms"]),
                epoch=int(body["epoch"]),
                status=dict(body["status"]),
                budget=dict(body["budget"]),
            )
        except (KeyError, TypeError, ValueError) as err:
            raise self._damaged(f"is not a header ({err!r})") from err

    def _event(self, body: Mapping[str, Any]) -> Event:
        try:
            if "payload_base64" in body:
                payload = base64.b64decode(body["payload_base64"], validate=True)
            else:
                payload = _text(body["payload"]).encode()
            return Event(
                seq=int(body["seq"]),
                type=_text(body["type"]),
                id=_text(body["id"]),
                ts=int(body["ts"]),
                lease=_text(body["lease"]),
                payload=payload,
            )
        except (KeyError, TypeError, ValueError, binascii.Error) as err:
            raise self._damaged(f"is not an event ({err!r})") from err

    def _end(self, body: Mapping[str, Any]) -> None:
        if body.get("events") != self._count:
            raise ExportDamaged(
                f"the footer speaks of {body.get('events')!r} events, the file has {self._count}: "
                f"{_AGAIN}"
            )
        if body.get("sha256") != self._sha.hexdigest():
            raise ExportDamaged(f"the SHA-256 of the footer does not match the file: {_AGAIN}")
        self._whole = True


def decode(lines: Iterable[bytes]) -> Export:
    """An export from its lines (with their newlines).

    Raises:
        ExportDamaged: it is not whole, or not an export.
    """
    reader = Reader()
    events = [event for raw in lines if (event := reader.feed(raw)) is not None]
    return Export(reader.finish(), tuple(events))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _message(body: Mapping[str, Any]) -> str:
    error = body["error"]
    return str(error.get("message") if isinstance(error, dict) else error)
