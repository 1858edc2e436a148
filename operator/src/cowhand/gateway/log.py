"""The raw log as NDJSON: an extension for people who debug, and the source of `cowhand events`.

One line per event, `{"seq","type","id","ts","lease","payload"}` with the payload byte for byte as stored.
Empty lines are keep-alives. A line `{"error":...}` at the end says why a followed log stopped.
"""

from __future__ import annotations

import json
from typing import Any

from cowhand.session.events import Event


def line(event: Event) -> bytes:
    """One event as a line with its newline."""
    head = {
        "seq": event.seq,
        "type": event.type,
        "id": event.id,
        "ts": event.ts,
        "lease": event.lease,
    }
    payload = event.payload or b"null"
    if b"\n" in payload or b"\r" in payload:
        payload = json.dumps(json.loads(payload), ensure_ascii=False).encode()
    return json.dumps(head, ensure_ascii=False).encode()[:-1] + b', "payload": ' + payload + b"}\n"


def error_line(envelope: dict[str, Any]) -> bytes:
    """The last line of a followed log that failed."""
    return json.dumps({"error": envelope["error"]}, ensure_ascii=False).encode() + b"\n"
