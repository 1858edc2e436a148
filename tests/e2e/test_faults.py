"""Faults of the machine: the node stops and comes back, the store comes back empty."""

from __future__ import annotations

import json
import subprocess
import uuid

import pytest

from e2e.checks import COUNT, check_log, check_requests, final_text
from lab import SYSTEM, Json, Rig, Session, bash, eventually, say

pytestmark = [pytest.mark.e2e, pytest.mark.disruptive]

STORE = "cowhand-store-0"


def _node(rig: Rig) -> str:
    (node,) = [item["metadata"]["name"] for item in rig.cluster.items("nodes", "default")]
    return str(node)


def _counting(rig: Rig, gate: str) -> Session:
    """A turn that grows the counter, then waits at a gate of the model server."""
    marker = rig.model.script(
        {"content": [bash(COUNT)]},
        {"content": [bash("cat /workspace/counter")], "gate": gate},
        {"content": [say("at {{result:-1}}")]},
    )
    session = rig.session(marker)
    rig.model.wait_gate(gate)
    return session


def _finished(rig: Rig, session: Session, before: list[Json], turns: int = 1) -> list[Json]:
    log = session.wait_turn(turns)
    check_log(log)
    check_requests(rig.model.requests(session.id))
    assert [e["id"] for e in log[: len(before)]] == [e["id"] for e in before]
    return log


def test_the_whole_node_stands_still_for_a_while(rig: Rig) -> None:
    gate = f"node-{uuid.uuid4().hex[:6]}"
    session = _counting(rig, gate)
    before = session.log()
    node = _node(rig)
    subprocess.run(["docker", "pause", node], check=True, capture_output=True)
    try:
        # Longer than the heartbeat's deadline of 10 s: all leases have run out when the node comes back.
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run(["docker", "wait", node], timeout=15, check=True, capture_output=True)
    finally:
        subprocess.run(["docker", "unpause", node], check=True, capture_output=True)
    rig.model.release(gate)
    log = _finished(rig, session, before)
    assert "at 1" in final_text(log)


class Volume:
    """The store's data on the node, which can be taken away and put back."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._node = _node(rig)
        claim = rig.cluster.get("pvc", "data-cowhand-store-0", SYSTEM)
        assert claim is not None
        volume = rig.cluster.get("pv", claim["spec"]["volumeName"], "default")
        assert volume is not None
        source = volume["spec"].get("hostPath") or volume["spec"]["local"]
        self.path: str = source["path"]

    def shell(self, script: str) -> str:
        done = subprocess.run(
            ["docker", "exec", self._node, "sh", "-ec", script],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout

    def restart(self, *, before_start: str) -> None:
        """Stop the server, change its volume, start it."""
        cluster = self._rig.cluster
        scale = ("-n", SYSTEM, "scale", "statefulset/cowhand-store")
        cluster.kubectl(*scale, "--replicas=0")
        eventually("the store is down", lambda: cluster.get("pod", STORE, SYSTEM) is None)
        self.shell(before_start)
        cluster.kubectl(*scale, "--replicas=1")


def _ready(rig: Rig) -> bool:
    pod = rig.cluster.get("pod", STORE, SYSTEM)
    conditions = pod["status"].get("conditions", []) if pod else []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def test_a_store_whose_data_was_deleted_does_not_start(rig: Rig) -> None:
    gate = f"emptied-{uuid.uuid4().hex[:6]}"
    session = _counting(rig, gate)
    before = session.log()
    volume = Volume(rig)
    data, away = f"{volume.path}/appendonlydir", f"{volume.path}/away"
    volume.restart(before_start=f"mv {data} {away}")
    try:

        def refusal() -> bool:
            pod = rig.cluster.get("pod", STORE, SYSTEM) or {}
            text = json.dumps(pod.get("status", {}))
            return "refusing to start empty" in text or "refusing to start empty" in (
                rig.cluster.kubectl("-n", SYSTEM, "logs", STORE, "-c", "check", check=False)
            )

        eventually("the store says why it does not start", refusal)
        assert not _ready(rig)
    finally:
        volume.restart(before_start=f"mv {away} {data}")
    eventually("the store is back", lambda: _ready(rig))
    rig.model.release(gate)
    assert "at 1" in final_text(_finished(rig, session, before))


def test_an_empty_store_in_its_place_is_refused_and_nothing_runs_again(rig: Rig) -> None:
    """The volume itself is another one: the server starts, and every process of ours refuses it."""
    session = rig.session("[[script:counter]] count")
    before = session.wait_turn()
    requests = rig.model.requests(session.id)
    volume = Volume(rig)
    keep = f"{volume.path}.keep"
    move = "find {0} -mindepth 1 -maxdepth 1 -exec mv {{}} {1}/ ';'"
    volume.restart(before_start=f"mkdir -m 0777 {keep}; " + move.format(volume.path, keep))
    try:
        eventually("the empty server answers", lambda: _ready(rig))
        for pod in rig.cluster.items("pods", SYSTEM, "app.kubernetes.io/component=operator"):
            rig.cluster.kill_pod(
                pod
            )  # one that starts anew must not take it for a new store either

        def refused() -> bool:
            text = json.dumps(session.resource().get("status", {}))
            return "cowhand-store-identity" in text and "Restore its volume" in text

        rig.cluster.kubectl(
            "-n", session.namespace, "annotate", "agentsession", session.name, "touched=yes"
        )
        eventually("the AgentSession says that the store is not the one", refused)
        assert rig.model.requests(session.id) == requests, "the run was made a second time"
    finally:
        empty = f"find {volume.path} -mindepth 1 -delete; "
        volume.restart(before_start=empty + move.format(keep, volume.path) + f"; rmdir {keep}")
    eventually("the store is back", lambda: _ready(rig))
    with session.follow() as events:  # the gateway's nudges were refused too
        events.until_type("session.status_idle")
    session.send("once more")
    log = _finished(rig, session, before, turns=2)
    assert final_text(log) == "2", "the sandbox kept its files"
