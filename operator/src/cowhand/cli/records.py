"""`cowhand export`, `verify` and `replay`: a session as a file, and what can be told from it offline."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from cowhand.cli import connection
from cowhand.cli.client import Client
from cowhand.cli.connection import session_id
from cowhand.cli.render import safe
from cowhand.errors import LogIncompatible, UserError
from cowhand.harness.replay import Replayed, replay
from cowhand.harness.verify import INVARIANTS, Report, verify
from cowhand.session.export import Export, Header, Reader, decode

STDOUT: Final = "-"


def fetch(client: Client, identity: str) -> Iterator[bytes]:
    """The lines of a session's export, with their newlines."""
    for line in client.lines(f"/v1/sessions/{identity}/export", {}):
        yield line + b"\n"


def export(args: argparse.Namespace) -> int:
    """`cowhand export`."""
    to = connection.target(args)
    identity = session_id(to, args.session)
    with connection.connect(to) as client:
        header = write(fetch(client, identity), args.output)
    print(f"{header.last_seq} events of {header.session_id}", file=sys.stderr)
    return 0


def write(lines: Iterator[bytes], output: str) -> Header:
    """Write an export to a file (whole or not at all), or to standard output.

    Raises:
        UserError: the export broke off, or the file cannot be written.
    """
    reader = Reader()
    with sink(output) as file:
        for line in lines:
            reader.feed(line)
            file.write(line)
        return reader.finish()


@contextlib.contextmanager
def sink(output: str) -> Iterator[BinaryIO]:
    """A file that appears whole or not at all, or standard output. Raises UserError."""
    if output == STDOUT:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    part = Path(f"{output}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(output)
    except OSError as err:
        raise UserError(f"{output}: {err.strerror or err}") from err
    finally:
        part.unlink(missing_ok=True)


def load(args: argparse.Namespace) -> Export:
    """The export that a command line names: a file, or a session that is fetched.

    Raises:
        UserError: the file is not a whole export.
    """
    name = args.session
    if looks_like_a_file(name):
        try:
            with Path(name).open("rb") as file:
                return decode(file)
        except OSError as err:
            raise UserError(f"{name}: {err.strerror or err}") from err
    to = connection.target(args)
    identity = session_id(to, name)
    with connection.connect(to) as client:
        return decode(fetch(client, identity))


def looks_like_a_file(name: str) -> bool:
    """Names of sessions have neither a slash nor our ending."""
    return "/" in name or name.endswith(".ndjson") or Path(name).is_file()


def check(args: argparse.Namespace) -> int:
    """`cowhand verify`: 0 when nothing is broken, 1 otherwise."""
    found = load(args)
    report = verify(found)
    if args.json:
        print(json.dumps(as_json(found, report), indent=2))
    else:
        print("\n".join(as_text(found, report)))
    return 0 if report.ok else 1


def as_json(found: Export, report: Report) -> dict[str, object]:
    """A report for programs."""
    return {
        "session": found.header.session_id,
        "events": found.header.last_seq,
        "ok": report.ok,
        "violations": [vars(item) for item in report.violations],
        "checked": dict(report.checked),
        "unchecked": dict(report.unchecked),
    }


def as_text(found: Export, report: Report) -> Iterator[str]:
    """A report for people."""
    yield f"{found.header.session_id}: {found.header.last_seq} events"
    for name, meaning in INVARIANTS.items():
        mine = [item for item in report.violations if item.invariant == name]
        if name in report.unchecked and not mine:
            continue
        yield f"{'✗' if mine else '✓'} {name:<4} {meaning} ({report.checked.get(name, 0)} checked)"
        for item in mine:
            yield f"       at {item.seq}: {safe(item.message)}"
        for remedy in dict.fromkeys(item.remedy for item in mine):
            yield f"       {remedy}"
    for name, why in report.unchecked.items():
        yield f"- {name:<4} not checked: {why}"
    count = len(report.violations)
    yield "nothing is broken" if report.ok else f"{count} violation{'s'[: count > 1]}"


def show(args: argparse.Namespace) -> int:
    """`cowhand replay`: 1 when a request that is shown was not sent like that."""
    found = load(args)
    try:
        made = list(replay(found.header.session_id, found.events))
    except LogIncompatible as err:
        raise UserError(f"the log cannot be replayed: {err}") from err
    if not args.request and not args.at:
        print("\n".join(listing(made)))
        return 0 if all(one.matches for one in made) else 1
    one = choose(made, args.request, args.at)
    if args.messages:
        print("\n".join(conversation(one)))
    elif args.json:
        print(json.dumps(json.loads(one.body), indent=2, ensure_ascii=sys.stdout.isatty()))
    else:
        sys.stdout.buffer.write(one.body + b"\n" * sys.stdout.isatty())
        sys.stdout.buffer.flush()
    said = (
        f"its SHA-256 {one.rebuilt_sha} is the logged one"
        if one.matches
        else f"NOT what was sent: logged {one.logged_sha}, rebuilt {one.rebuilt_sha or 'too little'}"
    )
    print(f"{_title(one)}: {said}", file=sys.stderr)
    return 0 if one.matches else 1


def _title(one: Replayed) -> str:
    return f"request {one.n}, attempt {one.attempt}, event {one.seq}"


def choose(made: list[Replayed], request: int, at: int) -> Replayed:
    """The request with this number (its newest attempt), or the newest one up to a position.

    Raises:
        UserError: there is none.
    """
    fitting = [one for one in made if (one.n == request if request else one.seq <= at)]
    if not fitting:
        numbers = f"1 to {made[-1].n}" if made else "none yet"
        which = f"request {request}" if request else f"request up to position {at}"
        raise UserError(f"there is no {which}: the session has requests {numbers}")
    return fitting[-1]


def listing(made: list[Replayed]) -> Iterator[str]:
    """One line for each request."""
    yield f"{'REQUEST':>7} {'ATTEMPT':>7} {'EVENT':>6} {'HORIZON':>7} {'MESSAGES':>8} {'BYTES':>8}  HASH"
    for one in made:
        said = "as logged" if one.matches else "NOT AS LOGGED"
        yield (
            f"{one.n:>7} {one.attempt:>7} {one.seq:>6} {one.horizon:>7} {len(one.messages):>8} "
            f"{len(one.body):>8}  {said}"
        )


def conversation(one: Replayed) -> Iterator[str]:
    """The messages of a request for people: role, then each block."""
    for message in json.loads(one.body)["messages"]:
        yield f"── {message['role']}"
        for block in message["content"]:
            if block["type"] == "text":
                yield safe(block["text"])
            else:
                yield safe(json.dumps(block, ensure_ascii=False))
