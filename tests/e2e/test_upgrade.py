"""`helm upgrade` to other images while sessions are in mid-turn: every pod of ours is replaced, no turn notices.

The other images are the same ones under another tag: a rolling upgrade of all that runs, the store included.
"""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Callable, Iterator

import pytest

from e2e.checks import COUNT, check_log, check_requests, final_text
from lab import ROOT, SYSTEM, Json, Rig, Session, bash, eventually, say

pytestmark = [pytest.mark.e2e, pytest.mark.disruptive]

OURS = "app.kubernetes.io/name=cowhand,app.kubernetes.io/component notin (sandbox,bootstrap)"
NAMESPACES = (SYSTEM, "default", "team-b")


def _helm(rig: Rig, *args: str) -> str:
    tools = subprocess.run(
        [str(ROOT / "hack/tools.sh"), "path", "helm"], check=True, capture_output=True, text=True
    )
    done = subprocess.run(
        [tools.stdout.strip(), *args],
        capture_output=True,
        text=True,
        env=rig.cluster.env(),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _ours(rig: Rig) -> dict[str, Json]:
    """Our running pods by uid, without sandboxes and hooks."""
    return {
        pod["metadata"]["uid"]: pod
        for namespace in NAMESPACES
        for pod in rig.cluster.items("pods", namespace, OURS)
        if "deletionTimestamp" not in pod["metadata"] and pod["status"]["phase"] == "Running"
    }


@pytest.fixture
def upgrade(rig: Rig) -> Iterator[Callable[[], None]]:
    """Upgrades the release to the same images under a tag of this test; puts the old values back after it."""
    tag = f"upgrade-{uuid.uuid4().hex[:6]}"
    values = json.loads(_helm(rig, "-n", SYSTEM, "get", "values", "cowhand", "-o", "json"))
    node = next(iter(_ours(rig).values()))["spec"]["nodeName"]
    runtime = ("docker", "exec", node, "ctr", "-n", "k8s.io", "images")
    images = {"image": values["image"], "store.image": values["store"]["image"]}
    made = []
    for image in images.values():
        name = f"docker.io/{image['repository']}"
        made.append(f"{name}:{tag}")
        subprocess.run([*runtime, "tag", f"{name}:{image['tag']}", made[-1]], check=True)

    def to(tags: dict[str, str]) -> None:
        sets = [word for key, value in tags.items() for word in ("--set", f"{key}.tag={value}")]
        chart = str(ROOT / "charts/cowhand")
        where = ("--namespace", SYSTEM, "--reuse-values", "--wait", "--timeout", "5m")
        _helm(rig, "upgrade", "cowhand", chart, *where, *sets)

    yield lambda: to(dict.fromkeys(images, tag))
    to({key: image["tag"] for key, image in images.items()})
    eventually(
        "the pods of the upgrade are gone",
        lambda: not any(f":{tag}" in json.dumps(pod["spec"]) for pod in _ours(rig).values()),
    )
    subprocess.run([*runtime, "rm", *made], check=False, capture_output=True)


def _streaming(rig: Rig, gate: str) -> Session:
    marker = rig.model.script(
        {"content": [bash(COUNT)]},
        {"content": [say("Let me think."), bash("echo second")], "gate_mid": gate},
        {"content": [say("said {{result:-1}}")]},
    )
    return rig.session(marker)


def _in_a_tool(rig: Rig) -> Session:
    wait = "while [ ! -e /workspace/go ]; do sleep 0.1; done; "
    marker = rig.model.script(
        {"content": [bash(wait + COUNT)]}, {"content": [say("counted {{result:-1}}")]}
    )
    return rig.session(marker)


@pytest.mark.timeout(900)
def test_upgraded_in_mid_turn(rig: Rig, upgrade: Callable[[], None]) -> None:
    gate = f"upgrade-{uuid.uuid4().hex[:6]}"
    streaming, tool, idle = (
        _streaming(rig, gate),
        _in_a_tool(rig),
        rig.session("[[script:counter]] count"),
    )
    idle.wait_turn()
    with tool.follow() as events:
        events.until_type("tool.started")
    rig.model.wait_gate(gate)
    sessions = (streaming, tool, idle)
    before = {session.name: session.log() for session in sessions}
    old = _ours(rig)

    upgrade()
    eventually("every pod of ours is a new one", lambda: not old.keys() & _ours(rig).keys())

    pod = tool.sandbox_pod()["metadata"]["name"]
    rig.cluster.kubectl(
        "-n", "default", "exec", pod, "-c", "sandbox", "--", "touch", "/workspace/go"
    )
    rig.model.release(gate)
    idle.send("once more")
    logs = {
        streaming.name: streaming.wait_turn(),
        tool.name: tool.wait_turn(),
        idle.name: idle.wait_turn(2),
    }
    for session in sessions:
        log = logs[session.name]
        check_log(log)
        check_requests(rig.model.requests(session.id))
        held = before[session.name]
        assert [e["id"] for e in log[: len(held)]] == [e["id"] for e in held]
        hands = [e["data"]["instance"] for e in log if e["type"] == "hand.provisioned"]
        assert hands == [1], f"{session.name}: the upgrade took the sandbox away"
    assert "second" in final_text(logs[streaming.name])
    assert "counted 1" in final_text(logs[tool.name]), "the effect did not run exactly once"
    assert final_text(logs[idle.name]) == "2", "the sandbox of the idle session kept its files"
