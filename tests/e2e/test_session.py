"""A session from `kubectl apply` to its answer, and what people do with it on the way."""

from __future__ import annotations

import json
import uuid

import pytest

from e2e.checks import COUNT, check_log, check_requests, final_text
from lab import Rig, bash, eventually, manifest, say, tool

pytestmark = pytest.mark.e2e


def test_tools_run_in_a_sandbox_that_only_the_first_call_makes(rig: Rig) -> None:
    marker = rig.model.script(
        {"content": [say("Looking."), bash("id -u; pwd; echo secret-$((6*7))")]},
        {
            "content": [
                tool("write", file_path="/workspace/a/b.txt", content="one\ntwo\n"),
                tool("edit", file_path="/workspace/a/b.txt", old_string="two", new_string="2"),
                tool("read", file_path="/workspace/a/b.txt"),
            ]
        },
        {
            "content": [
                tool("grep", pattern="2", path="/workspace"),
                tool("glob", pattern="**/*.txt"),
            ]
        },
        {"content": [say("It said {{result:-1}}")]},
    )
    session = rig.session(f"Use your tools. {marker}")
    log = session.wait_turn()
    check_log(log)
    check_requests(rig.model.requests(session.id))
    results = [e["data"]["content"] for e in log if e["type"] == "tool.result"]
    assert "1000" in results[0]
    assert "secret-42" in results[0]
    assert "2" in results[3]
    assert "b.txt" in results[4]
    assert "b.txt" in final_text(log)
    types = [e["type"] for e in log]
    assert types.index("model.response") < types.index("hand.requested"), (
        "the first token must not wait for a sandbox"
    )
    rig.cluster.kubectl(
        "-n",
        "default",
        "wait",
        "--for=condition=TurnComplete",
        f"agentsession/{session.name}",
        "--timeout=60s",
    )
    status = session.resource()["status"]
    assert status["observedGeneration"] == session.resource()["metadata"]["generation"]
    assert status["turns"] == 1


def test_a_session_without_tools_makes_no_pod(rig: Rig) -> None:
    marker = rig.model.script({"content": [say("Hello.")]})
    session = rig.session(f"Say hello. {marker}")
    log = session.wait_turn()
    check_log(log)
    assert final_text(log) == "Hello."
    assert session.pods() == []


def test_two_sessions_at_once_do_not_see_each_other(rig: Rig) -> None:
    names = ["left", "right"]
    sessions = []
    for name in names:
        marker = rig.model.script(
            {"content": [bash(f"echo {name} > /workspace/who")], "gate": f"both-{name}"},
            {"content": [bash("cat /workspace/who; ls /workspace | wc -l")]},
            {"content": [say("{{result:-1}}")]},
        )
        sessions.append(rig.session(f"{marker}"))
    for name in names:
        rig.model.wait_gate(f"both-{name}")
    for name in names:
        rig.model.release(f"both-{name}")
    for name, session in zip(names, sessions, strict=True):
        log = session.wait_turn()
        check_log(log)
        assert name in final_text(log)


def test_message_in_a_later_turn_and_interrupt(rig: Rig) -> None:
    gate = f"never-{uuid.uuid4().hex[:6]}"
    marker = rig.model.script(
        {"content": [say("First.")]}, {"content": [say("Second.")], "gate": gate}
    )
    session = rig.session(f"Go. {marker}")
    session.wait_turn(1)
    session.send("again")
    rig.model.wait_gate(gate)
    rig.cowhand("-n", "default", "interrupt", session.name)
    log = session.wait_turn(2)
    assert log[-1]["data"]["stop_reason"]["type"] == "interrupted"
    ends = [e["data"]["outcome"] for e in log if e["type"] == "span.model_request_end"]
    assert ends == ["ok", "interrupted"]
    rig.model.release(gate)
    session.send("and now?")
    log = session.wait_turn(3)
    check_log(log)
    assert final_text(log) == "Second."


def test_approval_holds_the_call_until_a_person_allows_it(rig: Rig) -> None:
    marker = rig.model.script(
        {"content": [bash(COUNT)]},
        {"content": [bash(COUNT)]},
        {"content": [say("Now at {{result:-1}}")]},
    )
    agent = {"model": {"id": "claude-sonnet-5-5"}, "tools": [{"name": "bash", "permission": "Ask"}]}
    session = rig.session(f"Count. {marker}", agent=agent)
    log = session.wait_turn(1)
    assert log[-1]["data"]["stop_reason"]["type"] == "requires_action"
    assert not [e for e in log if e["type"] == "tool.started"]
    rig.cowhand("-n", "default", "approve", session.name)
    log = session.wait_turn(2)
    assert log[-1]["data"]["stop_reason"]["type"] == "requires_action"
    rig.cowhand("-n", "default", "deny", session.name)
    log = session.wait_turn(3)
    check_log(log)
    results = [e["data"] for e in log if e["type"] == "tool.result"]
    assert [bool(r["is_error"]) for r in results] == [False, True]
    actors = [e["data"]["actor"] for e in log if e["type"] == "user.tool_confirmation"]
    assert all("cowhand-cli" in json.dumps(actor) for actor in actors)


def test_exec_into_a_session_is_audited(rig: Rig) -> None:
    marker = rig.model.script(
        {"content": [bash("echo 7 > /workspace/n")]}, {"content": [say("ok")]}
    )
    session = rig.session(f"{marker}")
    session.wait_turn()
    assert (
        rig.cowhand("-n", "default", "exec", session.name, "--", "cat /workspace/n").strip() == "7"
    )
    executed = [e for e in session.log() if e["type"] == "session.exec"]
    assert executed[-1]["data"]["command"] == "cat /workspace/n"
    assert "cowhand-cli" in json.dumps(executed[-1]["data"]["actor"])


def test_a_sandbox_applied_by_hand_works_by_itself(rig: Rig) -> None:
    name = f"by-hand-{uuid.uuid4().hex[:6]}"
    rig.cluster.apply(
        {
            "apiVersion": "cowhand.dev/v1alpha1",
            "kind": "Sandbox",
            "metadata": {"name": name, "namespace": "default"},
            "spec": {},
        }
    )
    try:
        rig.cluster.kubectl(
            "-n",
            "default",
            "wait",
            "--for=condition=Ready",
            f"sandboxes.cowhand.dev/{name}",
            "--timeout=180s",
        )
        assert rig.cowhand("-n", "default", "exec", name, "--", "echo hi; id -u").split() == [
            "hi",
            "1000",
        ]
        failed = rig.cowhand("-n", "default", "exec", name, "--", "exit 3", check=False)
        assert "Traceback" not in failed
    finally:
        rig.cluster.kubectl(
            "-n", "default", "delete", "sandboxes.cowhand.dev", name, "--wait=false"
        )


def test_suspended_in_mid_turn_and_resumed(rig: Rig) -> None:
    marker = rig.model.script(
        {"content": [bash(COUNT)]},
        {"content": [bash(COUNT)]},
        {"content": [say("{{result:-1}}")]},
    )
    session = rig.session(f"{marker}")
    with session.follow() as events:
        events.until_type("tool.started")
        rig.cluster.kubectl(
            "-n", "default", "patch", "agentsession", session.name, "--type=merge",
            "-p", '{"spec":{"operatingMode":"Suspended"}}',
        )  # fmt: skip
        events.until_type("session.suspended")
    eventually(
        "the sandbox of a suspended session goes",
        lambda: not [p for p in session.pods() if "deletionTimestamp" not in p["metadata"]],
    )
    before = session.log()
    session.send("one more thing")
    rig.cluster.kubectl(
        "-n", "default", "patch", "agentsession", session.name, "--type=merge",
        "-p", '{"spec":{"operatingMode":"Running"}}',
    )  # fmt: skip
    log = session.wait_turn(1)
    check_log(log)
    assert len(log) > len(before)
    assert "session.resumed" in [e["type"] for e in log]


def test_wrong_references_say_what_to_do(rig: Rig) -> None:
    name = f"e2e-{uuid.uuid4().hex[:8]}"
    rig.cluster.apply(manifest(name, "default", message="hi", agentRef={"name": "nobody"}))
    try:
        ready = eventually(
            "Ready=False, AgentNotFound",
            lambda: next(
                (
                    c
                    for c in (rig.cluster.get("agentsession", name, "default") or {})
                    .get("status", {})
                    .get("conditions", [])
                    # A store that is slow to answer comes first.
                    if c["type"] == "Ready" and c["reason"] == "AgentNotFound"
                ),
                None,
            ),
        )
        assert ready["status"] == "False"
        assert "nobody" in ready["message"]
        rig.cluster.apply(
            {
                "apiVersion": "cowhand.dev/v1alpha1",
                "kind": "Agent",
                "metadata": {"name": "nobody", "namespace": "default"},
                "spec": {"model": {"id": "claude-sonnet-5-5"}},
            }
        )
        rig.cluster.kubectl(
            "-n",
            "default",
            "wait",
            "--for=condition=Ready",
            f"agentsession/{name}",
            "--timeout=120s",
        )
    finally:
        rig.cluster.kubectl("-n", "default", "delete", "agentsession", name, "--wait=false")
        rig.cluster.kubectl(
            "-n", "default", "delete", "agents.cowhand.dev", "nobody", "--ignore-not-found"
        )
