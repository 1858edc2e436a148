"""`make bench`: measures on the running cluster and without it, prints the table, merges it into bench/results.json.

Every figure says its workload and sample size beside it. Ratios come from one run, alternating the two
sides; absolute times on shared cores are noise and are compared with nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import pathlib
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "hack"), str(ROOT / "bench")]

import lab  # noqa: E402
from figures import Row, merge, percentile, print_table, row  # noqa: E402

MODEL_DELAY_MS = 300


class ApiServer:
    """The API server over one warm connection (`kubectl proxy`), as a controller or a GitOps tool has it."""

    def __init__(self, cluster: lab.Cluster) -> None:
        self._process = subprocess.Popen(
            [cluster.binary, "proxy", "--port=0"],
            stdout=subprocess.PIPE,
            text=True,
            env=cluster.env(),
        )
        assert self._process.stdout is not None
        port = int(self._process.stdout.readline().strip().rsplit(":", 1)[1])
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def post(self, path: str, body: Any) -> None:
        self._connection.request(
            "POST", path, json.dumps(body), {"content-type": "application/json"}
        )
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status >= 300:
            raise RuntimeError(text.decode())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Bench:
    def __init__(self) -> None:
        self.rig = lab.Rig()
        self.api = ApiServer(self.rig.cluster)
        self.rows: list[Row] = []

    def close(self) -> None:
        self.api.close()
        self.rig.close()

    @contextlib.contextmanager
    def session(self, message: str, **spec: Any) -> Iterator[tuple[lab.Session, float]]:
        """An AgentSession posted over the warm connection; yields it and the time just before."""
        name = f"bench-{uuid.uuid4().hex[:8]}"
        body = lab.manifest(name, "default", message=message, **spec)
        before = time.time() * 1000
        self.api.post("/apis/cowhand.dev/v1alpha1/namespaces/default/agentsessions", body)
        session = lab.Session(self.rig, "default", name)
        try:
            yield session, before
        finally:
            self.rig.delete(session)

    def first_arrival(self, session: lab.Session) -> float:
        """Time of arrival of the first model request, ms since the epoch (same machine, same clock)."""
        found = self.rig.model.requests(session.id)
        arrived: float = found[0]["received_at"] * 1000
        return arrived

    def apply_to_request(self, samples: int = 20) -> None:
        script = self.rig.model.script({"content": [lab.say("ok")]})
        took = []
        for _ in range(samples + 2):
            with self.session(script) as (session, before):
                session.wait_turn()
                took.append(self.first_arrival(session) - before)
        took = took[2:]
        where = "POST of an AgentSession over a warm connection -> first byte at the model server, idle cluster"
        self.rows.append(
            row("apply_to_request_ms_p50", statistics.median(took), "ms", 150, samples, where)
        )
        self.rows.append(
            row("apply_to_request_ms_p99", percentile(took, 0.99), "ms", None, samples, where)
        )

    def lazy_against_sandbox_first(self, samples: int = 12) -> None:
        """Time to first token and to first tool result, hands Lazy and Eager, alternating."""
        script = self.rig.model.script(
            {"content": [lab.say("Looking."), lab.bash("true")], "delay_ms": MODEL_DELAY_MS},
            {"content": [lab.say("ok")]},
        )
        first_token: dict[str, list[float]] = {"Lazy": [], "Eager": []}
        first_result: dict[str, list[float]] = {"Lazy": [], "Eager": []}
        for index in range(samples * 2):
            mode = ("Lazy", "Eager")[index % 2]
            agent = {
                "model": {"id": "claude-sonnet-5-5"},
                "hands": [{"name": "sandbox", "sandbox": {"provisioning": mode}}],
            }
            with self.session(script, agent=agent) as (session, before):
                log = session.wait_turn()
                start = next(e for e in log if e["type"] == "span.model_request_start")
                response = next(e for e in log if e["type"] == "model.response")
                result = next(e for e in log if e["type"] == "tool.result")
                first_token[mode].append(start["ts"] + response["data"]["ttft_ms"] - before)
                first_result[mode].append(result["ts"] - before)
        where = (
            f"POST of an AgentSession -> first token; model server waits {MODEL_DELAY_MS} ms before it; "
            "one bash call; cold sandboxes; Lazy and Eager alternating on the same code"
        )
        for share, name in ((0.5, "p50"), (0.95, "p95")):
            lazy, eager = (
                percentile(first_token["Lazy"], share),
                percentile(first_token["Eager"], share),
            )
            target = {"p50": 0.90, "p95": 0.97}[name]
            self.rows.append(
                row(f"ttft_cut_{name}", 1 - lazy / eager, "share", target, samples, where)
            )
            self.rows.append(row(f"ttft_lazy_ms_{name}", lazy, "ms", None, samples, where))
            self.rows.append(
                row(f"ttft_sandbox_first_ms_{name}", eager, "ms", None, samples, where)
            )
        for mode, name in (("Lazy", "lazy"), ("Eager", "sandbox_first")):
            self.rows.append(
                row(
                    f"first_tool_result_{name}_ms_p50",
                    percentile(first_result[mode], 0.5),
                    "ms",
                    None,
                    samples,
                    where.replace("first token", "first tool result", 1),
                )
            )

    def execute_true(self, calls: int = 100) -> None:
        turns = [{"content": [lab.bash("true")]} for _ in range(calls + 5)]
        script = self.rig.model.script(*turns, {"content": [lab.say("ok")]})
        with self.session(script) as (session, _):
            log = session.wait_turn()
        took = [
            float(e["data"]["duration_ms"])
            for e in log
            if e["type"] == "tool.result" and e["data"].get("duration_ms") is not None
        ][5:]
        where = "execute of `true` in a bound sandbox, harness to sandboxd and back, TLS pinned, one after another"
        self.rows.append(
            row("execute_true_ms_p50", percentile(took, 0.5), "ms", 5, len(took), where)
        )
        self.rows.append(
            row("execute_true_ms_p99", percentile(took, 0.99), "ms", 25, len(took), where)
        )

    def takeover(self, samples: int = 5) -> None:
        took = []
        for _ in range(samples):
            gate = f"bench-{uuid.uuid4().hex[:6]}"
            script = self.rig.model.script({"content": [lab.say("ok")], "gate": gate})
            with self.session(script) as (session, _):
                self.rig.model.wait_gate(gate)
                pod = session.holder()
                killed = time.time() * 1000
                self.rig.cluster.kill_pod(pod)

                def second(one: lab.Session = session) -> list[Row] | None:
                    found = self.rig.model.requests(one.id)
                    return found if len(found) > 1 else None

                requests = lab.eventually("the next model request", second)
                took.append(requests[1]["received_at"] * 1000 - killed)
                self.rig.model.release(gate)
                session.wait_turn()
            self.wait_harness()
        where = "SIGKILL of the harness pod that holds the lease, request in flight -> next request on the wire; the operator hints"
        self.rows.append(
            row("takeover_hint_ms_p50", percentile(took, 0.5), "ms", None, samples, where)
        )
        self.rows.append(
            row("takeover_hint_ms_p99", percentile(took, 0.99), "ms", 2500, samples, where)
        )

    def wait_harness(self) -> None:
        """Until the harness Deployment is whole again: each kill starts from the same place."""
        self.rig.cluster.kubectl(
            "-n", "default", "rollout", "status", "deployment/cowhand-harness", "--timeout=120s"
        )

    def cold_sandbox(self, samples: int = 6) -> None:
        """A Sandbox until Ready against a bare pod of the same containers, alternating."""
        kubectl = self.rig.cluster.kubectl
        took: dict[str, list[float]] = {"sandbox": [], "bare": []}
        template: Row | None = None
        for index in range(samples * 2):
            name = f"bench-{uuid.uuid4().hex[:8]}"
            kind = ("sandbox", "bare")[index % 2]
            before = time.time()
            if kind == "sandbox":
                body = {
                    "apiVersion": "cowhand.dev/v1alpha1",
                    "kind": "Sandbox",
                    "metadata": {"name": name, "namespace": "default"},
                    "spec": {},
                }
                self.api.post("/apis/cowhand.dev/v1alpha1/namespaces/default/sandboxes", body)
                kubectl("-n", "default", "wait", "--for=create", f"pod/{name}", "--timeout=60s")
            else:
                assert template is not None
                self.api.post("/api/v1/namespaces/default/pods", bare_pod(template, name))
            kubectl(
                "-n", "default", "wait", "--for=condition=Ready", f"pod/{name}", "--timeout=120s"
            )
            took[kind].append(time.time() - before)
            if kind == "sandbox":
                template = self.rig.cluster.get("pod", name, "default")
                kubectl("-n", "default", "delete", "sandboxes.cowhand.dev", name, "--wait=true")
            else:
                kubectl("-n", "default", "delete", "pod", name, "--grace-period=0", "--force")
        cold, bare = statistics.median(took["sandbox"]), statistics.median(took["bare"])
        where = (
            f"Sandbox applied -> pod Ready (rules, egress check, registration) {cold * 1000:.0f} ms against a bare pod of the "
            f"same containers Ready {bare * 1000:.0f} ms; kubectl wait on both sides; alternating"
        )
        self.rows.append(row("cold_over_bare_pod", cold / bare, "ratio", 1.1, samples, where))

    def memory(self) -> None:
        for component, container, namespace, identity, target in (
            ("operator", "operator", lab.SYSTEM, "operator_rss_mb", 80),
            ("broker", "broker", lab.SYSTEM, "broker_rss_mb", None),
            ("gateway", "gateway", lab.SYSTEM, "gateway_rss_mb", None),
            ("harness", "harness", "default", "harness_rss_mb", None),
            ("harness", "proxy", "default", "proxy_rss_mb", 30),
        ):
            found = []
            for pod in self.rig.cluster.items(
                "pods", namespace, f"app.kubernetes.io/component={component}"
            ):
                status = self.rig.cluster.kubectl(
                    *("-n", namespace, "exec", pod["metadata"]["name"], "-c", container, "--"),
                    *("cat", "/proc/1/status"),
                )
                line = next(text for text in status.splitlines() if text.startswith("VmRSS"))
                found.append(int(line.split()[1]) / 1024)
            where = f"VmRSS of container {container}, the largest of {len(found)} pods, after the runs above"
            self.rows.append(row(identity, max(found), "MiB", target, len(found), where))


def bare_pod(template: Row, name: str) -> Row:
    """The pod of a Sandbox, alone: no owner, no readiness that waits for the broker."""
    spec = json.loads(json.dumps(template["spec"]))
    for field in ("nodeName", "priority", "preemptionPolicy", "tolerations"):
        spec.pop(field, None)
    # Only the operator may run a pod as cowhand-sandbox: the bare pod runs as an account with as few rights.
    spec["serviceAccountName"] = "default"
    spec.pop("serviceAccount", None)
    for container in spec["initContainers"] + spec["containers"]:
        container.pop("readinessProbe", None)
        container.pop("startupProbe", None)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": spec,
    }


def main() -> int:
    bench = Bench()
    parts: dict[str, Callable[[], None]] = {
        "apply": bench.apply_to_request,
        "ttft": bench.lazy_against_sandbox_first,
        "execute": bench.execute_true,
        "takeover": bench.takeover,
        "cold": bench.cold_sandbox,
        "memory": bench.memory,
    }
    wanted = sys.argv[1:] or list(parts)
    try:
        for name in wanted:
            print(f"measuring {name} ...", file=sys.stderr)
            parts[name]()
    finally:
        bench.close()
    rows = bench.rows
    if not sys.argv[1:]:
        rows += importlib.import_module("local").measure()[0]
    print_table(rows)
    merge(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
