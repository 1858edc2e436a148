"""The commands of `cowhand` for people; each takes the parsed command line and answers the exit code."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from typing import Any, Final

from cowhand.cli import connection, table, watch
from cowhand.cli.connection import Target, session_id
from cowhand.cli.kubectl import Json
from cowhand.errors import CowhandError, SessionNotFound, UserError

SESSIONS: Final = "agentsessions.cowhand.dev"
LABEL: Final = "app.kubernetes.io/component"


def run(args: argparse.Namespace) -> int:
    """`cowhand run`: apply an AgentSession, then follow it to the end of its turn."""
    to = connection.target(args)
    if args.file:
        if args.message or args.agent or args.model or args.environment or args.name:
            raise UserError(
                "-f FILE holds the whole AgentSession: leave out --message and the like"
            )
        stdin = sys.stdin.read() if args.file == "-" else None
        applied = to.kubectl.json("apply", "-f", args.file, namespace=args.namespace, stdin=stdin)
    else:
        manifest = json.dumps(manifest_of(args))
        applied = to.kubectl.json("create", "-f", "-", namespace=to.namespace, stdin=manifest)
    name, namespace = session_in(applied, to.namespace)
    print(f"agentsession/{name} in namespace {namespace}", file=sys.stderr)
    if args.detach:
        return 0
    to = Target(**{**vars(to), "namespace": namespace})
    identity = session_id(to, name)
    if args.wait:
        return watch.wait_quietly(to, identity)
    style = watch.style(args.color, full=args.full, verbose=args.verbose)
    options = watch.Options(
        "text", follow=True, until_idle=True, start=1, style=style, previews=not args.no_previews
    )
    return watch.show(to, identity, options)


def manifest_of(args: argparse.Namespace) -> Json:
    """The AgentSession that the flags of `cowhand run` describe. Raises UserError."""
    if not args.message:
        raise UserError("give -f FILE or --message TEXT")
    if bool(args.agent) == bool(args.model):
        raise UserError(
            "give one of --agent NAME (an Agent) and --model ID (an agent made on the spot)"
        )
    spec: Json = {"message": args.message}
    if args.agent:
        spec["agentRef"] = {"name": args.agent}
    else:
        spec["agent"] = {"model": {"id": args.model}}
    if args.environment:
        spec["environmentRef"] = {"name": args.environment}
    metadata = {"name": args.name} if args.name else {"generateName": "run-"}
    return {
        "apiVersion": "cowhand.dev/v1alpha1",
        "kind": "AgentSession",
        "metadata": metadata,
        "spec": spec,
    }


def session_in(applied: Json, namespace: str) -> tuple[str, str]:
    """Name and namespace of the one AgentSession in what kubectl applied. Raises UserError."""
    items = applied["items"] if applied.get("kind") == "List" else [applied]
    found = [item["metadata"] for item in items if item.get("kind") == "AgentSession"]
    if len(found) != 1:
        names = ", ".join(item["name"] for item in found) or "none"
        raise UserError(
            f"the file was applied, but holds {len(found)} AgentSessions ({names}) where one can be "
            "followed: `cowhand events -f NAME` follows one"
        )
    return found[0]["name"], found[0].get("namespace") or namespace


def get(args: argparse.Namespace) -> int:
    """`cowhand get`: a table of the AgentSessions, or one in detail."""
    to = connection.target(args)
    if not args.session:
        where = ["--all-namespaces"] if args.all_namespaces else []
        items = to.kubectl.json("get", SESSIONS, *where, namespace=to.namespace)["items"]
        print(table.sessions(items, time.time(), namespaces=args.all_namespaces))
        return 0
    if args.session.startswith("sesn_"):
        identity = session_id(to, args.session)
        with connection.connect(to) as client:
            print(table.session_object(client.call("GET", f"/v1/sessions/{identity}")))
        return 0
    found = to.kubectl.get(SESSIONS, args.session, to.namespace)
    if found is None:
        raise UserError(f"there is no AgentSession {args.session} in namespace {to.namespace}")
    print(table.session(found, time.time()))
    return 0


def events(args: argparse.Namespace) -> int:
    """`cowhand events`."""
    form = "raw" if args.raw else "json" if args.json else "text"
    _check_range(args, form)
    to = connection.target(args)
    style = watch.style(args.color, full=args.full, verbose=args.verbose)
    options = watch.Options(
        form, args.follow, args.until_idle, args.start, style, args.to, tuple(args.type),
        previews=not args.no_previews,
    )  # fmt: skip
    return watch.show(to, session_id(to, args.session), options)


def _check_range(args: argparse.Namespace, form: str) -> None:
    """Positions and filters of `cowhand events`. Raises UserError."""
    if args.start == 0 or args.to == 0:
        raise UserError("--from, --to: positions count from 1, and from the end with -1")
    following = args.follow or args.until_idle
    if args.to is not None and following:
        raise UserError("--to cannot be combined with -f or --until-idle")
    if form != "json":
        return
    if args.type or args.to is not None or args.start < 0:
        raise UserError("--type, --to and positions from the end work with text and --raw only")
    if args.start > 1 and not following:
        raise UserError("--from works with --json only together with -f; use --raw for positions")


def _send(args: argparse.Namespace, *events: Json) -> Json:
    to = connection.target(args)
    identity = session_id(to, args.session)
    with connection.connect(to) as client:
        path = f"/v1/sessions/{identity}/events"
        return client.call("POST", path, body={"events": list(events)})


def send(args: argparse.Namespace) -> int:
    """`cowhand send`: a message to the session; with --interrupt it replaces what runs."""
    text = sys.stdin.read() if args.text == "-" else args.text
    message = {"type": "user.message", "content": [{"type": "text", "text": text}]}
    first = [{"type": "user.interrupt"}] if args.interrupt else []
    last: list[Json] = []
    if args.system:
        last = [{"type": "system.message", "content": [{"type": "text", "text": args.system}]}]
    found = _send(args, *first, message, *last)
    print(f"sent {found['data'][len(first)]['id']}", file=sys.stderr)
    return 0


def interrupt(args: argparse.Namespace) -> int:
    """`cowhand interrupt`."""
    _send(args, {"type": "user.interrupt"})
    print("interrupt sent; `cowhand events -f` shows when the turn ends", file=sys.stderr)
    return 0


def approve(args: argparse.Namespace) -> int:
    """`cowhand approve`."""
    return _confirm(args, "allow", "")


def deny(args: argparse.Namespace) -> int:
    """`cowhand deny`."""
    return _confirm(args, "deny", args.reason)


def _confirm(args: argparse.Namespace, result: str, reason: str) -> int:
    to = connection.target(args)
    identity = session_id(to, args.session)
    with connection.connect(to) as client:
        named = [args.tool_use_id] if args.tool_use_id else []
        pending = _pending(client, identity, needed=not named)
        calls = named or waiting_calls(pending, "confirmation", every=args.all)
        answers = [
            {
                "type": "user.tool_confirmation",
                "tool_use_id": call,
                "result": result,
                **({"deny_message": reason} if reason else {}),
                **_digest(pending, call),
            }
            for call in calls
        ]
        client.call("POST", f"/v1/sessions/{identity}/events", body={"events": answers})
    for call in calls:
        print(f"{'approved' if result == 'allow' else 'denied'} {call}", file=sys.stderr)
    return 0


def _pending(client: Any, identity: str, *, needed: bool) -> list[Json]:
    """The calls that wait; whoever may approve but not read answers by id, without them."""
    try:
        session = client.call("GET", f"/v1/sessions/{identity}")
    except CowhandError:
        if needed:
            raise
        return []
    waiting: list[Json] = session["cowhand"]["pending"]
    return waiting


def _digest(pending: list[Json], call: str) -> Json:
    """The digest of the arguments as they stand in the log: an approval is for these only."""
    for waiting in pending:
        name = str(waiting["tool_use_id"])
        if waiting.get("input_sha256") and (name == call or name.endswith(f"_{call}")):
            return {"input_sha256": waiting["input_sha256"]}
    return {}


def answer(args: argparse.Namespace) -> int:
    """`cowhand answer`: the result of a custom tool."""
    text = sys.stdin.read() if args.text == "-" else args.text
    to = connection.target(args)
    identity = session_id(to, args.session)
    with connection.connect(to) as client:
        call = args.call
        if not call:
            pending = client.call("GET", f"/v1/sessions/{identity}")["cowhand"]["pending"]
            (call,) = waiting_calls(pending, "custom_tool", every=False)
        result = {
            "type": "user.custom_tool_result",
            "custom_tool_use_id": call,
            "content": [{"type": "text", "text": text}] if text.strip() else [],
            "is_error": args.error,
        }
        client.call("POST", f"/v1/sessions/{identity}/events", body={"events": [result]})
    print(f"answered {call}", file=sys.stderr)
    return 0


def waiting_calls(pending: list[Json], kind: str, *, every: bool) -> list[str]:
    """The calls to answer when the user named none. Raises UserError unless the choice is clear.

    Args:
        pending: as in the session object.
        kind: `confirmation` or `custom_tool`.
        every: several at once will do.
    """
    mine = [call for call in pending if call.get("kind", "confirmation") == kind]
    ids = [str(call["tool_use_id"]) for call in mine]
    custom = kind == "custom_tool"
    if not ids:
        what = "result of a custom tool" if custom else "approval"
        raise UserError(f"no tool call of this session waits for the {what}")
    if len(ids) > 1 and not every:
        rows = "\n".join(f"  {call['tool_use_id']}  {call['name']}" for call in mine)
        how = "with --call" if custom else "or answer them all with --all"
        raise UserError(f"{len(ids)} calls wait: name one {how}\n{rows}")
    return ids


def execute(args: argparse.Namespace) -> int:
    """`cowhand exec`: run a command in a sandbox; its exit code is ours."""
    words = args.argv
    if not words:
        raise UserError("give the command after --, as in `cowhand exec NAME -- ls -l`")
    to = connection.target(args)
    command = words[0] if len(words) == 1 else shlex.join(words)
    with connection.connect(to) as client:
        sandbox = _sandbox(to, client, args.target, args.hand)
        body: Json = {"command": command, "timeout_ms": round(args.timeout * 1000)}
        path = f"/v1/namespaces/{to.namespace}/sandboxes/{sandbox}/exec"
        result = client.call("POST", path, body=body, timeout=args.timeout + 60)
    sys.stdout.write(result["content"])
    sys.stdout.flush()
    code = result["exit_code"]
    return int(code) if code is not None else int(bool(result["is_error"]))


def _sandbox(to: Target, client: Any, target: str, hand: str) -> str:
    """Name of the Sandbox to run in: of a session's hand, or the target itself."""
    if not target.startswith("sesn_") and to.kubectl.get(SESSIONS, target, to.namespace) is None:
        return target
    session = client.call("GET", f"/v1/sessions/{session_id(to, target)}")
    return hand_of(session["cowhand"]["hands"], target, hand)


def hand_of(hands: list[Json], session: str, wanted: str) -> str:
    """The Sandbox of a session's live hand. Raises UserError."""
    live = [
        hand
        for hand in hands
        if hand.get("sandbox")
        and str(hand.get("state", "")).lower() not in ("lost", "failed")
        and wanted in ("", hand["name"])
    ]
    if not live:
        which = f" {wanted}" if wanted else ""
        raise UserError(
            f"session {session} has no sandbox{which} now: it is made by the first tool call"
        )
    if len(live) > 1:
        names = ", ".join(str(hand["name"]) for hand in live)
        raise UserError(f"session {session} has several sandboxes; choose with --hand: {names}")
    return str(live[0]["sandbox"])


def logs(args: argparse.Namespace) -> int:
    """`cowhand logs`: what the containers that work for a session wrote."""
    to = connection.target(args)
    identity = session_id(to, args.session)
    if args.sandbox:
        selector = f"cowhand.dev/session-id={identity}"
        pods = to.kubectl.items("pods", to.namespace, selector)
        if not pods:
            raise UserError(f"session {args.session} has no sandbox pod now")
        pod, container = pods[-1]["metadata"]["name"], args.container or "sandbox"
        lines = [f"--tail={args.tail}", *(["-f"] if args.follow else [])]
        return to.kubectl.stream("logs", pod, "-c", container, *lines, namespace=to.namespace)
    pod = _harness_pod(to, identity)
    container = args.container or "harness"
    if args.every_session or args.follow:
        lines = [f"--tail={args.tail}", *(["-f"] if args.follow else [])]
        return to.kubectl.stream("logs", pod, "-c", container, *lines, namespace=to.namespace)
    text = to.kubectl.run("logs", pod, "-c", container, "--tail=-1", namespace=to.namespace)
    mine = [line for line in text.splitlines() if identity in line]
    print("\n".join(mine[-args.tail :] if args.tail > 0 else mine))
    print(f"(pod {pod}; --every-session shows its other lines)", file=sys.stderr)
    return 0


def _harness_pod(to: Target, identity: str) -> str:
    """The pod that held the session last, by the newest `session.wake` of its log."""
    lease = ""
    for _, event in watch.Source(to, identity).raw(1, follow=False):
        if event["type"] == "session.wake":
            lease = str(event["lease"])
    uid = lease.partition(":")[2].split(".")[0]
    for pod in to.kubectl.items("pods", to.namespace, f"{LABEL}=harness"):
        if uid and pod["metadata"]["uid"] == uid:
            return str(pod["metadata"]["name"])
    if not uid:
        raise CowhandError(f"no harness has worked on session {identity} yet")
    raise SessionNotFound(
        f"the harness pod that worked last (uid {uid}) is gone, and its log with it"
    )
