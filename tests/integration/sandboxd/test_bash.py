"""The persistent bash of a real sandboxd: separation of calls, timeouts, restarts, limits."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from support.sandboxd_rig import Sandboxd


def alive(pid: str) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_directory_variables_and_functions_stay(box: Sandboxd) -> None:
    box.bash("mkdir a && cd a && export COLOUR=red && say() { echo said $1; }")
    result = box.bash("pwd; echo $COLOUR; say it")
    assert result["content"] == f"{box.workdir}/a\nred\nsaid it\n"
    assert (result["is_error"], result["exit_code"], result["truncated"]) == (False, 0, False)


@pytest.mark.parametrize(
    ("command", "content", "code"),
    [
        ("echo one; echo two >&2; echo three", "one\ntwo\nthree\n", 0),
        ("printf unterminated", "unterminated", 0),
        ("printf '\\xff\\x00\\xc3'", "\ufffd\0\ufffd", 0),
        ("true", "", 0),
        ("false", "", 1),
        ("(exit 42)", "", 42),
        ("kill -9 $BASHPID & wait $!", None, 137),
        ("cat; echo end", "end\n", 0),
        ("cat <<X\n'quoted' \"text\" $((1+1))\nX", "'quoted' \"text\" 2\n", 0),
        ("echo 'unbalanced", None, 2),
        ("if", None, 2),
        ("nosuchcommand", None, 127),
        ("echo \"it's\" '$A' \\\\", "it's $A \\\n", 0),
    ],
)
def test_output_and_exit_code(
    shared: Sandboxd, command: str, content: str | None, code: int
) -> None:
    result = shared.bash(command)
    assert (result["exit_code"], result["is_error"]) == (code, code != 0)
    if content is not None:
        assert result["content"] == content
    assert shared.bash("echo next")["content"] == "next\n"


def test_background_job_neither_blocks_nor_leaks_into_the_next_call(box: Sandboxd) -> None:
    started = box.bash(
        "(until [ -e go ]; do sleep 0.02; done; echo LATE; touch done) & echo started"
    )
    assert started["content"] == "started\n"
    seen = box.bash("touch go; until [ -e done ]; do sleep 0.02; done; echo mine")
    assert seen["content"] == "mine\n"


def test_background_job_that_writes_much_is_not_stopped_by_a_full_pipe(box: Sandboxd) -> None:
    box.bash("(head -c 5000000 /dev/zero; touch wrote) &")
    assert (
        box.bash("until [ -e wrote ]; do sleep 0.02; done; echo yes", 20_000)["content"] == "yes\n"
    )


def test_timeout_kills_the_command_with_its_children_and_says_so(box: Sandboxd) -> None:
    box.bash("mkdir sub; cd sub; KEPT=no")
    result = box.bash("(sleep 300 & echo $! > child; wait) & sleep 300", timeout_ms=300)
    assert result["is_error"]
    assert result["exit_code"] is None
    assert "timed out after 300 ms" in result["content"]
    assert "new shell" in result["content"]
    child = (box.workdir / "sub" / "child").read_text().strip()
    assert not alive(child)
    assert box.bash("pwd; echo KEPT=$KEPT")["content"] == f"{box.workdir}/sub\nKEPT=\n"


def test_timeout_in_the_input_counts_too(box: Sandboxd) -> None:
    result = box.execute("bash", {"command": "sleep 300", "timeout_ms": 200})
    assert "timed out after 200 ms" in result["content"]


def test_output_before_a_timeout_is_kept(box: Sandboxd) -> None:
    assert box.bash("echo before; sleep 300", timeout_ms=500)["content"].startswith("before\n[")


def test_job_control_cannot_hide_a_child_from_the_timeout(box: Sandboxd) -> None:
    box.bash("set -m; sleep 300 & echo $! > child; sleep 300", timeout_ms=400)
    assert not alive((box.workdir / "child").read_text().strip())


def test_children_that_are_made_while_others_are_killed_are_killed_too(box: Sandboxd) -> None:
    forks = "while :; do sleep 300 & echo $! >> children; done"
    box.bash(f"set -m; ({forks}) & ({forks}) & ({forks}) & sleep 300", timeout_ms=300)
    children = (box.workdir / "children").read_text().split()
    assert len(children) > 10
    assert not [pid for pid in children if alive(pid)]


def test_exit_and_errexit_end_the_shell_and_the_result_says_so(box: Sandboxd) -> None:
    for command, code in (
        ("exit 7", 7),
        ("set -e; false; echo never", 1),
        ("exec sh -c 'exit 3'", 3),
    ):
        result = box.bash(command)
        assert (result["exit_code"], result["is_error"]) == (code, True)
        assert f"the shell exited with code {code}" in result["content"]
        assert box.bash("echo alive")["content"] == "alive\n"


def test_a_shell_that_died_between_calls_is_reported(box: Sandboxd) -> None:
    box.bash("(sleep 0.2; touch killing; kill -9 $$) &")
    while not (box.workdir / "killing").exists():
        threading.Event().wait(0.02)
    results = [box.bash("echo hello")["content"] for _ in range(2)]
    assert any("had ended" in r or "killed by signal 9" in r for r in results)
    assert box.bash("echo again")["content"] == "again\n"


def test_traps_and_tracing_do_not_confuse_the_end(box: Sandboxd) -> None:
    box.bash("trap 'echo TRAP' DEBUG; set -x; printf() { echo fake; }; PS4=")
    assert "x\n" in box.bash("echo x")["content"]
    assert box.execute("bash", {"restart": True})["content"] == "bash session restarted"
    assert box.bash("echo x")["content"] == "x\n"


def test_restart_forgets_everything_but_files(box: Sandboxd) -> None:
    box.bash("cd /; A=1; sleep 300 & echo $! > $OLDPWD/job")
    box.execute("bash", {"restart": True})
    assert box.bash("pwd; echo A=$A")["content"] == f"{box.workdir}\nA=\n"
    assert not alive((box.workdir / "job").read_text().strip())


def test_large_output_keeps_head_and_tail_and_does_not_grow_memory(box: Sandboxd) -> None:
    box.bash("echo warm")
    before = box.memory_kib()
    result = box.bash("echo FIRST; head -c 50000000 /dev/zero | tr '\\0' x; echo; echo LAST")
    assert result["truncated"]
    content = result["content"]
    assert content.startswith("FIRST\n")
    assert content.endswith("\nLAST\n")
    assert "left out" in content
    assert len(content.encode()) <= 1024 * 1024
    assert box.memory_kib() - before < 24 * 1024


def test_large_command(box: Sandboxd) -> None:
    text = "0123456789'\"" * 20_000
    result = box.bash("cat > big <<'X'\n" + text + "\nX\nwc -c < big")
    assert result["content"].strip() == str(len(text) + 1)


def test_environment_of_commands_has_nothing_of_ours(tmp_path: Path) -> None:
    box = Sandboxd(tmp_path).start(COWHAND_TOKEN="t", KUBERNETES_SERVICE_HOST="h", MINE="yes")
    try:
        env = dict(
            x.split("=", 1) for x in box.bash("env -0 | tr '\\0' '\\n'")["content"].splitlines()
        )
        assert env["MINE"] == "yes"
        forbidden = ("SANDBOXD_", "COWHAND_", "KUBERNETES_", "PYTHONPATH", "PYTHONSAFEPATH")
        assert not [name for name in env if name.startswith(forbidden)]
    finally:
        box.stop()


def test_bash_calls_queue_and_pure_tools_do_not(box: Sandboxd) -> None:
    (box.workdir / "note").write_text("hello")
    order = box.workdir / "order"
    first = threading.Thread(
        target=box.bash,
        args=("touch running; until [ -e go ]; do sleep 0.02; done; echo 1 >> order",),
    )
    first.start()
    while not (box.workdir / "running").exists():
        threading.Event().wait(0.02)
    second = threading.Thread(target=box.bash, args=("echo 2 >> order",))
    second.start()
    # Answered while bash is busy: the file that ends the first command is written by a tool call itself.
    assert box.execute("read", {"file_path": "note"})["content"] == "hello"
    assert box.execute("glob", {"pattern": "no*"})["content"].endswith("note")
    assert "hello" in box.execute("grep", {"pattern": "h.llo"})["content"]
    assert not order.exists()
    box.execute("write", {"file_path": "go", "content": ""})
    first.join(20)
    second.join(20)
    assert order.read_text() == "1\n2\n"
