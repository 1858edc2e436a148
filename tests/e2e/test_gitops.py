"""What GitOps tools do with an object that runs once: re-apply, edit, delete, re-create."""

from __future__ import annotations

import subprocess
import uuid

import pytest

from e2e.checks import check_log, final_text
from lab import SYSTEM, Rig, Session, bash, eventually, manifest, say

pytestmark = pytest.mark.e2e


def _gone(rig: Rig, name: str) -> bool:
    return rig.cluster.get("agentsession", name, "default") is None


def test_reapply_changes_nothing(rig: Rig) -> None:
    marker = rig.model.script({"content": [say("once")]})
    session = rig.session(f"{marker}")
    before = session.wait_turn()
    rig.cluster.apply(manifest(session.name, "default", message=f"{marker}"))
    rig.cluster.kubectl("-n", "default", "annotate", "agentsession", session.name, "touched=yes")
    session.send("a later message, so that something must follow")
    log = session.wait_turn(2)
    assert [e["id"] for e in log[: len(before)]] == [e["id"] for e in before]
    assert [e["type"] for e in log].count("session.created") == 1
    assert [e["type"] for e in log].count("user.message") == 2


def test_an_immutable_field_is_refused_by_name(rig: Rig) -> None:
    marker = rig.model.script({"content": [say("ok")]})
    session = rig.session(f"{marker}")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        rig.cluster.apply(manifest(session.name, "default", message="something else"))
    assert "message" in refused.value.stderr
    assert "immutable" in refused.value.stderr


def test_an_added_message_is_sent_once(rig: Rig) -> None:
    marker = rig.model.script({"content": [say("one")]}, {"content": [say("two")]})
    name = f"e2e-{uuid.uuid4().hex[:8]}"
    first = {"id": "a", "content": f"start {marker}"}
    second = {"id": "b", "content": "go on"}
    rig.cluster.apply(manifest(name, "default", messages=[first]))
    session = Session(rig, "default", name)
    try:
        session.wait_turn(1)
        rig.cluster.apply(manifest(name, "default", messages=[first, second]))
        log = session.wait_turn(2)
        rig.cluster.apply(manifest(name, "default", messages=[first, second]))
        check_log(log)
        assert final_text(log) == "two"
        assert [e["id"] for e in session.log() if e["type"] == "user.message"] == ["msg:a", "msg:b"]
    finally:
        rig.delete(session)


def test_deleted_and_recreated_does_not_run_twice(rig: Rig) -> None:
    marker = rig.model.script({"content": [say("done once")]})
    session = rig.session(f"{marker}")
    session.wait_turn()
    rig.cluster.kubectl(
        "-n",
        "default",
        "wait",
        "--for=condition=TurnComplete",
        f"agentsession/{session.name}",
        "--timeout=60s",
    )
    first = session.id
    rig.delete(session)
    eventually("the object is gone", lambda: _gone(rig, session.name))
    rig.cluster.apply(manifest(session.name, "default", message=f"{marker}"))
    eventually(
        "the finished run is adopted",
        lambda: "AlreadyRan" in str(session.resource().get("status", {}).get("conditions")),
    )
    assert len(rig.model.requests(first)) == 1
    rig.delete(session)
    eventually("the object is gone", lambda: _gone(rig, session.name))
    rig.cluster.apply(manifest(session.name, "default", message=f"{marker}", runID="again"))
    session.wait_turn()
    assert session.id != first


def test_deleted_in_mid_turn_ends_the_log_and_the_pods(rig: Rig) -> None:
    gate = f"del-{uuid.uuid4().hex[:6]}"
    marker = rig.model.script(
        {"content": [bash("echo hi")]}, {"content": [say("never")], "gate": gate}
    )
    session = rig.session(f"{marker}")
    rig.model.wait_gate(gate)
    identity = session.id
    with session.follow() as events:
        events.until_type("session.created")
        rig.delete(session)
        events.until_type("session.deleted")
    eventually("the object is gone", lambda: _gone(rig, session.name))
    eventually(
        "its sandboxes are gone",
        lambda: not rig.cluster.items("pods", "default", f"cowhand.dev/session-id={identity}"),
    )
    rig.model.release(gate)


@pytest.mark.disruptive
def test_deleted_while_the_store_is_dead(rig: Rig) -> None:
    marker = rig.model.script({"content": [say("hi")]})
    session = rig.session(f"{marker}")
    session.wait_turn()
    rig.cluster.kubectl("-n", SYSTEM, "scale", "statefulset", "cowhand-store", "--replicas=0")
    try:
        eventually(
            "the store is gone", lambda: rig.cluster.get("pod", "cowhand-store-0", SYSTEM) is None
        )
        rig.delete(session)
        eventually("the finalizer gives up", lambda: _gone(rig, session.name), patience=240)
    finally:
        rig.cluster.kubectl("-n", SYSTEM, "scale", "statefulset", "cowhand-store", "--replicas=1")
        rig.cluster.kubectl(
            "-n", SYSTEM, "rollout", "status", "statefulset/cowhand-store", "--timeout=180s"
        )
    again = rig.session(rig.model.script({"content": [say("back")]}))
    assert final_text(again.wait_turn()) == "back"
