"""Forks, backups and restores in an installed system: what they copy is what was there, also what the archive has."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.checks import check_log, check_requests, final_text
from lab import Rig, Session, bash, eventually, say

pytestmark = pytest.mark.e2e

RESPONSE = 150_000
"""Characters of an answer that is a blob of the archive, where there is one."""


def payloads(log: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(e["seq"], e["type"], json.dumps(e["payload"], sort_keys=True)) for e in log]


def end_of_turn(log: list[dict[str, Any]], turn: int) -> int:
    ends = [event["seq"] for event in log if event["type"] == "session.status_idle"]
    return int(ends[turn - 1])


def forked(rig: Rig, source: str, *args: str) -> Session:
    name = f"e2e-{uuid.uuid4().hex[:8]}"
    rig.cowhand("-n", "default", "fork", source, "--name", name, "--detach", *args)
    return Session(rig, "default", name)


def test_a_fork_goes_on_from_a_position_of_its_source(rig: Rig) -> None:
    long = "".join(f"{n} " for n in range(RESPONSE // 6))
    marker = rig.model.script(
        {"content": [bash("echo one > file; cat file")]},
        {"content": [say(long)], "delta_ms": 0},
        {"content": [bash("cat file || echo none")]},
        {"content": [say("Done.")]},
    )
    source = rig.session(f"{marker} begin")
    at = end_of_turn(source.wait_turn(1), 1)
    source.send("and now?")
    before = source.wait_turn(2)
    fork = forked(rig, source.name, "--at", str(at), "-m", "try another way")
    try:
        log = fork.wait_turn(2)
        check_log(log)
        assert payloads(log)[1:at] == payloads(before)[1:at]
        assert log[at]["type"] == "session.forked"
        assert final_text(log) == "Done."
        first, *_, last = rig.model.requests(fork.id)
        assert long in first["body"], "Claude sees what it said before"
        assert "try another way" in first["body"]
        assert "and now?" not in first["body"], "nothing of what came behind the position"
        check_requests(rig.model.requests(fork.id))
        # Its sandbox is its own: the file of the source is not there, and Claude reads so.
        assert "none" in json.dumps(last["json"]["messages"][-1])
        assert payloads(source.log()) == payloads(before), "the source is only read"
    finally:
        rig.delete(fork)


@pytest.fixture
def may_restore(rig: Rig) -> Iterator[None]:
    """The CLI's account may restore, as the runbook says."""
    name = f"e2e-{uuid.uuid4().hex[:8]}"
    account = {"kind": "ServiceAccount", "name": "cowhand-cli", "namespace": "default"}
    role = {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "ClusterRole",
        "name": "cowhand-restore",
    }
    rig.cluster.apply(
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": name, "namespace": "default"},
            "subjects": [account],
            "roleRef": role,
        }
    )
    yield
    rig.cluster.kubectl("-n", "default", "delete", "rolebinding", name, "--ignore-not-found")


def test_a_deleted_session_comes_back_from_a_backup(
    rig: Rig, may_restore: None, tmp_path: Path
) -> None:
    long = "".join(f"{n} " for n in range(RESPONSE // 6))
    marker = rig.model.script(
        {"content": [say(long)], "delta_ms": 0}, {"content": [say("I remember.")]}
    )
    session = rig.session(f"{marker} begin", deletionPolicy="Delete")
    before = session.wait_turn(1)
    identity, file = session.id, tmp_path / "one.ndjson"
    everything = tmp_path / "all.ndjson"
    rig.cowhand("-n", "default", "backup", str(everything))
    assert identity in everything.read_text()
    # Other tests' sessions are in it; one that is restored after its test deleted it would stay.
    rig.cowhand("-n", "default", "export", session.name, "-o", str(file))

    def allowed() -> str | None:
        said = rig.cowhand("-n", "default", "restore", str(file), "--dry-run", check=False)
        return said if "unchanged" in said else None

    eventually("the binding counts", allowed)
    rig.cluster.kubectl("-n", "default", "delete", "agentsession", session.name, "--timeout=60s")
    eventually(
        "the log of the deleted session is gone",
        lambda: "restored" in rig.cowhand("restore", str(file), "--dry-run", check=False),
    )
    assert "restored" in rig.cowhand("restore", str(file))
    again = [
        json.loads(line)
        for line in rig.cowhand("-n", "default", "events", "--raw", identity).splitlines()
    ]
    for event in again:
        event["data"] = (event["payload"] or {}).get("d", {})
    assert payloads(again)[: len(before)] == payloads(before)
    fork = forked(rig, identity, "--at", str(len(before)), "-m", "what did I ask?")
    try:
        log = fork.wait_turn(2)
        check_log(log)
        assert final_text(log) == "I remember."
        assert long in rig.model.requests(fork.id)[-1]["body"]
    finally:
        rig.delete(fork)
