"""`cowhand backup` and `cowhand restore`: all sessions of a namespace as a file, and back again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from cowhand.cli import connection
from cowhand.cli.client import Client, Refused
from cowhand.cli.connection import Target
from cowhand.cli.records import sink
from cowhand.cli.render import safe
from cowhand.errors import Denied, UserError
from cowhand.session.backup import Index, Indexer, Part

CHUNK: Final = 256 * 1024
RESTORE_S: Final = 600.0
"""Longest wait for one session to be written."""


def backup(args: argparse.Namespace) -> int:
    """`cowhand backup`: 1 when a session could not be read."""
    to = connection.target(args)
    indexer = Indexer()
    with connection.connect(to) as client, sink(args.file) as file:
        for line in client.lines(f"/v1/namespaces/{to.namespace}/backup", {}):
            indexer.feed(line + b"\n")
            file.write(line + b"\n")
        index = indexer.finish()
    _say_skipped(index)
    print(f"{len(index.parts)} sessions of namespace {index.namespace}", file=sys.stderr)
    return 1 if any("deleted" not in why for why in index.skipped.values()) else 0


def _say_skipped(index: Index) -> None:
    for session_id, why in index.skipped.items():
        print(f"not in the backup: {session_id}: {safe(why)}", file=sys.stderr)


def restore(args: argparse.Namespace) -> int:
    """`cowhand restore`: a line for each session; 1 when one was refused."""
    index = read(args.file)
    if args.namespace and args.namespace != index.namespace:
        raise UserError(
            f"{args.file} is of namespace {index.namespace}: it can be restored there only, not in "
            f"{args.namespace}"
        )
    to: Target = replace(connection.target(args), namespace=index.namespace)
    _say_skipped(index)
    refused = 0
    with connection.connect(to) as client:
        for part in index.parts:
            try:
                print(_restore(client, args.file, part, dry_run=args.dry_run))
            except (UserError, Refused) as err:
                refused += 1
                print(f"{part.header.session_id}  REFUSED    {safe(str(err))}")
            except Denied as err:
                raise Denied(
                    f"{err}. Restoring needs `create agentsessions/restore`, which no role has by "
                    "default: bind the ClusterRole cowhand-restore in the namespace"
                ) from err
    if args.dry_run:
        print("nothing was changed (--dry-run)", file=sys.stderr)
    return 1 if refused else 0


def read(name: str) -> Index:
    """What a backup (or a single export) holds, every checksum checked. Raises UserError."""
    indexer = Indexer()
    try:
        with Path(name).open("rb") as file:
            for line in file:
                indexer.feed(line)
    except OSError as err:
        raise UserError(f"{name}: {err.strerror or err}") from err
    return indexer.finish()


def _restore(client: Client, name: str, part: Part, *, dry_run: bool) -> str:
    session_id = part.header.session_id
    answer = client.upload(
        f"/v1/sessions/{session_id}/restore",
        lambda: slices(name, part.start, part.length),
        part.length,
        query={"dry_run": "true"} if dry_run else {},
        timeout=RESTORE_S,
    )
    outcome, before, last = answer["outcome"], answer["before"], answer["last"]
    said = {
        "restored": f"{last} events",
        "extended": f"events {before + 1} to {last} came back",
        "unchanged": f"the store has its {before} events",
    }
    return f"{session_id}  {outcome:<9}  {said.get(outcome, '')}"


def slices(name: str, start: int, length: int) -> Iterator[bytes]:
    """The bytes of a part of a file."""
    with Path(name).open("rb") as file:
        file.seek(start)
        while length > 0 and (found := file.read(min(CHUNK, length))):
            length -= len(found)
            yield found
