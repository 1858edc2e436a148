"""`cowhand doctor`: is everything in place, and if not, what to do.

Looking is apart from judging: `look` gathers what kubectl and the gateway say into one snapshot, `judge` is
a pure function of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from cowhand.cli import connection
from cowhand.cli.connection import Target
from cowhand.cli.render import safe
from cowhand.errors import CowhandError

Verdict = Literal["ok", "warn", "fail"]

CRDS: Final = ("agents", "agentsessions", "environments", "sandboxes")
CONTROL: Final = ("operator", "broker", "gateway")
ANNOTATION: Final = "cowhand.dev/allowed-hosts"
MARKS: Final[Mapping[Verdict, str]] = {"ok": "✓", "warn": "!", "fail": "✗"}


@dataclass(frozen=True)
class Line:
    """One finding: what was looked at, and what to do if it is not ok."""

    verdict: Verdict
    what: str
    text: str


@dataclass
class Snapshot:
    """What was seen; a missing object is None, what could not be read is a text in `errors`.

    Attributes:
        namespace: the tenant.
        system: namespace of the control plane.
        server: version of the API server, empty if it does not answer.
        crds: names of the installed custom resources of ours.
        workloads: "namespace/kind/name" -> object.
        secret: the model key's Secret without its data.
        images: images that the nodes have.
        health: answer of the gateway's `/healthz`.
        errors: name of a look -> why it failed.
    """

    namespace: str
    system: str
    server: str = ""
    crds: frozenset[str] = frozenset()
    workloads: dict[str, Any] = field(default_factory=dict)
    secret: Any = None
    images: frozenset[str] = frozenset()
    health: Mapping[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def operator_env(self) -> Mapping[str, str]:
        """`COWHAND_*` of the operator's container: where defaults of model and sandbox stand."""
        found = self.workloads.get(f"{self.system}/deployment/cowhand-operator") or {}
        containers = _path(found, "spec", "template", "spec", "containers") or ()
        return {
            item["name"]: str(item.get("value") or "")
            for container in containers
            for item in container.get("env") or ()
        }


def _path(value: Any, *names: str) -> Any:
    for name in names:
        value = (value or {}).get(name)
    return value


def doctor(args: argparse.Namespace) -> int:
    """Print the findings; exit code 1 if one of them is a failure."""
    lines = list(judge(look(connection.target(args))))
    for line in lines:
        print(f"{MARKS[line.verdict]} {line.what:<22} {safe(line.text)}")
    return int(any(line.verdict == "fail" for line in lines))


def look(to: Target) -> Snapshot:
    """Gather the snapshot; whatever cannot be read is noted, not raised."""
    seen = Snapshot(to.namespace, to.system_namespace)

    def attempt(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except CowhandError as err:
            seen.errors[name] = str(err)

    def server() -> None:
        version = json.loads(to.kubectl.run("get", "--raw", "/version"))
        seen.server = str(version.get("gitVersion"))

    attempt("server", server)
    if not seen.server:
        return seen

    def crds() -> None:
        text = to.kubectl.run("api-resources", "--api-group=cowhand.dev", "-o", "name")
        seen.crds = frozenset(text.split())

    def workload(namespace: str, kind: str, name: str) -> None:
        seen.workloads[f"{namespace}/{kind}/{name}"] = to.kubectl.get(kind, name, namespace)

    def secret() -> None:
        name = seen.operator_env.get("COWHAND_MODEL_SECRET") or "cowhand-model"
        found = to.kubectl.get("secret", name, to.namespace)
        if found is not None:
            # The value is read by kubectl, and dropped here: only its name and annotations matter.
            found = {"metadata": found["metadata"], "keys": sorted(found.get("data") or ())}
        seen.secret = found

    def images() -> None:
        nodes = to.kubectl.json("get", "nodes")["items"]
        seen.images = frozenset(
            name
            for node in nodes
            for image in _path(node, "status", "images") or ()
            for name in image.get("names") or ()
        )

    def health() -> None:
        with connection.connect(to) as client:
            seen.health = client.call("GET", "/healthz", timeout=15)

    attempt("crds", crds)
    for part, namespace in (
        *((part, to.system_namespace) for part in CONTROL),
        ("harness", to.namespace),
    ):
        attempt(part, partial(workload, namespace, "deployment", f"cowhand-{part}"))
    attempt("secret", secret)
    attempt("images", images)
    attempt("gateway answer", health)
    return seen


def judge(seen: Snapshot) -> Iterator[Line]:
    """The findings of a snapshot, in the order in which to repair things."""
    if not seen.server:
        yield Line("fail", "API server", seen.errors.get("server", "no answer"))
        return
    yield Line("ok", "API server", seen.server)
    yield _crds(seen)
    for part in CONTROL:
        yield _workload(seen, seen.system, "deployment", part)
    yield _workload(seen, seen.namespace, "deployment", "harness")
    yield from _store_and_broker(seen)
    yield _secret(seen)
    yield _image(seen)


def _crds(seen: Snapshot) -> Line:
    what = "custom resources"
    if "crds" in seen.errors:
        return Line("warn", what, seen.errors["crds"])
    missing = [name for name in CRDS if f"{name}.cowhand.dev" not in seen.crds]
    if missing:
        return Line(
            "fail", what, f"missing {', '.join(missing)}: `kubectl apply --server-side -f crds/`"
        )
    return Line("ok", what, ", ".join(CRDS))


def _workload(seen: Snapshot, namespace: str, kind: str, part: str) -> Line:
    name = f"{namespace}/cowhand-{part}"
    if part in seen.errors:
        return Line("warn", part, f"{name}: cannot be read: {seen.errors[part]}")
    found = seen.workloads.get(f"{namespace}/{kind}/cowhand-{part}")
    if found is None:
        advice = (
            f"is {namespace} one of the chart's `tenants`?"
            if part == "harness"
            else "`helm install` it, or name its namespace with --system-namespace"
        )
        return Line("fail", part, f"there is no {kind} {name}: {advice}")
    wanted = _path(found, "spec", "replicas")
    wanted = 1 if wanted is None else int(wanted)
    ready = int(_path(found, "status", "readyReplicas") or 0)
    if ready == 0 and wanted > 0:
        advice = f"`kubectl -n {namespace} describe {kind} cowhand-{part}` and its pods say why"
        return Line("fail", part, f"{name}: 0 of {wanted} ready: {advice}")
    return Line("ok" if ready >= wanted else "warn", part, f"{name}: {ready} of {wanted} ready")


def _store_and_broker(seen: Snapshot) -> Iterator[Line]:
    if not seen.health:
        why = seen.errors.get("gateway answer", "no answer")
        yield Line("fail", "gateway answers", why)
        return
    yield Line("ok", "gateway answers", f"version {seen.health.get('version')}")
    for name, advice in (
        ("store", "the store's pod, its Secret and its NetworkPolicy"),
        ("broker", "the broker's pod and its NetworkPolicy"),
    ):
        said = str(seen.health.get(name))
        if said == "ok":
            yield Line("ok", f"{name} answers", "as the gateway sees it")
        else:
            yield Line("fail", f"{name} answers", f"{said}: look at {advice}")
    yield from _archive(seen)
    yield from _durability(seen.health.get("store_profile"))


def _durability(found: Any) -> Iterator[Line]:
    """What the store keeps, as the gateway has seen it."""
    what = "store profile"
    if not isinstance(found, Mapping):
        yield Line("warn", what, "not known: the gateway has not been able to ask the store")
        return
    faults, notes = list(found.get("faults") or ()), list(found.get("notes") or ())
    text = f"{found.get('effective')} ({found.get('server')})"
    if found.get("effective") != found.get("demanded"):
        text += f", less than {found.get('demanded')}, which is demanded"
        yield Line("fail", what, f"{text}: {'; '.join(map(str, faults))}")
    else:
        verdict: Verdict = "warn" if faults or notes else "ok"
        yield Line(verdict, what, "; ".join([text, *map(str, (*faults, *notes))]))


def _archive(seen: Snapshot) -> Iterator[Line]:
    """What the gateway says of the archive; a gateway of an older release says nothing."""
    what, said = "archive answers", str(seen.health.get("archive", ""))
    if said == "ok":
        yield Line("ok", what, "as the gateway sees it")
    elif said == "none":
        yield Line("ok", "archive", "none (archive.enabled is false): an event may have 1 MiB")
    elif said:
        advice = "look at the pod cowhand-archive-0, its volume and its NetworkPolicy"
        yield Line("fail", what, f"{said}: {advice}")


def _secret(seen: Snapshot) -> Line:
    what = "model key"
    env = seen.operator_env
    name = env.get("COWHAND_MODEL_SECRET") or "cowhand-model"
    where = f"Secret {seen.namespace}/{name}"
    if "secret" in seen.errors:
        return Line("warn", what, f"{where}: cannot be checked: {seen.errors['secret']}")
    base = urlsplit(env.get("COWHAND_MODEL_BASE_URL") or "https://api.anthropic.com")
    secure = base.scheme == "https"
    host = base.netloc.lower()
    if not secure and base.port is None:
        host += ":80"  # a host without a port allows https alone
    port = base.port or (443 if secure else 80)
    accepted = {f"{base.hostname}:{port}", *([host, str(base.hostname)] if secure else [])}
    create = (
        f"kubectl -n {seen.namespace} create secret generic {name} --from-literal=api-key=... && "
        f"kubectl -n {seen.namespace} annotate secret {name} {ANNOTATION}={host}"
    )
    if seen.secret is None:
        return Line("fail", what, f"there is no {where}: {create}")
    if "api-key" not in seen.secret["keys"]:
        return Line("fail", what, f"{where} has no key `api-key`")
    allowed = str((seen.secret["metadata"].get("annotations") or {}).get(ANNOTATION) or "")
    hosts = {part.strip().lower() for part in allowed.split(",") if part.strip()}
    if not hosts & accepted:
        return Line(
            "fail",
            what,
            f"{where} may not go to {host}: kubectl -n {seen.namespace} annotate --overwrite secret "
            f"{name} {ANNOTATION}={','.join(sorted({*hosts, host}))}",
        )
    return Line("ok", what, f"{where}, may go to {', '.join(sorted(hosts))}")


def _image(seen: Snapshot) -> Line:
    what = "sandbox image"
    image = seen.operator_env.get("COWHAND_SANDBOX_IMAGE", "")
    if not image:
        return Line("warn", what, "unknown: the operator's Deployment does not name one")
    if "images" in seen.errors:
        return Line("warn", what, f"{image}: nodes cannot be read: {seen.errors['images']}")
    if any(name == image or name.endswith(f"/{image}") for name in seen.images):
        return Line("ok", what, f"{image} is on a node")
    return Line(
        "warn", what, f"{image} is on no node yet: the first sandbox waits until it is pulled"
    )
