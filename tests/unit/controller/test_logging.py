"""Log lines: one JSON object each, with the key-values of what is worked on."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from cowhand.telemetry.logging import bound, setup


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    old, level = list(root.handlers), root.level
    stream = io.StringIO()
    setup("test", "INFO", stream=stream)
    yield stream
    root.handlers[:] = old
    root.setLevel(level)


def test_lines_carry_what_is_bound(lines: io.StringIO) -> None:
    logger = bound(bound(logging.getLogger("x"), session="s"), hand="h")
    logger.info("made %d\nlines", 2, extra={"hand": "other"})
    logger.debug("not shown")
    (line,) = lines.getvalue().splitlines()
    found = json.loads(line)
    assert (found["msg"], found["process"], found["level"]) == ("made 2\nlines", "test", "info")
    assert (found["session"], found["hand"]) == ("s", "other")
    assert found["ts"].endswith("Z")


def test_errors_and_odd_values_stay_one_line(lines: io.StringIO) -> None:
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("x").exception("failed", extra={"what": object()})
    (line,) = lines.getvalue().splitlines()
    assert "ValueError: no" in json.loads(line)["error"]
