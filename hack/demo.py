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
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "fix-the-tests"
NAMESPACE = os.environ.get("COWHAND_DEMO_NAMESPACE", "default")
TTY = sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))
PATIENCE = 300

Json = dict[str, Any]


def paint(code: str, text: str) -> str:
    return f"\033[{code}m{text}\033[0m" if TTY else text


def title(text: str) -> None:
    print(f"\n{paint('1;36', '━━ ' + text)}\n", flush=True)


def note(text: str) -> None:
    print(paint("2", f"   {text}"), flush=True)


def output(*command: str, env: dict[str, str] | None = None, stdin: str | None = None) -> str:
    done = subprocess.run(
        command, env=env, input=stdin, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


class Demo:
    """The cluster, kubectl and the `cowhand` command."""

    def __init__(self) -> None:
        self.kubectl_path = output(str(ROOT / "hack/tools.sh"), "path", "kubectl").strip()
        kubeconfig = output(str(ROOT / "hack/cluster.sh"), "kubeconfig").strip()
        path = f"{pathlib.Path(self.kubectl_path).parent}:{os.environ['PATH']}"
        self.env = {**os.environ, "KUBECONFIG": kubeconfig, "PATH": path}

    def kubectl(self, *args: str, stdin: str | None = None) -> str:
        return output(self.kubectl_path, "-n", NAMESPACE, *args, env=self.env, stdin=stdin)

    def cowhand(self, *args: str, **kwargs: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cowhand", "-n", NAMESPACE, *args]
        return subprocess.Popen(command, env=self.env, text=True, **kwargs)

    def get(self, kind: str, name: str) -> Json:
        found: Json = json.loads(self.kubectl("get", kind, name, "-o", "json"))
        return found

    def items(self, kind: str, selector: str) -> list[Json]:
        found: list[Json] = json.loads(self.kubectl("get", kind, "-l", selector, "-o", "json"))[
            "items"
        ]
        return found

    def log(self, session: str) -> list[Json]:
        """The raw log of a session so far, payloads decoded into `data`."""
        process = self.cowhand("events", "--raw", session, stdout=subprocess.PIPE)
        lines = process.communicate(timeout=60)[0].splitlines()
        return [decode(line) for line in lines]

    def watch(self, session: str) -> None:
        """Show the events live until the turn ends."""
        process = self.cowhand("events", "-f", "--until-idle", session)
        try:
            code = process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            sys.exit(f"error: session {session} did not finish within {PATIENCE} s")
        if code:
            sys.exit(f"error: `cowhand events` ended with {code}")

    def sigkill(self, pod: Json) -> None:
        """SIGKILL every process of a pod on the node, then remove the pod at once."""
        status = pod["status"]
        for entry in [
            *status.get("containerStatuses", []),
            *status.get("initContainerStatuses", []),
        ]:
            if "running" in entry.get("state", {}):
                container = entry["containerID"].removeprefix("containerd://")
                subprocess.run(
                    [
                        *("docker", "exec", pod["spec"]["nodeName"], "ctr", "-n", "k8s.io"),
                        *("tasks", "kill", "-s", "SIGKILL", container),
                    ],
                    capture_output=True,
                    check=False,
                )
        self.kubectl(
            *("delete", "pod", pod["metadata"]["name"], "--grace-period=0", "--force"),
            *("--wait=false", "--ignore-not-found"),
        )


def decode(line: str) -> Json:
    event: Json = json.loads(line)
    payload = event.get("payload") or {}
    if isinstance(payload, str):
        payload = json.loads(payload) if payload else {}
    event["data"] = payload.get("d", {})
    return event


def wait_for(what: str, probe: Any) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := probe():
            return found
        time.sleep(0.2)
    sys.exit(f"error: {what}: not within {PATIENCE} s")


def summary(demo: Demo, session: str, log: list[Json]) -> None:
    """What happened, from the resource and the log."""
    resource = demo.get("agentsession", session)
    status = resource["status"]
    of_type = lambda kind: [event for event in log if event["type"] == kind]
    created = of_type("session.created")[0]["ts"]
    request = of_type("span.model_request_start")[0]["ts"]
    response = of_type("model.response")[0]
    rows = [
        ("session", f"{session}  ({status.get('sessionID')})"),
        ("apply to model request", f"{request - created} ms (from session.created in the log)"),
        ("time to first token", f"{response['data'].get('ttft_ms')} ms of the model's own"),
        ("model requests", str(len(of_type("span.model_request_start")))),
        ("tool calls", str(len(of_type("tool.started")))),
    ]
    for hand in of_type("hand.provisioned"):
        data = hand["data"]
        rows.append(
            (
                "sandbox pod",
                f"{data['sandbox']} ready after {data['waited_ms']} ms; the first token did not wait",
            )
        )
    for condition in status.get("conditions", []):
        message = condition.get("message", "")
        rows.append(
            (
                "condition",
                f"{condition['type']}={condition['status']} {condition['reason']} {message}"[:110],
            )
        )
    print()
    for name, value in rows:
        print(f"   {paint('1', name.ljust(24))}{value}", flush=True)


def configmap(demo: Demo, variant: str, name: str) -> None:
    """The sample repository with one of its bugs, as a ConfigMap."""
    env = {**demo.env, "KUBECTL": demo.kubectl_path}
    manifest = output(str(EXAMPLE / "configmap.sh"), variant, env=env)
    manifest = manifest.replace("name: fix-the-tests-repo", f"name: {name}")
    demo.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=manifest)


def apply_session(demo: Demo, session: str, repository: str, message: str | None = None) -> None:
    """examples/fix-the-tests/session.yaml under a fresh name, so that each demo is a new run."""
    raw = (EXAMPLE / "session.yaml").read_text()
    manifest = json.loads(
        output(demo.kubectl_path, "create", "--dry-run=client", "--validate=false", "-o", "json", "-f", "-",
               stdin=raw, env=demo.env)
    )  # fmt: skip
    manifest["metadata"] = {"name": session, "namespace": NAMESPACE}
    for resource in manifest["spec"].get("resources", []):
        resource["configMap"]["name"] = repository
    if message is not None:
        manifest["spec"]["message"] = message
    demo.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(manifest))


COUNT = (
    "First append one line with the text `step` to /workspace/progress with bash and show how many lines the file has; "
    "then, in another call, run `sleep 6`; then answer with the number of lines. [[script:slow-steps]]"
)


def fix_the_tests(demo: Demo, stamp: str) -> None:
    variant = random.choice(sorted(path.stem for path in (EXAMPLE / "variants").glob("*.py")))
    session = f"fix-the-tests-{stamp}"
    title(f"1. A session that fixes failing tests (bug drawn at random: {variant})")
    configmap(demo, variant, f"fix-the-tests-repo-{stamp}")
    for name in ("agent.yaml", "environment.yaml"):
        demo.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(EXAMPLE / name))
    note(f"kubectl apply -f examples/fix-the-tests/   (AgentSession {session})")
    apply_session(demo, session, f"fix-the-tests-repo-{stamp}")
    note(f"cowhand events -f {session}\n")
    wait_for(
        "the session's id",
        lambda: demo.get("agentsession", session).get("status", {}).get("sessionID"),
    )
    demo.watch(session)
    demo.kubectl(
        "wait", "--for=condition=TurnComplete", f"agentsession/{session}", "--timeout=120s"
    )
    log = demo.log(session)
    results = [event["data"] for event in log if event["type"] == "tool.result"]
    summary(demo, session, log)
    if not results or results[-1]["is_error"]:
        sys.exit("error: the last test run in the sandbox failed; see the events above")


def kills(demo: Demo, stamp: str) -> None:
    session = f"unkillable-{stamp}"
    title("2. The point of it all: the harness is killed in mid-turn, and then the sandbox")
    apply_session(demo, session, f"fix-the-tests-repo-{stamp}", COUNT)
    wait_for(
        "the session's id",
        lambda: demo.get("agentsession", session).get("status", {}).get("sessionID"),
    )
    watcher = demo.cowhand("events", "-f", session)
    try:
        started = lambda n: [e for e in demo.log(session) if e["type"] == "tool.started"][n - 1 : n]
        wait_for("the second tool call", lambda: started(2))
        wake = [e for e in demo.log(session) if e["type"] == "session.wake"][-1]
        uid = wake["lease"].split(":")[1].split(".")[0]
        pods = demo.items("pods", "app.kubernetes.io/component=harness")
        pod = next(p for p in pods if p["metadata"]["uid"] == uid)
        print(
            paint(
                "1;31",
                f"\n   ✗ SIGKILL harness pod {pod['metadata']['name']} while the tool runs\n",
            ),
            flush=True,
        )
        demo.sigkill(pod)
        idle = lambda n: [e for e in demo.log(session) if e["type"] == "session.status_idle"][
            n - 1 : n
        ]
        wait_for("the end of the first turn", lambda: idle(1))
        demo.cowhand("send", session, "The same again, please.", stdout=subprocess.DEVNULL).wait(
            timeout=60
        )
        wait_for("a call of the second turn", lambda: started(4))
        identity = demo.get("agentsession", session)["status"]["sessionID"]
        sandbox = demo.items("pods", f"cowhand.dev/session-id={identity}")[-1]
        print(
            paint("1;31", f"\n   ✗ SIGKILL sandbox pod {sandbox['metadata']['name']}\n"), flush=True
        )
        demo.sigkill(sandbox)
        wait_for("the end of the second turn", lambda: idle(2))
        time.sleep(1)
    finally:
        watcher.terminate()
        watcher.wait()
    story(demo.log(session))


def story(log: list[Json]) -> None:
    """How the log shows it."""
    workers = []
    for event in log:
        if event["type"] == "session.wake":
            worker = event["lease"].split(":")[1]
            if not workers or workers[-1][1] != worker:
                workers.append((event["seq"], worker))
    uses = [
        block["id"]
        for event in log
        if event["type"] == "model.response"
        for block in event["data"]["message"]["content"]
        if block["type"] == "tool_use"
    ]
    results = [event["data"]["tool_use_id"] for event in log if event["type"] == "tool.result"]
    lost = [event for event in log if event["type"] == "hand.lost"]
    print(f"\n   {paint('1', 'what the log shows')}")
    print(f"   {len(log)} events, positions 1..{log[-1]['seq']} without a gap")
    for seq, worker in workers:
        print(f"   from {seq:>3} worker {worker}")
    for event in lost:
        print(
            f"   at   {event['seq']:>3} sandbox {event['data']['sandbox']} lost: {event['data']['reason']}"
        )
    print(
        f"   {len(uses)} tool calls asked for, {len(results)} results, each exactly once",
        flush=True,
    )
    if sorted(uses) != sorted(results) or [e["seq"] for e in log] != list(range(1, len(log) + 1)):
        sys.exit("error: the log is not what it should be")


def main() -> None:
    demo = Demo()
    if os.environ.get("ANTHROPIC_API_KEY"):
        note("Claude answers: ANTHROPIC_API_KEY is set.")
    else:
        note(
            "No ANTHROPIC_API_KEY is set: a scripted model server in the cluster plays Claude's side."
        )
        note("The commands and their outputs are real; each scripted answer is computed from them.")
    stamp = time.strftime("%H%M%S")
    fix_the_tests(demo, stamp)
    kills(demo, stamp)
    title("Done. Look around:")
    note("export KUBECONFIG=$(make -s kubeconfig)")
    note("kubectl get agentsessions,sandboxes.cowhand.dev")
    note(f".venv/bin/cowhand events fix-the-tests-{stamp}")


if __name__ == "__main__":
    main()
