"""The embedded store: its configuration, and the check that it never starts empty where it had data."""

from __future__ import annotations

import pathlib
import subprocess

import pytest

from chart.conftest import Json, Render, pick

MANIFEST = "appendonlydir/appendonly.aof.manifest"
MARKER = "cowhand-store-has-data"


def scripts(render: Render) -> Json:
    found: Json = pick(render(), "ConfigMap", "cowhand-store")["data"]
    return found


def run(script: str, data: pathlib.Path) -> subprocess.CompletedProcess[str]:
    assert "/data" in script
    local = script.replace("/data", str(data))
    return subprocess.run(
        ["sh", "-c", local], capture_output=True, text=True, check=False, timeout=20
    )


def volume(folder: pathlib.Path, *, data: bool, marker: bool) -> pathlib.Path:
    if data:
        (folder / MANIFEST).parent.mkdir()
        (folder / MANIFEST).write_text("file x\n")
    if marker:
        (folder / MARKER).touch()
    return folder


@pytest.mark.parametrize(
    ("data", "marker", "starts"),
    [
        (False, False, True),  # a new volume
        (True, False, True),  # killed before the marker was written
        (True, True, True),
        (False, True, False),  # emptied behind our back
    ],
)
def test_it_refuses_to_start_empty_where_it_had_data(
    render: Render, tmp_path: pathlib.Path, data: bool, marker: bool, starts: bool
) -> None:
    done = run(scripts(render)["check.sh"], volume(tmp_path, data=data, marker=marker))
    assert (done.returncode == 0) == starts
    if not starts:
        assert "refusing to start empty" in done.stderr
        assert f"delete {tmp_path}/{MARKER}" in done.stderr


def test_the_marker_is_written_once_there_is_data(render: Render, tmp_path: pathlib.Path) -> None:
    done = run(scripts(render)["mark.sh"], volume(tmp_path, data=True, marker=False))
    assert done.returncode == 0
    assert (tmp_path / MARKER).exists()


def test_settings_that_keep_the_log(render: Render) -> None:
    """Each of these, left out, loses acknowledged events or lets somebody in without TLS or password."""
    lines = {
        tuple(line.split(maxsplit=1))
        for line in scripts(render)["valkey.conf"].splitlines()
        if line and not line.startswith("#")
    }
    assert lines >= {
        ("appendonly", "yes"),
        ("appendfsync", "everysec"),
        ("save", '""'),
        ("maxmemory-policy", "noeviction"),
        ("maxmemory", "512mb"),
        ("port", "0"),
        ("tls-port", "6379"),
        ("aclfile", "/etc/cowhand/acl/users.acl"),
        ("lua-time-limit", "500"),
        ("stream-node-max-bytes", "4096"),
    }


def test_the_volume_outlives_the_release(render: Render) -> None:
    """A claim of a template belongs to the StatefulSet's pods, not to the release: Helm never deletes it."""
    store = pick(
        render({"store": {"persistence": {"storageClassName": "fast"}}}),
        "StatefulSet",
        "cowhand-store",
    )
    (claim,) = store["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "data"
    assert claim["spec"]["storageClassName"] == "fast"
    assert "persistentVolumeClaimRetentionPolicy" not in store["spec"]


@pytest.mark.parametrize(
    ("profile", "fsync", "replicas"), [("dev", "everysec", "1"), ("strict", "always", "0")]
)
def test_the_profile_decides_when_the_file_is_on_the_disk(
    render: Render, profile: str, fsync: str, replicas: str
) -> None:
    found = render({"store": {"profile": profile}})
    config = pick(found, "ConfigMap", "cowhand-store")["data"]["valkey.conf"]
    assert f"appendfsync {fsync}\n" in config
    for name in ("cowhand-operator", "cowhand-gateway", "cowhand-harness"):
        pod = pick(found, "Deployment", name)["spec"]["template"]["spec"]
        env = {item["name"]: item.get("value") for item in pod["containers"][0]["env"]}
        assert env["COWHAND_STORE_PROFILE"] == profile
        assert env["COWHAND_STORE_REPLICAS"] == replicas
        assert env["COWHAND_STORE_ALLOW_WEAKER"] == "false"


@pytest.mark.parametrize("scheme", ["rediss+sentinel", "rediss"])
def test_the_login_at_sentinels_comes_as_files(render: Render, scheme: str) -> None:
    wanted = scheme == "rediss+sentinel"
    external = {"url": f"{scheme}://a:26380{'/cowhand' if wanted else ''}"}
    found = render({"store": {"embedded": False, "external": external}})
    for name in ("cowhand-operator", "cowhand-broker", "cowhand-gateway", "cowhand-harness"):
        pod = pick(found, "Deployment", name)["spec"]["template"]["spec"]
        env = {item["name"]: item.get("value") for item in pod["containers"][0]["env"]}
        mounts = {item["name"]: item["mountPath"] for item in pod["containers"][0]["volumeMounts"]}
        volumes = {item["name"]: item for item in pod["volumes"]}
        file = env.get("COWHAND_STORE_SENTINEL_PASSWORD_FILE", "")
        assert file == (f"{mounts['store-sentinel']}/password" if wanted else "")
        assert ("store-sentinel" in volumes) is wanted
        if wanted:
            secret = volumes["store-sentinel"]["secret"]
            assert (secret["secretName"], secret["optional"]) == ("cowhand-store-sentinel", True)


@pytest.mark.parametrize(
    ("url", "ports"),
    [
        ("rediss://db.example:6380/0", [6380]),
        ("rediss://db.example/0", [6379]),
        ("redis+sentinel://a:26380,b/cowhand", [26380, 26379, 7000]),
        ("rediss+cluster://a:6380,b", [6380, 6379, 7000]),
    ],
)
def test_harness_pods_may_reach_an_external_store(
    render: Render, url: str, ports: list[int]
) -> None:
    external = {"url": url, "serverPort": 7000}
    found = pick(
        render({"store": {"embedded": False, "external": external}}),
        *("NetworkPolicy", "cowhand-harness"),
    )
    open_to_all = [rule["ports"] for rule in found["spec"]["egress"] if "to" not in rule]
    assert [{"protocol": "TCP", "port": port} for port in ports] in open_to_all
