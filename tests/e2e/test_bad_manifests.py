"""Wrong manifests at a real API server: each is refused, and the refusal names the field."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import uuid
from collections.abc import Callable, Iterator

import pytest

from e2e.bad_manifests import BAD, BAD_UPDATES, GOOD, GOOD_UPDATES, Bad, BadUpdate, Json, manifest

pytestmark = pytest.mark.apiserver

ROOT = pathlib.Path(__file__).resolve().parents[2]
SYSTEM = os.environ.get("COWHAND_SYSTEM_NAMESPACE", "cowhand-system")
RELEASE = r"meta\.helm\.sh/release-name"
Run = Callable[..., subprocess.CompletedProcess[str]]


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def kubectl() -> Run:
    """kubectl on the test cluster, with the CRDs of this tree installed."""
    binary = _output(str(ROOT / "hack/tools.sh"), "path", "kubectl")
    config = _output(str(ROOT / "hack/cluster.sh"), "kubeconfig")

    def run(*args: str, stdin: Json | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [binary, "--kubeconfig", config, *args],
            input=json.dumps(stdin) if stdin is not None else None,
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    assert done.returncode == 0, done.stderr
    if not run(
        "get", "crd/agents.cowhand.dev", "-o", f"jsonpath={{.metadata.annotations.{RELEASE}}}"
    ).stdout:
        # Not there by the chart: let a later `helm install` take them over.
        crds = [
            f"crd/{path.stem.partition('_')[2]}.cowhand.dev"
            for path in (ROOT / "crds").glob("*.yaml")
        ]
        run("label", *crds, "app.kubernetes.io/managed-by=Helm")
        run(
            "annotate",
            *crds,
            "meta.helm.sh/release-name=cowhand",
            f"meta.helm.sh/release-namespace={SYSTEM}",
        )
    for kind in ("agents", "agentsessions", "environments", "sandboxes"):
        done = run(
            "wait", "--for=condition=Established", f"crd/{kind}.cowhand.dev", "--timeout=60s"
        )
        assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def namespace(kubectl: Run) -> Iterator[str]:
    """A namespace that is no tenant, so that nobody acts on what is made in it."""
    name = f"bad-manifests-{uuid.uuid4().hex[:8]}"
    done = kubectl("create", "namespace", name)
    assert done.returncode == 0, done.stderr
    yield name
    kubectl("delete", "namespace", name, "--wait=false")


@pytest.mark.parametrize("kind", GOOD)
def test_the_good_ones_are_accepted(kubectl: Run, namespace: str, kind: str) -> None:
    dry = ("create", "-n", namespace, "--dry-run=server", "-f", "-")
    done = kubectl(*dry, stdin=manifest(kind, GOOD[kind]))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_a_bad_manifest_is_refused_by_name(kubectl: Run, namespace: str, bad: Bad) -> None:
    done = kubectl("create", "-n", namespace, "--dry-run=server", "-f", "-", stdin=bad.manifest)
    assert done.returncode != 0
    assert bad.field in done.stderr
    assert bad.text in done.stderr


@pytest.mark.parametrize("bad", BAD_UPDATES, ids=lambda bad: bad.name)
def test_a_bad_change_is_refused_by_name(kubectl: Run, namespace: str, bad: BadUpdate) -> None:
    made = kubectl(
        "create", "-n", namespace, "-f", "-", stdin=manifest(bad.kind, bad.before, bad.name)
    )
    assert made.returncode == 0, made.stderr
    changed = manifest(bad.kind, bad.after, bad.name)
    done = kubectl("replace", "-n", namespace, "--dry-run=server", "-f", "-", stdin=changed)
    assert done.returncode != 0
    assert bad.field in done.stderr
    assert bad.text in done.stderr


@pytest.mark.parametrize(("name", "kind", "before", "after"), GOOD_UPDATES)
def test_a_good_change_is_accepted(
    kubectl: Run, namespace: str, name: str, kind: str, before: Json, after: Json
) -> None:
    made = kubectl("create", "-n", namespace, "-f", "-", stdin=manifest(kind, before, name))
    assert made.returncode == 0, made.stderr
    changed = manifest(kind, after, name)
    done = kubectl("replace", "-n", namespace, "--dry-run=server", "-f", "-", stdin=changed)
    assert done.returncode == 0, done.stderr


def test_an_object_that_nobody_has_seen_does_not_look_current(kubectl: Run, namespace: str) -> None:
    made = kubectl(
        "create", "-n", namespace, "-o", "json", "-f", "-",
        stdin=manifest("AgentSession", GOOD["AgentSession"], "fresh"),
    )  # fmt: skip
    assert json.loads(made.stdout)["status"]["observedGeneration"] == -1


def test_kubectl_can_wait_for_the_end_of_a_turn(kubectl: Run, namespace: str) -> None:
    spec = manifest("AgentSession", GOOD["AgentSession"], "waited")
    assert kubectl("create", "-n", namespace, "-f", "-", stdin=spec).returncode == 0
    wait = ("wait", "-n", namespace, "--for=condition=TurnComplete", "agentsession/waited")
    assert kubectl(*wait, "--timeout=1s").returncode != 0
    condition = {
        "type": "TurnComplete",
        "status": "True",
        "reason": "EndTurn",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }

    def patch(generation: int) -> None:
        status = {"conditions": [condition], "observedGeneration": generation}
        patched = kubectl(
            "patch", "-n", namespace, "agentsession", "waited", "--subresource=status", "--type=merge",
            "-p", json.dumps({"status": status}),
        )  # fmt: skip
        assert patched.returncode == 0, patched.stderr

    patch(0)  # of an older spec: kubectl does not take it for an answer
    assert kubectl(*wait, "--timeout=1s").returncode != 0
    patch(1)
    assert kubectl(*wait, "--timeout=30s").returncode == 0


@pytest.mark.parametrize(
    "path",
    [
        "agentsession.spec.messages.content",
        "agentsession.status.timeToFirstTokenMilliseconds",
        "agent.spec.model.baseURL",
        "environment.spec.networking.type",
        "sandbox.spec.holder.sessionID",
    ],
)
def test_explain_describes_the_fields(kubectl: Run, path: str) -> None:
    kind, _, rest = path.partition(".")
    plural = {"sandbox": "sandboxes"}.get(kind, f"{kind}s")
    done = kubectl("explain", f"{plural}.{rest}", "--api-version=cowhand.dev/v1alpha1")
    assert done.returncode == 0, done.stderr
    assert path.rpartition(".")[2] in done.stdout.partition("DESCRIPTION:")[2]
