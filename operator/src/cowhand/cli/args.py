"""The grammar of the command line. Imports nothing heavy: every process goes through it at start."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cowhand import __version__
from cowhand.cli import processes


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; `handler` of the answer is the function that runs the command."""
    return parser().parse_args(argv)


def parser() -> argparse.ArgumentParser:
    """The whole grammar."""
    root = argparse.ArgumentParser(
        prog="cowhand", description="Managed agents on your own Kubernetes."
    )
    root.add_argument("--version", action="version", version=f"cowhand {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    processes.add_parsers(commands)
    return root
