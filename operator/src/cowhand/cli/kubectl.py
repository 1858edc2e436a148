"""kubectl as a subprocess: the user's own identity, kubeconfig, plugins and credentials helpers, as they are.

A Kubernetes client library would have to repeat what kubectl already does for every kind of kubeconfig
(client certificates, exec plugins, OIDC), and would triple the start-up time of each command.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any, Final

from cowhand.errors import CowhandError, UserError

TIMEOUT_S: Final = 30.0

Json = dict[str, Any]


class KubectlFailed(CowhandError):
    """kubectl ended with an error; the text is what it wrote.

    Attributes:
        missing: the object does not exist.
        forbidden: the user may not do this.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.missing = "(NotFound)" in message or "not found" in message
        self.forbidden = "(Forbidden)" in message or "forbidden" in message.lower()


@dataclass(frozen=True)
class Kubectl:
    """kubectl with its global flags.

    Attributes:
        kubeconfig: `--kubeconfig`, empty for kubectl's own choice (KUBECONFIG, ~/.kube/config).
        context: `--context`, empty for the current one.
        program: name or path of kubectl.
    """

    kubeconfig: str = ""
    context: str = ""
    program: str = "kubectl"

    def command(self, *args: str, namespace: str = "") -> list[str]:
        """The command line. Raises UserError when there is no kubectl."""
        path = shutil.which(self.program)
        if path is None:
            raise UserError(
                "kubectl is not on PATH; install it: https://kubernetes.io/docs/tasks/tools/"
            )
        flags = [f"--kubeconfig={self.kubeconfig}"] if self.kubeconfig else []
        flags += [f"--context={self.context}"] if self.context else []
        flags += [f"--namespace={namespace}"] if namespace else []
        return [path, *flags, *args]

    def run(self, *args: str, namespace: str = "", stdin: str | None = None) -> str:
        """Run it; answers stdout.

        Raises:
            KubectlFailed: it ended with an error or took longer than 30 s.
        """
        command = self.command(*args, namespace=namespace)
        try:
            done = subprocess.run(
                command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise KubectlFailed(
                f"kubectl {' '.join(args)}: no answer within {TIMEOUT_S:.0f} s"
            ) from None
        if done.returncode:
            text = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
            raise KubectlFailed(f"kubectl {args[0]}: {text}")
        return done.stdout

    def json(self, *args: str, namespace: str = "", stdin: str | None = None) -> Json:
        """Run it with `-o json`; answers the decoded object."""
        text = self.run(*args, "-o", "json", namespace=namespace, stdin=stdin)
        try:
            loaded: Json = json.loads(text)
        except ValueError:
            raise KubectlFailed(
                f"kubectl {args[0]} answers what is not JSON: {text[:200]}"
            ) from None
        return loaded

    def get(self, kind: str, name: str, namespace: str) -> Json | None:
        """One object, None if there is none (or no such kind)."""
        text = self.run("get", kind, name, "--ignore-not-found", "-o", "json", namespace=namespace)
        return json.loads(text) if text.strip() else None

    def items(self, kind: str, namespace: str, selector: str = "") -> list[Json]:
        """Objects of a kind in a namespace."""
        chosen = ["-l", selector] if selector else []
        found: list[Json] = self.json("get", kind, *chosen, namespace=namespace)["items"]
        return found

    def stream(self, *args: str, namespace: str = "") -> int:
        """Run it with our own stdout and stderr; answers its exit code."""
        return subprocess.run(self.command(*args, namespace=namespace), check=False).returncode

    def current_namespace(self) -> str:
        """Namespace of the current context, `default` if it names none."""
        text = self.run("config", "view", "--minify", "-o", "jsonpath={..namespace}")
        return text.strip() or "default"
