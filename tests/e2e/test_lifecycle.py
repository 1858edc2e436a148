"""A release through its life: upgraded while sessions are in mid-turn, uninstalled, and installed again.

The images of the upgrade are the same ones under another tag: a rolling upgrade of all that runs, the store
included. The tests stand in this order because the last one leaves what `hack/install.sh` installs.
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


def _ours(rig: Rig) -> dict[str, Json]:
    """Our running pods by uid, without sandboxes and hooks."""
    return {
        pod["metadata"]["uid"]: pod
        for namespace in NAMESPACES
        for pod in rig.cluster.items("pods", namespace, OURS)
        if "deletionTimestamp" not in pod["metadata"] and pod["status"]["phase"] == "Running"
    }


@pytest.fixture(scope="module")
def upgrade(rig: Rig) -> Iterator[Callable[[], None]]:
    """Upgrades the release to the same images under a tag of this module; puts the old values back at its end."""
    tag = f"upgrade-{uuid.uuid4().hex[:6]}"
    values = json.loads(rig.cluster.helm("-n", SYSTEM, "get", "values", "cowhand", "-o", "json"))
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
        rig.cluster.helm("upgrade", "cowhand", chart, *where, *sets)

    yield lambda: to(dict.fromkeys(images, tag))
    if tag in rig.cluster.helm("-n", SYSTEM, "get", "values", "cowhand", "-o", "json"):
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
        {"content": [bash(wait + COUNT, timeout_ms=600_000)]},
        {"content": [say("counted {{result:-1}}")]},
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


def _install(verb: str) -> None:
    done = subprocess.run(
        [str(ROOT / "hack/install.sh"), verb], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(900)
def test_uninstalled_and_installed_again(rig: Rig) -> None:
    session = rig.session("[[script:counter]] count")
    before = session.wait_turn(1)
    assert session.pods()
    try:
        _install("down")
        for namespace in (SYSTEM, "default", "team-b"):
            eventually(
                f"no pod of ours runs in {namespace}",
                lambda ns=namespace: (
                    not rig.cluster.items("pods", ns, "app.kubernetes.io/name=cowhand")
                ),
            )
            assert not rig.cluster.items("deployments,statefulsets", namespace)
        assert session.resource()["spec"]["message"] == "[[script:counter]] count"
        assert rig.cluster.get("pvc", "data-cowhand-store-0", SYSTEM) is not None
    finally:
        _install("up")
    rig.cluster.kubectl(
        *("-n", "default", "patch", "agentsession", session.name, "--type=merge"),
        *("-p", '{"spec":{"operatingMode":"Running"}}'),
    )
    session.send("and once more")
    assert "lost" in final_text(session.wait_turn(2)), "Claude is told that the old sandbox is gone"
    session.send("and again")
    log = session.wait_turn(3)
    check_log(log)
    assert [e["id"] for e in log[: len(before)]] == [e["id"] for e in before]
    assert final_text(log) == "1", "a new sandbox starts empty"
