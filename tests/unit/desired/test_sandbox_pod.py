"""The sandbox pod: who may what, in which order, and what is mounted where."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from cowhand.api.v1alpha1 import EnvironmentSpec, FileResource, Sandbox
from cowhand.desired import environment, names
from cowhand.desired.sandbox_pod import PodConfig, copy_script, sandbox_pod

CONFIG = PodConfig("cowhand:1", "Never", "https://broker:8443")
HOLDER = {"sessionID": "sesn_" + "0" * 32, "hand": "sandbox", "instance": 2}


def pod(env: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    sandbox = Sandbox.model_validate(
        {"metadata": {"name": "s", "namespace": "ns", "uid": "u"}, "spec": spec}
    )
    wanted = environment.resolve(
        EnvironmentSpec.model_validate(env or {}), EnvironmentSpec(), "sandbox:1"
    )
    return sandbox_pod(sandbox, wanted, CONFIG)


RESOURCES = [{"configMap": {"name": "code"}, "mountPath": "/workspace/src"}]


def containers(made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    both = [*made["spec"]["initContainers"], *made["spec"]["containers"]]
    return {container["name"]: container for container in both}


def test_order_of_the_containers() -> None:
    made = pod(resources=RESOURCES)["spec"]
    names_ = [container["name"] for container in made["initContainers"]]
    assert names_ == ["egress-rules", "proxy", "egress-verify", "resources"]
    assert [container["name"] for container in made["containers"]] == ["sandbox"]
    assert [c["name"] for c in pod()["spec"]["initContainers"]] == names_[:3]


def test_only_the_rules_container_has_a_right() -> None:
    for name, container in containers(pod(resources=RESOURCES)).items():
        context = container["securityContext"]
        assert context["capabilities"]["drop"] == ["ALL"]
        assert context.get("capabilities", {}).get("add", []) == (
            ["NET_ADMIN"] if name == "egress-rules" else []
        )
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "privileged" not in context
        user = {"egress-rules": 0, "proxy": 62017}.get(name, 1000)
        assert context["runAsUser"] == user
        assert context["runAsNonRoot"] is (user != 0)


def test_token_and_ca_are_in_the_proxy_alone() -> None:
    made = pod(resources=RESOURCES)
    for name, container in containers(made).items():
        mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
        assert ({"broker-token", "ca", "proxy-run"} <= mounted) is (name == "proxy")
        if name != "proxy":
            assert not mounted & {"broker-token", "ca", "proxy-run"}
    token = next(v for v in made["spec"]["volumes"] if v["name"] == "broker-token")
    (source,) = token["projected"]["sources"]
    assert source["serviceAccountToken"]["audience"] == "cowhand-broker"
    assert source["serviceAccountToken"]["expirationSeconds"] == 600
    assert made["spec"]["automountServiceAccountToken"] is False
    assert made["spec"]["serviceAccountName"] == "cowhand-sandbox"


def test_no_secret_no_host_and_nothing_shared() -> None:
    spec = pod(resources=RESOURCES)["spec"]
    assert not any("secret" in volume or "hostPath" in volume for volume in spec["volumes"])
    for key in ("hostNetwork", "hostPID", "hostIPC", "hostUsers"):
        assert key not in spec
    assert spec["shareProcessNamespace"] is False
    assert spec["enableServiceLinks"] is False


def test_nothing_waits_for_readiness_before_sandboxd_starts() -> None:
    proxy = containers(pod())["proxy"]
    assert proxy["restartPolicy"] == "Always"
    assert "startupProbe" not in proxy
    assert proxy["readinessProbe"]["exec"]["command"] == ["test", "-f", "/run/cowhand/ready"]
    sandbox = containers(pod())["sandbox"]
    assert not {"readinessProbe", "livenessProbe", "startupProbe"} & set(sandbox)
    assert pod()["spec"]["restartPolicy"] == "Never"


def test_the_environment_shapes_the_sandbox() -> None:
    made = pod(
        {
            "image": "mine:2",
            "resources": {"cpu": "500m", "memory": "1Gi", "ephemeralStorage": "4Gi"},
            "env": [{"name": "HOME", "value": "/tmp"}, {"name": "A", "value": "b"}],
            "runtimeClassName": "gvisor",
            "nodeSelector": {"pool": "sandboxes"},
        }
    )
    sandbox = containers(made)["sandbox"]
    assert sandbox["image"] == "mine:2"
    assert "command" not in sandbox
    amounts = {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "4Gi"}
    assert sandbox["resources"] == {"requests": {**amounts, "cpu": "50m"}, "limits": amounts}
    env = [(var["name"], var["value"]) for var in sandbox["env"]]
    assert ("HOME", "/tmp") in env
    assert len(env) == len({name for name, _ in env})
    assert made["spec"]["runtimeClassName"] == "gvisor"
    assert made["spec"]["nodeSelector"] == {"pool": "sandboxes"}
    workspace = next(v for v in made["spec"]["volumes"] if v["name"] == "workspace")
    assert workspace == {"name": "workspace", "emptyDir": {"sizeLimit": "4Gi"}}


@pytest.mark.parametrize(
    ("limit", "request_"),
    [
        ("500m", "50m"),
        ("1", "100m"),
        ("1.5", "150m"),
        ("2", "200m"),
        ("101m", "11m"),
        ("50m", "10m"),
        ("0.05", "10m"),
        ("4m", "4m"),
        ("500u", "1m"),
        ("250000000n", "25m"),
        ("1k", "100000m"),
        ("1Ki", "102400m"),
        ("0", "0m"),
    ],
)
def test_a_tenth_of_the_cpu_is_reserved(limit: str, request_: str) -> None:
    sandbox = containers(pod({"resources": {"cpu": limit}}))["sandbox"]
    assert sandbox["resources"] == {"requests": {"cpu": request_}, "limits": {"cpu": limit}}


def test_without_a_cpu_limit_nothing_is_reserved() -> None:
    sandbox = containers(pod({"resources": {"memory": "1Gi"}}))["sandbox"]
    assert sandbox["resources"] == {"requests": {"memory": "1Gi"}, "limits": {"memory": "1Gi"}}


def test_labels_and_owner() -> None:
    made = pod(holder=HOLDER)["metadata"]
    assert made["labels"]["cowhand.dev/session-id"] == HOLDER["sessionID"]
    assert made["labels"]["cowhand.dev/hand"] == "sandbox"
    assert made["labels"]["cowhand.dev/instance"] == "2"
    assert made["labels"]["cowhand.dev/sandbox"] == "s"
    (owner,) = made["ownerReferences"]
    assert (owner["uid"], owner["controller"]) == ("u", True)
    assert "cowhand.dev/session-id" not in pod()["metadata"]["labels"]


def test_files_are_copied_as_a_config_map_volume_shows_them(tmp_path: Path) -> None:
    """Runs the script on a folder that is laid out as kubelet does: links into `..data`."""
    source, workspace = tmp_path / "0", tmp_path / "workspace"
    data = source / "..2026_11_21"
    (data / "pkg").mkdir(parents=True)
    for name in ("a.py", ".hidden", "pkg/b.py"):
        (data / name).write_text(name)
        (data / name).chmod(0o444)
    (source / "..data").symlink_to("..2026_11_21")
    for name in ("a.py", ".hidden", "pkg"):
        (source / name).symlink_to(f"..data/{name}")
    resource = FileResource.model_validate(
        {"configMap": {"name": "c"}, "mountPath": "/workspace/src"}
    )
    script = copy_script([resource])
    script = script.replace("/mnt/resources/0", str(source)).replace("/workspace", str(workspace))
    subprocess.run(["sh", "-c", script], check=True)
    files = {str(p.relative_to(workspace)) for p in workspace.rglob("*") if p.is_file()}
    assert files == {"src/a.py", "src/.hidden", "src/pkg/b.py"}
    assert not any(path.is_symlink() for path in workspace.rglob("*"))
    assert (workspace / "src/a.py").stat().st_mode & 0o200


def test_items_choose_keys_and_paths() -> None:
    chosen = {"configMap": {"name": "c", "items": [{"key": "k", "path": "p/q"}]}}
    made = pod(resources=[{**chosen, "mountPath": "/workspace"}])
    volume = next(v for v in made["spec"]["volumes"] if v["name"] == "resource-0")
    assert volume["configMap"] == {"name": "c", "items": [{"key": "k", "path": "p/q"}]}


@pytest.mark.parametrize("name", ["a", "a" * 63, "a" * 64, "b" * 52 + "." + "c" * 200])
def test_any_name_becomes_a_label(name: str) -> None:
    value = names.label_value(name)
    assert len(value) <= 63
    assert value[-1].isalnum()


def test_names_of_a_session() -> None:
    sid = names.session_id("0d2f1c9a-4b7e-4a53-9d9e-0123456789ab")
    assert sid == "sesn_0d2f1c9a4b7e4a539d9e0123456789ab"
    assert names.sandbox_name(sid, "sandbox", 3) == "0d2f1c9a4b7e-sandbox-3"
