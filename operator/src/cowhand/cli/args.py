"""The grammar of the command line. Imports nothing heavy: every process goes through it at start."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cowhand import __version__
from cowhand.cli import processes

Handler = Callable[[argparse.Namespace], int]

EPILOG = """SESSION is the name of an AgentSession, or a session id (sesn_...).
Exit codes: 0 done, 1 failed, 2 wrong use, 3 the turn waits for an approval; exec passes on the command's own."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line.

    `handler` of the answer is the function that runs the command; `argv` is what stands behind `--`,
    which argparse must not look at (only `exec` takes it).
    """
    own, rest = list(argv), []
    if "--" in own:
        cut = own.index("--")
        own, rest = own[:cut], own[cut + 1 :]
    grammar = parser()
    args = grammar.parse_args(own)
    if rest and args.command != "exec":
        grammar.error(f"unexpected arguments after --: {' '.join(rest)}")
    args.argv = rest
    return args


def parser() -> argparse.ArgumentParser:
    """The whole grammar."""
    root = argparse.ArgumentParser(
        prog="cowhand", description="Managed agents on your own Kubernetes.", epilog=EPILOG
    )
    root.add_argument("--version", action="version", version=f"cowhand {__version__}")
    _globals(root, {})
    shared = argparse.ArgumentParser(add_help=False)
    # The same flags after the command; absent there, the value from before the command stays.
    _globals(shared, {"default": argparse.SUPPRESS})
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _people(commands, shared)
    processes.add_parsers(commands)
    return root


def _globals(into: argparse.ArgumentParser, suppress: dict[str, Any]) -> None:
    group = into.add_argument_group("where and as whom")

    def flag(*names: str, default: str = "", text: str) -> None:
        group.add_argument(*names, **{"default": default, "help": text, **suppress})

    flag("-n", "--namespace", text="namespace of the session (default: of the current context)")
    flag("--kubeconfig", text="as for kubectl")
    flag("--context", text="as for kubectl")
    flag("--system-namespace", default="cowhand-system", text="where Cowhand is installed")
    flag(
        "--service-account",
        default="cowhand-cli",
        text="whose token to use (default cowhand-cli, made with `kubectl create token`)",
    )
    flag("--token-file", text="file with a token for the audience cowhand-gateway, instead")
    flag("--gateway", text="https://host:port of the gateway, instead of a port-forward")
    flag("--ca-file", text="CA of the gateway's certificate, instead of ConfigMap cowhand-ca")


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)


def _lazy(module: str, function: str) -> Handler:
    def handler(args: argparse.Namespace) -> int:
        # The port-forward is a process of ours: whatever ends us must unwind, and end it too.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _leave)
        loaded = importlib.import_module(f"cowhand.cli.{module}")
        result: int = getattr(loaded, function)(args)
        return result

    return handler


def _drawing(into: argparse.ArgumentParser) -> None:
    into.add_argument("--full", action="store_true", help="whole outputs, whole lines")
    into.add_argument("-v", "--verbose", action="store_true", help="internal events too")
    into.add_argument(
        "--no-previews", action="store_true", help="no text that Claude is still writing"
    )
    into.add_argument("--color", choices=("auto", "always", "never"), default="auto")


def _people(commands: Any, shared: argparse.ArgumentParser) -> None:
    def command(name: str, function: str, text: str, module: str = "commands") -> Any:
        sub = commands.add_parser(name, help=text, description=text, parents=[shared])
        sub.set_defaults(handler=_lazy(module, function))
        return sub

    run = command("run", "run", "start a session and follow its first turn")
    run.add_argument("-f", "--file", default="", help="manifest to apply (- for standard input)")
    run.add_argument("-m", "--message", default="", help="first message, instead of a manifest")
    run.add_argument("--agent", default="", help="name of an Agent")
    run.add_argument("--model", default="", help="model of an agent made on the spot")
    run.add_argument("--environment", default="", help="name of an Environment")
    run.add_argument("--name", default="", help="name of the AgentSession (default: a new one)")
    ending = run.add_mutually_exclusive_group()
    ending.add_argument("--wait", action="store_true", help="print only the final answer")
    ending.add_argument("-d", "--detach", action="store_true", help="do not follow")
    _drawing(run)

    get = command("get", "get", "list sessions, or show one")
    get.add_argument("session", nargs="?", default="", metavar="SESSION")
    get.add_argument("-A", "--all-namespaces", action="store_true")

    events = command("events", "events", "show the events of a session")
    events.add_argument("session", metavar="SESSION")
    events.add_argument("-f", "--follow", action="store_true", help="go on with new events")
    events.add_argument("--until-idle", action="store_true", help="follow to the end of the turn")
    form = events.add_mutually_exclusive_group()
    form.add_argument("--raw", action="store_true", help="the log itself, a JSON object a line")
    form.add_argument("--json", action="store_true", help="events of the Managed Agents API")
    events.add_argument(
        "--from",
        "--start",
        type=int,
        default=1,
        dest="start",
        metavar="N",
        help="first position; negative: from the end (--from -20: the last 20 events)",
    )
    events.add_argument("--to", type=int, default=None, metavar="N", help="last position")
    events.add_argument(
        "--type",
        action="append",
        default=[],
        metavar="TYPE",
        help="only events of this type of the log, for example tool.result; may be repeated",
    )
    _drawing(events)

    send = command("send", "send", "send a message to a session")
    send.add_argument("session", metavar="SESSION")
    send.add_argument("text", metavar="TEXT", help="the message (- for standard input)")
    send.add_argument("--interrupt", action="store_true", help="instead of what runs now")
    send.add_argument(
        "--system",
        default="",
        metavar="TEXT",
        help="a system message with it (needs its own right)",
    )

    result = command("answer", "answer", "answer a call of a custom tool")
    result.add_argument("session", metavar="SESSION")
    result.add_argument("text", metavar="TEXT", help="the result (- for standard input)")
    result.add_argument(
        "--call", default="", metavar="TOOL_USE_ID", help="which call, if several wait"
    )
    result.add_argument("--error", action="store_true", help="the tool failed: TEXT says why")

    stop = command("interrupt", "interrupt", "end the running turn of a session")
    stop.add_argument("session", metavar="SESSION")

    for name, text in (("approve", "allow"), ("deny", "refuse")):
        answer = command(name, name, f"{text} a tool call that waits for approval")
        answer.add_argument("session", metavar="SESSION")
        answer.add_argument("tool_use_id", nargs="?", default="", metavar="TOOL_USE_ID")
        answer.add_argument("--all", action="store_true", help="all calls that wait")
        if name == "deny":
            answer.add_argument("--reason", default="", help="what Claude is told")

    logs = command("logs", "logs", "container logs of what works for a session")
    logs.add_argument("session", metavar="SESSION")
    logs.add_argument("--sandbox", action="store_true", help="the sandbox pod, not the harness")
    logs.add_argument("-c", "--container", default="", help="container of the pod")
    logs.add_argument("-f", "--follow", action="store_true")
    logs.add_argument("--tail", type=int, default=200, metavar="N", help="lines (-1 for all)")
    logs.add_argument(
        "--every-session", action="store_true", help="lines about other sessions of the pod too"
    )

    execute = command("exec", "execute", "run a command in a sandbox (it is logged)")
    execute.usage = "cowhand exec [options] SANDBOX|SESSION -- COMMAND"
    execute.add_argument("target", metavar="SANDBOX|SESSION")
    execute.add_argument("--hand", default="", help="which hand of the session")
    execute.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS")

    _records(command)
    _backups(command)

    command("doctor", "doctor", "check the installation and say what to do", "doctor")


def _records(command: Callable[..., Any]) -> None:
    """Sessions as files, and as the beginning of others."""
    fork = command("fork", "fork", "a new session that goes on from a position of another", "forks")
    fork.add_argument("session", metavar="SESSION")
    fork.add_argument(
        "--at",
        type=_count,
        default=None,
        metavar="SEQ",
        help="last position to copy, between two turns (default: the newest such)",
    )
    fork.add_argument("--name", default="", help="name of the new AgentSession")
    fork.add_argument("-m", "--message", default="", help="what to say first")
    fork.add_argument("-d", "--detach", action="store_true", help="do not wait, do not follow")
    _drawing(fork)

    export = command("export", "export", "write a session to a file, byte for byte", "records")
    export.add_argument("session", metavar="SESSION")
    export.add_argument(
        "-o", "--output", default="-", metavar="FILE", help="default: standard output"
    )

    verify = command("verify", "check", "check what a log promises, offline", "records")
    verify.add_argument("session", metavar="SESSION|FILE")
    verify.add_argument("--json", action="store_true", help="the report as JSON")

    replay = command("replay", "show", "show the exact request that Claude got", "records")
    replay.add_argument("session", metavar="SESSION|FILE")
    which = replay.add_mutually_exclusive_group()
    which.add_argument(
        "--request", type=_count, default=0, metavar="N", help="number of the request"
    )
    which.add_argument(
        "--at", type=_count, default=0, metavar="SEQ", help="the newest request at this position"
    )
    form = replay.add_mutually_exclusive_group()
    form.add_argument("--messages", action="store_true", help="only the messages, for people")
    form.add_argument("--json", action="store_true", help="indented, instead of the exact bytes")


def _backups(command: Callable[..., Any]) -> None:
    """All sessions of a namespace."""
    backup = command("backup", "backup", "write all sessions of a namespace to a file", "backups")
    backup.add_argument("file", metavar="FILE")

    restore = command(
        "restore", "restore", "bring sessions back from a backup or export", "backups"
    )
    restore.add_argument("file", metavar="FILE")
    restore.add_argument("--dry-run", action="store_true", help="only say what would be done")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("counts from 1")
    return value
