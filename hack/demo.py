"""`make demo`: one real session from `kubectl apply` to its answer, then the same with things killed in mid-turn.

Called by the Makefile after cluster, images and install. It goes the way a user goes, kubectl and the
`cowhand` command; only the kills use the node's container runtime, because no user has a SIGKILL.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import lab

EXAMPLE = lab.ROOT / "examples" / "fix-the-tests"
NAMESPACE = os.environ.get("COWHAND_DEMO_NAMESPACE", "default")
TTY = sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))
PATIENCE = 300


def paint(code: str, text: str) -> str:
    return f"\033[{code}m{text}\033[0m" if TTY else text


def title(text: str) -> None:
    print(f"\n{paint('1;36', '━━ ' + text)}\n", flush=True)


def note(text: str) -> None:
    print(paint("2", f"   {text}"), flush=True)


def cowhand(rig: lab.Rig, *args: str) -> subprocess.Popen[str]:
    """The `cowhand` command, its output on our terminal."""
    command = [sys.executable, "-m", "cowhand", "-n", NAMESPACE, *args]
    return subprocess.Popen(command, env=rig.cluster.env(), text=True)


def watch(rig: lab.Rig, session: lab.Session) -> None:
    """Show the events live until the turn ends."""
    process = cowhand(rig, "events", "-f", "--until-idle", session.name)
    try:
        code = process.wait(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        sys.exit(f"error: session {session.name} did not finish within {PATIENCE} s")
    if code:
        sys.exit(f"error: `cowhand events` ended with {code}")


def of_type(log: list[lab.Json], kind: str) -> list[lab.Json]:
    return [event for event in log if event["type"] == kind]


def summary(session: lab.Session, log: list[lab.Json]) -> None:
    """What happened, from the resource and the log."""
    status = session.resource()["status"]
    created = of_type(log, "session.created")[0]["ts"]
    request = of_type(log, "span.model_request_start")[0]["ts"]
    response = of_type(log, "model.response")[0]["data"]
    rows = [
        ("session", f"{session.name}  ({status.get('sessionID')})"),
        ("apply to model request", f"{request - created} ms (from session.created in the log)"),
        ("time to first token", f"{response.get('ttft_ms')} ms of the model's own"),
        ("model requests", str(len(of_type(log, "span.model_request_start")))),
        ("tool calls", str(len(of_type(log, "tool.started")))),
    ]
    for hand in of_type(log, "hand.provisioned"):
        data = hand["data"]
        ready = f"{data['sandbox']} ready after {data['waited_ms']} ms"
        rows.append(("sandbox pod", f"{ready}; the first token did not wait"))
    for condition in status.get("conditions", []):
        head = f"{condition['type']}={condition['status']} {condition['reason']}"
        rows.append(("condition", f"{head} {condition.get('message', '')}"[:110]))
    print()
    for name, value in rows:
        print(f"   {paint('1', name.ljust(24))}{value}", flush=True)


def configmap(rig: lab.Rig, variant: str, name: str) -> None:
    """The sample repository with one of its bugs, as a ConfigMap."""
    manifest = subprocess.run(
        [str(EXAMPLE / "configmap.sh"), variant],
        env={**rig.cluster.env(), "KUBECTL": rig.cluster.binary},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.replace("name: fix-the-tests-repo", f"name: {name}")
    apply(rig, "-", stdin=manifest)


def apply(rig: lab.Rig, file: str, stdin: str | None = None) -> None:
    options = ("--server-side", "--force-conflicts")
    rig.cluster.kubectl("-n", NAMESPACE, "apply", *options, "-f", file, stdin=stdin)


def start(rig: lab.Rig, name: str, repository: str, message: str | None = None) -> lab.Session:
    """examples/fix-the-tests/session.yaml under a fresh name, so that each demo is a new run."""
    convert = ("create", "--dry-run=client", "--validate=false", "-o", "json", "-f")
    manifest = json.loads(rig.cluster.kubectl(*convert, str(EXAMPLE / "session.yaml")))
    manifest["metadata"] = {"name": name, "namespace": NAMESPACE}
    for resource in manifest["spec"].get("resources", []):
        resource["configMap"]["name"] = repository
    if message is not None:
        manifest["spec"]["message"] = message
    apply(rig, "-", stdin=json.dumps(manifest))
    session = lab.Session(rig, NAMESPACE, name)
    assert session.id
    return session


COUNT = (
    "First append one line with the text `step` to /workspace/progress with bash and show how many lines the file has; "
    "then, in another call, run `sleep 6`; then answer with the number of lines. [[script:slow-steps]]"
)


def fix_the_tests(rig: lab.Rig, stamp: str) -> None:
    variant = random.choice(sorted(path.stem for path in (EXAMPLE / "variants").glob("*.py")))
    name = f"fix-the-tests-{stamp}"
    title(f"1. A session that fixes failing tests (bug drawn at random: {variant})")
    configmap(rig, variant, f"fix-the-tests-repo-{stamp}")
    for file in ("agent.yaml", "environment.yaml"):
        apply(rig, str(EXAMPLE / file))
    note(f"kubectl apply -f examples/fix-the-tests/   (AgentSession {name})")
    session = start(rig, name, f"fix-the-tests-repo-{stamp}")
    note(f"cowhand events -f {name}\n")
    watch(rig, session)
    until = ("--for=condition=TurnComplete", f"agentsession/{name}", "--timeout=120s")
    rig.cluster.kubectl("-n", NAMESPACE, "wait", *until)
    log = session.log()
    summary(session, log)
    results = of_type(log, "tool.result")
    if not results or results[-1]["data"]["is_error"]:
        sys.exit("error: the last test run in the sandbox failed; see the events above")


def kills(rig: lab.Rig, stamp: str) -> None:
    title("2. The point of it all: the harness is killed in mid-turn, and then the sandbox")
    session = start(rig, f"unkillable-{stamp}", f"fix-the-tests-repo-{stamp}", COUNT)
    watcher = cowhand(rig, "events", "-f", session.name)

    def until(what: str, kind: str, count: int) -> None:
        lab.eventually(what, lambda: len(of_type(session.log(), kind)) >= count, patience=PATIENCE)

    def kill(what: str, pod: lab.Json) -> None:
        line = f"\n   ✗ SIGKILL {what} {pod['metadata']['name']}\n"
        print(paint("1;31", line), flush=True)
        rig.cluster.kill_pod(pod)

    try:
        until("the second tool call", "tool.started", 2)
        kill("harness pod, while the tool runs,", session.holder())
        until("the end of the first turn", "session.status_idle", 1)
        session.send("The same again, please.")
        until("a call of the second turn", "tool.started", 4)
        kill("sandbox pod", session.sandbox_pod())
        until("the end of the second turn", "session.status_idle", 2)
        time.sleep(1)  # the watcher shows the last lines
    finally:
        watcher.terminate()
        watcher.wait()
    story(session.log())


def story(log: list[lab.Json]) -> None:
    """How the log shows it."""
    workers: list[tuple[int, str]] = []
    for event in of_type(log, "session.wake"):
        worker = event["lease"].split(":")[1]
        if not workers or workers[-1][1] != worker:
            workers.append((event["seq"], worker))
    uses = [
        block["id"]
        for event in of_type(log, "model.response")
        for block in event["data"]["message"]["content"]
        if block["type"] == "tool_use"
    ]
    results = [event["data"]["tool_use_id"] for event in of_type(log, "tool.result")]
    print(f"\n   {paint('1', 'what the log shows')}")
    print(f"   {len(log)} events, positions 1..{log[-1]['seq']} without a gap")
    for seq, worker in workers:
        print(f"   from {seq:>3} worker {worker}")
    for event in of_type(log, "hand.lost"):
        lost = event["data"]
        print(f"   at   {event['seq']:>3} sandbox {lost['sandbox']} lost: {lost['reason']}")
    print(
        f"   {len(uses)} tool calls asked for, {len(results)} results, each exactly once",
        flush=True,
    )
    if sorted(uses) != sorted(results) or [e["seq"] for e in log] != list(range(1, len(log) + 1)):
        sys.exit("error: the log is not what it should be")


def main() -> None:
    rig = lab.Rig()
    if os.environ.get("ANTHROPIC_API_KEY"):
        note("Claude answers: ANTHROPIC_API_KEY is set.")
    else:
        note(
            "No ANTHROPIC_API_KEY is set: a scripted model server in the cluster plays Claude's side."
        )
        note("The commands and their outputs are real; each scripted answer is computed from them.")
    stamp = time.strftime("%H%M%S")
    fix_the_tests(rig, stamp)
    kills(rig, stamp)
    title("Done. Look around:")
    note("export KUBECONFIG=$(make -s kubeconfig)")
    note("kubectl get agentsessions,sandboxes.cowhand.dev")
    note(f".venv/bin/cowhand events fix-the-tests-{stamp}")


if __name__ == "__main__":
    try:
        main()
    except AssertionError as failed:
        sys.exit(f"error: {failed}")
    except subprocess.CalledProcessError as failed:
        sys.exit(f"error: {' '.join(map(str, failed.cmd))}\n{failed.stdout}{failed.stderr}")
