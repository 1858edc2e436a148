"""The cluster under test, for the e2e tests, the benchmarks and the demo.

Everything goes the way a user goes (kubectl and the `cowhand` command), except for two things that no
user has: the control port of the scripted model server (gates hold a turn at a named place) and the
container runtime of the kind node (a real SIGKILL of a container's processes).
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import pathlib
import queue
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
SYSTEM = os.environ.get("COWHAND_SYSTEM_NAMESPACE", "cowhand-system")
PATIENCE = 180.0
"""Seconds after which a wait gives up; nothing asserts a time, this only bounds a failure."""

Json = dict[str, Any]


def _output(*command: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return done.stdout.strip()


def eventually(what: str, probe: Callable[[], Any], *, patience: float = PATIENCE) -> Any:
    """Call `probe` until it answers something true; fail with its last answer or error."""
    deadline = time.monotonic() + patience
    last: object = None
    while time.monotonic() < deadline:
        try:
            last = probe()
            if last:
                return last
        except (subprocess.CalledProcessError, urllib.error.URLError, OSError, KeyError) as err:
            last = getattr(err, "stderr", None) or err
        time.sleep(0.25)
    raise AssertionError(f"{what}: not within {patience:.0f} s; last seen: {last!r}")


class Cluster:
    """kubectl on the test cluster."""

    def __init__(self) -> None:
        self.kubeconfig = _output(str(ROOT / "hack/cluster.sh"), "kubeconfig")
        self.binary = _output(str(ROOT / "hack/tools.sh"), "path", "kubectl")

    def env(self) -> dict[str, str]:
        path = f"{pathlib.Path(self.binary).parent}:{os.environ['PATH']}"
        return {**os.environ, "KUBECONFIG": self.kubeconfig, "PATH": path}

    def kubectl(self, *args: str, stdin: str | None = None, check: bool = True) -> str:
        done = subprocess.run(
            [self.binary, *args],
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=self.env(),
            check=False,
        )
        if check and done.returncode:
            raise subprocess.CalledProcessError(
                done.returncode, ["kubectl", *args], done.stdout, done.stderr
            )
        return done.stdout if check else done.stdout + done.stderr

    def helm(self, *args: str) -> str:
        """Output of a helm command; raises CalledProcessError."""
        tool = _output(str(ROOT / "hack/tools.sh"), "path", "helm")
        return _output(tool, *args, env=self.env())

    def get(self, kind: str, name: str, namespace: str) -> Json | None:
        out = self.kubectl("-n", namespace, "get", kind, name, "-o", "json", "--ignore-not-found")
        return json.loads(out) if out.strip() else None

    def items(self, kind: str, namespace: str, selector: str = "") -> list[Json]:
        args = ["-n", namespace, "get", kind, "-o", "json"]
        found: list[Json] = json.loads(
            self.kubectl(*args, *(["-l", selector] if selector else []))
        )["items"]
        return found

    def apply(self, *manifests: Json) -> None:
        body = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)})
        self.kubectl("apply", "--server-side", "-f", "-", stdin=body)

    def signal(self, pod: Json, name: str) -> None:
        """Send a signal to the main process of each running container of a pod, on the node."""
        status = pod["status"]
        node = pod["spec"]["nodeName"]
        for entry in [
            *status.get("containerStatuses", []),
            *status.get("initContainerStatuses", []),
        ]:
            if "running" not in entry.get("state", {}):
                continue
            container = entry["containerID"].removeprefix("containerd://")
            command = ["ctr", "-n", "k8s.io", "tasks", "kill", "-s", name, container]
            subprocess.run(["docker", "exec", node, *command], check=False, capture_output=True)

    def kill_pod(self, pod: Json) -> None:
        """SIGKILL every process of a pod, remove the pod, and see to it that the kubelet starts none of it again."""
        self.signal(pod, "SIGKILL")
        meta = pod["metadata"]
        self.kubectl(
            "-n",
            meta["namespace"],
            "delete",
            "pod",
            meta["name"],
            "--grace-period=0",
            "--force",
            "--wait=false",
            "--ignore-not-found",
        )
        node, uid = pod["spec"]["nodeName"], meta["uid"]
        eventually(f"no process of pod {meta['name']}", lambda: not self._kill_tasks(node, uid))

    def _kill_tasks(self, node: str, uid: str) -> bool:
        """SIGKILL what runs of a pod, its sandbox too; whether there was something."""
        ctr = ["docker", "exec", node, "ctr", "-n", "k8s.io"]
        own = _output(*ctr, "containers", "ls", "-q", f'labels."io.kubernetes.pod.uid"=={uid}')
        rows = [line.split() for line in _output(*ctr, "tasks", "ls").splitlines()]
        running = {row[0] for row in rows if row[-1] == "RUNNING"} & set(own.split())
        for task in running:
            kill = [*ctr, "tasks", "kill", "-s", "SIGKILL", task]
            subprocess.run(kill, check=False, capture_output=True)
        return bool(running)


class Forward:
    """A `kubectl port-forward` to a Service, renewed when it breaks."""

    def __init__(self, cluster: Cluster, namespace: str, target: str, port: int) -> None:
        self._command = [
            cluster.binary,
            "-n",
            namespace,
            "port-forward",
            target,
            f":{port}",
        ]
        self._env = cluster.env()
        self._process: subprocess.Popen[str] | None = None
        self._port = 0

    def port(self) -> int:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                self._command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=self._env,
            )
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            match = re.search(r"127\.0\.0\.1:(\d+)", line)
            if match is None:
                self.close()
                raise OSError(f"port-forward: {line.strip()}")
            self._port = int(match.group(1))
            threading.Thread(target=self._process.stdout.read, daemon=True).start()
        return self._port

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class ModelServer:
    """The control port of the scripted model server."""

    def __init__(self, cluster: Cluster) -> None:
        self._forward = Forward(cluster, SYSTEM, "svc/cowhand-model-server", 8080)
        secret = cluster.get("secret", "cowhand-model-server", SYSTEM)
        assert secret is not None, "the scripted model server is not installed"
        self._key = base64.b64decode(secret["data"]["api-key"]).decode()

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        def once() -> Any:
            request = urllib.request.Request(
                f"http://127.0.0.1:{self._forward.port()}{path}",
                method=method,
                data=None if body is None else json.dumps(body).encode(),
                headers={"content-type": "application/json", "x-api-key": self._key},
            )
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    raw = answer.read()
            except urllib.error.HTTPError:
                raise
            except OSError:
                self._forward.close()
                raise
            return (json.loads(raw) if raw else None, True)

        return eventually(f"model server {method} {path}", once, patience=60)[0]

    def script(self, *turns: Json) -> str:
        """Register a script; answers the marker that a message must hold."""
        name = f"t{uuid.uuid4().hex[:10]}"
        self._call("PUT", f"/_control/scripts/{name}", {"turns": list(turns)})
        return f"[[script:{name}]]"

    def release(self, gate: str) -> None:
        self._call("POST", f"/_control/release/{gate}")

    def gates(self) -> Any:
        return self._call("GET", "/_control/gates")

    def wait_gate(self, gate: str) -> None:
        """Until a request waits at this gate."""
        eventually(f"a request at gate {gate}", lambda: gate in json.dumps(self.gates()))

    def requests(self, session_id: str) -> list[Json]:
        """Requests of a session as received, each with `body` (raw text) and `json`."""
        query = urllib.parse.urlencode({"session": session_id})
        found = self._call("GET", f"/_control/requests?{query}")
        rows = found["requests"] if isinstance(found, dict) else found
        return [{**row, "json": json.loads(row["body"])} for row in rows]

    def close(self) -> None:
        self._forward.close()


class Follower:
    """`cowhand events -f --raw`: the log of a session as it grows."""

    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cowhand", "-n", namespace, "events", "-f", "--raw", name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=cluster.env(),
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.seen: list[Json] = []

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def until(self, what: str, match: Callable[[Json], bool], patience: float = PATIENCE) -> Json:
        """The first event, from the last one looked at on, for which `match` holds."""
        deadline = time.monotonic() + patience
        while True:
            left = deadline - time.monotonic()
            try:
                line = self._lines.get(timeout=max(left, 0.01))
            except queue.Empty:
                tail = [event["type"] for event in self.seen[-12:]]
                raise AssertionError(f"{what}: not seen in the log; the last: {tail}") from None
            if line is None:
                assert self._process.stderr is not None
                raise AssertionError(f"{what}: events ended: {self._process.stderr.read()}")
            event = decode(line)
            self.seen.append(event)
            if match(event):
                return event

    def until_type(self, kind: str, patience: float = PATIENCE) -> Json:
        return self.until(kind, lambda event: event["type"] == kind, patience)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def decode(line: str) -> Json:
    """One NDJSON line of the raw log, with the payload's `d` as `data`."""
    event: Json = json.loads(line)
    event["data"] = (event["payload"] or {}).get("d", {})
    return event


class Session:
    """One AgentSession of a test."""

    def __init__(self, rig: Rig, namespace: str, name: str) -> None:
        self.rig, self.namespace, self.name = rig, namespace, name

    def resource(self) -> Json:
        found = self.rig.cluster.get("agentsession", self.name, self.namespace)
        assert found is not None, f"agentsession {self.name} is gone"
        return found

    @property
    def id(self) -> str:
        found = eventually(
            f"session id of {self.name}",
            lambda: self.resource().get("status", {}).get("sessionID"),
        )
        assert isinstance(found, str)
        return found

    @contextlib.contextmanager
    def follow(self) -> Iterator[Follower]:
        assert self.id
        follower = Follower(self.rig.cluster, self.namespace, self.name)
        try:
            yield follower
        finally:
            follower.close()

    def log(self) -> list[Json]:
        out = self.rig.cowhand("-n", self.namespace, "events", "--raw", self.name)
        return [decode(line) for line in out.splitlines()]

    def condition(self, kind: str) -> Json:
        conditions = self.resource().get("status", {}).get("conditions", [])
        return next((c for c in conditions if c["type"] == kind), {"status": "Missing"})

    def wait_turn(self, turns: int = 1) -> list[Json]:
        """Until the log has that many ends of a turn; answers the log."""

        def done() -> list[Json] | None:
            log = self.log()
            ends = [
                e
                for e in log
                if e["type"] == "session.status_idle"
                and e["data"]["stop_reason"]["type"] != "suspended"
            ]
            return log if len(ends) >= turns else None

        found = eventually(f"turn {turns} of {self.name}", done)
        assert isinstance(found, list)
        return found

    def send(self, text: str) -> None:
        self.rig.cowhand("-n", self.namespace, "send", self.name, text)

    def pods(self) -> list[Json]:
        return self.rig.cluster.items("pods", self.namespace, f"cowhand.dev/session-id={self.id}")

    def sandbox_pod(self) -> Json:
        """The running one; the kubelet may report that later than the sandbox answers."""

        def running() -> list[Json]:
            return [p for p in self.pods() if p["status"]["phase"] == "Running"]

        found = eventually("a running sandbox pod", running)
        pod: Json = found[-1]
        return pod

    def holder(self) -> Json:
        """The harness pod that holds the lease, by the last `session.wake` of the log.

        One that is gone already is no answer: then the session's next holder is waited for.
        """

        def known() -> Json | None:
            wake = [e for e in self.log() if e["type"] == "session.wake"][-1]
            uid = wake["lease"].split(":")[1].split(".")[0]
            pods = self.rig.cluster.items(
                "pods", self.namespace, "app.kubernetes.io/component=harness"
            )
            return next((pod for pod in pods if pod["metadata"]["uid"] == uid), None)

        found: Json = eventually("a harness pod that holds the session", known)
        return found


class Rig:
    """What a test gets."""

    def __init__(self) -> None:
        self.cluster = Cluster()

    @functools.cached_property
    def model(self) -> ModelServer:
        """Only where the scripted model server is installed."""
        return ModelServer(self.cluster)

    def cowhand(self, *args: str, check: bool = True) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "cowhand", *args],
            capture_output=True,
            text=True,
            env=self.cluster.env(),
            check=False,
        )
        if check and done.returncode:
            raise subprocess.CalledProcessError(
                done.returncode, ["cowhand", *args], done.stdout, done.stderr
            )
        return done.stdout if check else done.stdout + done.stderr

    def session(self, message: str, *, namespace: str = "default", **spec: Any) -> Session:
        """Apply an AgentSession with an inline agent."""
        session = Session(self, namespace, f"e2e-{uuid.uuid4().hex[:8]}")
        self.cluster.apply(manifest(session.name, namespace, message=message, **spec))
        return session

    def delete(self, session: Session) -> None:
        self.cluster.kubectl(
            "-n",
            session.namespace,
            "delete",
            "agentsession",
            session.name,
            "--ignore-not-found",
            "--wait=false",
        )

    def close(self) -> None:
        if "model" in self.__dict__:
            self.model.close()


def manifest(name: str, namespace: str, **spec: Any) -> Json:
    """An AgentSession with an inline agent."""
    if not {"agent", "agentRef"} & spec.keys():
        spec["agent"] = {"model": {"id": "claude-sonnet-5-5"}, "system": "You are a test."}
    return {
        "apiVersion": "cowhand.dev/v1alpha1",
        "kind": "AgentSession",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def tool(name: str, **tool_input: Any) -> Json:
    """A tool_use block of a script."""
    return {"type": "tool_use", "name": name, "input": tool_input}


def bash(command: str, **more: Any) -> Json:
    return tool("bash", command=command, **more)


def say(text: str) -> Json:
    return {"type": "text", "text": text}
