"""Call ids, the journal over restarts, interruption, and requests that are not requests."""

from __future__ import annotations

import json
import resource
import signal
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from support.sandboxd_rig import Sandboxd

COUNT = {"command": "n=$(cat n 2>/dev/null || echo 0); echo $((n+1)) > n; cat n"}


def path_of(call_id: str) -> str:
    return "/v1/calls/" + quote(call_id, safe="")


def test_same_call_id_runs_once(box: Sandboxd) -> None:
    first = box.execute("bash", COUNT, call_id="s/1")
    again = box.execute("bash", COUNT, call_id="s/1")
    assert first == again
    assert first["content"] == "1\n"
    # Control: another id does run.
    assert box.execute("bash", COUNT, call_id="s/2")["content"] == "2\n"


def test_same_call_id_with_another_input_is_refused(box: Sandboxd) -> None:
    box.execute("bash", COUNT, call_id="s/1")
    for name, given in (("bash", {"command": "echo other"}), ("read", COUNT)):
        body = {"call_id": "s/1", "name": name, "input": given, "timeout_ms": 1000}
        status, answer = box.request("POST", "/v1/execute", body)
        assert status == 409
        assert answer["error"]["type"] == "conflict"


def start_and_leave(box: Sandboxd, call_id: str, command: str) -> socket.socket:
    """Send a call without waiting for its answer."""
    call = {"call_id": call_id, "name": "bash", "input": {"command": command}, "timeout_ms": 60_000}
    body = json.dumps(call).encode()
    head = f"POST /v1/execute HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    client = socket.create_connection(("127.0.0.1", box.port))
    client.sendall(head.encode() + body)
    while not (box.workdir / "running").exists():
        threading.Event().wait(0.02)
    return client


def test_call_goes_on_without_its_client_and_can_be_waited_for(box: Sandboxd) -> None:
    start_and_leave(
        box, "s/1", "touch running; until [ -e go ]; do sleep 0.02; done; echo ready"
    ).close()
    assert box.request("GET", path_of("s/1"))[1]["status"] == "running"
    (box.workdir / "go").touch()
    status, answer = box.request("GET", path_of("s/1") + "?wait_ms=20000")
    assert (status, answer["status"], answer["result"]["content"]) == (200, "done", "ready\n")
    assert box.request("GET", path_of("s/9")) == (404, {"status": "unknown"})


def test_results_survive_a_restart(box: Sandboxd) -> None:
    first = box.execute("bash", COUNT, call_id="s/1")
    assert box.stop() == 0
    box.start()
    assert box.execute("bash", COUNT, call_id="s/1") == first
    assert (box.workdir / "n").read_text() == "1\n"


def test_call_that_ran_when_sandboxd_was_killed_is_not_run_again(box: Sandboxd) -> None:
    command = "touch running; echo x >> ran; sleep 300"
    with start_and_leave(box, "s/1", command):
        box.stop(signal.SIGKILL)
    box.start()
    result = box.execute("bash", {"command": command}, call_id="s/1")
    assert result["is_error"]
    assert result["content"] == "sandboxd restarted while the call ran; it may have partly executed"
    assert (box.workdir / "ran").read_text() == "x\n"


def test_without_its_journal_the_call_would_run_again(box: Sandboxd) -> None:
    """Control of the test above: it is the journal that keeps a call from running twice."""
    box.execute("bash", COUNT, call_id="s/1")
    box.stop(signal.SIGKILL)
    for file in box.state.glob("journal-*"):
        file.unlink()
    box.start()
    assert box.execute("bash", COUNT, call_id="s/1")["content"] == "2\n"


def test_delete_interrupts(box: Sandboxd) -> None:
    with start_and_leave(box, "s/1", "echo begun; touch running; sleep 300"):
        status, answer = box.request("DELETE", path_of("s/1"))
    assert (status, answer["status"]) == (200, "done")
    assert answer["result"]["content"].startswith("begun\n[the command was interrupted")
    assert answer["result"]["is_error"]
    assert box.bash("echo alive")["content"] == "alive\n"


def test_delete_of_a_queued_call_keeps_it_from_starting(box: Sandboxd) -> None:
    with start_and_leave(box, "s/1", "touch running; until [ -e go ]; do sleep 0.02; done"):
        with start_and_leave(box, "s/2", "touch started"):
            while box.request("GET", path_of("s/2"))[0] == 404:
                threading.Event().wait(0.02)
            status, answer = box.request("DELETE", path_of("s/2"))
            assert (status, answer["status"]) == (200, "done")
            assert "before its command started" in answer["result"]["content"]
        (box.workdir / "go").touch()
        assert box.request("GET", path_of("s/1") + "?wait_ms=20000")[1]["result"]["exit_code"] == 0
    assert box.bash("ls")["content"] == "go\nrunning\n"


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n\r\n",
        b"GARBAGE\r\n\r\n",
        b"GET /v1/health HTTP/1.0\r\n\r\n",
        b"GET v1/health HTTP/1.1\r\n\r\n",
        b"GET /v1/health HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET /v1/health HTTP/1.1\r\na : b\r\n\r\n",
        b"GET /v1/health HTTP/1.1\r\n folded: x\r\n\r\n",
        b"POST /v1/execute HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"POST /v1/execute HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/execute HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/execute HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n",
        b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\n\r\n",
        bytes(range(256)) + b"\r\n\r\n",
    ],
)
def test_malformed_http_is_refused_and_nothing_falls_over(shared: Sandboxd, raw: bytes) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), timeout=20) as client:
        client.sendall(raw)
        answer = client.recv(1 << 16)
    assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501")), answer
    assert shared.request("GET", "/v1/health") == (200, {"status": "ok", "version": 1})


GOOD: dict[str, Any] = {
    "call_id": "s/1",
    "name": "bash",
    "input": {"command": "true"},
    "timeout_ms": 1000,
}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"not json", "JSON"),
        (b"[" * 100_000, "JSON"),
        ([], "object"),
        ({**GOOD, "call_id": ""}, "call_id"),
        ({**GOOD, "call_id": "a b"}, "call_id"),
        ({**GOOD, "call_id": "x" * 257}, "call_id"),
        ({**GOOD, "name": 1}, "name"),
        ({**GOOD, "input": "ls"}, "input"),
        ({**GOOD, "timeout_ms": 0}, "timeout_ms"),
        ({**GOOD, "timeout_ms": True}, "timeout_ms"),
        ({**GOOD, "extra": 1}, "extra"),
    ],
)
def test_bad_execute_requests_name_the_field(shared: Sandboxd, body: Any, word: str) -> None:
    status, answer = shared.request("POST", "/v1/execute", body)
    assert status == 400
    assert word in answer["error"]["message"]


def test_unknown_paths_and_methods(shared: Sandboxd) -> None:
    assert shared.request("GET", "/nothing")[0] == 404
    assert shared.request("GET", "/v1/execute")[0] == 405
    assert shared.request("POST", "/v1/health", {})[0] == 405


def test_bad_tool_inputs_are_results(shared: Sandboxd) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("bash", {}, "'command' is required"),
        ("bash", {"command": "true", "restart": True}, "either"),
        ("bash", {"command": "a\0b"}, "NUL"),
        ("read", {}, "'file_path' is required"),
        ("edit", {"file_path": "x", "old": "y"}, "unknown field 'old'"),
        ("fly", {}, "unknown tool"),
    ]
    for name, given, word in cases:
        result = shared.execute(name, given)
        assert result["is_error"], name
        assert word in result["content"]


def test_a_journal_that_cannot_be_written_refuses_before_the_call_starts(box: Sandboxd) -> None:
    """The disk is full: nothing may run that could not be told apart later."""
    assert box.process is not None
    # A limit on file size makes writes fail as a full disk does.
    resource.prlimit(box.process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    body = {"call_id": "s/1", "name": "bash", "input": COUNT, "timeout_ms": 1000}
    status, answer = box.request("POST", "/v1/execute", body)
    assert (status, answer["error"]["type"]) == (503, "unavailable")
    resource.prlimit(box.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert not (box.workdir / "n").exists()
    assert box.execute("bash", COUNT, call_id="s/1")["content"] == "1\n"


def test_sigterm_ends_it_with_the_processes_of_the_shell(box: Sandboxd) -> None:
    box.bash("sleep 300 & echo $! > child")
    child = Path(f"/proc/{(box.workdir / 'child').read_text().strip()}/stat")
    assert child.exists()
    assert box.stop(signal.SIGTERM) == 0
    state = child.read_text().rsplit(")", 1)[1].split()[0] if child.exists() else "gone"
    assert state in ("gone", "Z")
