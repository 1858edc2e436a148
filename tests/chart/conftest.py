"""The rendered chart: `render(values)` gives its objects; helm comes from hack/tools.sh."""

from __future__ import annotations

import functools
import json
import pathlib
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/cowhand"
NS = "cowhand-system"
Json = dict[str, Any]
Render = Callable[..., list[Json]]


@functools.cache
def _helm() -> str | None:
    done = subprocess.run(
        [str(ROOT / "hack/tools.sh"), "path", "helm"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


class Refused(Exception):
    """helm did not render; the text is its message."""


@pytest.fixture(scope="session")
def helm_text() -> Callable[..., str]:
    """`helm_text(values, namespace)`: the rendered text."""
    binary = _helm()
    if binary is None:
        pytest.skip(
            "helm is neither installed nor can it be fetched or built (hack/tools.sh path helm)"
        )

    def render(values: Json | None = None, namespace: str = NS) -> str:
        done = subprocess.run(
            [
                *(binary, "template", "cowhand", str(CHART), "--namespace", namespace),
                *("--kube-version", "1.34.0", "-f", "-"),
            ],
            input=json.dumps(values or {}),
            capture_output=True,
            text=True,
            check=False,
            env={"HOME": "/nonexistent", "PATH": "/usr/bin:/bin"},
        )
        if done.returncode:
            raise Refused(done.stderr)
        return done.stdout

    return render


@pytest.fixture(scope="session")
def helm_lint() -> Callable[[Json], subprocess.CompletedProcess[str]]:
    """`helm_lint(values)`: the finished process."""
    binary = _helm()
    if binary is None:
        pytest.skip(
            "helm is neither installed nor can it be fetched or built (hack/tools.sh path helm)"
        )

    def lint(values: Json) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(binary, "lint", "--strict", str(CHART), "--namespace", NS),
                *("--kube-version", "1.34.0", "-f", "-"),
            ],
            input=json.dumps(values),
            capture_output=True,
            text=True,
            check=False,
            env={"HOME": "/nonexistent", "PATH": "/usr/bin:/bin"},
        )

    return lint


@pytest.fixture(scope="session")
def render(helm_text: Callable[..., str]) -> Render:
    """`render(values, namespace)`: the rendered objects."""

    @functools.cache
    def cached(values: str, namespace: str) -> str:
        return helm_text(json.loads(values), namespace)

    def run(values: Json | None = None, namespace: str = NS) -> list[Json]:
        text = cached(json.dumps(values or {}, sort_keys=True), namespace)
        return [found for found in yaml.safe_load_all(text) if found]

    return run


def pick(objects: list[Json], kind: str, name: str, namespace: str | None = None) -> Json:
    """The one object of this kind and name."""
    found = [
        o
        for o in objects
        if o["kind"] == kind
        and o["metadata"]["name"] == name
        and namespace in (None, o["metadata"].get("namespace"))
    ]
    assert len(found) == 1, f"{kind} {namespace}/{name}: {len(found)} found"
    return found[0]


def pods(objects: list[Json]) -> Iterator[tuple[str, Json, Json]]:
    """(name, object, pod spec) of everything that becomes a pod."""
    for item in objects:
        kind, name = item["kind"], item["metadata"]["name"]
        if kind == "Pod":
            yield f"Pod/{name}", item, item["spec"]
        elif kind in ("Deployment", "StatefulSet", "Job", "DaemonSet"):
            yield f"{kind}/{name}", item, item["spec"]["template"]["spec"]
        elif kind == "CronJob":
            yield f"{kind}/{name}", item, item["spec"]["jobTemplate"]["spec"]["template"]["spec"]


def containers(spec: Json) -> list[Json]:
    """Every container of a pod."""
    return [*spec.get("initContainers", []), *spec["containers"]]
