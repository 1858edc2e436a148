"""What the sandbox cannot reach, and where no credential can be found."""

from __future__ import annotations

import base64
import json

import pytest

from lab import SYSTEM, Rig, Session, bash, say

pytestmark = pytest.mark.e2e

PROBE = """
import json, socket, sys
found = {}
for name, family, host, port in json.loads(sys.argv[1]):
    kind = socket.SOCK_DGRAM if family == "udp" else socket.SOCK_STREAM
    s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
    s.settimeout(5)
    try:
        s.connect((host, port))
        if kind == socket.SOCK_DGRAM:
            s.send(b"\\0\\1\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\1a\\0\\0\\1\\0\\1")
            s.recv(512)
        found[name] = "reached"
    except OSError as err:
        found[name] = f"refused: {err}"
print(json.dumps(found))
"""


def targets(rig: Rig) -> list[list[object]]:
    """Name, protocol, address, port: only addresses of this test cluster and reserved ones."""
    dns = rig.cluster.get("service", "kube-dns", "kube-system")
    api = rig.cluster.get("service", "kubernetes", "default")
    broker = rig.cluster.get("service", "cowhand-broker", SYSTEM)
    other = rig.cluster.items("pods", SYSTEM, "app.kubernetes.io/name=cowhand-model-server")[0]
    node = rig.cluster.items("nodes", "default")[0]
    assert dns
    assert api
    assert broker
    return [
        ["dns-udp", "udp", dns["spec"]["clusterIP"], 53],
        ["dns-tcp", "tcp", dns["spec"]["clusterIP"], 53],
        ["api-server", "tcp", api["spec"]["clusterIP"], 443],
        ["broker", "tcp", broker["spec"]["clusterIP"], 8443],
        ["another-pod", "tcp", other["status"]["podIP"], 8080],
        ["kubelet", "tcp", node["status"]["addresses"][0]["address"], 10250],
        ["metadata", "tcp", "169.254.169.254", 80],
        ["internet-v4", "tcp", "192.0.2.1", 443],
        ["internet-v6", "tcp", "2001:db8::1", 443],
    ]


REACHABLE_WITHOUT_RULES = {"dns-udp", "dns-tcp", "api-server", "another-pod", "kubelet"}
"""The broker is not among them: its NetworkPolicy keeps strangers out where policies are enforced."""


def _session_with_sandbox(rig: Rig) -> Session:
    marker = rig.model.script({"content": [bash("echo hi")]}, {"content": [say("ok")]})
    session = rig.session(f"{marker}")
    results = [e["data"] for e in session.wait_turn() if e["type"] == "tool.result"]
    assert [result["is_error"] for result in results] == [False], results
    return session


def test_no_egress_from_the_sandbox(rig: Rig) -> None:
    session = _session_with_sandbox(rig)
    pod = session.sandbox_pod()["metadata"]["name"]
    wanted = targets(rig)
    out = rig.cluster.kubectl(
        "-n",
        "default",
        "exec",
        pod,
        "-c",
        "sandbox",
        "--",
        "python3",
        "-c",
        PROBE,
        json.dumps(wanted),
    )
    found = json.loads(out)
    assert len(found) == len(wanted)
    assert {name for name, answer in found.items() if answer == "reached"} == set()


def test_the_same_probe_succeeds_from_a_pod_without_rules(rig: Rig) -> None:
    """The control: were the rules container removed, `test_no_egress_from_the_sandbox` would be red."""
    image = _session_with_sandbox(rig).sandbox_pod()
    container = next(c for c in image["spec"]["containers"] if c["name"] == "sandbox")
    name = "egress-control"
    rig.cluster.kubectl(
        "-n", "default", "delete", "pod", name, "--ignore-not-found", "--grace-period=0", "--force"
    )
    rig.cluster.kubectl(
        "-n", "default", "run", name, f"--image={container['image']}", "--restart=Never",
        "--image-pull-policy=IfNotPresent", "--command", "--", "sleep", "600",
    )  # fmt: skip
    try:
        rig.cluster.kubectl(
            "-n", "default", "wait", "--for=condition=Ready", f"pod/{name}", "--timeout=120s"
        )
        out = rig.cluster.kubectl(
            "-n", "default", "exec", name, "--", "python3", "-c", PROBE, json.dumps(targets(rig))
        )
        found = json.loads(out)
        reached = {key for key, answer in found.items() if answer == "reached"}
        assert reached >= REACHABLE_WITHOUT_RULES
    finally:
        rig.cluster.kubectl(
            "-n", "default", "delete", "pod", name, "--grace-period=0", "--force", "--wait=false"
        )


def _model_key(rig: Rig) -> str:
    secret = rig.cluster.get("secret", "cowhand-model", "default")
    assert secret is not None
    return base64.b64decode(secret["data"]["api-key"]).decode()


def _haystacks(rig: Rig, session: Session) -> dict[str, str]:
    """Every place where a credential could be found, as text."""
    sandbox = session.sandbox_pod()["metadata"]["name"]
    harness = session.holder()["metadata"]["name"]
    scan = (
        "env; cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'; "
        "find /workspace /tmp /home /run /var/run /var/lib /etc /mnt /opt /dev/shm -type f "
        "-size -200k 2>/dev/null | "
        "xargs -r -d '\\n' cat 2>/dev/null; "
        "cat /run/secrets/*/* /var/run/secrets/*/* /var/run/secrets/*/*/* 2>/dev/null; true"
    )
    kubectl = rig.cluster.kubectl
    places = {
        f"{pod}/{container}": kubectl(
            "-n", "default", "exec", pod, "-c", container, "--", "sh", "-c", scan
        )
        for pod, container in ((sandbox, "sandbox"), (harness, "harness"))
    }
    for pod, containers in ((sandbox, ("sandbox", "proxy")), (harness, ("harness", "proxy"))):
        for container in containers:
            places[f"logs {pod}/{container}"] = kubectl(
                "-n", "default", "logs", pod, "-c", container
            )
        places[f"describe {pod}"] = kubectl("-n", "default", "describe", "pod", pod)
        places[f"yaml {pod}"] = kubectl("-n", "default", "get", "pod", pod, "-o", "yaml")
    for component in ("operator", "broker", "gateway"):
        for one in rig.cluster.items("pods", SYSTEM, f"app.kubernetes.io/component={component}"):
            places[f"logs {component}"] = kubectl(
                "-n", SYSTEM, "logs", one["metadata"]["name"], "--all-containers"
            )
    places["log"] = rig.cowhand("-n", "default", "events", "--raw", session.name)
    places["session"] = kubectl("-n", "default", "get", "agentsession", session.name, "-o", "yaml")
    places["events"] = kubectl("-n", "default", "get", "events", "-o", "yaml")
    return places


def test_no_model_key_outside_the_proxy(rig: Rig) -> None:
    session = _session_with_sandbox(rig)
    key = _model_key(rig)
    forms = {key, base64.b64encode(key.encode()).decode().rstrip("=")}
    places = _haystacks(rig, session)
    assert all(len(text) > 0 for name, text in places.items() if not name.startswith("logs"))
    leaks = [name for name, text in places.items() if any(form in text for form in forms)]
    assert leaks == []


def test_the_scan_finds_a_key_that_is_mounted(rig: Rig) -> None:
    """The control: a key in a pod's environment is found by the same scan."""
    session = _session_with_sandbox(rig)
    key = _model_key(rig)
    pod = session.sandbox_pod()["metadata"]["name"]
    rig.cluster.kubectl(
        "-n",
        "default",
        "exec",
        pod,
        "-c",
        "sandbox",
        "--",
        "sh",
        "-c",
        f"echo {key} > /workspace/leak",
    )
    places = _haystacks(rig, session)
    assert any(key in text for text in places.values())


def test_sandbox_pods_have_no_token_and_no_rights(rig: Rig) -> None:
    session = _session_with_sandbox(rig)
    pod = session.sandbox_pod()
    name = pod["metadata"]["name"]
    found = rig.cluster.kubectl(
        "-n", "default", "exec", name, "-c", "sandbox", "--", "sh", "-c",
        "ls /var/run/secrets 2>&1; ls /run/secrets 2>&1; id; grep CapEff /proc/self/status; touch /x 2>&1; true",
    )  # fmt: skip
    assert "kubernetes.io" not in found
    assert "uid=1000" in found
    assert "CapEff:\t0000000000000000" in found
    assert "Read-only" in found
    assert pod["spec"]["automountServiceAccountToken"] is False


@pytest.mark.xdist_group("team-b")
def test_a_tenant_cannot_reach_another_tenants_keys(rig: Rig) -> None:
    """The harness's own store login of `default`, used from its own pod, reads nothing of `team-b`."""
    marker = rig.model.script({"content": [say("secret of b")]})
    other = rig.session(f"{marker}", namespace="team-b")
    other.wait_turn()
    harness = rig.cluster.items("pods", "default", "app.kubernetes.io/component=harness")[0]
    code = (
        "import asyncio, sys\n"
        "from cowhand import settings\n"
        "import redis.asyncio as redis\n"
        "async def main():\n"
        "    s = settings.harness().store\n"
        "    c = redis.Redis.from_url(s.url, username=s.username, password=s.password, ssl_ca_certs=s.ca_file)\n"
        "    own = await c.exists('cowhand:default:{p00}:rdy')\n"
        "    print('own', own in (0, 1))\n"
        "    for call in (c.xrange('cowhand:team-b:{p00}:rdy'), c.set('cowhand:team-b:x', '1'), c.keys('*'),"
        " c.config_get('*'), c.acl_list()):\n"
        "        try:\n"
        "            await call\n"
        "            print('ALLOWED')\n"
        "        except redis.ResponseError as err:\n"
        "            print('refused', type(err).__name__)\n"
        "asyncio.run(main())\n"
    )
    out = rig.cluster.kubectl(
        "-n",
        "default",
        "exec",
        harness["metadata"]["name"],
        "-c",
        "harness",
        "--",
        "python3",
        "-c",
        code,
    )
    assert out.splitlines() == ["own True", *["refused NoPermissionError"] * 5]
