"""Between the store's bytes and our types. Pure.

Payloads pass through untouched. Hand records begin with `{"state":"..","owner_epoch":N`: the scripts compare
the two without decoding JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, cast

from cowhand.errors import LogIncompatible
from cowhand.session.events import Event
from cowhand.session.log import HandRecord, Mode, SessionMeta, SessionState, State

_RECORD_FIELDS = {field.name for field in fields(HandRecord)}


def meta_fields(meta: SessionMeta) -> list[str]:
    """The fixed part of the meta hash as `field, value, ...`."""
    return [
        *("ns", meta.namespace, "name", meta.name, "uid", meta.uid, "tomb", meta.tombstone),
        *("model", dump(meta.model), "st", "{}"),
    ]


def session_state(session_id: str, namespace: str, raw: Mapping[bytes, bytes]) -> SessionState:
    """A meta hash as `SessionState`.

    Args:
        session_id: whose hash it is.
        namespace: the tenant in whose keys it stands: what the hash says of itself must agree, because the
            tenant's own login can write it.
        raw: the hash.

    Raises:
        LogIncompatible: it is not a meta hash of this session.
    """
    try:
        text = {key.decode(): value.decode() for key, value in raw.items()}
        model, status = json.loads(text["model"]), json.loads(text["st"])
        if text["ns"] != namespace:
            raise ValueError("it names another namespace")
        budget = json.loads(text.get("bud", "{}"))
        if not all(isinstance(part, dict) for part in (model, status, budget)):
            raise ValueError("model, st and bud must be objects")
        meta = SessionMeta(
            session_id=session_id,
            namespace=namespace,
            name=text["name"],
            uid=text["uid"],
            model=model,
            tombstone=text["tomb"],
        )
        return SessionState(
            meta=meta,
            state=cast(State, text["state"]),
            mode=cast(Mode, text["mode"]),
            lease=text["lease"],
            epoch=int(text["epoch"]),
            next_seq=int(text["next"]),
            status=status,
            created_ms=int(text["created"]),
            budget=budget,
            regressed=_regressed(text.get("reg", "")),
            accepted=int(text.get("acc", "0")),
        )
    except (KeyError, ValueError, RecursionError) as err:
        why = f"it lacks {err}" if isinstance(err, KeyError) else str(err)
        raise LogIncompatible(f"the meta hash of {session_id!r} is not valid: {why}") from err


def _regressed(text: str) -> tuple[int, int] | None:
    seen, _, position = text.partition(":")
    return (int(seen), int(position)) if text else None


def event(entry: Sequence[Any]) -> Event:
    """One entry of XRANGE: `[id, [field, value, ...]]`."""
    entry_id, flat = entry
    values = dict(zip(flat[::2], flat[1::2], strict=True))
    try:
        return Event(
            seq=int(entry_id.split(b"-")[0]),
            type=values[b"t"].decode(),
            id=values[b"e"].decode(),
            ts=int(values[b"ts"]),
            lease=values[b"w"].decode(),
            payload=bytes(values[b"p"]),
        )
    except (KeyError, ValueError) as err:
        raise LogIncompatible(f"log entry {entry_id!r} is not an event: {err}") from err


def pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """A flat reply `[field, value, ...]` as a dict."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def dump(value: object) -> str:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def record_json(record: HandRecord) -> str:
    """A hand record as it is stored."""
    body = asdict(record)
    return dump({"state": body.pop("state"), "owner_epoch": body.pop("owner_epoch"), **body})


def record(raw: bytes | None) -> HandRecord | None:
    """A stored hand record; fields of a newer release are left out.

    Raises:
        LogIncompatible: it is something else (a tenant's login can write it).
    """
    if raw is None:
        return None
    try:
        body = json.loads(raw)
        found = HandRecord(**{key: value for key, value in body.items() if key in _RECORD_FIELDS})
    except (ValueError, TypeError, AttributeError, RecursionError) as err:
        raise LogIncompatible("a hand record is not valid") from err
    for field in fields(HandRecord):
        wanted = int if field.name in ("instance", "owner_epoch") else str
        if type(getattr(found, field.name)) is not wanted:
            raise LogIncompatible(f"the field {field.name} of a hand record is not valid")
    return found
