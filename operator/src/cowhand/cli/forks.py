"""`cowhand fork`: a new AgentSession that goes on from a position of another session."""

from __future__ import annotations

import argparse
import json
import sys

from cowhand.cli import connection, watch
from cowhand.cli.commands import SESSIONS, session_in
from cowhand.cli.connection import Target, session_id
from cowhand.cli.kubectl import Json
from cowhand.errors import CowhandError, UserError


def fork(args: argparse.Namespace) -> int:
    """`cowhand fork`: make the object, wait until it is accepted, follow the turn that it begins with."""
    to = connection.target(args)
    _check_source(to, args.session)
    manifest = manifest_of(args.session, args.at, args.name, args.message)
    made = to.kubectl.json("create", "-f", "-", namespace=to.namespace, stdin=json.dumps(manifest))
    name, namespace = session_in(made, to.namespace)
    print(f"agentsession/{name} in namespace {namespace}", file=sys.stderr)
    if args.detach:
        return 0
    try:
        identity = session_id(to, name)
    except CowhandError as err:
        raise type(err)(
            f"{err}\nDelete it: kubectl delete agentsession {name} -n {namespace}"
        ) from err
    source = watch.Source(to, identity)
    *_, (_, event) = source.raw(1, follow=False, types=["session.forked"])
    at = event["payload"]["d"]["position"]
    print(f"{identity} goes on from position {at} of {args.session}", file=sys.stderr)
    if not args.message:
        print(f"`cowhand send {name} TEXT` says how", file=sys.stderr)
        return 0
    style = watch.style(args.color, full=args.full, verbose=args.verbose)
    options = watch.Options("text", True, True, start=int(event["seq"]), style=style)
    return watch.show(to, identity, options)


def _check_source(to: Target, session: str) -> None:
    """Raise UserError unless this session can be named in spec.fork."""
    if "/" in session:
        raise UserError(
            f"{session}: a session is forked in its own namespace; name that one with -n"
        )
    if session.startswith("sesn_"):
        session_id(to, session)
    elif to.kubectl.get(SESSIONS, session, to.namespace) is None:
        raise UserError(
            f"there is no AgentSession {session} in namespace {to.namespace}; "
            f"`cowhand get -n {to.namespace}` lists them. If only its object is gone, name its "
            "session id (sesn_...)"
        )


def manifest_of(session: str, at: int | None, name: str, message: str) -> Json:
    """The AgentSession that the flags of `cowhand fork` describe."""
    fork: Json = {"session": session} if at is None else {"session": session, "at": at}
    prefix = "fork-" if session.startswith("sesn_") else f"{session[:50].rstrip('.-')}-fork-"
    return {
        "apiVersion": "cowhand.dev/v1alpha1",
        "kind": "AgentSession",
        "metadata": {"name": name} if name else {"generateName": prefix},
        "spec": {"fork": fork, **({"message": message} if message else {})},
    }
