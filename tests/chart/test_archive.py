"""The archive in the chart: who may reach it and with what, its volume or bucket, and an install without one."""

from __future__ import annotations

import json

from chart.conftest import NS, Json, Render, containers, pick, pods

TWO = {"tenants": ["team-a", "team-b"]}
BUCKET = {
    "archive": {
        "url": "s3://bucket/prefix",
        "options": {"aws_region": "eu-central-1"},
        "credentialsSecret": "bucket-key",
    }
}
OFF = {"archive": {"enabled": False}}


def spec_of(objects: list[Json]) -> Json:
    found: Json = pick(objects, "StatefulSet", "cowhand-archive", NS)["spec"]
    return found


def env(container: Json) -> dict[str, str]:
    return {item["name"]: item.get("value", "") for item in container.get("env", ())}


def test_without_an_archive_nothing_of_it_is_left(render: Render) -> None:
    objects = render(OFF)
    assert not [i for i in objects if i["metadata"]["name"] == "cowhand-archive"]
    for name, _, spec in pods(objects):
        assert "cowhand-archive" not in json.dumps(spec.get("volumes", [])), name
        for container in containers(spec):
            found = env(container)
            assert "COWHAND_ARCHIVE_URL" not in found, name
            assert found.get("COWHAND_ARCHIVE", "false") == "false", name


def test_everybody_who_reads_or_writes_large_events_is_told_of_it(render: Render) -> None:
    objects = render(TWO)
    url = f"https://cowhand-archive.{NS}.svc:8443"
    told = {}
    for name, item, spec in pods(objects):
        tokens = {
            volume["name"]
            for volume in spec.get("volumes", ())
            for source in volume.get("projected", {}).get("sources", ())
            if source.get("serviceAccountToken", {}).get("audience") == "cowhand-archive"
        }
        for container in containers(spec):
            mounts = {m["name"]: m["mountPath"] for m in container.get("volumeMounts", ())}
            if "COWHAND_ARCHIVE_URL" in env(container):
                assert env(container)["COWHAND_ARCHIVE_URL"] == url
                (token,) = tokens & set(mounts)
                assert mounts[token] == "/var/run/secrets/cowhand-archive"
                assert mounts["ca"] == "/etc/cowhand/ca"
                told[container["name"], item["metadata"]["namespace"]] = env(container).get(
                    "COWHAND_NAMESPACE", ""
                )
            else:
                assert not tokens & set(mounts), (name, container["name"])
    assert told == {
        ("gateway", NS): "",
        ("operator", NS): NS,
        ("proxy", "team-a"): "team-a",
        ("proxy", "team-b"): "team-b",
    }
    for tenant in ("team-a", "team-b"):
        template = pick(objects, "Deployment", "cowhand-harness", tenant)["spec"]["template"]
        (harness,) = template["spec"]["containers"]
        assert env(harness)["COWHAND_ARCHIVE"] == "true"


def test_who_may_connect(render: Render) -> None:
    objects = render(TWO)
    (rule, metrics) = pick(objects, "NetworkPolicy", "cowhand-archive")["spec"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 8443}]
    own, tenants = rule["from"]
    assert own["podSelector"]["matchExpressions"][0]["values"] == ["gateway", "operator", "test"]
    assert "namespaceSelector" not in own
    assert tenants["namespaceSelector"]["matchExpressions"][0]["values"] == ["team-a", "team-b"]
    assert tenants["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "harness"
    assert metrics["ports"][0]["port"] == 9090
    store = pick(objects, "NetworkPolicy", "cowhand-store")["spec"]["ingress"][0]["from"]
    assert "archive" in store[0]["podSelector"]["matchExpressions"][0]["values"]
    harness = pick(objects, "NetworkPolicy", "cowhand-harness", "team-a")["spec"]["egress"]
    assert "'archive'" in str(harness)
    sandbox = pick(objects, "NetworkPolicy", "cowhand-sandbox", "team-a")["spec"]
    assert "archive" not in str(sandbox)


def test_a_folder_is_a_volume_of_its_own(render: Render) -> None:
    spec = spec_of(render({"archive": {"persistence": {"size": "1Gi", "storageClassName": "x"}}}))
    assert spec["replicas"] == 1
    (claim,) = spec["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "1Gi"
    assert claim["spec"]["storageClassName"] == "x"
    (container,) = spec["template"]["spec"]["containers"]
    assert env(container)["COWHAND_OBJECTS_URL"] == "file:///data"
    assert {"name": "data", "mountPath": "/data"} in container["volumeMounts"]


def test_a_bucket_needs_no_volume_and_its_key_is_a_file(render: Render) -> None:
    spec = spec_of(render(BUCKET))
    assert "volumeClaimTemplates" not in spec
    (container,) = spec["template"]["spec"]["containers"]
    found = env(container)
    assert found["COWHAND_OBJECTS_URL"] == "s3://bucket/prefix"
    assert json.loads(found["COWHAND_OBJECTS_OPTIONS"]) == {"aws_region": "eu-central-1"}
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert mounts["objects"] == found["COWHAND_OBJECTS_CONFIG_DIR"]
    assert "data" not in mounts
    (secret,) = [v["secret"] for v in spec["template"]["spec"]["volumes"] if v["name"] == "objects"]
    assert secret["secretName"] == "bucket-key"


def test_a_bucket_may_do_without_a_secret(render: Render) -> None:
    """Identity of the workload: the ServiceAccount is the credential."""
    spec = spec_of(render({"archive": {"url": "gs://bucket"}}))["template"]["spec"]
    assert "objects" not in [volume["name"] for volume in spec["volumes"]]
    assert "COWHAND_OBJECTS_CONFIG_DIR" not in env(spec["containers"][0])


def test_the_settings_are_those_that_the_processes_read(render: Render) -> None:
    from cowhand import settings

    objects = render({**TWO, **BUCKET})
    made: dict[str, Json] = {}
    for _, _, spec in pods(objects):
        for container in containers(spec):
            found = env(container)
            found.pop("COWHAND_STORE_PASSWORD_FILE", None)  # the file is in the pod alone
            made[container["name"]] = found
    fill = {"COWHAND_POD_NAME": "p", "COWHAND_POD_UID": "u"}
    archive = settings.archive({**made["archive"], **fill})
    assert archive.objects_options == {"aws_region": "eu-central-1"}
    assert archive.control_accounts == (
        f"system:serviceaccount:{NS}:cowhand-gateway",
        f"system:serviceaccount:{NS}:cowhand-operator",
    )
    assert settings.harness({**made["harness"], **fill}).archive is True
    for loaded in (
        settings.proxy(made["proxy"]),
        settings.gateway(made["gateway"]),
        settings.operator({**made["operator"], **fill}),
    ):
        assert loaded.archive.url.startswith("https://cowhand-archive.")
    assert settings.proxy(made["proxy"]).namespace == "team-b"
