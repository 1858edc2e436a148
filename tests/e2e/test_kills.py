"""Harness and sandbox are killed at named positions of the log: Claude never notices, no effect runs twice.

A kill is SIGKILL of every process of the pod that holds the lease (or of the sandbox pod), while a gate
of the model server or a file in the sandbox holds the turn at exactly that place.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator

import pytest

from e2e.checks import COUNT, check_log, check_requests, final_text
from lab import SYSTEM, Follower, Json, Rig, Session, bash, eventually, say

pytestmark = pytest.mark.e2e

TENANT = "team-b"
"""Where harness pods are killed: nobody else's sessions run there meanwhile (its tests are one group)."""


WAIT_FOR_FILE = "while [ ! -e /workspace/go ]; do sleep 0.1; done; "


def _gate(name: str) -> str:
    return f"{name}-{uuid.uuid4().hex[:6]}"


def _kill_holder(rig: Rig, session: Session) -> str:
    pod = session.holder()
    rig.cluster.kill_pod(pod)
    uid: str = pod["metadata"]["uid"]
    return uid


def _finished(rig: Rig, session: Session, killed: str, answer: str) -> None:
    """The turn ended, by another worker, with the counter grown by exactly one."""
    log = session.wait_turn()
    check_log(log)
    check_requests(rig.model.requests(session.id))
    assert answer in final_text(log)
    last_wake = [e for e in log if e["type"] == "session.wake"][-1]
    assert killed not in last_wake["lease"], "the killed worker finished the turn itself"
    counted = rig.cowhand(
        "-n", session.namespace, "exec", session.name, "--", "cat /workspace/counter"
    )
    assert counted.strip() == "1", "the effect did not run exactly once"


def _first_request(rig: Rig) -> tuple[Session, Callable[[Follower], None], Callable[[], None]]:
    gate = _gate("first")
    marker = rig.model.script(
        {"content": [bash(COUNT)], "gate": gate}, {"content": [say("at {{result:-1}}")]}
    )
    return (
        rig.session(f"{marker}", namespace=TENANT),
        lambda _: rig.model.wait_gate(gate),
        lambda: rig.model.release(gate),
    )


def _mid_stream(rig: Rig) -> tuple[Session, Callable[[Follower], None], Callable[[], None]]:
    gate = _gate("mid")
    marker = rig.model.script(
        {"content": [say("Let me count."), bash(COUNT)], "gate_mid": gate},
        {"content": [say("at {{result:-1}}")]},
    )
    return (
        rig.session(f"{marker}", namespace=TENANT),
        lambda _: rig.model.wait_gate(gate),
        lambda: rig.model.release(gate),
    )


def _sandbox_on_its_way(rig: Rig) -> tuple[Session, Callable[[Follower], None], Callable[[], None]]:
    marker = rig.model.script({"content": [bash(COUNT)]}, {"content": [say("at {{result:-1}}")]})

    def reached(events: Follower) -> None:
        events.until_type("hand.requested")

    return rig.session(f"{marker}", namespace=TENANT), reached, lambda: None


def _tool_running(rig: Rig) -> tuple[Session, Callable[[Follower], None], Callable[[], None]]:
    marker = rig.model.script(
        {"content": [bash("true")]},
        {"content": [bash(WAIT_FOR_FILE + COUNT, timeout_ms=600_000)]},
        {"content": [say("at {{result:-1}}")]},
    )
    session = rig.session(f"{marker}", namespace=TENANT)

    def reached(events: Follower) -> None:
        events.until_type("tool.result")
        events.until_type("tool.started")

    def let_go() -> None:
        # not by exec: the one shell of the sandbox is busy with the call that waits
        pod = session.sandbox_pod()["metadata"]["name"]
        rig.cluster.kubectl(
            "-n", session.namespace, "exec", pod, "-c", "sandbox", "--", "touch", "/workspace/go"
        )

    return session, reached, let_go


def _results_in(rig: Rig) -> tuple[Session, Callable[[Follower], None], Callable[[], None]]:
    gate = _gate("second")
    marker = rig.model.script(
        {"content": [bash(COUNT)]}, {"content": [say("at {{result:-1}}")], "gate": gate}
    )
    return (
        rig.session(f"{marker}", namespace=TENANT),
        lambda _: rig.model.wait_gate(gate),
        lambda: rig.model.release(gate),
    )


@pytest.mark.xdist_group(TENANT)
@pytest.mark.parametrize(
    "arrange",
    [_first_request, _mid_stream, _sandbox_on_its_way, _tool_running, _results_in],
    ids=lambda f: f.__name__.strip("_"),
)
def test_harness_killed(rig: Rig, arrange: Callable[[Rig], tuple]) -> None:  # type: ignore[type-arg]
    session, reached, let_go = arrange(rig)
    with session.follow() as events:
        reached(events)
        killed = _kill_holder(rig, session)
        let_go()
        _finished(rig, session, killed, "at 1")


def test_sandbox_killed_between_calls(rig: Rig) -> None:
    gate = _gate("between")
    marker = rig.model.script(
        {"content": [bash(COUNT)]},
        {"content": [bash("echo alive")], "gate": gate},
        {"content": [bash("echo again")]},
        {"content": [say("{{result:-1}}")]},
    )
    session = rig.session(f"{marker}")
    rig.model.wait_gate(gate)
    rig.cluster.kill_pod(session.sandbox_pod())
    rig.model.release(gate)
    log = session.wait_turn()
    check_log(log)
    check_requests(rig.model.requests(session.id))
    assert "again" in final_text(log)
    assert [e["data"]["instance"] for e in log if e["type"] == "hand.provisioned"] == [1, 2]


def test_sandbox_killed_during_a_call_is_an_error_that_claude_sees(rig: Rig) -> None:
    marker = rig.model.script(
        {"content": [bash("true")]},
        {"content": [bash(WAIT_FOR_FILE, timeout_ms=600_000)]},
        {"content": [bash("echo alive again")]},
        {"content": [say("{{result:-1}}")]},
    )
    session = rig.session(f"{marker}")
    with session.follow() as events:
        events.until_type("tool.result")
        events.until_type("tool.started")
        rig.cluster.kill_pod(session.sandbox_pod())
    log = session.wait_turn()
    check_log(log)
    results = [e["data"] for e in log if e["type"] == "tool.result"]
    assert results[1]["is_error"]
    assert "lost" in results[1]["content"]
    assert "alive again" in final_text(log)


def test_sandbox_killed_before_it_is_ready(rig: Rig) -> None:
    marker = rig.model.script(
        {"content": [bash("echo one")]},
        {"content": [bash("echo two")]},
        {"content": [say("{{result:-1}}")]},
    )
    session = rig.session(f"{marker}")
    with session.follow() as events:
        events.until_type("hand.requested")
        pod = eventually("the sandbox pod", session.pods)[0]
        rig.cluster.kill_pod(pod)
    log = session.wait_turn()
    check_log(log)
    assert "two" in final_text(log)


@contextlib.contextmanager
def _stopped(rig: Rig, pod: Json) -> Iterator[None]:
    """SIGSTOP for the main process of each container of a pod, and SIGCONT at the end."""
    rig.cluster.signal(pod, "SIGSTOP")
    try:
        yield
    finally:
        rig.cluster.signal(pod, "SIGCONT")


@pytest.mark.xdist_group(TENANT)
def test_a_harness_that_stands_still_is_replaced_and_its_late_writes_are_refused(rig: Rig) -> None:
    session, reached, let_go = _results_in(rig)
    with session.follow() as events:
        reached(events)
    holder = session.holder()
    with _stopped(rig, holder):
        taken = eventually(
            "another worker holds the session",
            lambda: [
                e
                for e in session.log()
                if e["type"] == "session.wake" and holder["metadata"]["uid"] not in e["lease"]
            ],
        )
    let_go()
    _finished(rig, session, holder["metadata"]["uid"], "at 1")
    late = [
        e
        for e in session.log()
        if e["seq"] > taken[0]["seq"] and holder["metadata"]["uid"] in e["lease"]
    ]
    assert not late, "the old holder wrote after it had lost the session"


@pytest.mark.disruptive
def test_operator_killed_in_mid_turn(rig: Rig) -> None:
    gate = _gate("operator")
    marker = rig.model.script(
        {"content": [say("Wait."), bash(COUNT)], "gate": gate},
        {"content": [say("at {{result:-1}}")]},
    )
    session = rig.session(f"{marker}")
    rig.model.wait_gate(gate)
    for pod in rig.cluster.items("pods", SYSTEM, "app.kubernetes.io/component=operator"):
        rig.cluster.kill_pod(pod)
    rig.model.release(gate)
    log = session.wait_turn()
    check_log(log)
    assert "at 1" in final_text(log)


@pytest.mark.disruptive
def test_store_restarted_in_mid_turn(rig: Rig) -> None:
    gate = _gate("store")
    marker = rig.model.script(
        {"content": [bash(COUNT)], "gate": gate}, {"content": [say("at {{result:-1}}")]}
    )
    session = rig.session(f"{marker}")
    rig.model.wait_gate(gate)
    before = session.log()
    pod = rig.cluster.get("pod", "cowhand-store-0", SYSTEM)
    assert pod is not None
    uid = pod["metadata"]["uid"]
    rig.cluster.kill_pod(pod)

    def back() -> bool:
        new = rig.cluster.get("pod", "cowhand-store-0", SYSTEM)
        return bool(
            new
            and new["metadata"]["uid"] != uid
            and any(
                c["type"] == "Ready" and c["status"] == "True"
                for c in new["status"].get("conditions", [])
            )
        )

    eventually("the store is back", back)
    rig.model.release(gate)
    log = session.wait_turn()
    check_log(log)
    check_requests(rig.model.requests(session.id))
    assert [e["id"] for e in log[: len(before)]] == [e["id"] for e in before], (
        "acknowledged events are gone"
    )
    assert "at 1" in final_text(log)
