"""Large events in an installed system: they are files of the archive, come back whole, and go with their session."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator

import pytest

from e2e.checks import check_log, check_requests, final_text
from lab import SYSTEM, Rig, Session, eventually, say

pytestmark = pytest.mark.e2e

MESSAGE = 3 * 1024 * 1024
RESPONSE = 150_000
LIST = (
    "import json, os, sys\n"
    "found = {}\n"
    "for folder, _, names in os.walk(sys.argv[1]):\n"
    "    for name in names:\n"
    "        path = os.path.join(folder, name)\n"
    "        found[path] = os.path.getsize(path)\n"
    "print(json.dumps(found))\n"
)


def files(rig: Rig, session_id: str) -> dict[str, int]:
    """The files that the archive has of a session: path -> bytes."""
    where = f"/data/default/{session_id}"
    out = rig.cluster.kubectl(
        *("-n", SYSTEM, "exec", "cowhand-archive-0", "--", "python3", "-c", LIST, where)
    )
    found: dict[str, int] = json.loads(out)
    return found


def send(rig: Rig, session: Session, text: str) -> subprocess.CompletedProcess[str]:
    """`cowhand send` from standard input: no command line is as long as this."""
    return subprocess.run(
        [sys.executable, "-m", "cowhand", "-n", "default", "send", session.name, "-"],
        input=text,
        capture_output=True,
        text=True,
        env=rig.cluster.env(),
        check=False,
    )


@pytest.fixture(autouse=True)
def installed(rig: Rig) -> None:
    if rig.cluster.get("statefulset", "cowhand-archive", SYSTEM) is None:
        pytest.skip("archive.enabled is false in this install")


def test_large_events_are_blobs_come_back_whole_and_go_with_the_session(rig: Rig) -> None:
    long = "".join(f"{n} " for n in range(RESPONSE // 6))
    marker = rig.model.script({"content": [say("Hello.")]}, {"content": [say(long)], "delta_ms": 0})
    agent = {
        "model": {"id": "claude-sonnet-5-5"},
        "system": "You are a test.",
        # The message alone is larger than a window: a profile that renews it would.
        "context": {"profile": "plain"},
    }
    session = rig.session(f"{marker}", agent=agent, deletionPolicy="Delete")
    session.wait_turn(1)
    assert files(rig, session.id) == {}, "small events are not in the archive"
    text = uuid.uuid4().hex * (MESSAGE // 32)
    sent = send(rig, session, text)
    assert sent.returncode == 0, sent.stderr
    log = session.wait_turn(2)
    check_log(log)
    message = [e for e in log if e["type"] == "user.message"][-1]
    assert message["data"]["content"] == [{"type": "text", "text": text}]
    assert final_text(log) == long
    requests = rig.model.requests(session.id)
    check_requests(requests)
    assert text in requests[-1]["body"], "the model saw the whole message"
    sizes = sorted(files(rig, session.id).values())
    assert len(sizes) == 2
    assert sizes[0] > len(long)
    assert sizes[1] > MESSAGE
    # Another worker folds the same conversation from the blobs.
    rig.cluster.kill_pod(session.holder())
    session.send("and now?")
    log = session.wait_turn(3)
    check_log(log)
    assert text in rig.model.requests(session.id)[-1]["body"]
    session_id = session.id
    rig.cluster.kubectl("-n", "default", "delete", "agentsession", session.name, "--timeout=60s")
    eventually("the files of a deleted session are gone", lambda: files(rig, session_id) == {})


@pytest.fixture
def away(rig: Rig) -> Iterator[None]:
    """No archive during the test's first part; `back` ends it."""
    _scale(rig, 0)
    yield
    back(rig)


def _scale(rig: Rig, replicas: int) -> None:
    rig.cluster.kubectl(
        *("-n", SYSTEM, "scale", "statefulset", "cowhand-archive", f"--replicas={replicas}")
    )
    eventually(
        f"{replicas} pods of the archive",
        lambda: (
            len(rig.cluster.items("pods", SYSTEM, "app.kubernetes.io/component=archive"))
            == replicas
        ),
    )


def _said(rig: Rig) -> str:
    """What the harnesses of the namespace have logged lately."""
    args = ("-l", "app.kubernetes.io/component=harness", "-c", "harness", "--tail=200")
    return rig.cluster.kubectl("-n", "default", "logs", *args, "--since=60s")


def back(rig: Rig) -> None:
    """The archive is there again."""
    _scale(rig, 1)
    rig.cluster.kubectl(
        *("-n", SYSTEM, "wait", "--for=condition=Ready", "pod/cowhand-archive-0", "--timeout=180s")
    )


@pytest.mark.disruptive
@pytest.mark.disruptive
def test_without_the_archive_small_events_go_on_and_large_ones_wait(rig: Rig, away: None) -> None:
    long = "".join(f"{n} " for n in range(RESPONSE // 6))
    marker = rig.model.script(
        {"content": [say("Hello.")]},
        {"content": [say(long)], "delta_ms": 0},
        {"content": [say("Bye.")]},
    )
    session = rig.session(f"{marker}", deletionPolicy="Delete")
    log = session.wait_turn(1)
    assert final_text(log) == "Hello.", "a session of small events needs no archive"
    refused = send(rig, session, "x" * MESSAGE)
    assert refused.returncode != 0
    assert "archive" in refused.stderr
    session.send("long, please")
    eventually(
        "a worker has the answer and waits", lambda: "archive cannot be reached" in _said(rig)
    )
    other = rig.session(rig.model.script({"content": [say("Me too.")]}))
    assert final_text(other.wait_turn(1)) == "Me too.", "one that waits keeps nobody up"
    assert "model.response" not in [e["type"] for e in session.log()[len(log) :]]
    back(rig)
    log = session.wait_turn(2)
    check_log(log)
    assert final_text(log) == long
    assert len(rig.model.requests(session.id)) == 2, "the answer was kept, not asked for again"
    # Killed where it stands, in the middle of nothing and of everything.
    (pod,) = rig.cluster.items("pods", SYSTEM, "app.kubernetes.io/component=archive")
    rig.cluster.kill_pod(pod)
    session.send("and?")
    log = session.wait_turn(3)
    check_log(log)
    assert final_text(log) == "Bye."
    eventually(
        "a large message gets through", lambda: send(rig, session, "y" * MESSAGE).returncode == 0
    )
    log = session.wait_turn(4)
    assert [e for e in log if e["type"] == "user.message"][-1]["data"]["content"][0]["text"] == (
        "y" * MESSAGE
    )
