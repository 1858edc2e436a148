"""Backups of a namespace, and sessions that come back from one: an extension for `cowhand backup` and `restore`.

Both stream: a session may be larger than this process may grow.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from typing import Any, Final

from cowhand.errors import LogIncompatible, SessionNotFound, UserError
from cowhand.gateway.log import export_lines
from cowhand.session import backup
from cowhand.session.events import Event
from cowhand.session.export import Header, Reader
from cowhand.session.log import Restored, SessionLog

MAX_LINE: Final = 64 * 1024 * 1024
"""Longest line of an export in bytes: an event of the largest size, however its JSON escapes it."""


async def backup_lines(log: SessionLog, namespace: str, now_ms: int) -> AsyncIterator[bytes]:
    """The lines of a backup.

    A session that is deleted meanwhile, or that cannot be read, is skipped and named; the others are not lost with it.

    Args:
        log: of the namespace.
        namespace: a tenant.
        now_ms: milliseconds since the epoch.

    Raises:
        StoreUnavailable, ArchiveUnavailable: the backup is not whole; it lacks its last line then.
    """
    yield backup.begin(namespace, now_ms)
    count = 0
    async for session_id in log.session_ids():
        try:
            state = await log.get_session(session_id)
            async for line in export_lines(log, state, now_ms):
                yield line
        except SessionNotFound:
            yield backup.skipped(session_id, "it was deleted meanwhile")
        except LogIncompatible as err:
            yield backup.skipped(session_id, str(err))
        else:
            count += 1
    yield backup.end(count)


async def restore(
    log: SessionLog, session_id: str, chunks: AsyncIterable[bytes], *, dry_run: bool
) -> Restored:
    """Bring a session back from the lines of its export.

    Raises:
        ExportDamaged: the export is torn; nothing was changed.
        UserError: it is of another session or namespace, or the store has another log.
    """
    reader = Reader()
    lines = _lines(chunks)
    header = await _header(reader, lines)
    if header.session_id != session_id:
        raise UserError(f"the export is of {header.session_id}, the path says {session_id}")

    async def events() -> AsyncIterator[Event]:
        async for line in lines:
            event = reader.feed(line)
            if event is not None:
                yield event
        reader.finish()

    return await log.restore_session(header, events(), dry_run=dry_run)


async def _header(reader: Reader, lines: AsyncIterator[bytes]) -> Header:
    async for line in lines:
        reader.feed(line)
        break
    if reader.header is None:
        raise UserError("the body is empty: send the lines of an export")
    return reader.header


async def _lines(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Whole lines with their newline; the last one may lack it."""
    begun: list[bytes] = []
    size = 0
    async for chunk in chunks:
        *whole, rest = chunk.split(b"\n")
        for piece in whole:
            yield b"".join([*begun, piece, b"\n"])
            begun, size = [], 0
        begun.append(rest)
        size += len(rest)
        if size > MAX_LINE:
            raise UserError(f"a line of the export has more than {MAX_LINE} bytes")
    if size:
        yield b"".join(begun)


def as_json(session_id: str, done: Restored, *, dry_run: bool) -> dict[str, Any]:
    """The answer to a restore."""
    return {
        "session": session_id,
        "outcome": done.outcome,
        "before": done.before,
        "last": done.last,
        "dry_run": dry_run,
    }
