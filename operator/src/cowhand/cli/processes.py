"""The commands that start a process of Cowhand inside its image (`cowhand operator`, `cowhand harness`, ...).

Each package is imported only when its own command runs, so that a process loads only what it needs: the proxy
that sits beside untrusted code holds no Kubernetes client, and takes 30 MB instead of 80.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from cowhand import settings
from cowhand.telemetry import logging

Run: TypeAlias = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True)
class Process:
    """A long-running command: `cowhand.<package>.run.run(settings)`."""

    package: str
    load: Callable[[], Any]
    help: str


PROCESSES = {
    "operator": Process(
        "controller", settings.operator, "reconcile the custom resources (needs a leader Lease)"
    ),
    "harness": Process("harness", settings.harness, "run the sessions of one tenant"),
    "proxy": Process("proxy", settings.proxy, "the credential proxy of a harness or sandbox pod"),
    "broker": Process("broker", settings.broker, "give proxies short-lived credentials"),
    "gateway": Process("gateway", settings.gateway, "the HTTP API for people and clients"),
    "archive": Process(
        "archive", settings.archive, "keep large payloads and old events in a volume or a bucket"
    ),
    "bootstrap": Process(
        "bootstrap", settings.bootstrap, "make CA, certificates and store users where missing"
    ),
}

EGRESS = {
    "egress-rules": ("run_rules", "load the packet filter of a sandbox pod (init container)"),
    "egress-verify": ("run_verify", "prove from inside that the filter holds (init container)"),
}


def add_parsers(commands: Any) -> None:
    """Add the process commands to the subparsers of the grammar."""
    for name, process in PROCESSES.items():
        sub = commands.add_parser(
            name, help=process.help, description=f"{process.help}. Settings: COWHAND_* variables."
        )
        sub.set_defaults(handler=_run_process)
    for name, (_, text) in EGRESS.items():
        commands.add_parser(name, help=text, description=text).set_defaults(handler=_run_egress)


def _run_egress(args: argparse.Namespace) -> int:
    logging.setup(args.command)
    function, _ = EGRESS[args.command]
    result: int = getattr(importlib.import_module("cowhand.proxy.egress"), function)()
    return result


def _run_process(args: argparse.Namespace) -> int:
    process = PROCESSES[args.command]
    loaded = process.load()
    logging.setup(args.command)
    run: Run = importlib.import_module(f"cowhand.{process.package}.run").run
    return asyncio.run(until_terminated(run, loaded))


async def until_terminated(run: Run, loaded: Any) -> int:
    """Await `run(loaded)`; SIGTERM and SIGINT cancel it, and that is a clean end (exit code 0).

    A process that drains in its own way installs its own handlers in `run`; they replace these.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(run(loaded))
    stopped = asyncio.Event()

    def stop() -> None:
        stopped.set()
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not stopped.is_set():
            raise
    return 0
