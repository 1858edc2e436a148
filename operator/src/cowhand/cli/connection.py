"""From the flags of a command to a client of the gateway: tunnel, CA, token, and the id of a session.

The three kubectl calls that this takes run side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from cowhand.cli.client import Client
from cowhand.cli.kubectl import Json, Kubectl, KubectlFailed
from cowhand.cli.tunnel import port_forward
from cowhand.errors import CowhandError, UserError

AUDIENCE: Final = "cowhand-gateway"
SERVICE: Final = "cowhand-gateway"
PORT: Final = 8443
ACCEPTED_WAIT_S: Final = 30.0
"""How long a command waits for the operator to accept a new AgentSession."""
POLL_S: Final = 0.25

SESSION_ID: Final = re.compile(r"sesn_[0-9a-f]{32}")


@dataclass(frozen=True)
class Target:
    """Cluster, namespace and identity of a command line."""

    kubectl: Kubectl
    namespace: str
    system_namespace: str
    service_account: str
    token_file: str
    gateway: str
    ca_file: str

    def token(self) -> str:
        """A token for the gateway. Raises UserError, KubectlFailed."""
        if self.token_file:
            try:
                return Path(self.token_file).read_text("utf-8").strip()
            except OSError as err:
                raise UserError(f"--token-file {self.token_file}: {err.strerror}") from err
        try:
            return self.kubectl.run(
                "create",
                "token",
                self.service_account,
                f"--audience={AUDIENCE}",
                namespace=self.namespace,
            ).strip()
        except KubectlFailed as err:
            if err.missing:
                raise UserError(
                    f"namespace {self.namespace} has no ServiceAccount {self.service_account}: is it "
                    "one of the chart's `tenants`? Name another with --service-account, or use "
                    "--token-file"
                ) from err
            if err.forbidden:
                raise CowhandError(
                    f"you may not make a token for ServiceAccount {self.service_account} in namespace "
                    f"{self.namespace} (verb create on serviceaccounts/token); use --token-file with "
                    f"a token of your own for the audience {AUDIENCE}. {err}"
                ) from err
            raise

    def ca(self) -> str:
        """PEM text of the CA of the gateway's certificate."""
        if self.ca_file:
            try:
                return Path(self.ca_file).read_text("utf-8")
            except OSError as err:
                raise UserError(f"--ca-file {self.ca_file}: {err.strerror}") from err
        for namespace in dict.fromkeys((self.system_namespace, self.namespace)):
            try:
                found = self.kubectl.get("configmap", "cowhand-ca", namespace)
            except KubectlFailed as err:
                if not err.forbidden:
                    raise
                continue
            if found and (found.get("data") or {}).get("ca.crt"):
                return str(found["data"]["ca.crt"])
        raise CowhandError(
            f"there is no ConfigMap cowhand-ca in namespace {self.system_namespace} or "
            f"{self.namespace}: is Cowhand installed there (--system-namespace)? "
            "`cowhand doctor` checks"
        )


def target(args: argparse.Namespace) -> Target:
    """What the global flags say; asks kubectl for the namespace if they do not name one."""
    kubectl = Kubectl(args.kubeconfig, args.context)
    return Target(
        kubectl=kubectl,
        namespace=args.namespace or kubectl.current_namespace(),
        system_namespace=args.system_namespace,
        service_account=args.service_account,
        token_file=args.token_file,
        gateway=args.gateway,
        ca_file=args.ca_file,
    )


@contextlib.contextmanager
def connect(to: Target) -> Iterator[Client]:
    """A client of the gateway, through a port-forward unless `--gateway` names its address."""
    name = f"{SERVICE}.{to.system_namespace}.svc"
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        ca = pool.submit(to.ca)
        token = pool.submit(to.token)
        if to.gateway:
            name, address = _direct(to.gateway)
        else:
            forwarded = port_forward(to.kubectl, to.system_namespace, f"svc/{SERVICE}", PORT)
            address = ("127.0.0.1", stack.enter_context(forwarded))
        first = [token.result()]
        client = Client(
            address, name, ca.result(), lambda: first.pop() if first else to.token(), to.namespace
        )
        yield client


def _direct(url: str) -> tuple[str, tuple[str, int]]:
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise UserError(f"--gateway {url}: must be https://host[:port]")
    return parts.hostname, (parts.hostname, parts.port or 443)


def session_id(to: Target, session: str) -> str:
    """The id of a session by its AgentSession's name (or the id itself).

    A new AgentSession may take a moment to be accepted: this waits, at most 30 s.

    Raises:
        UserError: there is no such AgentSession.
        CowhandError: it was not accepted; the message holds the condition that says why.
    """
    if session.startswith("sesn_"):
        if not SESSION_ID.fullmatch(session):
            raise UserError(f"{session} is not a session id: sesn_ and 32 hex digits")
        return session
    deadline = time.monotonic() + ACCEPTED_WAIT_S
    while True:
        found = to.kubectl.get("agentsessions.cowhand.dev", session, to.namespace)
        if found is None:
            raise UserError(
                f"there is no AgentSession {session} in namespace {to.namespace}; "
                f"`cowhand get -n {to.namespace}` lists them"
            )
        status = found.get("status") or {}
        if status.get("sessionID"):
            return str(status["sessionID"])
        stalled = condition(found, "Stalled")
        if stalled.get("status") == "True":
            raise CowhandError(f"AgentSession {session} is stalled: {_said(stalled)}")
        if time.monotonic() >= deadline:
            ready = condition(found, "Ready")
            why = (
                f": {_said(ready)}" if ready else "; does the operator run? `cowhand doctor` checks"
            )
            raise CowhandError(
                f"AgentSession {session} was not accepted within {ACCEPTED_WAIT_S:.0f} s{why}"
            )
        time.sleep(POLL_S)


def condition(resource: Json, kind: str) -> dict[str, Any]:
    """A condition of a resource, empty if it has none of this type."""
    conditions = (resource.get("status") or {}).get("conditions") or ()
    return next((item for item in conditions if item.get("type") == kind), {})


def _said(item: dict[str, Any]) -> str:
    return f"{item.get('reason', '')}: {item.get('message', '')}"
