"""Logs as JSON lines on stderr, the same in every process.

`setup` is called once, by the `run` of a process; everybody else uses the standard `logging` with
`logging.getLogger(__name__)` and, where one thing is worked on for a while, `bound(logger, session=...)`.
Levels: INFO never holds a prompt, a tool's output or a secret.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, TextIO

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One line of JSON per record: `ts` (RFC 3339, UTC), `level`, `process`, `logger`, `msg`, extras, `error`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The record as compact JSON; values that JSON does not know become their `str`."""
        ts = datetime.fromtimestamp(record.created, tz=UTC)
        line: dict[str, Any] = {
            "ts": ts.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "msg": record.getMessage(),
        }
        for key, value in vars(record).items():
            if key not in _STANDARD and not key.startswith("_") and key not in line:
                line[key] = value
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False, separators=(",", ":"))


class Bound(logging.LoggerAdapter[logging.Logger]):
    """A logger that adds fixed key-values to each record."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Merge our key-values with the call's own `extra`, which wins."""
        merged = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        return msg, {**kwargs, "extra": merged}


def bound(logger: logging.Logger | Bound, **kv: object) -> Bound:
    """A logger whose records carry `kv` (and what an already bound logger carries)."""
    if isinstance(logger, Bound):
        inherited: Mapping[str, object] = logger.extra or {}
        return Bound(logger.logger, {**inherited, **kv})
    return Bound(logger, kv)


def setup(process: str, level: str = "INFO", *, stream: TextIO | None = None) -> None:
    """Send all logs of this process to stderr as JSON lines.

    Args:
        process: name of the process, in each line.
        level: `DEBUG`, `INFO`, `WARNING` or `ERROR`.
        stream: for tests; default stderr.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(process))
    root = logging.getLogger()
    for old in tuple(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    logging.getLogger("aiohttp.access").setLevel("WARNING")
