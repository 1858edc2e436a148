"""The metrics port: open to the release's namespace and to whom the values name, to nobody else."""

from __future__ import annotations

import pytest

from chart.conftest import Refused, Render, containers, pick, pods

PROCESSES = ("operator", "broker", "gateway", "harness", "archive")


def test_each_process_has_the_port_and_no_proxy_has(render: Render) -> None:
    found = {}
    for name, _, spec in pods(render({"metrics": {"port": 9191}})):
        for container in containers(spec):
            env = {item["name"]: item.get("value") for item in container.get("env", ())}
            ports = [port for port in container.get("ports", ()) if port["name"] == "metrics"]
            if ports:
                found[container["name"]] = (env["COWHAND_METRICS_PORT"], ports[0]["containerPort"])
            else:
                assert "COWHAND_METRICS_PORT" not in env, name
    assert found == dict.fromkeys(PROCESSES, ("9191", 9191))


def test_off_means_no_port_and_no_rule(render: Render) -> None:
    objects = render({"metrics": {"enabled": False}})
    for _, _, spec in pods(objects):
        for container in containers(spec):
            assert "metrics" not in [port["name"] for port in container.get("ports") or ()]
            env = {item["name"]: item.get("value") for item in container.get("env", ())}
            assert env.get("COWHAND_METRICS_PORT", "0") == "0"
    assert "ingress" not in pick(objects, "NetworkPolicy", "cowhand-operator")["spec"]
    assert "ingress" not in pick(objects, "NetworkPolicy", "cowhand-harness")["spec"]


@pytest.mark.parametrize("process", PROCESSES)
def test_who_may_read_them(render: Render, process: str) -> None:
    home = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "cowhand-system"}}}
    extra = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    for values, allowed in (({}, [home]), ({"metrics": {"from": [extra]}}, [home, extra])):
        policy = pick(render(values), "NetworkPolicy", f"cowhand-{process}")
        rules = [r for r in policy["spec"]["ingress"] if r["ports"][0]["port"] == 9090]
        assert [rule["from"] for rule in rules] == [allowed]


def test_a_pod_monitor_only_when_asked_for(render: Render) -> None:
    assert "PodMonitor" not in [item["kind"] for item in render()]
    values = {
        "tenants": ["team-b", "team-a"],
        "metrics": {"podMonitor": {"enabled": True, "labels": {"release": "prometheus"}}},
    }
    spec = pick(render(values), "PodMonitor", "cowhand")["spec"]
    assert spec["namespaceSelector"]["matchNames"] == ["cowhand-system", "team-a", "team-b"]
    assert spec["podMetricsEndpoints"][0]["port"] == "metrics"


@pytest.mark.parametrize("bad", [{"port": 80}, {"port": 8443}, {"from": [{}]}, {"form": []}])
def test_bad_values_are_refused(render: Render, bad: dict[str, object]) -> None:
    with pytest.raises(Refused):
        render({"metrics": bad})
